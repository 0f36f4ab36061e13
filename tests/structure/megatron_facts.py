"""What a release of megatron-core defines, read from its source: nothing of it is imported, so any Python will do.

    python -m tests.structure.megatron_facts WHEEL_OR_FOLDER > tests/structure/megatron_0_19_2.json

writes the facts that ``test_megatron_names`` needs of a release that isn't installed: for each name that megarl uses,
the parameters it takes, or null where there is no such name.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ANY = "**"
"""Stands among parameters for all that no one has listed."""

Parameters = tuple[str, ...]
_Definition = ast.FunctionDef | ast.ClassDef | ast.stmt


@dataclass(frozen=True)
class Found:
    """A definition and the module it stands in. node None: a module itself."""

    module: str
    node: _Definition | None


class Release:
    """A release by its source. ``read`` returns the text of a path below the folder that has ``megatron``, or None."""

    def __init__(self, read: Callable[[str], str | None]) -> None:
        self._read = read
        self._tree = cache(self._parse)

    def parameters(self, module: str, name: str) -> Parameters | None:
        """Return what ``name`` of ``module`` takes, None where there is none such; nothing for what isn't called.

        name: dotted below a class for its members; empty for the module itself.
        """
        first, _, member = name.partition(".")
        found = self._find(module, first) if first else self._module(module)
        if found is None:
            return None
        if not member:
            return self._taken(found)
        return self._member(found, member) if isinstance(found.node, ast.ClassDef) else None

    def _parse(self, module: str) -> tuple[ast.Module, bool] | None:
        path = module.replace(".", "/")
        for file, is_package in ((f"{path}.py", False), (f"{path}/__init__.py", True)):
            text = self._read(file)
            if text is not None:
                return ast.parse(text), is_package
        return None

    def _module(self, module: str) -> Found | None:
        return Found(module, None) if self._tree(module) else None

    def _find(self, module: str, name: str) -> Found | None:
        """Return where ``name``, which ``module`` defines or imports, is defined."""
        parsed = self._tree(module)
        if parsed is None:
            return None
        tree, is_package = parsed
        for node in _statements(tree.body):
            match node:
                case ast.FunctionDef(name=defined) | ast.ClassDef(name=defined) if defined == name:
                    return Found(module, node)
                case ast.ImportFrom(names=names):
                    for alias in names:
                        if (alias.asname or alias.name) == name:
                            base = _absolute(module, is_package, node)
                            # A package imports its own submodules as if they were names of it.
                            of_base = None if (base, alias.name) == (module, name) else self._find(base, alias.name)
                            return of_base or self._module(f"{base}.{alias.name}")
                case ast.Assign(targets=targets) if name in {t.id for t in targets if isinstance(t, ast.Name)}:
                    return Found(module, node)
                case ast.AnnAssign(target=ast.Name(id=defined)) if defined == name:
                    return Found(module, node)
        return self._module(f"{module}.{name}")

    def _taken(self, found: Found) -> Parameters:
        match found.node:
            case ast.FunctionDef() as function:
                return _arguments(function)
            case ast.ClassDef() as class_:
                return self._constructor(found.module, class_)
        return ()

    def _constructor(self, module: str, class_: ast.ClassDef) -> Parameters:
        """Return what a class is built from: the arguments of ``__init__``, or a dataclass's fields."""
        for node in class_.body:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                return _arguments(node)[1:]
        bases = self._bases(module, class_)
        inherited = tuple(name for base in bases for name in self._taken(base))
        if any("dataclass" in ast.unparse(decorator) for decorator in class_.decorator_list):
            return tuple(dict.fromkeys([*inherited, *_fields(class_)]))
        return inherited if bases else (ANY,)

    def _bases(self, module: str, class_: ast.ClassDef) -> list[Found]:
        found = [self._find(module, base.id) for base in class_.bases if isinstance(base, ast.Name)]
        return [base for base in found if base is not None and isinstance(base.node, ast.ClassDef)]

    def _member(self, found: Found, name: str) -> Parameters | None:
        """Return what a method takes, nothing for an attribute, None where no class of the hierarchy has it."""
        assert isinstance(found.node, ast.ClassDef)
        for node in found.node.body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return _arguments(node)[1:]
        if name in _fields(found.node) or name in _set_on_self(found.node):
            return ()
        of_bases = (self._member(base, name) for base in self._bases(found.module, found.node))
        return next((taken for taken in of_bases if taken is not None), None)


def open_release(path: Path) -> Release:
    """Open a wheel, or the folder that holds ``megatron``."""
    if path.is_dir():
        return Release(lambda file: (path / file).read_text(encoding="utf-8") if (path / file).is_file() else None)
    archive = zipfile.ZipFile(path)
    names = set(archive.namelist())
    return Release(lambda file: archive.read(file).decode("utf-8") if file in names else None)


def _statements(body: Iterable[ast.stmt]) -> Iterable[ast.stmt]:
    """Yield the statements of a module, those under ``if`` and ``try`` too."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            yield from _statements([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            handled = [statement for handler in node.handlers for statement in handler.body]
            yield from _statements([*node.body, *handled, *node.orelse])


def _absolute(module: str, is_package: bool, node: ast.ImportFrom) -> str:
    """Return the dotted name of what is imported from."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parent = parts[: len(parts) - node.level + is_package]
    return ".".join([*parent, *([node.module] if node.module else [])])


def _arguments(function: ast.FunctionDef) -> Parameters:
    """Return the names of all arguments, ``self`` included, and ANY where it takes more than those."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return (*names, *([ANY] if given.kwarg else []))


def _fields(class_: ast.ClassDef) -> list[str]:
    return [n.target.id for n in class_.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]


def _set_on_self(class_: ast.ClassDef) -> set[str]:
    found = set()
    for node in ast.walk(class_):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                found.add(name)
    return found


def main(path: str) -> None:
    """Print the facts."""
    from tests.structure.megatron_uses import megarl_uses

    release = open_release(Path(path))
    names = sorted({(use.module, use.name) for use in megarl_uses()})
    facts = {f"{module}:{name}": release.parameters(module, name) for module, name in names}
    lines = [f"{json.dumps(name)}: {json.dumps(taken)}" for name, taken in facts.items()]
    sys.stdout.write("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1])
