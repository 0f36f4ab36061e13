"""Run the quickstart on several seeds and write docs/learning_curve.png and the table of docs/learning.md.

    python benchmarks/learning.py --seeds 0 1 2

Each seed is one launch/quickstart.sh, timed with start-up, in a folder of its own under --work. Figures go between
the markers of docs/learning.md; the text around them stays.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True)
class Result:
    """One seed. accuracy: held-out greedy accuracy by step. wall_s: seconds of the whole command."""

    seed: int
    accuracy: dict[int, float]
    reward: dict[int, float]
    wall_s: float
    command: str


def run_seed(seed: int, work: Path, overrides: list[str]) -> Result:
    """Run the quickstart with ``seed`` and read what it left."""
    folder = work / f"seed_{seed}"
    folder.mkdir(parents=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(REPOSITORY / "launch/quickstart.sh"), str(seed), *overrides]
    start = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    wall_s = time.perf_counter() - start
    [run] = [p for p in (folder / "outputs").iterdir() if not p.name.endswith("_sft")]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracy = {s["step"]: s["val/reward_mean"] for s in steps if "val/reward_mean" in s}
    report = (folder / "log.txt").read_text()
    accuracy[0] = float(re.findall(r"before training: ([\d.]+)", report)[-1])
    accuracy[steps[-1]["step"]] = float(re.findall(r"after \d+ steps: ([\d.]+)", report)[-1])
    typed = " ".join(["launch/quickstart.sh", str(seed), *overrides])
    return Result(seed, dict(sorted(accuracy.items())), {s["step"]: s["reward/mean"] for s in steps}, wall_s, typed)


def table(results: list[Result]) -> str:
    """Return the measured part of docs/learning.md."""
    steps = list(results[0].accuracy)
    lines = [
        "| seed | " + " | ".join("warm start" if s == 0 else f"step {s}" for s in steps) + " | gain | wall time |",
        "|---" * (len(steps) + 3) + "|",
    ]
    for r in results:
        values = list(r.accuracy.values())
        cells = " | ".join(f"{v:.3f}" for v in values)
        lines.append(f"| {r.seed} | {cells} | {values[-1] - values[0]:+.3f} | {r.wall_s:.0f} s |")
    return "\n".join(lines)


def plot(results: list[Result], out: Path) -> None:
    """Draw held-out accuracy and training reward over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for i, r in enumerate(results):
        axes.plot(list(r.accuracy), list(r.accuracy.values()), "o-", color=f"C{i}", label=f"held-out, seed {r.seed}")
        axes.plot(list(r.reward), list(r.reward.values()), "--", color=f"C{i}", alpha=0.4)
    axes.set(xlabel="GRPO step", ylabel="accuracy", ylim=(0, 1), title="quickstart (dashed: reward while sampling)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    """Run the seeds, then write table and curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, required=True, help="a new folder for data and runs")
    options, overrides = parser.parse_known_args()
    results = []
    for seed in options.seeds:
        results.append(run_seed(seed, options.work, overrides))
        print(f"seed {seed}: {results[-1].accuracy} in {results[-1].wall_s:.0f} s", flush=True)
    plot(results, REPOSITORY / "docs/learning_curve.png")
    page = REPOSITORY / "docs/learning.md"
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


if __name__ == "__main__":
    main()
