"""The programs that train, and which of them a config or a recipe is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from megarl.config.command_line import EXPERIMENT, CommandLine
from megarl.config.files import find_config, names_in
from megarl.config.schema import PPOConfig, SFTConfig
from megarl.errors import Absent, ConfigError, Problem

_SECTIONS = {schema: {field.name for field in fields(schema)} for schema in (PPOConfig, SFTConfig)}


@dataclass(frozen=True)
class Program:
    """A program that trains. name: in ``python -m megarl.NAME``. config_name: its default main config."""

    name: str
    config_name: str
    schema: type[PPOConfig] | type[SFTConfig]

    def num_own_sections(self, values: Mapping[str, Any]) -> int:
        """Return the number of sections that no other program has, as an int."""
        others = (sections for schema, sections in _SECTIONS.items() if schema is not self.schema)
        return len(_SECTIONS[self.schema].difference(*others) & values.keys())


PPO = Program("main_ppo", "ppo_trainer", PPOConfig)
SFT = Program("main_sft", "sft_trainer", SFTConfig)
PROGRAMS = (PPO, SFT)
MEGATRON = "ppo_megatron_trainer"


def program_of(values: Mapping[str, Any]) -> Program:
    """Return the program that composed values are for."""
    return SFT if SFT.num_own_sections(values) > PPO.num_own_sections(values) else PPO


def main_config_of(values: Mapping[str, Any]) -> str | None:
    """Return the main config that has what ``values``, a part of a config, set; None where each may have it."""
    if SFT.num_own_sections(values):
        return SFT.config_name
    sections = [values.get(name) for name in ("actor_rollout_ref", "critic", "reward")]
    models = [model for section in sections if isinstance(section, Mapping) for model in (section, *section.values())]
    has_megatron = any(isinstance(model, Mapping) and "megatron" in model for model in models)
    if has_megatron:
        return MEGATRON
    return PPO.config_name if PPO.num_own_sections(values) else None


def for_recipe(line: CommandLine, programs: Sequence[Program]) -> CommandLine:
    """Return a command line with the main config that its recipe is for, where it names none itself.

    Raises ConfigError for a recipe of none of ``programs``, and one that --config-name=ppo_trainer doesn't fit.
    """
    name = main_config_of_recipe(line.config_dir, line.recipe) if line.recipe else None
    if name is None:
        return line
    program = SFT if name == SFT.config_name else PPO
    if program not in programs:
        fix = f"python -m megarl.{program.name} with the same arguments"
        raise ConfigError([Problem(EXPERIMENT, line.recipe, f"is a recipe of megarl.{program.name}", fix)])
    if line.is_named and line.config_name in {other.config_name for other in PROGRAMS} - {name}:
        allowed = f"is a recipe for {name}"
        raise ConfigError([Problem(EXPERIMENT, line.recipe, allowed, f"--config-name={name}, or leave that out")])
    return line if line.is_named else replace(line, config_name=name)


def main_config_of_recipe(folder: Path | None, name: str) -> str | None:
    """Return the main config that a recipe is for, None where it may be any or there is no such recipe."""
    return main_config_of(_recipe(find_config(folder, f"{EXPERIMENT}/{name}")))


def recipes_of(programs: Sequence[Program], folder: Path | None) -> dict[str, str]:
    """Return the recipes that ``programs`` can do, each with its line of itself. folder: the user's."""
    paths = {name: find_config(folder, f"{EXPERIMENT}/{name}") for name in names_in(folder, EXPERIMENT)}
    return {name: _own_line(path) for name, path in paths.items() if path and program_of(_recipe(path)) in programs}


def _recipe(path: Path | None) -> dict[str, Any]:
    """Return the values that a recipe sets; none where it can't be read, which the composition reports."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) if path else None
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return {}
    return values if isinstance(values, dict) else {}


def _own_line(path: Path) -> str:
    """Return the first comment of a config file that tells of it; ``# @package`` tells Hydra something."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    comments = (line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    return next((text for text in comments if not text.startswith("@package")), "")


def require_program(values: Mapping[str, Any], schema: type[PPOConfig] | type[SFTConfig]) -> None:
    """Raise ConfigError for values of another program than that of ``schema``."""
    program = program_of(values)
    if program.schema is not schema:
        allowed = f"is a config of megarl.{program.name}, which is another program"
        raise ConfigError([Problem("--config-name", Absent(), allowed, f"python -m megarl.{program.name}")])
