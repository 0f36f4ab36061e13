"""Reinforcement learning: ``python -m megarl.main_ppo --config-name=ppo_megatron_trainer [overrides]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from megarl.config.build import build_config
from megarl.config.compose import run_hydra
from megarl.config.model_shape import read_model_shape
from megarl.config.rules import check_ppo, check_ppo_model, check_schedule, needs_reference, num_ranks
from megarl.config.schema import PPOConfig
from megarl.controller.start import check_world_size, resolve_model_folder, serve_if_not_controller

if TYPE_CHECKING:
    from megarl.controller.report import Evaluation


def main() -> None:
    """Compose, check, start, loop, report."""
    if not serve_if_not_controller():
        run_hydra("ppo_megatron_trainer", run_ppo)


def run_ppo(values: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Run what resolved config values describe."""
    config = build_config(PPOConfig, values)
    check_ppo(config)
    check_world_size(config)
    models = config.actor_rollout_ref
    folder = resolve_model_folder(cast(str, models.model.path))
    check_ppo_model(config, read_model_shape(folder))

    from megarl.controller.loop import train
    from megarl.controller.rank import RunSpec
    from megarl.controller.ranks import Ranks, RoleLayout
    from megarl.controller.run import Run
    from megarl.controller.start import worker_group
    from megarl.data.chat import load_tokenizer
    from megarl.data.order import Order
    from megarl.data.prompts import load_prompts
    from megarl.monitor.rundir import create_run_dir
    from megarl.monitor.sinks import open_tracker
    from megarl.parallel.layout import layout_of
    from megarl.plan.batch import plan_batch
    from megarl.reward.pool import RewardPool
    from megarl.reward.registry import RewardSpec, require_functions

    data, actor, trainer = config.data, models.actor, config.trainer
    layout = layout_of(actor.megatron, num_ranks(config))
    plan = plan_batch(
        num_prompts=data.train_batch_size,
        n=models.rollout.n,
        mini_batch_size=actor.ppo_mini_batch_size,
        micro_batch_size=actor.ppo_micro_batch_size_per_gpu,
        dp_size=layout.dp,
        epochs=actor.ppo_epochs,
    )
    tokenizer = load_tokenizer(folder)
    train_set, val_set = (
        load_prompts(
            files,
            tokenizer,
            prompt_key=data.prompt_key,
            max_prompt_length=data.max_prompt_length,
            overlong=cast(Literal["filter", "error"], data.overlong_prompts),
        )
        for files in (data.train_files, data.val_files)
    )
    order = Order(len(train_set.prompts), data.train_batch_size, data.train_shuffle, trainer.seed)
    num_steps = trainer.total_training_steps or trainer.total_epochs * order.batches_per_epoch
    check_schedule("actor_rollout_ref.actor.lr_scheduler", actor.lr_scheduler, num_steps * plan.num_optimizer_steps)
    log_prob_size = actor.log_prob_micro_batch_size_per_gpu or actor.ppo_micro_batch_size_per_gpu
    roles = {"actor": RoleLayout(layout, log_prob_size)}
    if needs_reference(config):
        ref_size = models.ref.log_prob_micro_batch_size_per_gpu or log_prob_size
        roles["ref"] = RoleLayout(layout_of(models.ref.megatron, num_ranks(config)), ref_size)

    if not config.reward.name and not config.reward.path:
        require_functions({p.data_source for p in (*train_set.prompts, *val_set.prompts)})

    run_dir = create_run_dir(Path(trainer.run_dir).expanduser().absolute(), values, overrides)
    (run_dir / "plan.txt").write_text(plan.describe() + "\n")
    print(f"run folder: {run_dir}\n{plan.describe()}", flush=True)
    _say_overlong(train_set.num_overlong, val_set.num_overlong)

    sinks = tuple(dict.fromkeys((*trainer.logger, "jsonl")))
    reward = config.reward
    spec = RewardSpec(reward.name, reward.path, reward.function)
    run_spec = RunSpec(config, folder, num_steps * plan.num_optimizer_steps)
    with (
        RewardPool(reward.num_workers, reward.timeout_s, spec, reward.score_on_failure) as pool,
        worker_group(run_spec) as group,
        open_tracker(sinks, run_dir, trainer.project_name, trainer.experiment_name, values, num_steps) as tracker,
    ):
        ranks = Ranks(group, roles, models.rollout.tensor_model_parallel_size)
        before, after = train(
            Run(
                config,
                ranks,
                tokenizer,
                train_set.prompts,
                val_set.prompts,
                order,
                plan,
                num_steps,
                pool,
                tracker,
                run_dir,
            )
        )
    report(before, after, run_dir)


def report(before: Evaluation | None, after: Evaluation, run_dir: Path) -> None:
    """Print sampled rollouts and the validation reward before and after, and where the run is."""
    from megarl.monitor.console import rollouts_table

    for name, evaluation in (("before", before), ("after", after)):
        if evaluation is not None and evaluation.rows:
            print(f"\nvalidation rollouts {name} training (step {evaluation.step})\n{rollouts_table(evaluation.rows)}")
    print(f"\nvalidation reward over {after.num_rollouts} rollouts")
    if before is not None:
        print(f"  before training: {before.reward_mean:.3f}")
    print(f"  after {after.step} steps: {after.reward_mean:.3f}")
    print(f"run folder: {run_dir}\nmodel: {run_dir / 'checkpoints' / 'final'}", flush=True)


def _say_overlong(num_train: int, num_val: int) -> None:
    if num_train or num_val:
        print(f"left out as longer than data.max_prompt_length: {num_train} training, {num_val} validation prompts")


if __name__ == "__main__":
    main()
