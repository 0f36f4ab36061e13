"""How many rollouts or tokens a micro-batch of one kind of pass holds."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.parallel.layout import Layout


@dataclass(frozen=True)
class Batching:
    """The micro-batches of one kind of pass of a role, on one data-parallel rank.

    key: the setting that decides, whose value is ``value``. max_tokens: tokens of a micro-batch at most, None where
    rollouts are counted. sequence_tokens: tokens of the longest kind of rollout.
    """

    key: str
    value: int
    max_tokens: int | None
    sequence_tokens: int
    layout: Layout

    @property
    def micro_batch_size(self) -> int:
        """Rollouts of a micro-batch; where tokens are counted, as many of the longest kind as fit."""
        # A budget that holds no rollout at all is for a rule to report.
        return self.value if self.max_tokens is None else max(1, self.max_tokens // self.longest_tokens)

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest micro-batch that can be."""
        return self.micro_batch_size * self.sequence_tokens if self.max_tokens is None else self.max_tokens

    @property
    def sequence_multiple(self) -> int:
        """The number that the tokens of every sequence are rounded up to a multiple of; see megarl.batching.pack."""
        return 2 * self.layout.cp if self.layout.cp > 1 and not self.layout.is_fsdp else 1

    @property
    def longest_tokens(self) -> int:
        """Tokens that the longest kind of rollout takes."""
        return -(-self.sequence_tokens // self.sequence_multiple) * self.sequence_multiple

    @property
    def least_value(self) -> int:
        """The least value of a token budget that holds the longest kind of rollout."""
        least = self.longest_tokens // self.layout.cp
        while rank_tokens(least, self.layout) < self.longest_tokens:
            least += 1
        return least


def rollouts_a_pass(key: str, count: int, sequence_tokens: int, layout: Layout) -> Batching:
    """Return the batching by a count of rollouts."""
    return Batching(key, count, None, sequence_tokens, layout)


def tokens_a_pass(key: str, tokens: int, sequence_tokens: int, layout: Layout) -> Batching:
    """Return the batching by a budget of ``tokens`` on each device."""
    return Batching(key, tokens, rank_tokens(tokens, layout), sequence_tokens, layout)


def rank_tokens(tokens: int, layout: Layout) -> int:
    """Return the most tokens of a data-parallel rank's micro-batch, with ``tokens`` on each of its devices.

    Context parallelism gives a device only its part of every sequence. The positions on a device are rounded up to a
    multiple of TP where sequence parallelism splits them, so the bound is rounded down to one.
    """
    multiple = layout.tp if layout.sequence_parallel else 1
    return tokens // multiple * multiple * layout.cp
