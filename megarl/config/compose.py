"""From Hydra's composed config to plain values, and one way to report what is wrong with them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from megarl.errors import ConfigError, MegarlError

USER_ERROR, RUN_ERROR = 2, 1

# Hydra composes, and leaves folders and logging alone.
_QUIET = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")


def run_hydra(config_name: str, task: Callable[[dict[str, Any], Sequence[str]], None]) -> None:
    """Compose ``config_name`` with the command line and give ``task`` the resolved values and the overrides.

    A MegarlError is printed without its traceback: its text is complete. Exit code 2 for a mistake in the
    configuration or its files, 1 for a run that failed.
    """

    @hydra.main(version_base="1.3", config_path="pkg://megarl.conf", config_name=config_name)
    def main(config: DictConfig) -> None:
        try:
            values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
            assert isinstance(values, dict)
            task({str(k): v for k, v in values.items()}, list(HydraConfig.get().overrides.task))
        except MegarlError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            sys.exit(USER_ERROR if isinstance(error, ConfigError) else RUN_ERROR)

    sys.argv += _QUIET
    main()
