"""The loop of supervised fine-tuning: one optimizer step a batch of demonstrations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarl.batching.pack import sequences_to_batch
from megarl.batching.plan import BatchPlan, MiniBatch, plan_update
from megarl.checks.rules import num_ranks
from megarl.config.schema import SFTConfig
from megarl.controller.inputs import SFTInputs
from megarl.controller.ranks import Ranks, RoleLayout
from megarl.data.sft import SFTExample
from megarl.launchers.start import worker_group
from megarl.monitor.sinks import Tracker, open_tracker
from megarl.monitor.timing import Stopwatch
from megarl.parallel.layout import layout_of
from megarl.ranks.spec import RunSpec
from megarl.train.work import Metrics
from megarl.types import Batch


@dataclass
class SFTRun:
    """An SFT run after start-up."""

    config: SFTConfig
    ranks: Ranks
    inputs: SFTInputs
    tracker: Tracker
    run_dir: Path
    stopwatch: Stopwatch = field(default_factory=Stopwatch)


@contextmanager
def open_sft_run(
    config: SFTConfig, inputs: SFTInputs, model_folder: str, run_dir: Path, values: Mapping[str, Any]
) -> Iterator[SFTRun]:
    """Start ranks and sinks, and end them afterwards. values: of the config, for the sinks."""
    trainer = config.trainer
    sinks = tuple(dict.fromkeys((*trainer.logger, "jsonl")))
    with (
        worker_group(RunSpec(config, model_folder, inputs.num_steps)) as group,
        open_tracker(
            sinks, run_dir, trainer.project_name, trainer.experiment_name, values, inputs.num_steps
        ) as tracker,
    ):
        layout = layout_of(config.megatron, num_ranks(config))
        ranks = Ranks(group, {"actor": RoleLayout(layout, config.data.micro_batch_size_per_gpu)})
        yield SFTRun(config, ranks, inputs, tracker, run_dir)


def train_sft(run: SFTRun) -> float:
    """Train on the demonstrations; return the last loss (of validation, where there are files for it)."""
    timed, save_freq = run.stopwatch.timed, run.config.trainer.save_freq
    loss = float("nan")
    for step in range(1, run.inputs.num_steps + 1):
        with timed("step"):
            batch = _batch([run.inputs.examples[i] for i in run.inputs.order.batch(step - 1)])
            with timed("update_actor"):
                [update] = run.ranks.update_sft(batch, _plan(run.inputs.batch_plan, len(batch)))
        loss = update["loss"]
        metrics: Metrics = {"loss/train": loss, **{f"actor/{k}": v for k, v in update.items() if k != "loss"}}
        if run.inputs.val_examples and step == run.inputs.num_steps:
            loss = metrics["loss/val"] = evaluate(run)
        if save_freq is not None and step % save_freq == 0 and step < run.inputs.num_steps:
            with timed("save"):
                run.ranks.export(run.run_dir / "checkpoints" / f"step_{step}")
        times = {f"time_s/{name}": seconds for name, seconds in run.stopwatch.drain().items()}
        run.tracker.log(step, {**metrics, **times})
    run.ranks.export(run.run_dir / "checkpoints" / "final")
    return loss


def evaluate(run: SFTRun) -> float:
    """Return the mean loss a token over the validation examples."""
    a_pass = run.inputs.batch_plan.rollouts_per_pass
    usable = len(run.inputs.val_examples) // a_pass * a_pass
    batch = _batch(run.inputs.val_examples[:usable])
    [plan] = _plan(run.inputs.batch_plan, usable)
    return run.ranks.evaluate_sft(batch, plan)["loss"]


def _batch(examples: Sequence[SFTExample]) -> Batch:
    return sequences_to_batch([e.token_ids for e in examples], [e.loss_mask for e in examples])


def _plan(plan: BatchPlan, num_rows: int) -> tuple[MiniBatch, ...]:
    return plan_update(num_rows, num_rows, plan.micro_batch_size, plan.dp_size, 1, None)
