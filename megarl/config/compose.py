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

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.utils import setup_globals
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from megarl.config.command_line import SEARCHPATH, CommandLine, key_of, parse_command_line
from megarl.config.composition_errors import composition_errors
from megarl.config.picked_files import (
    EXPERIMENT,
    OURS,
    check_config_name,
    check_values_stand_in_sections,
    file_names,
    overrides_of_files,
    picks_a_file,
)
from megarl.config.provenance import find_origins, read_sources, with_origins
from megarl.errors import Absent, ConfigError, DataError, MegarlError, ModelFolderError, Problem, RewardError, nearest

USER_ERROR, RUN_ERROR = 2, 1
_USER_ERRORS = (ConfigError, DataError, ModelFolderError, RewardError)
_NO_SECTION = re.compile(r"node `([\w.]+)` is not a container")
_INTERPOLATION = re.compile(r"\$\{([\w.]+)\}")

HELP = """\
usage: python -m megarl.{program} [--config-dir=FOLDER] [--config-name=FILE] [key=value ...]

  key=value            set a value, as in data.train_batch_size=256; docs/config.md lists every key
  experiment=NAME      start from a complete recipe: one of {experiments}
  --config-name=FILE   a main config of megarl's: {main}; default {default}
  --config-dir=FOLDER  where --config-name is a file of your own, which may start with `defaults: [{default}, _self_]`
  --cfg job            print the composed config without running it; with --resolve, interpolations as their values

docs/overview.md tells what a run does. A mistake in the config ends a run before it starts, with exit code 2."""


@dataclass(frozen=True)
class Composition:
    """A composed config, interpolations unresolved, and what it was composed of.

    typed: the overrides as typed; passed: as Hydra got them; search_path: where it looked for files, in order.
    """

    config: DictConfig
    typed: tuple[str, ...]
    loader: ConfigLoaderImpl
    config_name: str
    passed: tuple[str, ...]
    search_path: tuple[str, ...]
    value_overrides: tuple[Override, ...]

    def located(self, error: ConfigError) -> ConfigError:
        """Return ``error`` with the file and line, or the command line, that each value came from."""
        try:
            with _self_is_last():
                found = self.loader.compute_defaults_list(self.config_name, list(self.passed), RunMode.RUN)
            sources = read_sources(found.defaults, self.search_path)
        except OSError:  # a file went away since it was composed: the error counts, where it came from is extra
            return error
        overrides = [(o.key_or_group, None if o.is_delete() else o.value()) for o in self.value_overrides]
        return with_origins(error, find_origins(sources, overrides))

    def values(self) -> dict[str, Any]:
        """Return plain values. Raises ConfigError for an interpolation that leads nowhere and a value left as ???."""
        try:
            values = OmegaConf.to_container(self.config, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise ConfigError([self._unresolved(str(error.full_key), str(error).splitlines()[0])]) from error
        assert isinstance(values, dict)
        return {str(k): v for k, v in values.items()}

    def _unresolved(self, key: str, found: str) -> Problem:
        if value := _NO_SECTION.search(found):
            section = value[1]
            fix = f"set a key in it, as in {section}.{key.rpartition('.')[2]}=VALUE"
            return Problem(section, _raw_text(self.config, section), "must be a section with keys of its own", fix)
        deleted = [o.key_or_group for o in self.value_overrides if o.is_delete()]
        for target in _INTERPOLATION.findall(_raw_text(self.config, key)):
            gone = next((d for d in deleted if f"{target}.".startswith(f"{d}.")), None)
            if gone is not None:
                return Problem(gone, Absent(), f"is missing, and {key} is taken from it", f"leave ~{gone} out")
        return Problem(key, found, "must be a value, or the name of another key", f"set {key}")


def run_hydra(
    config_name: str,
    task: Callable[[dict[str, Any], Sequence[str]], None],
    arguments: Sequence[str] | None = None,
    help_text: str = HELP,
) -> None:
    """Compose ``config_name`` with the command line and give ``task`` the resolved values and the overrides as typed.

    arguments: the command line without flags of the caller's own (see command_line.take_flags); sys.argv unless given.
    help_text: what --help prints, with {program}, {experiments}, {main} and {default} filled in.

    A MegarlError is printed without its traceback: its text is complete. Exit code 2 for a mistake in the
    configuration or its files, 1 for a run that failed.
    """
    with errors_reported():
        line = parse_command_line(sys.argv[1:] if arguments is None else arguments, config_name)
        if line.wants_help:
            print(_help(help_text, config_name))
            return
        run = compose(line)
        try:
            if line.prints_config:
                print(as_yaml(run.values()) if line.resolves else OmegaConf.to_yaml(run.config), end="")
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
    """Compose what a command line names. Raises ConfigError for files, groups and overrides that can't be."""
    version.setbase("1.3")
    setup_globals()
    loader = _loader(line)
    name = line.config_name
    searched = [str(o.input_line) for o in line.overrides if o.key_or_group == SEARCHPATH]
    with composition_errors(loader, name), _self_is_last():
        check_config_name(loader, line, searched)
        picks = tuple(o for o in line.overrides if picks_a_file(loader, o))
        files = overrides_of_files(loader, name, picks, searched)
        values = tuple(o for o in line.overrides if o not in picks and o.key_or_group != SEARCHPATH)
        check_values_stand_in_sections(loader, values)
        # Set whether or not the key exists: an unknown one is then reported with the others and its nearest match.
        passed = [*searched, *files, *(f"++{key_of(o)}={o.get_value_string()}" for o in values if not o.is_delete())]
        config = loader.load_configuration(name, passed, RunMode.RUN)
    HydraConfig.instance().set_config(config)  # for ${hydra:...} in a value
    search_path = [f"{s.schema}://{s.path}" for s in config.hydra.runtime.config_sources]
    with open_dict(config):
        del config["hydra"]
    typed = tuple(str(o.input_line) for o in line.overrides)
    run = Composition(config, typed, loader, name, tuple(passed), tuple(search_path), values)
    _delete(run)
    return run


@contextmanager
def _self_is_last() -> Iterator[None]:
    """Keep Hydra from warning of a file without `_self_`: its own values come last, as a reader expects."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*_self_", category=UserWarning)
        yield


def as_yaml(values: Mapping[str, Any]) -> str:
    """Return resolved values as a config file that composes to exactly them, whatever their strings look like."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(dict(values))))


def _escaped(value: Any) -> Any:
    """Keep ``${`` in a string from being read as an interpolation."""
    if isinstance(value, Mapping):
        return {k: _escaped(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(v) for v in value]
    if isinstance(value, str) and "${" in value:
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    return value


def _loader(line: CommandLine) -> ConfigLoaderImpl:
    """Return Hydra's loader of megarl's configs and, after them, of the user's folder."""
    search_path = create_config_search_path(OURS)
    if line.config_dir is not None:
        if not line.config_dir.is_dir():
            raise ConfigError([Problem("--config-dir", str(line.config_dir), "is no folder", "correct the path")])
        last = SearchPathQuery(provider="schema")
        search_path.prepend(provider="command-line", path=f"file://{line.config_dir}", anchor=last)
    return ConfigLoaderImpl(search_path)


def _delete(run: Composition) -> None:
    """Take away what ``~key`` names. Raises ConfigError for keys that aren't there, or have another value."""
    problems = []
    for override in (o for o in run.value_overrides if o.is_delete()):
        above, _, name = override.key_or_group.rpartition(".")
        section = _select(run.config, above)
        if not isinstance(section, DictConfig) or name not in section:
            known = [str(k) for k in section] if isinstance(section, DictConfig) else []
            problems.append(Problem(override.key_or_group, Absent(), "no such key to take away", nearest(name, known)))
            continue
        value, asked = section._get_node(name), override.value()
        if asked is not None and OmegaConf.create({"v": value})["v"] != asked:
            problems.append(Problem(override.key_or_group, asked, "is not its value", f"~{override.key_or_group}"))
            continue
        with open_dict(section):
            section.pop(name)
    if problems:
        raise ConfigError(problems)


def _select(config: DictConfig, key: str) -> Any:
    """Return the node at ``key`` unresolved, None where there is none."""
    node: Any = config
    for part in filter(None, key.split(".")):
        node = node._get_node(part) if isinstance(node, DictConfig) and part in node else None
    return node


def _raw_text(config: DictConfig, key: str) -> str:
    """Return a value as it stands in its file, interpolations unresolved."""
    node = _select(config, key)
    return "" if node is None else str(node._value())


def _help(text: str, config_name: str) -> str:
    loader = ConfigLoaderImpl(create_config_search_path(OURS))
    experiments, main = (", ".join(file_names(loader, group)) for group in (EXPERIMENT, ""))
    program = Path(sys.argv[0]).stem
    return text.format(program=program, experiments=experiments, main=main, default=config_name)
