"""Which keys of the schema some code reads, found in the sources by light type inference.

A type is the set of class names that an annotation mentions, so that ``tuple[X, ...]``, ``X | None`` and an item of
either are all X. A key is read where its attribute is taken of an expression whose type is its dataclass, or one that
it inherits from or that inherits from it. Where nothing is known of the expression, the name alone counts, if no two
dataclasses of the schema have it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

Types = frozenset[str]
Env = dict[str, Types]
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

UNKNOWN: Types = frozenset()
_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass
class Classes:
    """What is known of all classes and functions by their names. aliases: unions, and type variables of classes."""

    bases: dict[str, list[str]] = field(default_factory=dict)
    attributes: dict[str, Env] = field(default_factory=dict)
    returns: Env = field(default_factory=dict)
    aliases: Env = field(default_factory=dict)

    def add(self, tree: ast.Module) -> None:
        """Note every class and function of a source; what annotations mention may come later."""
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                self.bases.setdefault(node.name, []).extend(_names(node.bases))
                attributes = self.attributes.setdefault(node.name, {})
                for line in node.body:
                    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                        attributes[line.target.id] = _names([line.annotation])
                    elif isinstance(line, ast.FunctionDef | ast.AsyncFunctionDef):
                        attributes[line.name] = _names([line.returns])
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self.returns[node.name] = self.returns.get(node.name, UNKNOWN) | _names([node.returns])
        for line in tree.body:
            if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name) and _is_type(line.value):
                name = line.targets[0].id
                self.aliases[name] = self.aliases.get(name, UNKNOWN) | _names([line.value])

    def known(self, types: Types) -> Types:
        """Return the names among ``types`` that are classes of ours: others tell nothing."""
        meant = types.union(*(self.aliases.get(name, UNKNOWN) for name in types))
        return frozenset(name for name in meant if name in self.bases)

    def lineage(self, name: str) -> list[str]:
        """Return a class and all that it inherits from."""
        found = [name]
        for each in found:  # a class may be called as its base from elsewhere
            found += [base for base in self.bases.get(each, ()) if base not in found]
        return found

    def attribute(self, types: Types, name: str) -> Types:
        """Return the type of an attribute, or of what a method returns."""
        found = (self.attributes.get(c, {}).get(name, UNKNOWN) for t in types for c in self.lineage(t))
        return self.known(frozenset().union(*found))


def unread_keys(schema: str, sources: Iterable[str]) -> list[str]:
    """Return ``Class.key`` of every key of the schema that no source reads, in the schema's order."""
    classes, trees = Classes(), [ast.parse(source) for source in sources]
    schema_tree = ast.parse(schema)
    for tree in (schema_tree, *trees):
        classes.add(tree)
    sections = {node.name for node in schema_tree.body if isinstance(node, ast.ClassDef)}
    keys = [(c, k) for c in sections for k, types in classes.attributes[c].items() if not types & sections]
    order = {node.name: node.lineno for node in schema_tree.body if isinstance(node, ast.ClassDef)}
    owners: dict[str, set[str]] = {}
    for section, key in ((c, k) for c in sections for k in classes.attributes[c]):
        owners.setdefault(key, set()).add(section)
    read: set[tuple[str, str]] = set()
    for tree in trees:
        reader = _Reader(classes)
        reader.run(tree)
        read |= reader.typed
        read |= {(next(iter(owners[k])), k) for k in reader.untyped if len(owners.get(k, ())) == 1}
    related = {c: {d for d in classes.bases if d in classes.lineage(c) or c in classes.lineage(d)} for c in sections}
    left = [(c, k) for c, k in keys if not any((d, k) in read for d in related[c])]
    return [f"{c}.{k}" for c, k in sorted(left, key=lambda pair: order[pair[0]])]


def _names(annotations: Iterable[ast.expr | None]) -> Types:
    """Return all names that annotations mention; one in quotes may be an expression."""
    found = set()
    for annotation in annotations:
        for node in ast.walk(annotation) if annotation is not None else ():
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.update(_NAME.findall(node.value))
    return frozenset(found)


def _is_type(value: ast.expr) -> bool:
    """Whether a name that gets ``value`` is another word for some classes."""
    is_union = isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr)
    return is_union or (isinstance(value, ast.Call) and _called(value) == "TypeVar")


class _Reader:
    """Goes through one source. typed: (class, attribute) that it takes; untyped: attributes of it knows not what."""

    def __init__(self, classes: Classes) -> None:
        self.classes = classes
        self.typed: set[tuple[str, str]] = set()
        self.untyped: set[str] = set()

    def run(self, tree: ast.Module) -> None:
        """Collect all attributes that a source takes. Twice, since attributes of ``self`` are set in any order."""
        for _ in range(2):
            self._block(tree, {}, None)

    def _block(self, scope: ast.AST, outer: Mapping[str, Types], owner: str | None) -> None:
        """Go through a module, class or function body with the names around it."""
        env = dict(outer)
        if isinstance(scope, Function):
            env |= self._parameters(scope, owner)
        nodes = list(_own_nodes(scope))
        for _ in range(2):  # a name may be bound below where it is used
            for node in nodes:
                self._bind(node, env, owner)
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                self._note(self.type_of(node.value, env), node.attr)
            elif isinstance(node, ast.Call) and _called(node) == "getattr" and isinstance(node.args[1], ast.Constant):
                self._note(self.type_of(node.args[0], env), str(node.args[1].value))
            elif isinstance(node, ast.ClassDef):
                self._block(node, env, node.name)
            elif isinstance(node, Function):
                self._block(node, env, owner)

    def _note(self, types: Types, attribute: str) -> None:
        self.typed |= {(t, attribute) for t in types}
        if not types:
            self.untyped.add(attribute)

    def _parameters(self, function: Function, owner: str | None) -> Env:
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        env = {a.arg: self.classes.known(_names([a.annotation])) for a in arguments}
        if owner is not None and arguments and arguments[0].arg == "self":
            env["self"] = frozenset({owner})
        return env

    def _bind(self, node: ast.AST, env: Env, owner: str | None) -> None:
        """Note what a node assigns."""
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._assign(target, value, env, owner)
            case ast.AnnAssign(target=target, annotation=annotation):
                self._set(target, self.classes.known(_names([annotation])), env, owner)
            case ast.NamedExpr(target=target, value=value):
                self._assign(target, value, env, owner)
            case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
                self._set(target, self.type_of(value, env), env, owner)
            case ast.withitem(context_expr=value, optional_vars=ast.expr() as target):
                self._set(target, self.type_of(value, env), env, owner)

    def _assign(self, target: ast.expr, value: ast.expr, env: Env, owner: str | None) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, its in zip(target.elts, value.elts, strict=True):
                self._assign(one, its, env, owner)
        else:
            self._set(target, self.type_of(value, env), env, owner)

    def _set(self, target: ast.expr, types: Types, env: Env, owner: str | None) -> None:
        match target:
            case ast.Name(id=name):
                env[name] = env.get(name, UNKNOWN) | types
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                for one in targets:
                    self._set(one, types, env, owner)
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if owner is not None:
                attributes = self.classes.attributes[owner]
                attributes[name] = attributes.get(name, UNKNOWN) | types

    def type_of(self, node: ast.expr, env: Mapping[str, Types]) -> Types:
        """Return the type of an expression, UNKNOWN where it can't be told."""
        match node:
            case ast.Name(id=name):
                return env.get(name, UNKNOWN)
            case ast.Attribute(value=value, attr=name):
                return self.classes.attribute(self.type_of(value, env), name)
            case ast.Call():
                return self._type_of_call(node, env)
            case ast.Subscript(value=value) | ast.Await(value=value) | ast.Starred(value=value):
                return self.type_of(value, env)
            case ast.NamedExpr(value=value):
                return self.type_of(value, env)
            case ast.IfExp(body=body, orelse=orelse):
                return self.type_of(body, env) | self.type_of(orelse, env)
            case ast.BoolOp(values=items) | ast.Tuple(elts=items) | ast.List(elts=items):
                return frozenset().union(*(self.type_of(item, env) for item in items))
            case ast.Dict(values=items):
                return frozenset().union(*(self.type_of(item, env) for item in items))
            case _:
                return UNKNOWN

    def _type_of_call(self, call: ast.Call, env: Mapping[str, Types]) -> Types:
        """A class makes its instances; a function what it says; one that says nothing of ours, what it is given."""
        name = _called(call)
        if isinstance(call.func, ast.Attribute) and (types := self.type_of(call.func, env)):
            return types
        if name in self.classes.bases:
            return frozenset({name})
        if said := self.classes.known(self.classes.returns.get(name, UNKNOWN)):
            return said
        if name not in PASS_ON:
            return UNKNOWN
        values = [*call.args, *([call.func.value] if isinstance(call.func, ast.Attribute) else [])]
        classes = frozenset(a.id for a in call.args if isinstance(a, ast.Name) and a.id in self.classes.bases)
        return classes.union(*(self.type_of(value, env) for value in values))


# Give back, or give in pieces, what they are given; build_config and cast make what they are told to.
PASS_ON = frozenset(
    {"replace", "build_config", "cast", "zip", "enumerate", "items", "values", "sorted", "list", "tuple"}
)


def _called(call: ast.Call) -> str:
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """Yield what lies in a scope, inner scopes as one node each."""
    pending = list(ast.iter_child_nodes(scope))
    while pending:
        node = pending.pop(0)
        yield node
        if not isinstance(node, ast.ClassDef | Function):
            pending = [*ast.iter_child_nodes(node), *pending]
