"""What a reward file says without being run: a plan and the checks of a run read it, processes of their own run it."""

from __future__ import annotations

import ast
from pathlib import Path

from megarl.errors import RewardError, nearest


def check_reward_file(path: str, function: str) -> None:
    """Read the file of a reward function.

    Raises RewardError where it is no Python, has no such function, or a class, generator or async function of that
    name. A name that the file may have come by in another way passes.
    """
    file = Path(path).expanduser()
    try:
        module = ast.parse(file.read_bytes(), filename=str(file))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise RewardError(f"reward.path = {path!r}: the file is no Python: {error}") from error
    found = [node for node in module.body if isinstance(node, _Definition) and node.name == function]
    if not found and not _may_come_by(module, function):
        names = [node.name for node in module.body if isinstance(node, ast.FunctionDef)]
        raise RewardError(
            f"reward.function = {function!r}: {path} has no such function. it has: {', '.join(names) or 'none'}. "
            f"{nearest(function, names)}".rstrip()
        )
    if found and (kind := _kind_without_a_number(found[-1])):
        raise RewardError(
            f"reward.function = {function!r}: it is {kind} in {path}, whose call gives no number. "
            "fix: a plain `def` that returns one; it may run an async function with asyncio.run"
        )


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _kind_without_a_number(node: _Definition) -> str:
    """Return what a definition is whose call can't return a number, empty where it can or a decorator may see to it."""
    if isinstance(node, ast.ClassDef):
        return "a class"
    if node.decorator_list:
        return ""
    if isinstance(node, ast.AsyncFunctionDef):
        return "an async function"
    return "a generator function" if any(_yields(statement) for statement in node.body) else ""


def _yields(node: ast.AST) -> bool:
    """Return True for a ``yield`` of the function itself, not of one inside it."""
    if isinstance(node, ast.Yield | ast.YieldFrom):
        return True
    if isinstance(node, _Definition | ast.Lambda):
        return False
    return any(_yields(child) for child in ast.iter_child_nodes(node))


def _may_come_by(module: ast.Module, name: str) -> bool:
    """Return True where a name may be an import, a value, or of a definition that isn't at the top."""

    def gives(node: ast.AST) -> bool:
        match node:
            case ast.alias():
                return node.name == "*" or name == (node.asname or node.name)
            case ast.Name(id=other, ctx=ast.Store()):
                return other == name
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                return node.name in (name, "__getattr__")
            case ast.Call(func=ast.Name(id=called)):
                return called in ("globals", "exec", "setattr")
        return False

    return any(gives(node) for node in ast.walk(module))
