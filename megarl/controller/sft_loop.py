"""The loop of supervised fine-tuning: one optimizer step a batch of demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megarl.config.schema import SFTConfig
from megarl.controller.ranks import Ranks
from megarl.data.batch import sequences_to_batch
from megarl.data.order import Order
from megarl.data.sft import SFTExample
from megarl.monitor.sinks import Tracker
from megarl.monitor.timing import Stopwatch
from megarl.plan.batch import BatchPlan, MiniBatch, plan_update
from megarl.train.work import Metrics
from megarl.types import Batch


@dataclass
class SFTRun:
    """An SFT run after start-up."""

    config: SFTConfig
    ranks: Ranks
    examples: Sequence[SFTExample]
    val_examples: Sequence[SFTExample]
    order: Order
    batch_plan: BatchPlan
    num_steps: int
    tracker: Tracker
    run_dir: Path
    stopwatch: Stopwatch = field(default_factory=Stopwatch)


def train_sft(run: SFTRun) -> float:
    """Train on the demonstrations; return the last loss (of validation, where there are files for it)."""
    timed, save_freq = run.stopwatch.timed, run.config.trainer.save_freq
    loss = float("nan")
    for step in range(1, run.num_steps + 1):
        with timed("step"):
            batch = _batch([run.examples[i] for i in run.order.batch(step - 1)])
            with timed("update_actor"):
                [update] = run.ranks.update_sft(batch, _plan(run.batch_plan, len(batch)))
        loss = update["loss"]
        metrics: Metrics = {"loss/train": loss, **{f"actor/{k}": v for k, v in update.items() if k != "loss"}}
        if run.val_examples and step == run.num_steps:
            loss = metrics["loss/val"] = evaluate(run)
        if save_freq is not None and step % save_freq == 0 and step < run.num_steps:
            with timed("save"):
                run.ranks.export(run.run_dir / "checkpoints" / f"step_{step}")
        times = {f"time_s/{name}": seconds for name, seconds in run.stopwatch.drain().items()}
        run.tracker.log(step, {**metrics, **times})
    run.ranks.export(run.run_dir / "checkpoints" / "final")
    return loss


def evaluate(run: SFTRun) -> float:
    """Return the mean loss a token over the validation examples."""
    a_pass = run.batch_plan.rollouts_per_pass
    usable = len(run.val_examples) // a_pass * a_pass
    batch = _batch(run.val_examples[:usable])
    [plan] = _plan(run.batch_plan, usable)
    return run.ranks.evaluate_sft(batch, plan)["loss"]


def _batch(examples: Sequence[SFTExample]) -> Batch:
    return sequences_to_batch([e.token_ids for e in examples], [e.loss_mask for e in examples])


def _plan(plan: BatchPlan, num_rows: int) -> tuple[MiniBatch, ...]:
    return plan_update(num_rows, num_rows, plan.micro_batch_size, plan.dp_size, 1, None)
