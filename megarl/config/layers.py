"""How many layers each pipeline stage holds: arithmetic that the rules of a config and the layout of ranks share."""

from __future__ import annotations


def layers_of_stages(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Return the number of layers of every stage, in order; 0 for some where there are fewer layers than stages.

    Where ``num_layers`` doesn't divide, the extra layers go to the middle stages first, since the first stage also
    holds the embedding and the last the output layer.
    """
    base, extra = divmod(num_layers, num_stages)
    from_the_middle = sorted(range(num_stages), key=lambda s: (s in (0, num_stages - 1), s == num_stages - 1, s))
    return tuple(base + (stage in from_the_middle[:extra]) for stage in range(num_stages))
