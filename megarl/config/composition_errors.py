"""What Hydra and the YAML reader raise over a user's files and overrides, as a ConfigError that names the place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from megarl.config.command_line import CommandLine
from megarl.config.files import find_config, names_in, shown_path
from megarl.config.provenance import COMMAND_LINE, Source, describe_origin, find_origins
from megarl.errors import Absent, ConfigError, Problem, nearest

# Hydra and the YAML reader tell of a file's form and of an override's value by Python's own errors.
_RAISED_BY_HYDRA = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, OSError)
_MERGING = "Error merging override"
_PARENT = re.compile(r"In '([^']+)'")
_NOISE = ("full_key:", "object_type=", "reference_type=", "See https:", "Config search path", "provider=")


@contextmanager
def hydra_errors_named(line: CommandLine) -> Iterator[None]:
    """Raise ConfigError for what Hydra raises. For calls of Hydra alone: an error of megarl's would be hidden."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        raise ConfigError([_bad_yaml(error, line)]) from error
    except MissingConfigException as error:
        raise ConfigError([_missing_file(error, line)]) from error
    except RecursionError as error:
        allowed = "has itself in its defaults, at once or by way of another file"
        raise ConfigError([Problem("--config-name", line.config_name, allowed, "rename your file")]) from error
    except _RAISED_BY_HYDRA as error:
        raise ConfigError([_as_told(error, line)]) from error


def _bad_yaml(error: yaml.MarkedYAMLError, line: CommandLine) -> Problem:
    """Return the line that isn't YAML."""
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return Problem("--config-name", line.config_name, f"is not YAML: {error.problem}")
    path = Path(mark.name)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    text = lines[mark.line].strip() if mark.line < len(lines) else ""
    told = ", ".join(part for part in (error.context, error.problem) if part)
    place = f"{shown_path(path)}:{mark.line + 1}"
    return Problem(place, text, f"is not YAML: {told}", "correct this line or the one before")


def _missing_file(error: MissingConfigException, line: CommandLine) -> Problem:
    """Return the main config, the override or the entry of a defaults list that names no file."""
    missing = error.missing_cfg_file or line.config_name
    group, _, name = missing.rpartition("/")
    options = names_in(line.config_dir, group)
    fix = nearest(name, options) or f"one of {', '.join(options)}"
    if missing == line.config_name:
        fix = f"{fix}; a file of your own: --config-dir=FOLDER --config-name=FILE"
        return Problem("--config-name", missing, "no such file", fix)
    if any(o.key_or_group == group and name in o.get_value_string() for o in line.overrides):
        return Problem(group, name, f"no such file in {group}/", fix, COMMAND_LINE)
    # A file that overrides an entry isn't the parent that Hydra names.
    parents = (line.config_name, *_PARENT.findall(str(error)))
    origin = next((place for parent in parents if (place := _line_naming(name, parent, line))), "")
    return Problem("defaults", missing, "no such file", fix, origin)


def _line_naming(name: str, config: str, line: CommandLine) -> str:
    """Return the file and line of a config that has ``name`` as a word, "" where none has."""
    path = find_config(line.config_dir, config)
    for i, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path else [], 1):
        if path and re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", text):
            return f"{shown_path(path)}:{i}"
    return ""


def _as_told(error: BaseException, line: CommandLine) -> Problem:
    """Return the Problem in Hydra's words, without its advice on Hydra: of the override, key or file they speak of."""
    while not str(error) and error.__cause__:
        error = error.__cause__
    # The message of a failed merge says nothing of why.
    texts = [str(error), str(error.__cause__)] if str(error).startswith(_MERGING) and error.__cause__ else [str(error)]
    told = "; ".join(t.strip() for text in texts for t in text.splitlines() if t and not t.strip().startswith(_NOISE))
    parent = _PARENT.search(told)
    typed = [o for o in line.overrides if re.search(rf"(?<![\w.]){re.escape(o.key_or_group)}(?![\w.])", told)]
    if typed and not parent:
        return Problem(str(typed[-1].input_line), Absent(), f"can't be composed: {told}", origin=COMMAND_LINE)
    path = find_config(line.config_dir, parent[1] if parent else line.config_name)
    place = shown_path(path) if path else ""
    if path and isinstance(error, OmegaConfBaseException) and error.full_key:
        origins = find_origins([Source("", place, path.read_text(encoding="utf-8"))], [])
        return Problem(error.full_key, Absent(), told, origin=describe_origin(error.full_key, origins) or place)
    return Problem("--config-name", line.config_name, f"can't be composed: {told}", origin=place)
