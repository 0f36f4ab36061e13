"""Where a run of verl's is written down: a shell script, a YAML file, or overrides on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from megarl.errors import Absent, ConfigError, Problem
from megarl.from_verl.shell import trainer_call

TRAINER = "verl.trainer.main_ppo"


@dataclass(frozen=True)
class VerlRun:
    """What a run of verl's sets, by verl's keys. module, config_name: the trainer it calls, and with which config.

    undecided: what a case of its script asks, where nothing here says so.
    """

    given: Mapping[str, Any]
    module: str = TRAINER
    config_name: str = "ppo_trainer"
    undecided: Sequence[str] = ()


def read_run(arguments: Sequence[str]) -> VerlRun:
    """Return the VerlRun of a script or file, where the first argument is one, and of overrides.

    With a script, NAME=VALUE without a dot sets a variable of it. Raises ConfigError for what can't be read.
    """
    first = Path(arguments[0]).expanduser() if arguments and "=" not in arguments[0] else None
    if first is None:
        return VerlRun(_values(arguments))
    if not first.is_file():
        raise ConfigError([Problem(arguments[0], Absent(), "is neither a file nor key=value", "correct the path")])
    try:
        text = first.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(str(first), Absent(), f"can't be read: {error}")]) from error
    if first.suffix in (".yaml", ".yml"):
        return VerlRun({**_of_yaml(first, text), **_values(arguments[1:])})
    of_script = [argument for argument in arguments[1:] if "." not in argument.partition("=")[0]]
    call = trainer_call(text, dict(argument.split("=", 1) for argument in of_script if "=" in argument))
    if call is None:
        allowed = "calls no trainer of verl's: no `python3 -m verl.trainer.main_ppo` was found"
        raise ConfigError([Problem(str(first), Absent(), allowed, "give the overrides themselves, or a YAML of them")])
    given = _values([*call.arguments, *(argument for argument in arguments[1:] if argument not in of_script)])
    name = _config_name(call.arguments)
    if "megatron" in name:
        given.setdefault("model_engine", "megatron")
    return VerlRun(given, call.module, name, call.undecided)


def _config_name(passed: Sequence[str]) -> str:
    """Return the config that a command line of Hydra's starts from."""
    flags = ("--config-name", "-cn")
    found = [text.partition("=")[2] for text in passed if text.startswith(tuple(f"{flag}=" for flag in flags))]
    found += [name for flag, name in pairwise(passed) if flag in flags]
    return found[-1].removesuffix(".yaml") if found else "ppo_trainer"


def _values(texts: Sequence[str]) -> dict[str, Any]:
    """Return key -> value of overrides; flags and the script's own words are passed over."""
    values: dict[str, Any] = {}
    problems = []
    for before, text in pairwise(["", *texts]):
        if text.startswith("-") or (before.startswith("-") and "=" not in before + text) or not text.strip():
            continue
        key, sign, value = text.lstrip("+").partition("=")
        if text.startswith("~"):
            values.pop(key.lstrip("~"), None)
        elif sign and key.replace(".", "").replace("_", "").replace("/", "").replace("@", "").isalnum():
            values.update(_leaves(key, parsed(value)))
        else:
            problems.append(Problem(text, Absent(), "is not key=value"))
    if problems:
        raise ConfigError(problems)
    return values


def parsed(text: str) -> Any:
    """Return a value as Hydra reads it; as text where Hydra can't, as with a command of the shell's in it."""
    try:
        value = OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return text
    return _plain(value)


def _plain(value: Any) -> Any:
    """Return a value without Hydra's own classes for quoted text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return getattr(value, "text", value)


def _of_yaml(path: Path, text: str) -> dict[str, Any]:
    """Return key -> value of a YAML file: a list of overrides, or sections as in a config."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError([Problem(str(path), Absent(), f"can't be read as YAML: {error}")]) from error
    if isinstance(found, list):
        return _values([str(item) for item in found])
    if not isinstance(found, Mapping):
        raise ConfigError([Problem(str(path), Absent(), "must be a list of key=value, or sections of keys")])
    sections = {name: value for name, value in found.items() if name not in ("defaults", "hydra")}
    return {key: value for name, inner in sections.items() for key, value in _leaves(str(name), inner)}


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a section with their values; a value that is none as it is."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key, value
