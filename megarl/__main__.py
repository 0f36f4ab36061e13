"""The programs of megarl by name: ``python -m megarl NAME ...``, and ``megarl NAME ...`` where it is installed."""

from __future__ import annotations

import runpy
import sys
from dataclasses import dataclass

from megarl.config.command_line import end_quietly_with_the_reader
from megarl.errors import nearest

USER_ERROR = 2


@dataclass(frozen=True)
class Program:
    """A program. module: what ``python -m`` runs. line: what it does, for a list."""

    module: str
    line: str


PROGRAMS = {
    "ppo": Program("megarl.main_ppo", "train by reinforcement learning: PPO, GRPO and the other estimators"),
    "sft": Program("megarl.main_sft", "train on demonstrations"),
    "engine_host": Program("megarl.engine_host", "have the engines of a run on this node, apart from its ranks"),
    "plan": Program("megarl.plan", "what a run would do, hold and move, and whether it fits, before it is launched"),
    "prepare": Program("megarl.data.prepare", "write a data set as the parquet files that a run reads"),
    "checkpoints": Program("megarl.checkpoints", "the checkpoints of a run: list, verify, keep the best"),
    "trace": Program("megarl.trace", "what overlapped in a run, from its timeline"),
    "export": Program("megarl.export", "a Hugging Face folder of a checkpoint"),
    "from_verl": Program("megarl.from_verl", "a script or overrides of verl's as a run of megarl's"),
    "doctor": Program("megarl.doctor", "is this machine fit to run?"),
    "verify": Program("megarl.verify", "prove on this machine that the layout doesn't change the mathematics"),
}


def main() -> None:
    """Run the program that the command line names; list all of them where it names none."""
    name, rest = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("-h", "--help"):
        end_quietly_with_the_reader()
        print(programs_text())
        return
    if name not in PROGRAMS:
        hint = nearest(name, PROGRAMS)
        print(f"megarl: there is no program {name!r}. {hint}\n\n{programs_text()}", file=sys.stderr)
        sys.exit(USER_ERROR)
    sys.argv[1:] = rest
    runpy.run_module(PROGRAMS[name].module, run_name="__main__", alter_sys=True)


def programs_text() -> str:
    """Return the programs with a line each."""
    width = max(map(len, PROGRAMS))
    lines = (f"  {name:<{width}}  {program.line}" for name, program in PROGRAMS.items())
    return "\n".join(
        (
            "usage: megarl PROGRAM ...",
            "",
            *lines,
            "",
            "megarl PROGRAM --help says more. python -m megarl and python -m MODULE do the same: "
            + ", ".join(program.module for program in PROGRAMS.values()),
        )
    )


if __name__ == "__main__":
    main()
