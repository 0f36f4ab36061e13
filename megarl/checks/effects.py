"""Settings that mean something only in some modes: changed from their default in another mode, they do nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megarl.algorithm.needs import needs_old_logprobs, needs_reward_function, needs_reward_model, uses_kl_loss
from megarl.catalog import POLICY_LOSSES
from megarl.config.defaults import default_of, value_of
from megarl.config.schema import ASYNC, SGLANG, VLLM, PPOConfig
from megarl.errors import Problem
from megarl.roles import REWARD_MODEL, engines_share_devices, is_served, pass_keys

ACTOR, ROLLOUT, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"


@dataclass(frozen=True)
class Effect:
    """A key that acts only ``where``; ``words`` say so and ``fix`` turns that on."""

    key: str
    where: Callable[[PPOConfig], bool]
    words: str
    fix: str


def _of_loss(setting: str) -> Effect:
    """Return the Effect of a setting that some policy losses read. A loss of the user's own may read any."""
    names = [name for name, needs in POLICY_LOSSES.items() if setting in needs.uses]

    def reads(c: PPOConfig) -> bool:
        loss = c.actor_rollout_ref.actor.policy_loss
        return loss in names or loss not in POLICY_LOSSES

    words = f"{ACTOR}.policy_loss is {' or '.join(names)}"
    return Effect(f"{ACTOR}.{setting}", reads, words, f"{ACTOR}.policy_loss={names[0]}")


def _of_passes(key: str, by: str, dynamic: bool) -> Effect:
    """Return the Effect of the size of some pass, by tokens where ``dynamic``. by: the key that says which counts."""

    def decides(c: PPOConfig) -> bool:
        return key in pass_keys(c)

    wanted = str(dynamic).lower()
    return Effect(key, decides, f"{by} is {wanted}", f"leave {key} out, or {by}={wanted}")


def _one_side_is_clipped_by_it(c: PPOConfig) -> bool:
    actor = c.actor_rollout_ref.actor
    return actor.clip_ratio_low is None or actor.clip_ratio_high is None


_KL_LOSS = (uses_kl_loss, f"{ACTOR}.use_kl_loss is on", f"{ACTOR}.use_kl_loss=true")
_KL_REWARD = (
    lambda c: c.algorithm.use_kl_in_reward,
    "algorithm.use_kl_in_reward is on",
    "algorithm.use_kl_in_reward=true",
)
_ADAPTIVE = (
    lambda c: c.algorithm.kl_ctrl.type == "adaptive",
    "algorithm.kl_ctrl.type is adaptive",
    "algorithm.kl_ctrl.type=adaptive",
)
_OVERLONG = (
    lambda c: c.reward.overlong_buffer.enable,
    "reward.overlong_buffer.enable is true",
    "reward.overlong_buffer.enable=true",
)
_FUNCTION = (
    needs_reward_function,
    "a function scores: reward.name or reward.path is set, or reward.model.path isn't",
    "reward.name=NAME or reward.path=FILE.py",
)
_SAMPLES = (
    lambda c: c.actor_rollout_ref.rollout.val_kwargs.temperature > 0,
    f"{ROLLOUT}.val_kwargs.temperature is above 0",
    f"{ROLLOUT}.val_kwargs.temperature=1",
)

_SERVED = (
    is_served,
    f"{ROLLOUT}.placement is server, or {ROLLOUT}.name sglang",
    f"{ROLLOUT}.placement=server",
)

_LOSS_SETTINGS = dict.fromkeys(setting for needs in POLICY_LOSSES.values() for setting in needs.uses)

EFFECTS: tuple[Effect, ...] = (
    *(_of_loss(setting) for setting in _LOSS_SETTINGS),
    _of_passes(f"{ACTOR}.ppo_micro_batch_size_per_gpu", f"{ACTOR}.use_dynamic_bsz", False),
    _of_passes(f"{ACTOR}.log_prob_micro_batch_size_per_gpu", f"{ACTOR}.log_prob_use_dynamic_bsz", False),
    _of_passes(f"{REF}.log_prob_micro_batch_size_per_gpu", f"{REF}.log_prob_use_dynamic_bsz", False),
    _of_passes(f"{ACTOR}.ppo_max_token_len_per_gpu", f"{ACTOR}.use_dynamic_bsz", True),
    _of_passes(f"{ACTOR}.log_prob_max_token_len_per_gpu", f"{ACTOR}.log_prob_use_dynamic_bsz", True),
    _of_passes(f"{REF}.log_prob_max_token_len_per_gpu", f"{REF}.log_prob_use_dynamic_bsz", True),
    _of_passes(f"{REWARD_MODEL}.micro_batch_size_per_gpu", f"{REWARD_MODEL}.use_dynamic_bsz", False),
    _of_passes(f"{REWARD_MODEL}.forward_max_token_len_per_gpu", f"{REWARD_MODEL}.use_dynamic_bsz", True),
    Effect(
        f"{ACTOR}.clip_ratio",
        _one_side_is_clipped_by_it,
        "clip_ratio_low or clip_ratio_high is null: they stand for the two sides of it",
        f"leave {ACTOR}.clip_ratio out, or one of the two",
    ),
    Effect(
        f"{ACTOR}.separate_old_log_probs",
        lambda c: not (needs_old_logprobs(c) or c.algorithm.rollout_correction.bypass),
        "nothing but the first update of a step reads old log-probs: one epoch, no KL in the reward, no rollout "
        "correction or bypass, no loss that chooses tokens",
        f"{ACTOR}.separate_old_log_probs=false",
    ),
    Effect(f"{ACTOR}.kl_loss_coef", *_KL_LOSS),
    Effect(f"{ACTOR}.kl_loss_type", *_KL_LOSS),
    Effect("algorithm.kl_penalty", *_KL_REWARD),
    Effect("algorithm.kl_ctrl.kl_coef", *_KL_REWARD),
    Effect("algorithm.kl_ctrl.target_kl", *_ADAPTIVE),
    Effect("algorithm.kl_ctrl.horizon", *_ADAPTIVE),
    Effect(
        "algorithm.filter_groups.max_num_gen_batches",
        lambda c: c.algorithm.filter_groups.enable,
        "algorithm.filter_groups.enable is true",
        "algorithm.filter_groups.enable=true",
    ),
    Effect("reward.overlong_buffer.len", *_OVERLONG),
    Effect("reward.overlong_buffer.penalty_factor", *_OVERLONG),
    Effect(
        "reward.function",
        lambda c: c.reward.path is not None,
        "reward.path names a file",
        "reward.path=FILE.py",
    ),
    Effect("reward.kwargs", lambda c: c.reward.path is not None, "reward.path names a file", "reward.path=FILE.py"),
    Effect("reward.num_workers", *_FUNCTION),
    Effect("reward.timeout_s", *_FUNCTION),
    Effect("reward.batch_timeout_s", *_FUNCTION),
    Effect("reward.try_first", *_FUNCTION),
    Effect("reward.score_on_failure", *_FUNCTION),
    Effect("reward.on_all_failed", *_FUNCTION),
    Effect("reward.model.coef", needs_reward_model, "reward.model.path names a model", "reward.model.path=FOLDER"),
    Effect(
        f"{ROLLOUT}.sglang.python",
        lambda c: c.actor_rollout_ref.rollout.name == SGLANG,
        f"{ROLLOUT}.name is sglang",
        f"{ROLLOUT}.name=sglang",
    ),
    Effect(
        f"{ROLLOUT}.disable_log_stats",
        lambda c: c.actor_rollout_ref.rollout.name == VLLM,
        f"{ROLLOUT}.name is vllm",
        f"leave {ROLLOUT}.disable_log_stats out",
    ),
    Effect(f"{ROLLOUT}.nnodes", *_SERVED),
    Effect(f"{ROLLOUT}.n_gpus_per_node", *_SERVED),
    Effect(
        f"{ROLLOUT}.reproducible",
        lambda c: not is_served(c),
        f"{ROLLOUT}.placement is colocated: engines in processes of their own always are",
        f"leave {ROLLOUT}.reproducible out",
    ),
    Effect(
        f"{ROLLOUT}.free_cache_engine",
        engines_share_devices,
        f"{ROLLOUT}.placement is colocated or {ROLLOUT}.n_gpus_per_node 0: engines on devices of their own have "
        "nothing to give back",
        f"leave {ROLLOUT}.free_cache_engine out",
    ),
    Effect(f"{ROLLOUT}.val_kwargs.top_p", *_SAMPLES),
    Effect(f"{ROLLOUT}.val_kwargs.top_k", *_SAMPLES),
    Effect(f"{ROLLOUT}.val_kwargs.n", *_SAMPLES),
    Effect(
        "trainer.total_epochs",
        lambda c: c.trainer.total_training_steps is None,
        "trainer.total_training_steps is null",
        "trainer.total_training_steps=null",
    ),
    Effect(
        "trainer.max_staleness",
        lambda c: c.trainer.mode == ASYNC,
        "trainer.mode is async",
        "trainer.mode=async",
    ),
    Effect(
        "trainer.show_rollouts_freq",
        lambda c: c.trainer.num_sampled_rollouts > 0,
        "trainer.num_sampled_rollouts is above 0",
        "trainer.num_sampled_rollouts=5",
    ),
)


def settings_have_an_effect(c: PPOConfig) -> Iterator[Problem]:
    """What is changed from its default acts in the chosen mode."""
    for effect in EFFECTS:
        value = value_of(c, effect.key)
        if value != default_of(effect.key) and not effect.where(c):
            yield Problem(effect.key, value, f"has an effect only where {effect.words}", effect.fix)
