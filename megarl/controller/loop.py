"""The loop is the algorithm: one line a step. Everything it calls is in the file its name says."""

from __future__ import annotations

from megarl.controller.run import Run, S


def train(run: Run[S]) -> None:
    """Train the actor, and the critic where there is one, as the recipe says."""
    sampler, recipe, timed = run.sampler, run.recipe, run.stopwatch.timed
    actor, ref, critic = run.actor, run.ref, run.critic  # None where nothing needs them

    with timed("publish"):
        run.publish(actor)
    for step in run.steps():
        with timed("sample"):
            samples = sampler.take(step)
        with timed("log_probs"):
            old_BS = recipe.old_logprobs(samples, actor, step)
            ref_BS = ref.logprobs(samples.batch) if ref else None
            values_BS = critic.values(samples.batch) if critic else None
        with timed("advantages"):
            batch = recipe.train_batch(samples, old_BS, ref_BS, values_BS, step)
        if critic and batch.values:
            with timed("update_critic"):
                run.tell(critic.update(batch.values, step).metrics)
        update = None
        if step > recipe.critic_warmup_steps:
            with timed("update_actor"):
                update = actor.update(batch.policy, step)
            run.tell(update.metrics)
            with timed("publish"), sampler.paused():
                run.publish(actor)
        run.tell(recipe.metrics(samples, batch, update))
