"""Where each value of a composed config was set last: a line of a file, or the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from hydra.core.default_element import ResultDefault

from megarl.config.files import find_config, shown_path
from megarl.errors import ConfigError, Problem

COMMAND_LINE = "command line"
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
        node = yaml.compose(yaml.safe_dump(value), Loader=yaml.SafeLoader)
        assert node is not None, "a value has a document"
        _add_node(origins, key, node, COMMAND_LINE, None)
    return origins


def _add_node(origins: dict[str, Origin], key: str, node: yaml.Node, file: str, line: int | None) -> None:
    """Enter the origin of every key that a YAML node sets. line: of the node's key; None for an override."""

    def line_of(child: yaml.Node) -> int | None:
        return None if line is None else child.start_mark.line + 1

    if isinstance(node, yaml.MappingNode) and (node.value or not key):
        # What is merged in (`<<`) gives way to what stands beside it, wherever it stands.
        for name, child in sorted(node.value, key=lambda pair: pair[0].tag != _MERGE):
            if name.tag == _MERGE:
                for merged in child.value if isinstance(child, yaml.SequenceNode) else [child]:
                    _add_node(origins, key, merged, file, line)
            else:
                _add_node(origins, _joined(key, name.value), child, file, line_of(name))
    elif isinstance(node, yaml.MappingNode):
        if not any(k.startswith(f"{key}.") for k in origins):  # {} is merged and so takes nothing away
            _set(origins, key, Origin(file, line))
    elif isinstance(node, yaml.SequenceNode):
        _set(origins, key, Origin(file, line))
        for i, child in enumerate(node.value):
            _add_node(origins, f"{key}[{i}]", child, file, line_of(child))
    elif node.value != "???" or key not in origins or line is None:  # merged over a value, ??? leaves it
        _set(origins, key, Origin(file, line, _references(key, node.value)))


def _set(origins: dict[str, Origin], key: str, origin: Origin) -> None:
    """Make ``key`` a leaf: what was under it is gone, and what it is under is no leaf, unless it is a list."""
    for other in [k for k in origins if k.startswith((f"{key}.", f"{key}["))]:
        del origins[other]
    for above in _above(key):
        if key[len(above)] == ".":
            origins.pop(above, None)
    origins[key] = origin


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
    """Return the place where ``key`` was set and, for a value taken from another key, that key's place; "" for none.

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


def read_sources(defaults: Sequence[ResultDefault], folder: Path | None) -> list[Source]:
    """Return the Source of every file of Hydra's defaults list, in its order. folder: of the user's own files."""
    found = [(default.package or "", find_config(folder, default.config_path or "")) for default in defaults]
    return [Source(package, shown_path(p), p.read_text(encoding="utf-8")) for package, p in found if p is not None]
