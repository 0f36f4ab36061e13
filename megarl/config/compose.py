"""From Hydra's composed config to plain values, and one way to report what is wrong with them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megarl.errors import ConfigError, DataError, MegarlError, ModelFolderError, Problem, RewardError

USER_ERROR, RUN_ERROR = 2, 1
_USER_ERRORS = (ConfigError, DataError, ModelFolderError, RewardError)

# Hydra composes, and leaves folders and logging alone.
_QUIET = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
_ADD = "++"
_OVERRIDE = re.compile(r"[^-=\s][^=\s]*=|~")
_VALUE = re.compile(r"(?!hydra\.)\w+(\.\w+)+=")  # not a group, which has no dot or an @


def run_hydra(config_name: str, task: Callable[[dict[str, Any], Sequence[str]], None]) -> None:
    """Compose ``config_name`` with the command line and give ``task`` the resolved values and the overrides.

    A MegarlError is printed without its traceback: its text is complete. Exit code 2 for a mistake in the
    configuration or its files, 1 for a run that failed.
    """

    @hydra.main(version_base="1.3", config_path="pkg://megarl.conf", config_name=config_name)
    def main(config: DictConfig) -> None:
        try:
            task(_resolved(config), [o.removeprefix(_ADD) for o in HydraConfig.get().overrides.task])
        except MegarlError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            sys.exit(USER_ERROR if isinstance(error, _USER_ERRORS) else RUN_ERROR)

    sys.argv[1:] = hydra_arguments(sys.argv[1:])
    main()


def hydra_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the command line as Hydra gets it.

    What Hydra shall leave alone is said beside the first override, since argparse wants overrides in one run. Values
    are set whether or not their key exists: an unknown key is then reported with the others and its nearest match.
    """
    overrides = [i for i, a in enumerate(arguments) if _OVERRIDE.match(a)]
    first = overrides[0] if overrides else len(arguments)
    added = [_ADD + a if _VALUE.match(a) else a for a in arguments]
    return [*added[:first], *_QUIET, *added[first:]]


def _resolved(config: DictConfig) -> dict[str, Any]:
    """Return plain values. Raises ConfigError for an interpolation that leads nowhere and a value left as ???."""
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        found, key = str(error).splitlines()[0], str(error.full_key)
        raise ConfigError([Problem(key, found, "must be a value, or the name of another key", f"set {key}")]) from error
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}
