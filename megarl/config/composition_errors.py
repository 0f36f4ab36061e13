"""What Hydra and the YAML reader raise over a user's files, told as one problem with its file and line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from megarl.config.picked_files import file_names
from megarl.config.provenance import (
    OWN_PACKAGE,
    Source,
    describe_origin,
    find_origins,
    is_config,
    read_config,
    shown_name,
    shown_path,
)
from megarl.errors import ConfigError, Problem, nearest

# ValueError, TypeError and AssertionError are of Hydra's own checks of a file's form.
_OTHERS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, AssertionError, OSError)
_PARENT = re.compile(r"In '([^']+)'")
_NOISE = ("full_key:", "object_type=", "reference_type=", "See https:", "Config search path", "provider=")


@contextmanager
def composition_errors(loader: ConfigLoaderImpl, config_name: str) -> Iterator[None]:
    """Turn an error of composition into a ConfigError that says which file is wrong, and where."""
    try:
        yield
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        raise ConfigError([_bad_yaml(error, config_name)]) from error
    except MissingConfigException as error:
        raise ConfigError([_bad_default(error, loader, config_name)]) from error
    except RecursionError as error:
        allowed = "has itself in its defaults, at once or by way of another file"
        raise ConfigError([Problem("--config-name", config_name, allowed, "rename your file")]) from error
    except _OTHERS as error:
        raise ConfigError([_other(error, loader, config_name)]) from error


def _bad_yaml(error: yaml.MarkedYAMLError, config_name: str) -> Problem:
    """Name the line that isn't YAML."""
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return Problem("--config-name", config_name, f"is not YAML: {error.problem}")
    path = Path(mark.name)
    place = f"{_known_name(path)}:{mark.line + 1}"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    text = lines[mark.line].strip() if mark.line < len(lines) else ""
    told = ", ".join(part for part in (error.context, error.problem) if part)
    return Problem(place, text, f"is not YAML: {told}", "correct this line or the one before")


def _known_name(path: Path) -> str:
    own = Path(str(files(OWN_PACKAGE))).resolve()
    resolved = path.resolve()
    return f"conf/{resolved.relative_to(own)}" if resolved.is_relative_to(own) else shown_path(path)


def _bad_default(error: MissingConfigException, loader: ConfigLoaderImpl, config_name: str) -> Problem:
    """Name the entry of a defaults list that leads to no file."""
    missing = error.missing_cfg_file or config_name
    group, _, name = missing.rpartition("/")
    options = file_names(loader, group)
    fix = nearest(name, options) or (f"one of {', '.join(options)}" if options else "")
    parent = _PARENT.match(str(error))
    # A file that overrides an entry isn't the parent that Hydra names.
    places = [_place_of_default(loader, path, name) for path in (config_name, *(parent.groups() if parent else ()))]
    origin = next((place for place in places if place), "")
    return Problem("defaults", missing, "no such file", fix, origin)


def _place_of_default(loader: ConfigLoaderImpl, config_path: str, name: str) -> str:
    """Return file:line of the entry of a file's defaults list that ends in ``name``, "" where there is none."""
    place = _place(loader, config_path)
    root = yaml.compose(read_config(place, config_path), Loader=yaml.SafeLoader) if place else None
    if not isinstance(root, yaml.MappingNode):
        return ""
    for key, entries in root.value:
        for entry in entries.value if key.value == "defaults" and isinstance(entries, yaml.SequenceNode) else []:
            scalars = [v for _, v in entry.value] if isinstance(entry, yaml.MappingNode) else [entry]
            if any(str(v.value).split("@")[0].rpartition("/")[2] == name for v in scalars):
                return f"{shown_name(place, config_path)}:{entry.start_mark.line + 1}"
    return ""


def _place(loader: ConfigLoaderImpl, config_path: str) -> str:
    """Return the entry of the search path that has a file, "" where none has."""
    return next((s.full_path() for s in loader.get_sources() if is_config(s.full_path(), config_path)), "")


def _other(error: Exception, loader: ConfigLoaderImpl, config_name: str) -> Problem:
    """Say in one line what is wrong, without advice on Hydra."""
    chain = [e for e in (error, error.__cause__ or error.__context__) if e is not None]
    told = [line.strip() for e in chain for line in str(e).splitlines()]
    found = _PARENT.search(told[0]) if told else None
    told = [t for t in dict.fromkeys(told) if t and not t.startswith(_NOISE) and "raised while composing" not in t]
    name = found[1] if found else config_name
    place = _place(loader, name)
    key = next((str(e.full_key) for e in chain if isinstance(e, OmegaConfBaseException) and e.full_key), "")
    if not key:
        text = "; ".join(told) or type(error).__name__
        origin = shown_name(place, name) if place else ""
        return Problem("--config-name", config_name, f"can't be composed: {text}", origin=origin)
    source = [Source("", shown_name(place, name), read_config(place, name))] if place else []
    origin = describe_origin(key, find_origins(source, []))
    return Problem(key, told[-1], "can't be read, or isn't of the kind that it is in the files before", origin=origin)
