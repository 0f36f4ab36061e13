"""The loop is the algorithm: one line a step. Everything it calls is in the file its name says."""

from __future__ import annotations

from dataclasses import replace

from megarl.algorithm.advantage import AdvantageInputs, AdvantageSettings, estimators
from megarl.config.rules import needs_reference
from megarl.controller.report import Evaluation, update_metrics
from megarl.controller.run import Run
from megarl.data.batch import rollouts_to_batch
from megarl.plan.batch import plan_update


def train(run: Run) -> tuple[Evaluation | None, Evaluation]:
    """Train the actor; return the validation before (where asked for) and after."""
    config, ranks, timed = run.config, run.ranks, run.stopwatch.timed
    actor, rollout, algorithm = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.algorithm
    estimate = estimators.get(algorithm.adv_estimator)
    settings = AdvantageSettings(norm_by_std=algorithm.norm_adv_by_std_in_grpo)

    ranks.publish()
    run.check_publish()
    before = run.validate(step=0) if config.trainer.val_before_train else None
    run.stopwatch.drain()

    for step in range(1, run.num_steps + 1):
        with timed("step"):
            prompts = run.prompts(step)
            with timed("generate"):
                groups = run.generate(prompts, step)
            with timed("score"):
                rewards = run.score(prompts, groups)
            batch = rollouts_to_batch([p.token_ids for p in prompts], groups)
            batch = replace(batch, rewards_B=rewards.scores_B)
            with timed("old_logprobs"):
                batch = replace(batch, old_logprobs_BS=ranks.logprobs("actor", batch, rollout.temperature))
            if needs_reference(config):
                with timed("ref_logprobs"):
                    batch = replace(batch, ref_logprobs_BS=ranks.logprobs("ref", batch, rollout.temperature))
            with timed("advantages"):
                inputs = AdvantageInputs(rewards.scores_B, batch.group_B, batch.mask_BS)
                batch = replace(batch, advantages_BS=estimate(inputs, settings).advantages_BS)
            with timed("update_actor"):
                seed = run.seed(step) if actor.shuffle else None
                plan = plan_update(*run.update_sizes, seed)
                updates = ranks.update_actor(batch, plan, run.loss)
            with timed("publish"):
                ranks.publish()
        metrics = update_metrics(batch, rewards, updates)
        if run.is_due(config.trainer.test_freq, step):
            with timed("validate"):
                metrics |= run.validate(step).metrics()
        if run.is_due(config.trainer.save_freq, step):
            with timed("save"):
                run.save(f"step_{step}")
        run.log(step, metrics, prompts, groups, rewards)

    run.save("final")
    return before, run.validate(run.num_steps)
