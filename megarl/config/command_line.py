"""The command line of a run: flags, then ``key=value`` in any order; every mistake in it is reported together."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from megarl.errors import Absent, ConfigError, Problem, nearest

SEARCHPATH = "hydra.searchpath"


class FlagParser(argparse.ArgumentParser):
    """A parser of flags whose mistakes are ConfigErrors. Values of the config are left to others."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError in place of printing usage."""
        flag, _, wrong = message.removeprefix("argument ").partition(": ")
        raise ConfigError([Problem(flag, Absent(), wrong or "can't be read", "see --help")])


def take_flags(parser: FlagParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags that ``parser`` knows and the arguments that remain. Raises ConfigError for a wrong value."""
    return parser.parse_known_args(list(arguments))


@dataclass(frozen=True)
class CommandLine:
    """What was typed. overrides: parsed ``key=value``, ``+key=value``, ``++key=value`` and ``~key``, in order."""

    config_name: str
    config_dir: Path | None
    prints_config: bool
    resolves: bool
    wants_help: bool
    overrides: tuple[Override, ...]


def parse_command_line(arguments: Sequence[str], config_name: str) -> CommandLine:
    """Return what ``arguments`` say; ``config_name`` where they name none. Raises ConfigError with all problems."""
    parser = _parser(config_name)
    flags, rest = take_flags(parser, arguments)
    known = [o for action in parser._actions for o in action.option_strings if o.startswith("--")]
    problems = [
        Problem(a, Absent(), "no such flag", nearest(a.split("=")[0], known) or f"flags: {', '.join(known)}")
        for a in rest
        if a.startswith("-")
    ]
    if flags.resolve and not flags.cfg:
        problems.append(Problem("--resolve", Absent(), "has no effect without --cfg job", "--cfg job --resolve"))
    overrides = _parsed([a for a in rest if not a.startswith("-")], problems)
    problems += _sweeps(overrides)
    problems += _twice(overrides)
    problems += _of_hydra(overrides)
    if problems:
        raise ConfigError(problems)
    return CommandLine(
        flags.config_name.removesuffix(".yaml"),
        Path(flags.config_dir).expanduser().absolute() if flags.config_dir is not None else None,
        flags.cfg is not None,
        flags.resolve,
        flags.help,
        tuple(overrides),
    )


def _parser(config_name: str) -> FlagParser:
    parser = FlagParser()
    parser.add_argument("--config-name", "-cn", default=config_name)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--cfg", "-c", choices=("job",))
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    return parser


def _parsed(typed: Sequence[str], problems: list[Problem]) -> list[Override]:
    """Return each override as Hydra's grammar reads it; note those that it can't."""
    parser, overrides = OverridesParser.create(), []
    for text in typed:
        key, equals, value = text.partition("=")
        if not key.strip("+~"):
            problems.append(Problem(repr(text), Absent(), "has no key", "key=VALUE"))
            continue
        try:
            overrides += parser.parse_overrides([text])
        except HydraException:
            if equals and "[" in key:
                allowed = "can't be read: an item of a list can't be set alone"
                problems.append(Problem(key, value, allowed, f"{key.partition('[')[0]}='[...]'"))
            elif equals:
                allowed = "can't be read: a quote or bracket is left open, or a sign needs quotes"
                problems.append(Problem(key.lstrip("+~"), value, allowed, f"""'{key}="..."', quotes included"""))
            else:
                problems.append(Problem(text, Absent(), "is neither key=value nor a flag", f"{key}=VALUE"))
    return overrides


def _sweeps(overrides: Sequence[Override]) -> list[Problem]:
    """A run has one value for each key."""
    allowed = "is several values, and a run has one; a list stands in brackets"
    return [
        Problem(
            o.key_or_group,
            o.get_value_string(),
            allowed,
            "give one value" if "(" in o.get_value_string() else f"{o.key_or_group}='[{o.get_value_string()}]'",
        )
        for o in overrides
        if o.is_sweep_override()
    ]


def _twice(overrides: Sequence[Override]) -> list[Problem]:
    """A file is picked once, and a key isn't both set and removed. Of two values the last counts, as for scripts."""
    counts = Counter(key_of(o) for o in overrides)
    plain = {key for key in counts if "." in key and not any(o.is_delete() for o in overrides if key_of(o) == key)}
    return [
        Problem(
            key,
            " and ".join((o.input_line or "").partition("=")[2] or "~" for o in overrides if key_of(o) == key),
            "is set more than once on the command line",
            "leave all but one out",
        )
        for key, count in counts.items()
        if count > 1 and key not in plain
    ]


def _of_hydra(overrides: Sequence[Override]) -> list[Problem]:
    """Hydra composes; it makes no folders, logs and sweeps here."""
    allowed = f"has no effect: of Hydra's own settings only {SEARCHPATH} is used"
    return [
        Problem(key_of(o), (o.input_line or "").partition("=")[2], allowed, "leave it out; see trainer.run_dir")
        for o in overrides
        if o.is_hydra_override() and o.key_or_group != SEARCHPATH
    ]


def key_of(override: Override) -> str:
    """Return the key without +, ++ or ~: ``a.b``, ``group`` or ``group@package``."""
    return override.get_key_element().lstrip("+~")
