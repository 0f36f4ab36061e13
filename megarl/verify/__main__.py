"""Prove that the layout doesn't change the mathematics: ``python -m megarl.verify``, by itself or under torchrun."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megarl.config.command_line import FlagParser, end_quietly_with_the_reader
from megarl.config.compose import errors_reported
from megarl.errors import Absent, ConfigError, Problem
from megarl.launchers.start import end_process, serve_if_not_controller
from megarl.parallel.environment import apply_environment
from megarl.verify.figures import Row, Tolerances
from megarl.verify.layouts import Layouts, check_names, chosen, layouts_of
from megarl.verify.site import num_placed_ranks, opened
from megarl.verify.subject import Subject, subjects

HELP = """\
usage: python -m megarl.verify [--layouts all|quick|NAME,...] [--max-ranks N] [--model FOLDER] [--no-engine]
                               [--minutes N] [--out FILE] [--scratch FOLDER]
       torchrun --nnodes=N --nproc-per-node=M ... -m megarl.verify ...

  --layouts WHAT           all that the rules allow (the default), quick: few that use every axis between them, or names
                           with commas between them, such as tp2xpp2+sp
  --max-ranks N            ranks of the largest layout, each a process; default 8, at most the GPUs there are on CUDA;
                           under torchrun all that it started
  --model FOLDER           a Hugging Face folder with weights, in place of tiny random models
  --no-engine              start no vLLM
  --minutes N              begin with no layout later than so many minutes after the first; the page says how many were
                           left out
  --out FILE               where the page goes; default docs/parity.md, or stdout where there is no folder docs
  --scratch FOLDER         where models and exports lie meanwhile; all nodes must see it. Default the temporary folder,
                           on several nodes the current one
  --logprob-tolerance X    largest error of a log-prob in float32, times Hugging Face's own; default 4
  --bf16-tolerance X       mean error of a log-prob in bfloat16, times Hugging Face's own; default 2
  --training-tolerance X   difference of loss and gradient norm of the first optimizer step, times the error of
                           Hugging Face's log-probs and of its gradient; default 4
  --later-tolerance X      difference of the losses of later steps, times the error of a log-prob; default 20
  --timeout SECONDS        for one layout; default 600

Exit code 0 where everything is within tolerance, 1 where something isn't, 2 for a mistake in the command."""
DEFAULT_PAGE = Path("docs/parity.md")
DEFAULT_RANKS = 8
OVER_TOLERANCE = 1


def main(arguments: Sequence[str]) -> int:
    """Check the arguments, verify, and write the page. Return the exit code. Raises MegarlError."""
    flags = _flags(arguments)
    if flags.help:
        end_quietly_with_the_reader()
        print(HELP)
        return 0
    max_ranks, models = _max_ranks(flags.max_ranks), subjects(flags.model)
    check_names(flags.layouts, [layouts_of(model.shape, max_ranks) for model in models], max_ranks)
    if flags.out is not None and not Path(flags.out).absolute().parent.is_dir():
        raise ConfigError([Problem("--out", flags.out, "must be in a folder that is there")])
    if flags.scratch is not None and not flags.scratch.is_dir():
        raise ConfigError([Problem("--scratch", str(flags.scratch), "must be a folder that is there")])
    return _verify(flags, max_ranks, models, arguments)


def _max_ranks(asked: int | None) -> int:
    """Return the ranks that a layout may have. Raises ConfigError for more than were started, where others were."""
    started = num_placed_ranks()
    if started is None:
        return asked or DEFAULT_RANKS
    if asked is not None and asked > started:
        fix = "start more (torchrun --nnodes, --nproc-per-node), or leave it out"
        allowed = f"must be at most {started}, as many ranks as were started"
        raise ConfigError([Problem("--max-ranks", asked, allowed, fix)])
    return asked or started


def _flags(arguments: Sequence[str]) -> argparse.Namespace:
    parser = FlagParser()
    parser.add_argument("--layouts", default="all")
    parser.add_argument("--max-ranks", type=int)
    parser.add_argument("--model")
    parser.add_argument("--engine", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--out")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--logprob-tolerance", type=float, default=Tolerances.logprobs)
    parser.add_argument("--bf16-tolerance", type=float, default=Tolerances.bf16)
    parser.add_argument("--training-tolerance", type=float, default=Tolerances.training)
    parser.add_argument("--later-tolerance", type=float, default=Tolerances.later)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--help", "-h", action="store_true")
    flags = parser.parse_args(list(arguments))
    problems = [
        Problem(name, value, f"must be {allowed}")
        for name, value, is_right, allowed in [
            ("--max-ranks", flags.max_ranks, flags.max_ranks is None or flags.max_ranks >= 1, "at least 1"),
            ("--logprob-tolerance", flags.logprob_tolerance, flags.logprob_tolerance >= 0, "at least 0"),
            ("--bf16-tolerance", flags.bf16_tolerance, flags.bf16_tolerance >= 0, "at least 0"),
            ("--training-tolerance", flags.training_tolerance, flags.training_tolerance >= 0, "at least 0"),
            ("--later-tolerance", flags.later_tolerance, flags.later_tolerance >= 0, "at least 0"),
            ("--timeout", flags.timeout, flags.timeout > 0, "greater than 0"),
            ("--minutes", flags.minutes, flags.minutes > 0, "greater than 0"),
        ]
        if not is_right
    ]
    if not flags.layouts:
        problems.append(Problem("--layouts", Absent(), "must be all, quick, or names with commas between them"))
    if problems:
        raise ConfigError(problems)
    return flags


def _verify(flags: argparse.Namespace, asked_ranks: int, models: Sequence[Subject], arguments: Sequence[str]) -> int:
    apply_environment()
    import torch

    from megarl.parallel.platform import install_platform

    platform, max_ranks, num_placed = install_platform(), asked_ranks, num_placed_ranks()
    device = f"a CPU of {os.cpu_count()} cores over gloo"
    if platform.name == "cuda":
        if num_placed is None:
            max_ranks = min(max_ranks, torch.cuda.device_count())
        device = f"{torch.cuda.get_device_name(0)} over nccl"
    from megarl.verify.page import Page, failures, line_of
    from megarl.verify.suite import Suite, engine_is_installed, verify

    with_engine = flags.engine and engine_is_installed()
    layouts: dict[Subject, Layouts] = {m: chosen(layouts_of(m.shape, max_ranks), flags.layouts) for m in models}
    count, done = sum(map(len, layouts.values())), list[Row]()

    def report(row: Row) -> None:
        done.append(row)
        print(line_of(row, len(done), count), flush=True)

    tolerances = Tolerances(
        flags.logprob_tolerance, flags.bf16_tolerance, flags.training_tolerance, flags.later_tolerance
    )
    suite = Suite(layouts, tolerances, with_engine, flags.timeout, 60 * flags.minutes)
    folders = [model.folder for model in models if model.folder is not None]
    with opened(suite.max_ranks, flags.scratch, folders, with_engine=with_engine) as site:
        if site.num_nodes > 1:
            device = f"{site.num_nodes} nodes, the first with {device}"
        print(
            f"{count} layouts of {len(models)} models, on up to {max_ranks} ranks, {device}"
            f"{'' if max_ranks == asked_ranks else f' (of {asked_ranks} asked for: there are no more GPUs)'}"
            f"{'' if with_engine or not flags.engine else '; vLLM is not installed: no engine is started'}",
            flush=True,
        )
        rows, references = verify(suite, site, report)
    command = _command(arguments, num_placed, site.num_nodes)
    page = Page(command, device, tolerances, models, references, rows, count - len(rows))
    _write(page.text(), flags.out)
    for sentence in failures(rows):
        print(sentence, file=sys.stderr)
    return 0 if all(row.passes for row in rows) else OVER_TOLERANCE


def _command(arguments: Sequence[str], num_placed: int | None, num_nodes: int) -> str:
    """Return the command as typed, without the folders of this machine; of ranks that were started, as for torchrun."""
    shown = ["=".join(Path(part).name or part for part in argument.split("=")) for argument in arguments]
    if num_placed is None:
        return shlex.join(["python", "-m", "megarl.verify", *shown])
    sizes = [f"--nnodes={num_nodes}", f"--nproc-per-node={num_placed // num_nodes}"]
    return shlex.join(["torchrun", *sizes, "-m", "megarl.verify", *shown])


def _write(text: str, out: str | None) -> None:
    if out is None and not DEFAULT_PAGE.parent.is_dir():
        print(text)
        return
    path = Path(out) if out is not None else DEFAULT_PAGE
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


def _serve() -> None:
    from megarl.verify.torchrun_pool import serve

    serve()


if __name__ == "__main__":
    if serve_if_not_controller(_serve):
        sys.exit()
    with errors_reported():
        end_process(main(sys.argv[1:]))
