"""Spread the rollouts of an optimizer step over ranks and micro-batches by what they cost, within a budget of tokens.

It decides where a rollout is computed, never which rollouts share an optimizer step. Standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megarl.batching.plan import Rows, Spread

Cost = Callable[[int], float]


@dataclass(frozen=True)
class TokenBudget:
    """How rows are spread by tokens.

    tokens: of a micro-batch on a data-parallel rank, at most. cost: of a sequence, by its length in tokens; it grows
    with it. multiple: the number of micro-batches is one of it, as interleaved pipelines want. sequence_multiple: the
    tokens of every sequence are rounded up to one of it, as context parallelism wants.
    """

    tokens: int
    cost: Cost
    multiple: int = 1
    sequence_multiple: int = 1

    def over(self, lengths: Sequence[int]) -> Spread:
        """Return the Spread of rows of these lengths over ranks, for ``plan_update``."""
        return lambda rows, dp_size: spread_rows(rows, lengths, dp_size, self)


def pass_cost(linear_size: int, attention_width: int) -> Cost:
    """Return the cost of a packed forward pass over one sequence, in multiply-adds.

    linear_size: parameters that a token is multiplied by. attention_width: width of all layers' queries together; a
    token attends to half of the sequence on average, in two products.
    """
    return lambda length: length * linear_size + length * length * attention_width


def spread_rows(rows: Rows, lengths: Sequence[int], dp_size: int, budget: TokenBudget) -> tuple[tuple[Rows, ...], ...]:
    """Return for each data-parallel rank its micro-batches, as many on every rank and none over the budget.

    lengths: in tokens, of every row of the batch. Rows are first spread over ranks, then those of each rank over as few
    micro-batches as the same rule finds room in on all ranks. Costly micro-batches come first, so that ranks that wait
    for each other in the middle of a pass have similar ones. A rank with fewer rows than micro-batches has empty ones.
    """
    sizes = {row: _round_up(lengths[row], budget.sequence_multiple) for row in rows}
    longest = max(sizes.values(), default=0)
    assert longest <= budget.tokens, f"a sequence of {longest} tokens with {budget.tokens} for a micro-batch"
    cost = {row: budget.cost(lengths[row]) for row in rows}
    by_rank = least_loaded_first(cost, dp_size)
    assert by_rank is not None
    fewest = max(1, *(-(-sum(sizes[row] for row in mine) // budget.tokens) for mine in by_rank))
    count = _round_up(fewest, budget.multiple)
    while (cut := [_fill(mine, count, cost, sizes, budget.tokens) for mine in by_rank]) and None in cut:
        count += budget.multiple
    return tuple(micros for micros in cut if micros is not None)


def _fill(
    rows: Rows, count: int, cost: dict[int, float], sizes: dict[int, int], max_tokens: int
) -> tuple[Rows, ...] | None:
    """Return rows in ``count`` micro-batches, the costliest first; None where they don't fit so few."""
    micros = least_loaded_first({row: cost[row] for row in rows}, count, sizes, max_tokens)
    return None if micros is None else tuple(sorted(micros, key=lambda micro: -sum(cost[row] for row in micro)))


def least_loaded_first(
    cost: dict[int, float], parts: int, sizes: dict[int, int] | None = None, limit: int = 0
) -> tuple[Rows, ...] | None:
    """Give rows, the costliest first, each to the part that costs least so far; return the parts, rows in order.

    This is Graham's LPT rule: the costliest part costs at most 4/3 - 1/(3 parts) of the best that is possible (Bounds
    on Multiprocessing Timing Anomalies, SIAM J. Appl. Math. 17(2), 1969), and no two parts differ by more than the
    costliest row. Both hold where ``sizes`` are None: else only parts whose sizes stay within ``limit`` are asked, and
    None is returned where a row finds none. Ties go to the lower row and the lower part.
    """
    members: list[list[int]] = [[] for _ in range(parts)]
    loads, filled = [0.0] * parts, [0] * parts
    for row in sorted(cost, key=lambda row: (-cost[row], row)):
        size = sizes[row] if sizes else 0
        open_parts = [part for part in range(parts) if filled[part] + size <= limit]
        if not open_parts:
            return None
        chosen = min(open_parts, key=lambda part: (loads[part], part))
        members[chosen].append(row)
        loads[chosen] += cost[row]
        filled[chosen] += size
    return tuple(tuple(sorted(part)) for part in members)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
