"""Where each value of a composed config was set last: a line of a file, or the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import yaml
from hydra.core.default_element import ResultDefault

from megarl.errors import ConfigError, Problem

COMMAND_LINE = "command line"
OWN_PACKAGE = "megarl.conf"
_FILE, _PACKAGE = "file://", "pkg://"
_MERGE = "tag:yaml.org,2002:merge"
_REFERENCE = re.compile(r"\$\{(\.*[A-Za-z_][\w.\[\]]*)\}")
_KEY = re.compile(r"[A-Za-z_][\w-]*(?:\.[\w-]+|\[\d+\])*")
_LAST_PART = re.compile(r"(\.[^.\[\]]+|\[\d+\])$")


@dataclass(frozen=True)
class Source:
    """One file of a composition. package: dotted key that its content goes under, "" for the root."""

    package: str
    file: str
    text: str


@dataclass(frozen=True)
class Origin:
    """Where a value was set. line: from 1, None on the command line. refers_to: keys that the value is taken from."""

    file: str
    line: int | None = None
    refers_to: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


def find_origins(sources: Iterable[Source], overrides: Iterable[tuple[str, object]]) -> dict[str, Origin]:
    """Return the origin of every leaf, and of every item of a list as ``key[i]``.

    sources: in the order in which they are merged. overrides: key and value of each, set on the command line.
    """
    origins: dict[str, Origin] = {}
    for source in sources:
        root = yaml.compose(source.text, Loader=yaml.SafeLoader)
        if isinstance(root, yaml.MappingNode):
            root.value = [pair for pair in root.value if pair[0].value != "defaults"]
            _add_node(origins, source.package, root, source.file, root.start_mark.line + 1)
    for key, value in overrides:
        _add_value(origins, key, value)
    return origins


def _add_node(origins: dict[str, Origin], key: str, node: yaml.Node, file: str, line: int) -> None:
    """Note what a YAML node sets. line: of the node's key."""
    if isinstance(node, yaml.MappingNode) and (node.value or not key):
        # What is merged in (`<<`) gives way to what stands beside it, wherever it stands.
        for name, child in sorted(node.value, key=lambda pair: pair[0].tag != _MERGE):
            if name.tag == _MERGE:
                for merged in child.value if isinstance(child, yaml.SequenceNode) else [child]:
                    _add_node(origins, key, merged, file, line)
            else:
                _add_node(origins, _joined(key, name.value), child, file, name.start_mark.line + 1)
    elif isinstance(node, yaml.MappingNode):
        _set_empty(origins, key, Origin(file, line))
    elif isinstance(node, yaml.SequenceNode):
        _set(origins, key, Origin(file, line))
        for i, child in enumerate(node.value):
            _add_node(origins, f"{key}[{i}]", child, file, child.start_mark.line + 1)
    elif node.value != "???" or key not in origins:  # merged over a value, ??? leaves it
        _set(origins, key, Origin(file, line, _references(key, node.value)))


def _add_value(origins: dict[str, Origin], key: str, value: object) -> None:
    """Note what an override sets."""
    if isinstance(value, Mapping) and value:
        for name, child in value.items():
            _add_value(origins, _joined(key, str(name)), child)
    elif isinstance(value, Mapping):
        _set_empty(origins, key, Origin(COMMAND_LINE))
    else:
        references = _references(key, value) if isinstance(value, str) else ()
        _set(origins, key, Origin(COMMAND_LINE, refers_to=references))
        for i, child in enumerate(value if isinstance(value, list) else []):
            _add_value(origins, f"{key}[{i}]", child)


def _set(origins: dict[str, Origin], key: str, origin: Origin) -> None:
    """Make ``key`` a leaf: what was under it is gone, and what it is under is no leaf, unless it is a list."""
    for other in [k for k in origins if k.startswith((f"{key}.", f"{key}["))]:
        del origins[other]
    for above in _above(key):
        if key[len(above)] == ".":
            origins.pop(above, None)
    origins[key] = origin


def _set_empty(origins: dict[str, Origin], key: str, origin: Origin) -> None:
    """Set ``key`` to {}, which is merged and so takes nothing away."""
    if not any(k.startswith(f"{key}.") for k in origins):
        _set(origins, key, origin)


def _joined(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _above(key: str) -> Iterator[str]:
    """Yield the keys that ``key`` is under, nearest first."""
    while match := _LAST_PART.search(key):
        key = key[: match.start()]
        yield key


def _references(key: str, value: str) -> tuple[str, ...]:
    """Return the keys that an interpolated value at ``key`` names, relative ones made absolute."""
    found = []
    for name in _REFERENCE.findall(value):
        base = key
        for _ in range(len(name) - len(name.lstrip("."))):
            base = next(_above(base), "")
        found.append(_joined(base, name.lstrip(".")) if name.startswith(".") else name)
    return tuple(found)


def describe_origin(key: str, origins: Mapping[str, Origin]) -> str:
    """Return where ``key`` was set and, for what is taken from another key, where that was; "" where nothing was.

    A key that isn't there has the origin of the leaf it would be under.
    """
    return ", ".join(_steps(key, origins, set()))


def _steps(key: str, origins: Mapping[str, Origin], seen: set[str]) -> Iterator[str]:
    leaf = next((k for k in (key, *_above(key)) if k in origins), None)
    if leaf is None or leaf in seen:
        return
    seen.add(leaf)
    yield str(origins[leaf])
    for reference in origins[leaf].refers_to:
        source, *more = [*_steps(reference + key[len(leaf) :], origins, seen)] or [""]
        if source:
            yield f"from {reference}{key[len(leaf) :]} at {source}"
            yield from more


def with_origins(error: ConfigError, origins: Mapping[str, Origin]) -> ConfigError:
    """Return ``error`` with the origin of every key that its problems name, said by key where they name several."""
    return ConfigError([replace(p, origin=p.origin or _origin_of(p, origins)) for p in error.problems])


def _origin_of(problem: Problem, origins: Mapping[str, Origin]) -> str:
    found = {key: describe_origin(key, origins) for key in _KEY.findall(problem.key)}
    found = {key: origin for key, origin in found.items() if origin}
    if len(found) <= 1:
        return next(iter(found.values()), "")
    return "; ".join(f"{key}: {origin}" for key, origin in found.items())


def read_sources(defaults: Sequence[ResultDefault], search_path: Sequence[str]) -> list[Source]:
    """Read the files of Hydra's defaults list, in its order. search_path: ``file://...`` and ``pkg://...`` entries.

    Raises: OSError for a file that can no longer be read.
    """
    sources = []
    for default in defaults:
        path = default.config_path or ""
        place = next((p for p in search_path if is_config(p, path)), None)
        if place is not None and not path.startswith("hydra/"):
            sources.append(Source(default.package or "", shown_name(place, path), read_config(place, path)))
    return sources


def is_config(place: str, config_path: str) -> bool:
    """Whether there is a file of that name at one place of the search path."""
    if place.startswith(_PACKAGE):
        return files(place.removeprefix(_PACKAGE)).joinpath(_file_name(config_path)).is_file()
    return place.startswith(_FILE) and Path(place.removeprefix(_FILE), _file_name(config_path)).is_file()


def read_config(place: str, config_path: str) -> str:
    """Return the text of a file at one place of the search path."""
    if place.startswith(_PACKAGE):
        return files(place.removeprefix(_PACKAGE)).joinpath(_file_name(config_path)).read_text(encoding="utf-8")
    return Path(place.removeprefix(_FILE), _file_name(config_path)).read_text(encoding="utf-8")


def shown_name(place: str, config_path: str) -> str:
    """Return a file's name as a user knows it: ``conf/...`` for ours, relative to here for one that lies below."""
    if place == _PACKAGE + OWN_PACKAGE:
        return f"conf/{_file_name(config_path)}"
    if place.startswith(_PACKAGE):
        return place.removeprefix(_PACKAGE).replace(".", "/") + f"/{_file_name(config_path)}"
    return shown_path(Path(place.removeprefix(_FILE), _file_name(config_path)))


def shown_path(path: Path) -> str:
    """Return ``path`` relative to the working directory where it lies below, else absolute."""
    path, here = path.absolute(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _file_name(config_path: str) -> str:
    return config_path if config_path.endswith(".yaml") else f"{config_path}.yaml"
