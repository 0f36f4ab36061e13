"""What an estimator needs, and the rules between algorithm, critic, reference and reward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megarl.algorithm.needs import (
    estimator_needs,
    loss_needs,
    needs_critic,
    needs_reference,
    needs_reward_function,
    needs_reward_model,
    uses_kl_loss,
    weighs_or_rejects,
    weight_level,
)
from megarl.catalog import ESTIMATORS, POLICY_LOSSES
from megarl.config.schema import PPOConfig
from megarl.errors import Problem, nearest

Problems = Iterator[Problem]


def the_estimator_is_known(c: PPOConfig) -> Problems:
    """The estimator exists, or a file of the user's may have it."""
    name, key = c.algorithm.adv_estimator, "algorithm.adv_estimator"
    if name not in ESTIMATORS and c.algorithm.path is None:
        allowed = f"must be one of {', '.join(ESTIMATORS)}, or of a file of yours at algorithm.path"
        yield Problem(key, name, allowed, nearest(name, ESTIMATORS))


def the_policy_loss_is_known(c: PPOConfig) -> Problems:
    """The policy loss exists, or a file of the user's may have it."""
    name, key = c.actor_rollout_ref.actor.policy_loss, "actor_rollout_ref.actor.policy_loss"
    if name not in POLICY_LOSSES and c.algorithm.path is None:
        allowed = f"must be one of {', '.join(POLICY_LOSSES)}, or of a file of yours at algorithm.path"
        yield Problem(key, name, allowed, nearest(name, POLICY_LOSSES))


def the_algorithm_file_is_there(c: PPOConfig) -> Problems:
    """algorithm.path names a python file."""
    path = c.algorithm.path
    if path is not None and not (path.endswith(".py") and Path(path).expanduser().is_file()):
        yield Problem("algorithm.path", path, "there is no such .py file", "correct the path")


def a_group_is_large_enough(c: PPOConfig) -> Problems:
    """Estimators that compare the rollouts of a prompt have some to compare."""
    n, least = c.actor_rollout_ref.rollout.n, estimator_needs(c).min_group_size
    if n < least:
        key = "actor_rollout_ref.rollout.n"
        allowed = f"{c.algorithm.adv_estimator} compares the rollouts of a prompt: at least {least}"
        yield Problem(key, n, allowed, f"{key}=8")


def grpo_has_a_kl_term_or_says_not(c: PPOConfig) -> Problems:
    """GRPO without KL is asked for by name."""
    if c.algorithm.adv_estimator == "grpo" and not needs_reference(c) and not c.algorithm.kl_free:
        yield Problem(
            "actor_rollout_ref.actor.use_kl_loss",
            False,
            "grpo keeps the policy near the reference by a KL term, and this run has none: neither this nor "
            "algorithm.use_kl_in_reward is on",
            "actor_rollout_ref.actor.use_kl_loss=true, or algorithm.kl_free=true if that is meant (DAPO, Dr.GRPO)",
        )
    if c.algorithm.kl_free and needs_reference(c):
        allowed = "contradicts actor_rollout_ref.actor.use_kl_loss or algorithm.use_kl_in_reward, which is on"
        yield Problem("algorithm.kl_free", True, allowed, "algorithm.kl_free=false")


def a_kl_term_weighs_something(c: PPOConfig) -> Problems:
    """A reference that is kept for a KL term has a say: an adaptive coefficient that starts at 0 stays there too."""
    terms = (
        (uses_kl_loss(c), "actor_rollout_ref.actor.", "kl_loss_coef", "use_kl_loss"),
        (c.algorithm.use_kl_in_reward, "algorithm.", "kl_ctrl.kl_coef", "use_kl_in_reward"),
    )
    weights = (c.actor_rollout_ref.actor.kl_loss_coef, c.algorithm.kl_ctrl.kl_coef)
    for (is_on, section, name, switch), weight in zip(terms, weights, strict=True):
        if is_on and weight == 0:
            allowed = f"must be above 0 where {section}{switch} is on: the reference would be kept for nothing"
            yield Problem(f"{section}{name}", weight, allowed, f"{section}{switch}=false")


def the_critic_is_there_where_it_is_needed(c: PPOConfig) -> Problems:
    """critic.enable agrees with the estimator."""
    name = c.algorithm.adv_estimator
    if c.critic.enable is False and needs_critic(c):
        yield Problem(
            "critic.enable", False, f"{name} needs a critic's values", "critic.enable=null, or another estimator"
        )


def a_reward_model_weighs_something(c: PPOConfig) -> Problems:
    """A reward model that is kept has a say."""
    if needs_reward_model(c) and c.reward.model.coef == 0:
        allowed = "must not be 0: the reward model would be kept for nothing"
        yield Problem("reward.model.coef", c.reward.model.coef, allowed, "reward.model.path=null")


def components_are_named_and_weighed(c: PPOConfig) -> Problems:
    """An estimator that reads components of the reward has some, from the function alone, and a weight for each."""
    names, weights = c.algorithm.gdpo_reward_keys, c.algorithm.gdpo_reward_weights
    key, estimator = "algorithm.gdpo_reward_keys", c.algorithm.adv_estimator
    if estimator_needs(c).components:
        if not names:
            allowed = f"{estimator} needs the names of the components that the reward function returns beside its score"
            yield Problem(key, [], allowed, f"{key}=[correct,format]")
        for name, is_on, off in (
            ("algorithm.use_kl_in_reward", c.algorithm.use_kl_in_reward, "false"),
            ("reward.overlong_buffer.enable", c.reward.overlong_buffer.enable, "false"),
            ("reward.model.path", needs_reward_model(c), "null"),
        ):
            if is_on:
                allowed = f"is no component of the reward: {estimator} reads those of the function alone"
                yield Problem(name, c.reward.model.path or True, allowed, f"{name}={off}, or another estimator")
    if names and not needs_reward_function(c):
        yield Problem(
            key, list(names), "names components of a function's reward, and a model scores alone", f"{key}=[]"
        )
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1 or name == "score"]:
        yield Problem(key, list(names), f"must name each component once, and never score: {', '.join(twice)}")
    if weights is not None and (len(weights) != len(names) or not all(w > 0 for w in weights)):
        allowed = f"must be a number above 0 for each of the {len(names)} {key}"
        yield Problem("algorithm.gdpo_reward_weights", list(weights), allowed, "algorithm.gdpo_reward_weights=null")


def some_response_can_end(c: PPOConfig) -> Problems:
    """Overlong filtering leaves something to train on."""
    rollout = c.actor_rollout_ref.rollout
    if c.algorithm.overlong_filtering and rollout.ignore_eos and not rollout.stop_token_ids:
        key = "algorithm.overlong_filtering"
        allowed = "leaves nothing: rollout.ignore_eos without rollout.stop_token_ids cuts every response at the limit"
        yield Problem(key, True, allowed, "actor_rollout_ref.rollout.ignore_eos=false")


def an_adaptive_kl_keeps_its_sign(c: PPOConfig) -> Problems:
    """An adaptive coefficient is corrected slowly enough to keep its sign."""
    control = c.algorithm.kl_ctrl
    if control.type == "fixed" or not c.algorithm.use_kl_in_reward:
        return
    least = c.data.train_batch_size * c.actor_rollout_ref.rollout.n // 5 + 1
    if control.horizon < least:
        yield Problem("algorithm.kl_ctrl.horizon", control.horizon, f"must be at least a fifth of a step: {least}")


def dynamic_sampling_has_groups(c: PPOConfig) -> Problems:
    """Groups are filtered only where rollouts of a prompt are compared."""
    name = c.algorithm.adv_estimator
    if c.algorithm.filter_groups.enable and name in ESTIMATORS and ESTIMATORS[name].min_group_size < 2:
        groups = ", ".join(e for e, needs in ESTIMATORS.items() if needs.min_group_size > 1)
        allowed = f"{name} learns from groups of equal rewards too; filtering is for {groups}"
        yield Problem("algorithm.filter_groups.enable", True, allowed, "algorithm.filter_groups.enable=false")
    if c.algorithm.filter_groups.enable and c.algorithm.filter_groups.max_num_gen_batches < 2:
        allowed = "must be at least 2: the first generation is the step's own, and replaces nothing"
        key = "algorithm.filter_groups.max_num_gen_batches"
        yield Problem(key, c.algorithm.filter_groups.max_num_gen_batches, allowed, f"{key}=10")


def the_policy_loss_is_that_of_its_paper(c: PPOConfig) -> Problems:
    """Aggregation and epochs leave the policy loss the algorithm whose name it has."""
    actor, needs = c.actor_rollout_ref.actor, loss_needs(c)
    key, mode, name = "actor_rollout_ref.actor.loss_agg_mode", actor.loss_agg_mode, actor.policy_loss
    if mode is not None and mode not in needs.aggregations:
        allowed = f"makes {name} another algorithm: its paper has {' or '.join(needs.aggregations)}"
        yield Problem(key, mode, allowed, f"{key}=null, or another policy_loss")
    if needs.max_epochs is not None and actor.ppo_epochs > needs.max_epochs:
        key, allowed = "actor_rollout_ref.actor.ppo_epochs", f"{name} has no ratio: a second pass would be off policy"
        yield Problem(key, actor.ppo_epochs, allowed, f"{key}={needs.max_epochs}, or another policy_loss")


def covariances_lie_between_two_bounds(c: PPOConfig) -> Problems:
    """The lower bound is below the upper one."""
    settings, key = c.actor_rollout_ref.actor.policy_loss_settings, "actor_rollout_ref.actor.policy_loss_settings"
    if settings.cov_low >= settings.cov_high:
        allowed = f"must be less than {key}.cov_high = {settings.cov_high:g}, or no token is chosen"
        yield Problem(f"{key}.cov_low", settings.cov_low, allowed)


def the_overlong_buffer_is_within_the_response(c: PPOConfig) -> Problems:
    """The buffer isn't longer than a response."""
    buffer, longest = c.reward.overlong_buffer, c.data.max_response_length
    if buffer.enable and buffer.len > longest:
        yield Problem("reward.overlong_buffer.len", buffer.len, f"must be at most data.max_response_length = {longest}")


def rollout_correction_is_said_in_one_way(c: PPOConfig) -> Problems:
    """A preset, or keys; and every key has weights to act on."""
    correction, key = c.algorithm.rollout_correction, "algorithm.rollout_correction"
    weighs = {"cap": correction.cap, "band": correction.band, "normalize": correction.normalize or None}
    keys = {**weighs, "level": correction.level, "rejections": correction.rejections or None}
    given = [name for name, value in keys.items() if value is not None]
    if correction.preset and given:
        yield Problem(f"{key}.preset", correction.preset, f"stands for all keys, but {', '.join(given)} are set too")
    for name in (name for name, value in weighs.items() if value is not None and correction.level is None):
        yield Problem(
            f"{key}.{name}", getattr(correction, name), "acts on weights, and there are none", f"{key}.level=token"
        )
    if correction.band and (len(correction.band) != 2 or not 0 <= correction.band[0] < correction.band[1]):
        yield Problem(f"{key}.band", list(correction.band), "must be [low, high] with 0 <= low < high")
    for i, rejection in enumerate(correction.rejections):
        if rejection.high is not None and rejection.low >= rejection.high:
            allowed = f"must be less than its high = {rejection.high:g}, or everything is rejected"
            yield Problem(f"{key}.rejections[{i}].low", rejection.low, allowed)
        if rejection.high is None and rejection.low == 0:
            allowed = "rejects nothing: from 0 upwards all is kept"
            yield Problem(
                f"{key}.rejections[{i}].high", None, allowed, f"{key}.rejections[{i}].high=2, or leave it out"
            )


def a_bypass_leaves_what_is_corrected_to_the_update(c: PPOConfig) -> Problems:
    """Beside a bypass an optimizer step rejects, and weighs what has no ratio to the engine's log-probs yet."""
    correction, key, loss = c.algorithm.rollout_correction, "algorithm.rollout_correction", c.actor_rollout_ref.actor
    if not correction.bypass:
        return
    if correction.preset == "metrics_only":
        allowed = "compares log-probs by the actor with the engine's, and a bypass computes none before the update"
        yield Problem(f"{key}.preset", correction.preset, allowed, f"{key}.preset=null")
    if correction.normalize:
        allowed = "divides by the mean weight of the step, which no optimizer step of a bypass knows"
        yield Problem(f"{key}.normalize", True, allowed, f"{key}.normalize=false")
    if weight_level(c) and loss.policy_loss in POLICY_LOSSES and POLICY_LOSSES[loss.policy_loss].has_ratio:
        name = "preset" if correction.preset else "level"
        allowed = (
            f"weighs by the ratio to the engine, which the ratio of {loss.policy_loss} is where {key}.bypass is on: "
            "rejections alone are left to add"
        )
        fix = f"{key}.{name}=null, or actor_rollout_ref.actor.policy_loss=gpg, which has no ratio"
        yield Problem(f"{key}.{name}", getattr(correction, name), allowed, fix)


def corrected_rollouts_are_sampled_from_all_tokens(c: PPOConfig) -> Problems:
    """Log-probs that are compared are of one distribution.

    After top_p and top_k the engine's are of the kept tokens, renormalised; the trainer's are of the whole vocabulary.
    """
    correction, rollout = c.algorithm.rollout_correction, c.actor_rollout_ref.rollout
    if not (weighs_or_rejects(c) or correction.bypass or correction.off_policy_mask_delta is not None):
        return
    for name, value, whole in (("top_p", rollout.top_p, 1.0), ("top_k", rollout.top_k, None)):
        if value != whole:
            key, fix = f"actor_rollout_ref.rollout.{name}", "null" if whole is None else "1"
            allowed = (
                f"must be {fix} where algorithm.rollout_correction acts: the engine's log-probs are of the kept tokens "
                "alone, the trainer's of all, and what was cut off would count as an error of the engine"
            )
            yield Problem(key, value, allowed, f"{key}={fix}, or no correction")


ALGORITHM_RULES = (
    rollout_correction_is_said_in_one_way,
    a_bypass_leaves_what_is_corrected_to_the_update,
    corrected_rollouts_are_sampled_from_all_tokens,
    the_estimator_is_known,
    the_policy_loss_is_known,
    the_algorithm_file_is_there,
    a_group_is_large_enough,
    grpo_has_a_kl_term_or_says_not,
    a_kl_term_weighs_something,
    the_critic_is_there_where_it_is_needed,
    a_reward_model_weighs_something,
    components_are_named_and_weighed,
    some_response_can_end,
    an_adaptive_kl_keeps_its_sign,
    dynamic_sampling_has_groups,
    the_policy_loss_is_that_of_its_paper,
    covariances_lie_between_two_bounds,
    the_overlong_buffer_is_within_the_response,
)
