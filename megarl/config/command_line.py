"""The command line of a run: flags, then ``key=value`` in any order; every mistake in it is reported together."""

from __future__ import annotations

import argparse
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from megarl.errors import Absent, ConfigError, Problem, nearest

EXPERIMENT = "experiment"
_LINE_END = re.compile(r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|\s*\n\s*""")
_FLAGS = ("--config-name", "--config-dir", "--cfg", "--resolve", "--help")
_QUOTES = """key=VALUE, or 'key="VALUE"' where a value has commas, brackets, quotes or signs"""


class FlagParser(argparse.ArgumentParser):
    """A parser of flags whose mistakes are ConfigErrors. Values of the config are left to others."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError in place of printing usage."""
        flag, _, wrong = message.removeprefix("argument ").partition(": ")
        raise ConfigError([Problem(flag, Absent(), wrong or "can't be read", "see --help")])


def end_quietly_with_the_reader() -> None:
    """Have this process, which only prints, end without a word where a pager or head has seen enough."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def only_prints(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for help or for the config: what one process prints, however many were started."""
    return any(word.partition("=")[0] in ("--help", "-h", "--cfg", "-c") for word in arguments)


def take_flags(parser: FlagParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags that ``parser`` knows and the arguments that remain. Raises ConfigError for a wrong value."""
    return parser.parse_known_args(list(arguments))


@dataclass(frozen=True)
class CommandLine:
    """A command line as typed. overrides: parsed ``key=value``, ``+key=value``, ``++key=value`` and ``~key``.

    is_named: whether --config-name was given.
    """

    config_name: str
    config_dir: Path | None
    prints_config: bool
    resolves: bool
    wants_help: bool
    overrides: tuple[Override, ...]
    is_named: bool = True

    @property
    def recipe(self) -> str | None:
        """The recipe that was asked for."""
        chosen = [o.value() for o in self.overrides if o.key_or_group == EXPERIMENT and not o.is_delete()]
        return str(chosen[-1]) if chosen and chosen[-1] is not None else None


def parse_command_line(arguments: Sequence[str], config_name: str) -> CommandLine:
    """Return the CommandLine of ``arguments``; ``config_name`` where they name none. Raises ConfigError."""
    parser = FlagParser()
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--cfg", "-c", choices=("job",))
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    flags, rest = take_flags(parser, arguments)
    problems: list[Problem] = []
    overrides: list[Override] = []
    if flags.resolve and not flags.cfg:
        problems.append(Problem("--resolve", Absent(), "has no effect without --cfg job", "--cfg job --resolve"))
    folder = None if flags.config_dir is None else Path(flags.config_dir).expanduser().absolute()
    for text in rest:
        read = _no_such_flag(text) if text.startswith("-") else _override(text)
        if isinstance(read, Problem):
            problems.append(read)
        else:
            overrides.append(read)
    if problems:
        raise ConfigError(problems)
    name, prints_config = (flags.config_name or config_name).removesuffix(".yaml"), flags.cfg is not None
    is_named = flags.config_name is not None
    return CommandLine(name, folder, prints_config, flags.resolve, flags.help, tuple(overrides), is_named)


def _no_such_flag(text: str) -> Problem:
    fix = nearest(text.partition("=")[0], _FLAGS) or f"flags: {', '.join(_FLAGS)}"
    return Problem(text, Absent(), "no such flag", fix)


def _override(text: str) -> Override | Problem:
    """Return one override as Hydra's grammar reads it, or what is wrong with it, in Hydra's words.

    A value may be written over several lines, which Hydra's grammar doesn't know: outside quotes a line's end is space.
    """
    try:
        override = OverridesParser.create().parse_override(_LINE_END.sub(lambda found: found[1] or " ", text))
    except HydraException as error:
        told = [line for line in str(error).splitlines() if not line.startswith(("See ", "Error parsing"))]
        return Problem(text, Absent(), f"is neither key=value nor a flag: {told[0]}", _QUOTES)
    if not override.key_or_group:
        return Problem(text, Absent(), "has no key", _QUOTES)
    if override.is_sweep_override():
        allowed = "is several values, and a run has one"
        return Problem(override.key_or_group, override.get_value_string(), allowed, f"{_QUOTES}; a list is key='[a,b]'")
    if override.is_hydra_override():
        allowed = "has no effect: Hydra composes the config here and does nothing else"
        return Problem(text, Absent(), allowed, "leave it out; see trainer.run_dir")
    return override
