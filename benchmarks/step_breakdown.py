"""How the time of a training step divides: generate, score, log-probs, update, publish, other.

    python benchmarks/step_breakdown.py RUN_FOLDER [RUN_FOLDER ...]

reads the metrics.jsonl that every run leaves, and prints the median over its steps but the first (which warms up).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

PARTS = ("generate", "score", "resample", "log_probs", "advantages", "update_critic", "update_actor", "publish")


def breakdown(run_folder: Path) -> dict[str, float]:
    """Return the median seconds of every part of a step, of ``other`` and of the whole ``step``."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"] > 1]
    if not steps:
        raise SystemExit(f"{run_folder}: a breakdown needs a run of at least two steps")
    times = {p: [s[f"time_s/{p}"] for s in steps] for p in (*PARTS, "step") if f"time_s/{p}" in steps[0]}
    times["other"] = [s["time_s/step"] - sum(s.get(f"time_s/{p}", 0.0) for p in PARTS) for s in steps]
    return {part: statistics.median(values) for part, values in times.items()}


def main() -> None:
    """Print a table a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folders", nargs="+", type=Path)
    for folder in parser.parse_args().run_folders:
        parts = breakdown(folder)
        whole = parts.pop("step")
        print(f"{folder}: median step {whole:.2f} s")
        for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
            print(f"  {part:<14}{seconds:8.3f} s {seconds / whole:6.1%}")


if __name__ == "__main__":
    main()
