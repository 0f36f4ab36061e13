"""Run the quickstart on several seeds and write a curve to docs/ and a table into docs/learning.md.

    python benchmarks/learning.py --work outputs/learning [--name NAME --warm-starts FOLDER] [overrides]

Each seed is one launch/quickstart.sh, timed with start-up, in a folder of its own under --work. With --warm-starts it
is main_ppo alone, from the warm starts of an earlier --work. The table goes between the page's markers for NAME, or is
printed alone without one.
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


@dataclass(frozen=True)
class Result:
    """One seed. accuracy: held-out greedy accuracy by step. wall_s: seconds of the whole command."""

    seed: int
    accuracy: dict[int, float]
    reward: dict[int, float]
    wall_s: float


def run_seed(seed: int, work: Path, warm_starts: Path | None, overrides: list[str]) -> Result:
    """Run the quickstart with ``seed``, or its GRPO part from an earlier warm start, and read what it left."""
    folder = work / f"seed_{seed}"
    folder.mkdir(parents=True)
    command = ["bash", str(REPOSITORY / "launch/quickstart.sh"), str(seed), *overrides]
    if warm_starts is not None:
        [earlier] = (warm_starts / f"seed_{seed}" / "outputs").glob("*_sft")
        (folder / "quickstart_data").symlink_to((warm_starts / f"seed_{seed}" / "quickstart_data").resolve())
        model = (earlier / "checkpoints/final").resolve()
        command = [sys.executable, "-m", "megarl.main_ppo", "--config-name=ppo_megatron_trainer"]
        command += ["experiment=quickstart", f"trainer.seed={seed}"]
        command += [f"actor_rollout_ref.model.path={model}", *overrides]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    start = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    return read_result(seed, folder, time.perf_counter() - start)


def read_result(seed: int, folder: Path, wall_s: float) -> Result:
    """Return what a finished run left in a seed's folder."""
    [run] = [p for p in (folder / "outputs").iterdir() if not p.name.endswith("_sft")]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracy = {s["step"]: s["val/reward_mean"] for s in steps if "val/reward_mean" in s}
    report = (folder / "log.txt").read_text()
    accuracy[0] = float(re.findall(r"before training: ([\d.]+)", report)[-1])
    accuracy[steps[-1]["step"]] = float(re.findall(r"after \d+ steps: ([\d.]+)", report)[-1])
    rewards = {s["step"]: s["reward/mean"] for s in steps if "reward/mean" in s}  # none before training
    return Result(seed, dict(sorted(accuracy.items())), rewards, wall_s)


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


def plot(results: list[Result], name: str, out: Path) -> None:
    """Draw held-out accuracy and training reward over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for i, r in enumerate(results):
        axes.plot(list(r.accuracy), list(r.accuracy.values()), "o-", color=f"C{i}", label=f"held-out, seed {r.seed}")
        axes.plot(list(r.reward), list(r.reward.values()), "--", color=f"C{i}", alpha=0.4)
    axes.set(
        xlabel="GRPO step", ylabel="accuracy", ylim=(0, 1), title=f"quickstart, {name} (dashed: reward while sampling)"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    """Run the seeds, then write table and curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, required=True, help="a new folder for data and runs")
    parser.add_argument("--name", help="which table of docs/learning.md to write, with a curve beside it")
    parser.add_argument("--warm-starts", type=Path, help="a --work folder with warm starts of the same seeds")
    options, overrides = parser.parse_known_args()
    results = []
    for seed in options.seeds:
        results.append(run_seed(seed, options.work, options.warm_starts, overrides))
        print(f"seed {seed}: {results[-1].accuracy} in {results[-1].wall_s:.0f} s", flush=True)
    if options.name is None:
        print(table(results))
        return
    plot(results, options.name, REPOSITORY / f"docs/learning_{options.name}.png")
    page = REPOSITORY / "docs/learning.md"
    begin, end = f"<!-- measured {options.name}: begin -->", f"<!-- measured {options.name}: end -->"
    before, rest = page.read_text().split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n{table(results)}\n{end}{after}")


if __name__ == "__main__":
    main()
