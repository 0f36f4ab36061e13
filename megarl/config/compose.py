"""From the command line to a run's plain values, and one way to report what is wrong with them."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from megarl.config.command_line import EXPERIMENT, CommandLine, end_quietly_with_the_reader, parse_command_line
from megarl.config.composition_errors import hydra_errors_named
from megarl.config.files import OURS, find_config, group_names, names_in
from megarl.config.programs import PROGRAMS, Program, for_recipe, recipes_of
from megarl.config.provenance import find_origins, read_sources, with_origins
from megarl.config.secrets import without_secrets
from megarl.errors import ConfigError, DataError, MegarlError, ModelFolderError, Problem, RewardError

USER_ERROR, RUN_ERROR = 2, 1
_ACTOR = "actor@actor_rollout_ref.actor"
_USER_ERRORS = (ConfigError, DataError, ModelFolderError, RewardError)
_NO_SECTION = re.compile(r"node `([\w.]+)` is not a container")

HELP = """\
usage: python -m megarl.{program} [--config-dir=FOLDER] [--config-name=FILE] [key=value ...]

  key=value            set a value, as in data.train_batch_size=256; docs/config.md lists every key
  experiment=NAME      start from a complete recipe of those below
  --config-name=FILE   a main config of megarl's: {main}; default {default}
  --config-dir=FOLDER  where --config-name is a file of your own, which may start with `defaults: [{default}, _self_]`
  --cfg job            print the composed config without running it; with --resolve, interpolations as their values

docs/overview.md tells what a run does. A mistake in the config ends a run before it starts, with exit code 2.

recipes:
{recipes}"""


class OwnConfigs(SearchPathPlugin):
    """Lets Hydra find megarl's own configs after those in the user's folder."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folder of megarl's configs."""
        search_path.append("megarl", f"file://{OURS}")


Plugins.instance().register(OwnConfigs)


@dataclass(frozen=True)
class Composition:
    """A composed config, interpolations unresolved, of a command line. passed: the overrides as Hydra got them."""

    config: DictConfig
    line: CommandLine
    passed: tuple[str, ...]

    @property
    def typed(self) -> tuple[str, ...]:
        """The overrides as typed."""
        return tuple(str(o.input_line) for o in self.line.overrides)

    def located(self, error: ConfigError) -> ConfigError:
        """Return ``error`` with the file and line, or the command line, that each value came from."""
        try:
            with _hydra(self.line) as loader, hydra_errors_named(self.line):
                found = loader.compute_defaults_list(self.line.config_name, list(self.passed), RunMode.RUN)
            sources = read_sources(found.defaults, self.line.config_dir)
        except (
            ConfigError,
            OSError,
        ):  # a file has changed since it was composed: ``error`` counts, its origin is extra
            return error
        overrides = [(o.key_or_group, None if o.is_delete() else o.value()) for o in self.line.overrides]
        return with_origins(error, find_origins(sources, overrides))

    def values(self) -> dict[str, Any]:
        """Return plain values. Raises ConfigError for an interpolation that leads nowhere and a value left as ???."""
        try:
            values = OmegaConf.to_container(self.config, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            found = str(error).splitlines()[0]
            if section := _NO_SECTION.search(found):
                value = OmegaConf.select(self.config, section[1])
                problem = Problem(section[1], value, "must be a section with keys of its own")
            else:
                key = str(error.full_key)
                problem = Problem(key, found, "must be a value, or the name of another key", f"set {key}")
            raise ConfigError([problem]) from error
        assert isinstance(values, dict)
        return {str(k): v for k, v in values.items()}


def run_hydra(
    config_name: str,
    task: Callable[[dict[str, Any], Sequence[str]], None],
    arguments: Sequence[str] | None = None,
    help_text: str = HELP,
    programs: Sequence[Program] = PROGRAMS,
) -> None:
    """Compose a main config with the command line and give ``task`` the resolved values and the overrides as typed.

    config_name: where neither --config-name nor the recipe says which. programs: whose recipes the task can do.
    arguments: the command line without flags of the caller's own (see command_line.take_flags); sys.argv unless given.
    help_text: what --help prints, with {program}, {recipes}, {main} and {default} filled in.

    A MegarlError is printed without its traceback: its text is complete. Exit code 2 for a mistake in the
    configuration or its files, 1 for a run that failed.
    """
    with errors_reported():
        line = for_recipe(parse_command_line(sys.argv[1:] if arguments is None else arguments, config_name), programs)
        if arguments is None and (line.wants_help or line.prints_config):
            end_quietly_with_the_reader()
        if line.wants_help:
            print(_help(help_text, config_name, programs, line.config_dir))
            return
        run = compose(line)
        try:
            if line.prints_config:
                print(as_yaml(run.values(), run.typed) if line.resolves else OmegaConf.to_yaml(run.config), end="")
            else:
                task(run.values(), run.typed)
        except ConfigError as error:
            raise run.located(error) from error


@contextmanager
def errors_reported() -> Iterator[None]:
    """Print a MegarlError without its traceback and exit with 2 for the user's mistakes, 1 for a run that failed."""
    try:
        yield
    except MegarlError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR if isinstance(error, _USER_ERRORS) else RUN_ERROR)


def compose(line: CommandLine) -> Composition:
    """Return the Composition of a command line. Raises ConfigError for files, groups and overrides that can't be."""
    with _hydra(line) as loader:
        passed = tuple(text for override in _once(line.overrides) for text in _for_hydra(override, line, loader))
        with hydra_errors_named(line):
            config = loader.load_configuration(line.config_name, list(passed), RunMode.RUN)
    HydraConfig.instance().set_config(config)  # for ${hydra:...} in a value
    with open_dict(config):
        del config["hydra"]
    return Composition(config, line, passed)


def _once(overrides: Sequence[Override]) -> Iterator[Override]:
    """Yield overrides, a recipe that is named twice once: by a script, and by whoever starts it."""
    named: set[str] = set()
    for override in overrides:
        if override.key_or_group == EXPERIMENT and not override.is_delete():
            recipe = override.get_value_string()
            if recipe in named:
                continue
            named.add(recipe)
        yield override


@contextmanager
def _hydra(line: CommandLine) -> Iterator[ConfigLoader]:
    """Yield Hydra's loader of the user's configs and megarl's.

    Its warning of a file without `_self_` is silenced: the file's own values come last, as a reader expects.
    """
    if line.config_dir is not None and not line.config_dir.is_dir():
        raise ConfigError([Problem("--config-dir", str(line.config_dir), "is no folder", "correct the path")])
    with initialize_config_dir(str(line.config_dir or OURS), version_base="1.3"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*_self_", category=UserWarning)
        yield GlobalHydra.instance().config_loader()


def _for_hydra(override: Override, line: CommandLine, loader: ConfigLoader) -> Iterator[str]:
    """Yield an override as Hydra takes it.

    A value is set whether or not its key exists: an unknown key is then reported with the others and its nearest
    match. A recipe comes after the user's own file, not in the slot before it, for the command line has the last word;
    what it says of the actor's backend alone, in a folder of the backend's name, comes after it.
    """
    key, value = override.key_or_group, override.value()
    if key == EXPERIMENT and override.package is None:
        with hydra_errors_named(line):
            choices = loader.compute_defaults_list(line.config_name, [], RunMode.RUN).overrides.known_choices
        if EXPERIMENT in choices:
            yield f"~{EXPERIMENT}"
        if value is not None:
            yield f"+{EXPERIMENT}@_global_={override.get_value_string()}"
            backend = choices.get(_ACTOR, "").removesuffix("_actor")
            group = f"{EXPERIMENT}/{backend}"
            if backend and find_config(line.config_dir, f"{group}/{value}"):
                yield f"+{group}@_global_={value}"
    elif override.is_delete() or "/" in key or override.package:
        yield str(override.input_line)
    elif key in group_names(line.config_dir) and not isinstance(value, dict):  # data={...} sets values
        if not isinstance(value, str | list):
            options = names_in(line.config_dir, key)
            raise ConfigError([Problem(key, value, "must be the name of a file", f"one of {', '.join(options)}")])
        yield str(override.input_line)
    else:
        yield f"++{key}={override.get_value_string()}"


def as_yaml(values: Mapping[str, Any], typed: Sequence[str] = ()) -> str:
    """Return resolved values as a config file that composes to exactly them, whatever their strings look like.

    It refers to secrets of the environment, and doesn't hold them. typed: the overrides.
    """
    return OmegaConf.to_yaml(OmegaConf.create(without_secrets(_escaped(dict(values)), typed)))


def _escaped(value: Any) -> Any:
    """Keep ``${`` in a string from being read as an interpolation."""
    if isinstance(value, Mapping):
        return {k: _escaped(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(v) for v in value]
    if isinstance(value, str) and "${" in value:
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    return value


def _help(text: str, config_name: str, programs: Sequence[Program], folder: Path | None) -> str:
    main, recipes = ", ".join(names_in(folder, "")), recipes_of(programs, folder)
    width = max(map(len, recipes), default=0)
    lines = "\n".join(f"  {name:<{width}}  {line}" for name, line in recipes.items())
    return text.format(program=Path(sys.argv[0]).stem, recipes=lines, main=main, default=config_name)
