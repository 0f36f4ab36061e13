"""What the load-balancing loss does to the quickstart's warm start, given experts: routing and loss after some steps.

    python benchmarks/balance.py [--steps 60] [--coefficients 0 0.05]

Runs main_sft once for each coefficient, on four ranks (TP2 x DP2, experts split over 2).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
}
AXES = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 2,
    "expert_tensor_parallel_size": 1,
}
COLUMNS = ("loss/train", "actor/moe/load_max", "actor/moe/load_min", "actor/moe/load_entropy")


def prepare(folder: Path) -> None:
    """Write the quickstart's data into ``folder``, and give its model experts."""
    subprocess.run(
        [sys.executable, "-m", "megarl.data.prepare", "verbs", "--out", "quickstart_data"], cwd=folder, check=True
    )
    config = folder / "quickstart_data" / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | EXPERTS))


def train(folder: Path, steps: int, coefficient: float) -> Mapping[str, float]:
    """Return the metrics of the last of ``steps`` optimizer steps."""
    run = folder / f"run_{coefficient}"
    kind = "seq_aux_loss" if coefficient else "none"
    losses = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": coefficient}
    subprocess.run(
        [
            *(sys.executable, "-m", "megarl.main_sft", "experiment=quickstart_sft"),
            *(f"trainer.total_training_steps={steps}", f"trainer.run_dir={run}"),
            *(f"megatron.{name}={size}" for name, size in AXES.items()),
            *(f"+megatron.override_transformer_config.{name}={value}" for name, value in losses.items()),
        ],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    metrics: Mapping[str, float] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return metrics


def main() -> None:
    """Run, and print a row for each coefficient."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--coefficients", type=float, nargs="+", default=[0.0, 0.05])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        print("| moe_aux_loss_coeff | loss | load_max | load_min | load_entropy |\n|---|---|---|---|---|")
        for coefficient in arguments.coefficients:
            metrics = train(folder, arguments.steps, coefficient)
            print(f"| {coefficient:g} | " + " | ".join(f"{metrics[column]:.3f}" for column in COLUMNS) + " |")


if __name__ == "__main__":
    main()
