"""The names that a config selects functions by, and what each entry needs: for schema, checks, docs and registries.

The functions themselves are in megarl.algorithm and megarl.monitor.sinks, which register them under these names and
hold no other, and miss none. Only a file of the user's (algorithm.path) adds estimators and policy losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@dataclass(frozen=True)
class Needs:
    """What an advantage estimator needs besides rewards.

    values: a critic's. greedy_baseline: the reward of a greedy rollout of every prompt. components: named parts of
    the reward. min_group_size: the fewest rollouts a prompt must have for the estimate to say anything. uses: keys of
    ``algorithm`` that the estimator reads, among those that not all do; a user's own may read every one.
    """

    values: bool = False
    greedy_baseline: bool = False
    components: bool = False
    min_group_size: int = 1
    uses: tuple[str, ...] = ()


@dataclass(frozen=True)
class LossNeeds:
    """What a policy loss needs. uses: keys of ``actor_rollout_ref.actor`` that it reads, among those that not all do.

    chosen_tokens: whether some tokens of a step are chosen before the update, see megarl.algorithm.covariance.
    aggregations: those that leave it the algorithm of its paper, the paper's first. clip_low, clip_high: the paper's.
    max_epochs: passes over the rollouts of a step that it allows, None for any number. has_ratio: whether it weighs
    tokens by their ratio to the old log-probs.
    """

    uses: tuple[str, ...] = ()
    chosen_tokens: bool = False
    aggregations: tuple[str, ...] = AGGREGATIONS
    clip_low: float = 0.2
    clip_high: float = 0.2
    max_epochs: int | None = None
    has_ratio: bool = True


_SPREAD = ("norm_adv_by_std_in_grpo",)
ESTIMATORS: Mapping[str, Needs] = {
    "gae": Needs(values=True, uses=("gamma", "lam")),
    "grpo": Needs(min_group_size=2, uses=_SPREAD),
    "grpo_passk": Needs(min_group_size=2, uses=_SPREAD),
    "rloo": Needs(min_group_size=2),
    "remax": Needs(greedy_baseline=True),
    "reinforce_plus_plus": Needs(uses=("gamma",)),
    "reinforce_plus_plus_baseline": Needs(min_group_size=2),
    "opo": Needs(min_group_size=2),
    "gpg": Needs(min_group_size=2),
    "gdpo": Needs(components=True, min_group_size=2, uses=(*_SPREAD, "gdpo_reward_keys", "gdpo_reward_weights")),
}

_OF_SEQUENCES = ("seq-mean-token-mean",)
_CLIPS = ("clip_ratio", "clip_ratio_low", "clip_ratio_high")
_TAUS = ("policy_loss_settings.tau_positive", "policy_loss_settings.tau_negative")
_SHARE, _BAND = "policy_loss_settings.cov_share", ("policy_loss_settings.cov_low", "policy_loss_settings.cov_high")
POLICY_LOSSES: Mapping[str, LossNeeds] = {
    "ppo_clip": LossNeeds(uses=(*_CLIPS, "clip_ratio_c")),
    "gspo": LossNeeds(uses=_CLIPS, aggregations=_OF_SEQUENCES, clip_low=3e-4, clip_high=4e-4),
    "geo_mean": LossNeeds(uses=_CLIPS, aggregations=_OF_SEQUENCES, clip_low=0.4, clip_high=0.4),
    # MiniMax-M1 bounds the weight above alone, and doesn't publish by how much.
    "cispo": LossNeeds(uses=_CLIPS, clip_low=1.0),
    "sapo": LossNeeds(uses=_TAUS, aggregations=(*_OF_SEQUENCES, "token-mean")),
    "gpg": LossNeeds(max_epochs=1, has_ratio=False),
    "clip_cov": LossNeeds(uses=(*_CLIPS, _SHARE, *_BAND), chosen_tokens=True),
    "kl_cov": LossNeeds(uses=(_SHARE, "policy_loss_settings.cov_kl_coef"), chosen_tokens=True),
}

# "kl" is k1 with the gradient of the KL. A name with a + has the value of the name before it and the unbiased gradient
# of mse, which counts in a loss alone.
KL_ESTIMATORS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
KL_LOSSES = (*KL_ESTIMATORS, "kl+", "k1+", "abs+", "low_var_kl+", "k3+")
KL_CONTROLLERS = ("fixed", "adaptive")

CRITERIA = ("token", "sequence", "geometric", "sequence_k3", "worst_token")
# By the level of their weights, None where they only reject, or nothing.
CORRECTION_PRESETS: Mapping[str, str | None] = {
    "metrics_only": None,
    "token_tis": "token",
    "sequence_tis": "sequence",
    "sequence_mis": "sequence",
    "seq_mask_tis": "token",
    "icepop": "token",
    "geometric": None,
    "geometric_token_tis": "token",
    "geometric_sequence_tis": "sequence",
    "k3": None,
    "k3_token_tis": "token",
    "k3_sequence_tis": "sequence",
}

SINKS = ("console", "tensorboard", "jsonl", "wandb", "trace")
