"""Rollouts of an engine in the trainer's ranks and of one in a process of its own, against bare vLLM.

    OMP_NUM_THREADS=1 python benchmarks/rollout.py [--turns 5] [--write]

All three have the same weights, prompts, seeds and settings, those of benchmarks/laptop.py, and one thread each, and
take turns; it stops where their tokens differ. Of all turns the fastest counts. --write puts the table into
docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

from laptop import (
    SPEC,
    Rollouts,
    alone,
    engine_of_megarl,
    engine_of_vllm,
    requests,
    rollouts_by_turns,
    serve,
    weights,
    write_task,
)
from page import write_measured

from megarl.parallel.environment import apply_environment

NAMES = ("bare vLLM", "in the trainer's ranks", "in a process of its own")


def engine_of_server(connection: Connection, folder: Path) -> None:
    """Do as ``engine_of_megarl`` with an engine in a process of its own, of which this one is the controller."""
    alone()
    import torch

    from megarl.controller.served_engines import ServedEngines
    from megarl.launchers.engine_processes import EngineProcesses
    from megarl.parallel.layout import EngineLayout, Layout
    from megarl.ranks.spec import EngineStart
    from megarl.rollout.served import Take
    from megarl.rollout.vllm import VllmSpec
    from megarl.verify.roles import role_on
    from megarl.weights.shared import SharedWriter
    from megarl.weights.shared_plan import writer_plan

    actor = role_on(Layout(1, fsdp=1), folder)
    start = EngineStart(VllmSpec(model_folder=str(folder), **SPEC), actor)
    writer = SharedWriter(
        writer_plan(actor.shape, actor.layout, EngineLayout(1), 0, torch.float32.itemsize), torch.float32
    )
    asked, sampling = requests()
    with closing(ServedEngines(lambda number: EngineProcesses(start, None), 1, 600.0, sys.stderr.write)) as engines:

        def generate() -> list[tuple[int, ...]]:
            groups = engines.collect(engines.ask(asked, sampling))
            return [rollout.token_ids for group in groups for rollout in group]

        engines.take(Take(0, (writer.write(weights(folder), 0),)))
        serve(connection, generate)


def table(measured: Sequence[Rollouts]) -> str:
    """Return tokens a second of each engine, beside those of the first."""
    lines = ["| engine | tokens/s | of bare vLLM | CPU seconds |", "|---|---|---|---|"]
    for name, rollouts in zip(NAMES, measured, strict=True):
        ratio = rollouts.rate / measured[0].rate
        lines.append(f"| {name} | {rollouts.rate:.0f} | {ratio:.2f} | {rollouts.cpu_seconds:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    flags = parser.parse_args()
    apply_environment()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder)
        makers = (engine_of_vllm, engine_of_megarl, engine_of_server)
        text = table(rollouts_by_turns(folder, flags.turns, makers))
    print(text)
    if flags.write:
        write_measured("rollout", text)


if __name__ == "__main__":
    main()
