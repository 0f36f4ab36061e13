"""Frozen values that cross the borders between packages.

Shape suffixes: B rollouts, S sequence (prompt + response, right-padded).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from torch import Tensor

Metrics = dict[str, float]
"""Numbers by name."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, tokenized, with what its reward needs.

    uid: ``<place of the file in the list>:<row>``, stable across epochs and resumes. text: the rendered chat template.
    origin: ``<file>:<row>``, for people.
    """

    uid: str
    token_ids: tuple[int, ...]
    text: str
    data_source: str
    ground_truth: str
    extra_info: Mapping[str, object]
    origin: str


@dataclass(frozen=True)
class Sampling:
    """How to sample responses. ``top_k`` None keeps all tokens. ``temperature`` 0 is greedy.

    with_greedy: append to the n rollouts of each prompt one that is greedy.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    with_greedy: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to generate for. ``seed`` makes its samples independent of batching and of the replica."""

    token_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    token_ids: response tokens with the stop token if one was sampled. logprobs: natural log of the sampling
    distribution's probability of each, as the engine computed it. finish_reason: ``stop`` or ``length``.
    policy_version: number of the publication whose weights sampled its first token. switches: the index of each token
    from which on another's did, and its number.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    policy_version: int
    switches: tuple[tuple[int, int], ...] = ()

    @property
    def last_version(self) -> int:
        """Number of the publication whose weights sampled its last token."""
        return self.switches[-1][1] if self.switches else self.policy_version


Group = tuple[Rollout, ...]
"""The rollouts of one prompt."""


@dataclass(frozen=True)
class RewardRequest:
    """What a reward function sees of one rollout."""

    data_source: str
    prompt: str
    response: str
    ground_truth: str
    extra_info: Mapping[str, object]


@dataclass(frozen=True)
class RewardResult:
    """A reward and how it came about. outcome: ``ok``, ``raised``, ``timeout`` or ``invalid`` (NaN, not a number).

    components: the parts of the reward that were asked for, in that order. Of a failure: detail, what happened in a
    line; kind, what it has in common with others of its cause; traceback, of the function where it raised.
    """

    score: float
    outcome: str
    detail: str = ""
    kind: str = ""
    traceback: str = ""
    components: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sequences:
    """Right-padded sequences: what a pass of any model reads.

    ``mask_BS`` is True on the tokens that count: those of the responses. Every per-token column, here and in the
    classes below, is aligned with ``tokens_BS``: position s tells of token s given the tokens before it, and is zero
    where ``mask_BS`` is False.
    """

    tokens_BS: Tensor  # int64
    lengths_B: Tensor  # int64, real tokens of each row
    mask_BS: Tensor  # bool

    def __len__(self) -> int:
        return int(self.tokens_BS.shape[0])

    def alone(self) -> Sequences:
        """Return the sequences without the columns of a class that inherits this one."""
        return Sequences(self.tokens_BS, self.lengths_B, self.mask_BS)

    def rows(self, index: Sequence[int]) -> Self:
        """Return the given rows, in the given order."""
        chosen, columns = list(index), {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t[chosen] for name, t in columns.items() if hasattr(t, "shape")})


@dataclass(frozen=True)
class RolloutBatch(Sequences):
    """The rollouts of a step as sequences: prompts, whose tokens don't count, and responses, whose tokens do."""

    group_B: Tensor  # int64, rollouts of one prompt share a group
    rollout_logprobs_BS: Tensor  # float32, by the engine that sampled
    policy_version_B: Tensor  # int64


@dataclass(frozen=True)
class PolicyBatch(Sequences):
    """What an update of the policy reads.

    old_logprobs_BS: by the actor before its update; None where every optimizer step takes its own, detached.
    first_is_on_policy: whether the rows of the first mini-batch have none, since its own log-probs are the old ones.
    policy_weights_BS: factors of the policy loss (rollout correction). selected_BS: tokens that the policy loss treats
    apart (bool). rollout_logprobs_BS: by the engine, None where no optimizer step compares with them.
    """

    advantages_BS: Tensor
    old_logprobs_BS: Tensor | None = None
    ref_logprobs_BS: Tensor | None = None
    policy_weights_BS: Tensor | None = None
    selected_BS: Tensor | None = None
    rollout_logprobs_BS: Tensor | None = None
    first_is_on_policy: bool = False


@dataclass(frozen=True)
class ValueBatch(Sequences):
    """What an update of the critic reads.

    values_BS: by the critic before its update, of the state before each token. returns_BS: what it learns to predict.
    """

    values_BS: Tensor
    returns_BS: Tensor
