"""Frozen values that cross the borders between packages.

Shape suffixes: B rollouts, S sequence (prompt + response, right-padded).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One prompt, tokenized, with what its reward needs.

    uid: ``<file>:<row>``, stable across epochs and resumes. text: the rendered chat template.
    """

    uid: str
    token_ids: tuple[int, ...]
    text: str
    data_source: str
    ground_truth: str
    extra_info: Mapping[str, object]


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
    policy_version: number of the publication whose weights sampled it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    policy_version: int


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
    """A reward and how it came about. outcome: ``ok``, ``raised``, ``timeout`` or ``invalid`` (NaN, not a number)."""

    score: float
    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class Batch:
    """The rollouts of a step (or SFT examples) as right-padded sequences.

    Every per-token column is aligned with ``tokens_BS``: position s tells of token s given the tokens before it,
    and is zero where ``mask_BS`` is False. ``mask_BS`` is True on the tokens that are trained on.
    """

    tokens_BS: Tensor  # int64
    lengths_B: Tensor  # int64, real tokens of each row
    mask_BS: Tensor  # bool
    group_B: Tensor  # int64, rollouts of one prompt share a group
    rewards_B: Tensor | None = None  # float32
    rollout_logprobs_BS: Tensor | None = None  # float32, by the engine that sampled
    old_logprobs_BS: Tensor | None = None  # float32, by the actor before its update
    ref_logprobs_BS: Tensor | None = None  # float32, by the reference
    values_BS: Tensor | None = None  # float32, by the critic before its update; of the state before each token
    advantages_BS: Tensor | None = None  # float32
    returns_BS: Tensor | None = None  # float32, what the critic learns to predict
    policy_weights_BS: Tensor | None = None  # float32, multiply the policy loss: rollout correction
    selected_BS: Tensor | None = None  # bool, tokens that the policy loss treats apart
    policy_version_B: Tensor | None = None  # int64

    def __len__(self) -> int:
        return int(self.tokens_BS.shape[0])

    def rows(self, index: list[int]) -> Batch:
        """Return the given rows, in the given order."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t[index] for name, t in columns.items() if t is not None})
