"""How the rollouts of a pass become micro-batches: by count or by tokens, where null keys take the value of others."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megarl.checks.algorithm import needs_critic, needs_reference, needs_reward_model
from megarl.config.schema import MegatronConfig, PPOConfig

ACTOR, REF, CRITIC = "actor_rollout_ref.actor", "actor_rollout_ref.ref", "critic"
REWARD_MODEL = "reward.model"

# Keys with their values, the first that isn't null decides.
_Keys = tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class PassSize:
    """The micro-batches of one kind of pass, on one data-parallel rank.

    key: of the setting that decides, which has ``value``. micro_batch_size: rollouts of a micro-batch; where tokens
    are counted, as many of the longest kind as fit. max_tokens: of a micro-batch, None where rollouts are counted.
    sequence_tokens: of the longest kind of rollout.
    """

    key: str
    value: int
    micro_batch_size: int
    max_tokens: int | None
    sequence_tokens: int
    megatron: MegatronConfig

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest micro-batch that can be."""
        return self.micro_batch_size * self.sequence_tokens if self.max_tokens is None else self.max_tokens

    @property
    def sequence_multiple(self) -> int:
        """What the tokens of every sequence are rounded up to, see megarl.batching.pack.pack."""
        cp = self.megatron.context_parallel_size
        return 2 * cp if cp > 1 else 1

    @property
    def longest_tokens(self) -> int:
        """Tokens that the longest kind of rollout takes."""
        return -(-self.sequence_tokens // self.sequence_multiple) * self.sequence_multiple

    @property
    def least_value(self) -> int:
        """The least value of a token budget that holds the longest kind of rollout."""
        least = self.longest_tokens // self.megatron.context_parallel_size
        while rank_tokens(least, self.megatron) < self.longest_tokens:
            least += 1
        return least


def rank_tokens(tokens: int, megatron: MegatronConfig) -> int:
    """Return the tokens of a data-parallel rank's micro-batch at most, with ``tokens`` on each of its devices.

    Context parallelism gives a device only its part of every sequence. The positions on a device are rounded up to a
    multiple of TP where sequence parallelism splits them, so the bound is rounded down to one.
    """
    multiple = megatron.tensor_model_parallel_size if megatron.sequence_parallel else 1
    return tokens // multiple * multiple * megatron.context_parallel_size


def actor_update(c: PPOConfig) -> PassSize:
    """Return the sizes of the actor's update."""
    actor = c.actor_rollout_ref.actor
    size = (f"{ACTOR}.ppo_micro_batch_size_per_gpu", actor.ppo_micro_batch_size_per_gpu)
    tokens = (f"{ACTOR}.ppo_max_token_len_per_gpu", actor.ppo_max_token_len_per_gpu)
    return _pass_size(c, actor.megatron, actor.use_dynamic_bsz, (size,), (tokens,))


def actor_scoring(c: PPOConfig) -> PassSize:
    """Return the sizes of the actor's log-prob pass."""
    megatron = c.actor_rollout_ref.actor.megatron
    return _pass_size(c, megatron, _actor_scores_by_tokens(c), _scored_rollouts(c), _scored_tokens(c))


def ref_scoring(c: PPOConfig) -> PassSize:
    """Return the sizes of the reference's log-prob pass."""
    ref = c.actor_rollout_ref.ref
    own = ref.log_prob_use_dynamic_bsz
    by_tokens = _actor_scores_by_tokens(c) if own is None else own
    size = (f"{REF}.log_prob_micro_batch_size_per_gpu", ref.log_prob_micro_batch_size_per_gpu)
    tokens = (f"{REF}.log_prob_max_token_len_per_gpu", ref.log_prob_max_token_len_per_gpu)
    return _pass_size(c, ref.megatron, by_tokens, (size, *_scored_rollouts(c)), (tokens, *_scored_tokens(c)))


def critic_update(c: PPOConfig) -> PassSize:
    """Return the sizes of the critic's update."""
    size = (f"{CRITIC}.ppo_micro_batch_size_per_gpu", c.critic.ppo_micro_batch_size_per_gpu)
    tokens = (f"{CRITIC}.ppo_max_token_len_per_gpu", c.critic.ppo_max_token_len_per_gpu)
    return _pass_size(c, c.critic.megatron, c.critic.use_dynamic_bsz, (size,), (tokens,))


def critic_scoring(c: PPOConfig) -> PassSize:
    """Return the sizes of the pass for values."""
    sizes = (
        (f"{CRITIC}.forward_micro_batch_size_per_gpu", c.critic.forward_micro_batch_size_per_gpu),
        (f"{CRITIC}.ppo_micro_batch_size_per_gpu", c.critic.ppo_micro_batch_size_per_gpu),
    )
    tokens = (
        (f"{CRITIC}.forward_max_token_len_per_gpu", c.critic.forward_max_token_len_per_gpu),
        (f"{CRITIC}.ppo_max_token_len_per_gpu", c.critic.ppo_max_token_len_per_gpu),
    )
    return _pass_size(c, c.critic.megatron, c.critic.use_dynamic_bsz, sizes, tokens)


def reward_scoring(c: PPOConfig) -> PassSize:
    """Return the sizes of the reward model's pass."""
    model = c.reward.model
    by_tokens = _actor_scores_by_tokens(c) if model.use_dynamic_bsz is None else model.use_dynamic_bsz
    size = (f"{REWARD_MODEL}.micro_batch_size_per_gpu", model.micro_batch_size_per_gpu)
    tokens = (f"{REWARD_MODEL}.forward_max_token_len_per_gpu", model.forward_max_token_len_per_gpu)
    return _pass_size(c, model.megatron, by_tokens, (size, *_scored_rollouts(c)), (tokens, *_scored_tokens(c)))


def passes_of(c: PPOConfig) -> tuple[PassSize, ...]:
    """Return every kind of pass of the run."""
    passes = [actor_update(c), actor_scoring(c)]
    if needs_reference(c):
        passes.append(ref_scoring(c))
    if needs_critic(c):
        passes += [critic_update(c), critic_scoring(c)]
    if needs_reward_model(c):
        passes.append(reward_scoring(c))
    return tuple(passes)


def _actor_scores_by_tokens(c: PPOConfig) -> bool:
    actor = c.actor_rollout_ref.actor
    own = actor.log_prob_use_dynamic_bsz
    return actor.use_dynamic_bsz if own is None else own


def _scored_rollouts(c: PPOConfig) -> _Keys:
    actor = c.actor_rollout_ref.actor
    return (
        (f"{ACTOR}.log_prob_micro_batch_size_per_gpu", actor.log_prob_micro_batch_size_per_gpu),
        (f"{ACTOR}.ppo_micro_batch_size_per_gpu", actor.ppo_micro_batch_size_per_gpu),
    )


def _scored_tokens(c: PPOConfig) -> _Keys:
    actor = c.actor_rollout_ref.actor
    return (
        (f"{ACTOR}.log_prob_max_token_len_per_gpu", actor.log_prob_max_token_len_per_gpu),
        (f"{ACTOR}.ppo_max_token_len_per_gpu", actor.ppo_max_token_len_per_gpu),
    )


def _pass_size(c: PPOConfig, megatron: MegatronConfig, by_tokens: bool, sizes: _Keys, tokens: _Keys) -> PassSize:
    sequence = c.data.max_prompt_length + c.data.max_response_length
    key, value = next((key, value) for key, value in (tokens if by_tokens else sizes) if value is not None)
    if not by_tokens:
        return PassSize(key, value, value, None, sequence, megatron)
    max_tokens = rank_tokens(value, megatron)
    size = PassSize(key, value, 1, max_tokens, sequence, megatron)
    # A budget that holds no rollout at all is for a rule to report.
    return replace(size, micro_batch_size=max(1, max_tokens // size.longest_tokens))
