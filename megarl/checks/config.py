"""From composed values to a config. One that is wrong is mended, so that its mistakes hide no others."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from megarl.checks.findings import Findings
from megarl.config.build import NO_SUCH_KEY, build_config
from megarl.config.defaults import resolved_defaults
from megarl.config.programs import main_config_of, program_of, require_program
from megarl.config.schema import PPOConfig, SFTConfig
from megarl.errors import ConfigError, Problem

C = TypeVar("C", PPOConfig, SFTConfig)


def built(schema: type[C], values: Mapping[str, Any]) -> tuple[C, tuple[Problem, ...]]:
    """Return the config of a run, with defaults in place of what is wrong, and the problems of that.

    Raises ConfigError for values of another program, and where no default could stand in.
    """
    require_program(values, schema)
    try:
        return build_config(schema, values), ()
    except ConfigError as error:
        try:
            return build_config(schema, _mended(values, error.problems)), error.problems
        except ConfigError:
            raise error from None


def _mended(values: Mapping[str, Any], problems: Collection[Problem]) -> dict[str, Any]:
    """Return values without unknown keys, and with defaults for what is missing or wrong."""
    tree = copy.deepcopy(dict(values))
    defaults = resolved_defaults(main_config_of(values) or program_of(values).config_name)
    for key in _keys_of(problems):
        *sections, last = key.split(".")
        node: Any = tree
        default: Any = defaults
        for section in sections:
            node, default = (inner.get(section, {}) if isinstance(inner, dict) else {} for inner in (node, default))
        if isinstance(node, dict):
            node.pop(last, None)
            if isinstance(default, dict) and last in default:
                node[last] = default[last]
    return tree


def drop_consequences(found: Findings, problems: Collection[Problem]) -> None:
    """Drop from ``found`` what may follow from the defaults that stand in for the wrong values of ``problems``."""
    keys = _keys_of([problem for problem in problems if problem.allowed != NO_SUCH_KEY])
    if keys:
        named = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, keys))})(?!\w)")
        found.problems = [p for p in found.problems if not named.search(f"{p.key} {p.allowed} {p.fix}")]
        found.errors = [error for error in found.errors if not named.search(error[0])]


def _keys_of(problems: Collection[Problem]) -> list[str]:
    """Return the keys of problems; of an item of a list that of the list."""
    return sorted({problem.key.partition("[")[0] for problem in problems})
