"""The loop is the algorithm: one line a step. Everything it calls is in the file its name says."""

from __future__ import annotations

from dataclasses import replace

from megarl.algorithm.advantage import AdvantageInputs
from megarl.batching.pack import rollouts_to_batch
from megarl.batching.plan import plan_update
from megarl.checks.algorithm import needs_critic, needs_reference
from megarl.controller.report import Evaluation, critic_metrics, step_metrics, update_metrics
from megarl.controller.run import Run
from megarl.controller.settings import estimator, policy_loss, value_loss


def train(run: Run) -> tuple[Evaluation | None, Evaluation]:
    """Train the actor; return the validation before (where asked for) and after."""
    config, ranks, timed = run.config, run.ranks, run.stopwatch.timed
    actor, critic, algorithm = config.actor_rollout_ref.actor, config.critic, config.algorithm
    temperature = config.actor_rollout_ref.rollout.temperature
    estimate = estimator(config)

    ranks.publish()
    run.check_publish()
    before = run.validate(step=0) if config.trainer.val_before_train else None
    run.stopwatch.drain()

    for step in range(1, run.num_steps + 1):
        with timed("step"):
            prompts = run.prompts(step)
            with timed("generate"):
                groups, greedy = run.generate(prompts, step)
            with timed("score"):
                rewards, baseline_B = run.score(prompts, groups), run.score_baseline(prompts, greedy)
            if algorithm.filter_groups.enable:
                with timed("resample"):
                    prompts, groups, rewards = run.replace_groups_without_spread(step, prompts, groups, rewards)
            batch = rollouts_to_batch([p.token_ids for p in prompts], groups)
            batch = replace(batch, rewards_B=rewards.scores_B)
            with timed("old_logprobs"):
                batch = replace(batch, old_logprobs_BS=run.old_logprobs(batch))
            if needs_reference(config):
                with timed("ref_logprobs"):
                    batch = replace(batch, ref_logprobs_BS=ranks.logprobs("ref", batch, temperature))
            if needs_critic(config):
                with timed("values"):
                    batch = replace(batch, values_BS=ranks.values(batch))
            with timed("advantages"):
                token_rewards_BS, kl_metrics = run.penalize(batch)
                inputs = AdvantageInputs(
                    rewards.scores_B, batch.group_B, batch.mask_BS, token_rewards_BS, batch.values_BS, baseline_B
                )
                advantages = estimate(inputs)
                batch = replace(batch, advantages_BS=advantages.advantages_BS, returns_BS=advantages.returns_BS)
                metrics = step_metrics(batch, rewards) | kl_metrics
                batch, correction_metrics = run.correct(batch)
                batch = run.select_tokens(batch, step)
                metrics |= correction_metrics
            if needs_critic(config):
                with timed("update_critic"):
                    seed = run.shuffle_seed(critic.shuffle, "critic", step)
                    plan = plan_update(*run.critic_sizes, seed, run.spread("critic", batch))
                    metrics |= critic_metrics(batch, ranks.update_critic(batch, plan, value_loss(config)))
            if step > critic.warmup_steps or not needs_critic(config):
                with timed("update_actor"):
                    seed = run.shuffle_seed(actor.shuffle, "actor", step)
                    plan = plan_update(*run.actor_sizes, seed, run.spread("actor", batch))
                    metrics |= update_metrics("actor", ranks.update_actor(batch, plan, policy_loss(config)))
                with timed("publish"):
                    ranks.publish()
        if run.is_due(config.trainer.test_freq, step):
            with timed("validate"):
                metrics |= run.validate(step).metrics()
        if run.is_due(config.trainer.save_freq, step):
            with timed("save"):
                run.save(f"step_{step}", step)
        run.log(step, metrics, prompts, groups, rewards)

    run.save("final", run.num_steps)
    return before, run.validate(run.num_steps)
