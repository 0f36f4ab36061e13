"""The arguments of a call, each distinct one once: data-parallel peers are given the same object."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

A = TypeVar("A")


@dataclass(frozen=True)
class Parcels(Generic[A]):
    """The distinct arguments of a call, and which ranks take each, in order of the first of them."""

    contents: tuple[A, ...]
    takers: tuple[tuple[int, ...], ...]

    def of_rank(self) -> dict[int, int]:
        """Return the index of every rank's argument."""
        return {rank: i for i, ranks in enumerate(self.takers) for rank in ranks}


def parcels_of(arguments: Sequence[A]) -> Parcels[A]:
    """Return the parcels of arguments by rank; the same object is one parcel."""
    contents: dict[int, A] = {}
    takers: dict[int, list[int]] = {}
    for rank, argument in enumerate(arguments):
        contents.setdefault(id(argument), argument)
        takers.setdefault(id(argument), []).append(rank)
    return Parcels(tuple(contents.values()), tuple(tuple(ranks) for ranks in takers.values()))


def packed(parcels: Parcels[A]) -> tuple[bytes, ...]:
    """Return every parcel as bytes."""
    return tuple(pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL) for content in parcels.contents)


def relay_of(takers: Sequence[int], rank: int) -> tuple[int | None, tuple[int, ...]]:
    """Return the taker that ``rank`` gets a parcel from, None for the first, and those that it hands it on to.

    The takers form a binomial tree, so that the last has it after as many rounds as the logarithm of their number.
    """
    place, count = takers.index(rank), len(takers)
    lowest = place & -place if place else 1 << (count - 1).bit_length()
    sender = takers[place - lowest] if place else None
    steps = [lowest >> shift for shift in range(1, lowest.bit_length())]
    return sender, tuple(takers[place + step] for step in steps if place + step < count)
