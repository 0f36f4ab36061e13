"""Which files a command line picks: the main config, and ``group=file`` for the groups of its defaults list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override
from hydra.types import RunMode

from megarl.config.command_line import SEARCHPATH, CommandLine, key_of
from megarl.config.provenance import OWN_PACKAGE, is_config, read_config, shown_name
from megarl.errors import Absent, ConfigError, Problem, nearest

OURS = f"pkg://{OWN_PACKAGE}"
EXPERIMENT = "experiment"


def check_config_name(loader: ConfigLoaderImpl, line: CommandLine, searched: Sequence[str]) -> None:
    """Raise ConfigError for a main config that doesn't exist, and one of the user's that one of ours would hide."""
    name = line.config_name
    if hidden := _hidden(loader, name):
        raise ConfigError([Problem("--config-name", name, hidden, "rename your file")])
    if not _exists(loader, name, searched):
        known = file_names(loader, "", searched)
        fix = nearest(name, known) or f"one of {', '.join(known)}"
        if is_config("file://.", name):
            folder, _, file = name.rpartition("/")
            fix = f"--config-dir={folder or '.'} --config-name={file}"
        raise ConfigError([Problem("--config-name", name, "no such file", fix)])


def picks_a_file(loader: ConfigLoaderImpl, override: Override) -> bool:
    """Whether an override picks a file and doesn't set a value; ``data={...}`` sets one."""
    if override.package is not None or "/" in override.key_or_group:
        return True
    if isinstance(override.value(), dict) or "." in override.key_or_group:
        return False
    return override.key_or_group != SEARCHPATH and bool(file_names(loader, override.key_or_group))


def check_values_stand_in_sections(loader: ConfigLoaderImpl, values: Sequence[Override]) -> None:
    """Raise ConfigError for ``name=value`` without a dot: no group of files has that name, and no value such a key."""
    groups = [str(group) for group in loader.list_groups("") if group != "hydra"]
    problems = [
        Problem(o.key_or_group, o.value(), "is neither a key in a section nor a group of files", fix)
        for o in values
        if "." not in o.key_or_group and not isinstance(o.value(), dict) and not o.is_delete()
        for fix in [nearest(o.key_or_group, groups) or "section.key=value"]
    ]
    if problems:
        raise ConfigError(problems)


def overrides_of_files(
    loader: ConfigLoaderImpl, config_name: str, picks: Sequence[Override], searched: Sequence[str]
) -> list[str]:
    """Return ``picks`` as Hydra wants them, prefixed by whether their group is in use.

    searched: overrides that say where to look. Raises ConfigError with all groups and options that don't exist.
    """
    if not picks:
        return []
    problems = [p for o in picks for p in _wrong_option(loader, o, searched)]
    if problems:
        raise ConfigError(problems)
    in_use = _choices(loader, config_name, searched)
    first = [o for o in picks if key_of(o) in in_use or key_of(o) == EXPERIMENT]
    texts = [text for o in first for text in _override_of_file(o, in_use)]
    later = [o for o in picks if o not in first]
    if later:  # a picked file may bring groups of its own
        in_use = _choices(loader, config_name, [*searched, *texts])
    return [*texts, *(text for o in later for text in _override_of_file(o, in_use))]


def _choices(loader: ConfigLoaderImpl, config_name: str, overrides: Sequence[str]) -> Mapping[str, Any]:
    """Return group -> file picked, or None, of the defaults list."""
    return loader.compute_defaults_list(config_name, list(overrides), RunMode.RUN).overrides.known_choices


def file_names(loader: ConfigLoaderImpl, group: str, searched: Sequence[str] = ()) -> list[str]:
    """Return the names of the files of a group, of main configs for ""."""
    names = [str(name) for name in loader.get_group_options(group, overrides=list(searched))]
    return [name for name in names if not name.startswith("_")]  # Hydra has one of its own at the root


def _exists(loader: ConfigLoaderImpl, config_path: str, searched: Sequence[str]) -> bool:
    group, _, name = config_path.rpartition("/")
    return name in file_names(loader, group, searched)


def _hidden(loader: ConfigLoaderImpl, config_path: str) -> str:
    """Return what is wrong where a file of the user's is hidden by one of the same name before it, "" if none is."""
    places = [s.full_path() for s in loader.get_sources() if is_config(s.full_path(), config_path)]
    taken, *others = [(shown_name(p, config_path), read_config(p, config_path)) for p in places] or [("", "")]
    other = next((name for name, text in others if text != taken[1]), None)
    return f"is {other}, but also megarl's own {taken[0]}, which would be taken" if other else ""


def _wrong_option(loader: ConfigLoaderImpl, override: Override, searched: Sequence[str]) -> Iterator[Problem]:
    """A picked file exists, in a group that does."""
    group, picked = override.key_or_group, override.value()
    options = file_names(loader, group, searched)
    if not options:
        groups = [str(g) for g in loader.list_groups("")]
        yield Problem(key_of(override), picked, "no such group of files", nearest(group, groups))
        return
    for option in picked if isinstance(picked, list) else [picked]:
        if option is not None and not _exists(loader, f"{group}/{option}", searched):
            fix = nearest(str(option), options) or f"one of {', '.join(options)}"
            yield Problem(key_of(override), option, f"no such file in {group}/", fix)
        elif option is not None and (hidden := _hidden(loader, f"{group}/{option}")):
            yield Problem(key_of(override), option, hidden, "rename your file")


def _override_of_file(override: Override, in_use: Mapping[str, Any]) -> Iterator[str]:
    """Yield what Hydra wants for one pick, nothing where it changes nothing. Raises ConfigError for a group unused."""
    key, value = key_of(override), override.value()
    if value is None or override.is_delete():  # group=null means ~group
        if key not in in_use or value not in (None, in_use[key]):
            used = in_use.get(key)
            allowed = f"is {used}, so it can't be taken away" if used else "is not in use, so it can't be taken away"
            fix = f"~{key}" if used else nearest(key, list(in_use))
            raise ConfigError([Problem(key, Absent() if value is None else value, allowed, fix)])
        if in_use[key] is not None:
            yield f"~{key}"
    elif key == EXPERIMENT and in_use.get(key) is None:
        # After the user's own file, not in the slot before it: the command line has the last word.
        yield f"+{EXPERIMENT}@_global_={override.get_value_string()}"
    elif key in in_use:
        yield f"{key}={override.get_value_string()}"
    else:
        elsewhere = [k for k in in_use if k.split("@")[0] == override.key_or_group]
        if elsewhere:
            fix = f"{elsewhere[0]}={override.get_value_string()}"
            raise ConfigError([Problem(key, value, "is not where files of this group are in use", fix)])
        yield f"+{key}={override.get_value_string()}"
