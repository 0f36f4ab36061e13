"""What megarl says of a translated run: which overrides it needs, and what stands in the way of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megarl.checks.idle import idle_settings
from megarl.checks.run import check_ppo
from megarl.config.build import build_config
from megarl.config.command_line import parse_command_line
from megarl.config.compose import compose
from megarl.config.schema import PPOConfig
from megarl.errors import ConfigError, MegarlError, Problem
from megarl.from_verl.read import parsed
from megarl.from_verl.translate import Translation, without
from megarl.roles import roles_of

_PLAIN = re.compile(r"[\w./$:@%+*-]+")  # text that Hydra reads as it is


def overrides(found: Translation) -> list[str]:
    """Return the overrides of a run of ours, verl's defaults that differ from ours first, as Hydra takes them."""
    return [f"{key}={written(value)}" for key, value in {**found.defaults, **found.ours}.items()]


def written(value: Any) -> str:
    """Return a value so that Hydra reads it as it is."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{','.join(written(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str) or (_PLAIN.fullmatch(value) and parsed(value) == value):
        return str(value)
    quoted = re.sub(r'(\\*)("|$)', lambda end: end[1] * 2 + ('\\"' if end[2] else ""), value)
    return f'"{quoted}"'


def needed(found: Translation) -> Translation:
    """Return ``found`` without the overrides that have no effect in this run."""
    try:
        config = build_config(PPOConfig, _values(found))
        idle = idle_settings(config, roles_of(config, lambda facts: facts))
    except ConfigError:
        return found  # other mistakes come first, and ``problems`` says them
    return without(found, {problem.key: problem.allowed for problem in idle})


def problems(found: Translation) -> Sequence[Problem | str]:
    """Return what megarl's checks say of the run, but for files that may be elsewhere; nothing where it may start."""
    try:
        check_ppo(_values(found), files_may_be_missing=True)
    except ConfigError as error:
        return error.problems
    except MegarlError as error:
        return [str(error)]
    return []


def _values(found: Translation) -> dict[str, Any]:
    return compose(parse_command_line(overrides(found), found.backend)).values()
