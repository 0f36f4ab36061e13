"""The reference of every key, from the schema and the YAML files: ``python -m megarl.config.docs > docs/config.md``."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from megarl.config.schema import PPOConfig, SFTConfig

_INTRODUCTION = """\
# Every key

Written by `python -m megarl.config.docs > docs/config.md` from megarl/config/schema.py and conf/; don't edit it.

Set a key on the command line as `section.key=value`. A default of `required` is a null that has to be replaced.
A `${...}` takes the value of the key it names. What has to hold between keys is in megarl/config/rules.py, and all
that is wrong is reported together. `--cfg job` prints a composed config without running it.
"""
_PARTS = (
    ("Reinforcement learning", "megarl.main_ppo", "ppo_megatron_trainer", PPOConfig),
    ("Supervised fine-tuning", "megarl.main_sft", "sft_trainer", SFTConfig),
)
_REQUIRED = ("actor_rollout_ref.model.path", "model.path")
_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}


def config_reference() -> str:
    """Return the whole page as Markdown."""
    lines = [_INTRODUCTION]
    for title, module, config_name, schema in _PARTS:
        lines.append(f"# {title}\n\n`python -m {module} --config-name={config_name}`\n")
        lines += _sections(schema, default_values(config_name), "")
    return "\n".join(lines)


def default_values(config_name: str) -> dict[str, Any]:
    """Return what a main config composes to without overrides, interpolations unresolved."""
    with initialize_config_module("megarl.conf", version_base="1.3"):
        values = OmegaConf.to_container(compose(config_name), resolve=False)
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}


def _sections(schema: Any, values: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yield the section of one dataclass, then those of the dataclasses in it."""
    kinds = typing.get_type_hints(schema)
    nested = [name for name, kind in kinds.items() if dataclasses.is_dataclass(kind)]
    rows = [
        _row(f"{path}.{f.name}", kinds[f.name], values[f.name], f.metadata)
        for f in dataclasses.fields(schema)
        if f.name not in nested
    ]
    if rows:
        yield f"## {path}\n\n{schema.__doc__}\n"
        yield "| Key | Type | Default | Allowed | Meaning |\n|---|---|---|---|---|"
        yield "\n".join(rows) + "\n"
    for name in nested:
        yield from _sections(kinds[name], values[name], f"{path}.{name}" if path else name)


def _row(key: str, kind: Any, default: object, rule: Mapping[str, Any]) -> str:
    name = key.rpartition(".")[2]
    shown = "required" if key in _REQUIRED else f"`{json.dumps(default)}`"
    return f"| `{name}` | {type_in_words(kind)} | {shown} | {allowed_in_words(rule)} | {rule['doc']} |"


def type_in_words(kind: Any) -> str:
    """Return a key's type as a reader of YAML would name it."""
    if isinstance(kind, types.UnionType):
        return " or ".join("null" if k is type(None) else type_in_words(k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"list of {type_in_words(typing.get_args(kind)[0])}s"
    return _TYPES[kind]


def allowed_in_words(rule: Mapping[str, Any]) -> str:
    """Return a key's choices or bounds, empty where its type is all that is asked."""
    if rule["choices"]:
        return ", ".join(f"`{choice}`" for choice in rule["choices"])
    bounds = (("at least", rule["low"]), ("above", rule["above"]), ("at most", rule["high"]))
    return ", ".join(f"{words} {bound:g}" for words, bound in bounds if bound is not None)


if __name__ == "__main__":
    print(config_reference(), end="")
