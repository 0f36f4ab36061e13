"""Supervised fine-tuning: ``python -m megarl.main_sft --config-name=sft_trainer [overrides]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from megarl.config.build import build_config
from megarl.config.compose import run_hydra
from megarl.config.model_shape import read_model_shape
from megarl.config.rules import check_schedule, check_sft, check_sft_model, num_ranks
from megarl.config.schema import SFTConfig
from megarl.controller.start import check_world_size, resolve_model_folder, serve_if_not_controller


def main() -> None:
    """Compose, check, start, loop, report."""
    if not serve_if_not_controller():
        run_hydra("sft_trainer", run_sft)


def run_sft(values: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Run what resolved config values describe."""
    config = build_config(SFTConfig, values)
    check_sft(config)
    check_world_size(config)
    folder = resolve_model_folder(cast(str, config.model.path))
    check_sft_model(config, read_model_shape(folder))

    from megarl.controller.rank import RunSpec
    from megarl.controller.ranks import Ranks, RoleLayout
    from megarl.controller.sft_loop import SFTRun, train_sft
    from megarl.controller.start import worker_group
    from megarl.data.chat import load_tokenizer
    from megarl.data.order import Order
    from megarl.data.sft import load_sft_examples
    from megarl.monitor.rundir import create_run_dir
    from megarl.monitor.sinks import open_tracker
    from megarl.parallel.layout import layout_of
    from megarl.plan.batch import plan_batch

    data, trainer = config.data, config.trainer
    layout = layout_of(config.megatron, num_ranks(config))
    size = data.train_batch_size
    plan = plan_batch(
        num_prompts=size, n=1, mini_batch_size=size, micro_batch_size=data.micro_batch_size_per_gpu, dp_size=layout.dp
    )
    tokenizer = load_tokenizer(folder)
    train_set, val_set = (
        load_sft_examples(
            files,
            tokenizer,
            messages_key=data.messages_key,
            max_length=data.max_length,
            overlong=cast(Literal["filter", "error"], data.overlong_examples),
        )
        if files
        else ()
        for files in (data.train_files, data.val_files)
    )
    order = Order(len(train_set), size, data.train_shuffle, trainer.seed)
    num_steps = trainer.total_training_steps or trainer.total_epochs * order.batches_per_epoch
    check_schedule("lr_scheduler", config.lr_scheduler, num_steps)
    run_dir = create_run_dir(Path(trainer.run_dir).expanduser().absolute(), values, overrides)
    print(f"run folder: {run_dir}\n{plan.describe()}", flush=True)
    sinks = tuple(dict.fromkeys((*trainer.logger, "jsonl")))
    with (
        worker_group(RunSpec(config, folder, num_steps)) as group,
        open_tracker(sinks, run_dir, trainer.project_name, trainer.experiment_name, values, num_steps) as tracker,
    ):
        ranks = Ranks(group, {"actor": RoleLayout(layout, data.micro_batch_size_per_gpu)})
        loss = train_sft(SFTRun(config, ranks, train_set, val_set, order, plan, num_steps, tracker, run_dir))
    print(f"loss after {num_steps} steps: {loss:.4f}\nmodel: {run_dir / 'checkpoints' / 'final'}", flush=True)


if __name__ == "__main__":
    main()
