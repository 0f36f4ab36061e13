"""What overlapped in a run, from its timeline: ``python -m megarl.trace RUN``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megarl.config.compose import errors_reported
from megarl.errors import DataError
from megarl.monitor.trace import TIMELINE, engines_in, overlap_share, read_spans, training_s


def main(arguments: Sequence[str] | None = None) -> None:
    """Print how long a run's passes and updates took, and in what share of that time engines generated."""
    parser = argparse.ArgumentParser(prog="python -m megarl.trace", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run with trainer.logger=[...,trace]")
    path = parser.parse_args(arguments).run / TIMELINE
    with errors_reported():
        if not path.is_file():
            raise DataError(f"{path} is not there. fix: name a run whose trainer.logger has trace")
        spans = read_spans(path)
        print(
            f"passes and updates took {training_s(spans):.1f} s; "
            f"rollouts were generated in {overlap_share(spans):.0%} of that time"
        )
        for number in range(engines_in(spans)):
            print(f"  engine {number}: {overlap_share(spans, number):.0%}")


if __name__ == "__main__":
    main()
