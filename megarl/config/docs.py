"""The reference of every key, from the schema and the YAML files: ``python -m megarl.config.docs > docs/config.md``."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from megarl.config.build import number_in_words, section_of
from megarl.config.defaults import default_values
from megarl.config.schema import PPOConfig, SFTConfig

_INTRODUCTION = """\
# Every key

Written by `python -m megarl.config.docs > docs/config.md` from megarl/config/schema.py and conf/; don't edit it.

Set a key on the command line as `section.key=value`. A name that doesn't exist is an error with the nearest that does.
What has to hold between keys is in megarl/checks/rules.py and algorithm.py. `--cfg job` prints a composed config
without running it.
"""
_PARTS = (
    ("Reinforcement learning", "megarl.main_ppo", "ppo_megatron_trainer", PPOConfig),
    ("Reinforcement learning, data-parallel backend", "megarl.main_ppo", "ppo_trainer", PPOConfig),
    ("Supervised fine-tuning", "megarl.main_sft", "sft_trainer", SFTConfig),
)
_REQUIRED = ("actor_rollout_ref.model.path", "model.path")
_OTHER_KEY = re.compile(r"\$\{([\w.]+)\}")
_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}


def config_reference() -> str:
    """Return the whole page as Markdown."""
    lines = [_INTRODUCTION]
    for title, module, config_name, schema in _PARTS:
        lines.append(f"## {title}\n\n`python -m {module} --config-name={config_name}`\n")
        # What two trainers have alike is told once.
        lines += [part for part in _sections(schema, default_values(config_name), "") if part not in lines]
    return "\n".join(lines)


def _sections(schema: Any, values: Mapping[str, Any] | None, path: str) -> Iterator[str]:
    """Yield the section of one dataclass, then those of the dataclasses in it. values: None for an item of a list."""
    kinds = {name: section_of(kind) or kind for name, kind in typing.get_type_hints(schema).items()}
    leaves = [f for f in dataclasses.fields(schema) if not dataclasses.is_dataclass(kinds[f.name])]
    if leaves:
        rows = [
            f"### {path}\n\n{schema.__doc__}\n",
            "| Key | Type | Default | Allowed | Meaning |\n|---|---|---|---|---|",
        ]
        for f in leaves:
            default = default_in_words(f"{path}.{f.name}", values[f.name]) if values is not None else ""
            cells = (f"`{f.name}`", type_in_words(kinds[f.name]), default, allowed_in_words(f.metadata))
            rows.append(f"| {' | '.join(cells)} | {f.metadata['doc']} |")
        yield "\n".join(rows) + "\n"
    for name, kind in kinds.items():
        where = f"{path}.{name}" if path else name
        if dataclasses.is_dataclass(kind):
            if values is None or values.get(name) is not None:  # another backend's section isn't there
                yield from _sections(kind, values[name] if values is not None else None, where)
        elif dataclasses.is_dataclass(item := _item(kind)):
            yield from _sections(item, None, f"{where}[]")


def _item(kind: Any) -> Any:
    """Return the type of a list's items, None for what is no list."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None


def default_in_words(key: str, value: object) -> str:
    """Return a default as YAML has it; what it is taken from, where that is another key."""
    if key in _REQUIRED:
        return "required"
    other = _OTHER_KEY.fullmatch(value) if isinstance(value, str) else None
    return f"that of `{other[1]}`" if other else f"`{json.dumps(value)}`"


def type_in_words(kind: Any) -> str:
    """Return a key's type as a reader of YAML would name it."""
    if isinstance(kind, types.UnionType):
        return " or ".join("null" if k is type(None) else type_in_words(k) for k in typing.get_args(kind))
    if item := _item(kind):
        return f"list of {type_in_words(item)}s"
    if typing.get_origin(kind) is Mapping:
        return "mapping"
    return "section" if dataclasses.is_dataclass(kind) else _TYPES[kind]


def allowed_in_words(rule: Mapping[str, Any]) -> str:
    """Return a key's choices or bounds, empty where its type is all that is asked."""
    if rule["choices"]:
        return ", ".join(f"`{choice}`" for choice in rule["choices"])
    bounds = (("at least", rule["low"]), ("above", rule["above"]), ("at most", rule["high"]))
    return ", ".join(f"{words} {number_in_words(bound)}" for words, bound in bounds if bound is not None)


if __name__ == "__main__":
    print(config_reference(), end="")
