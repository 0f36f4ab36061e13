"""What a rank holds, said in the coordinates of the Hugging Face checkpoint.

Every parameter of a trainer's or an engine's rank is a stack of row ranges of Hugging Face tensors along one dim.
Load, publish and export are then all the same question: which range goes where. A model has few kinds of parameters and
many of each: those that differ in their layer and expert alone are one pattern, and ranks that hold the same are peers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Segment:
    """The range [start, stop) of a Hugging Face tensor along its shard's dim. ``tensor`` None is zero padding."""

    tensor: str | None
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """One parameter on one rank: ``segments`` stacked in order along ``dim`` of a tensor of ``shape``."""

    name: str
    shape: tuple[int, ...]
    dim: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Pattern:
    """Shards alike: ``{i}`` in the names of ``shard`` is each of ``layers``, and ``{e}`` each of ``experts``.

    Names without either are of layer 0 and expert 0.
    """

    shard: Shard
    layers: tuple[int, ...] = (0,)
    experts: tuple[int, ...] = (0,)

    def shards(self) -> Iterator[Shard]:
        """Yield each shard, layer by layer."""
        shard = self.shard
        for i in self.layers:
            for e in self.experts:
                segments = tuple(
                    seg if seg.tensor is None else Segment(seg.tensor.format(i=i, e=e), seg.start, seg.stop)
                    for seg in shard.segments
                )
                yield Shard(shard.name.format(i=i, e=e), shard.shape, shard.dim, segments)


@dataclass(frozen=True)
class Peers:
    """Ranks that hold the same: ``patterns``, on each of them. A rank may be among several peers."""

    ranks: tuple[int, ...]
    patterns: tuple[Pattern, ...]


def whole(name: str, shape: tuple[int, ...], dim: int = 0) -> Shard:
    """Return the Shard that is a whole Hugging Face tensor."""
    return Shard(name, shape, dim, (Segment(name, 0, shape[dim]),))


def clip(blocks: list[Segment], start: int, stop: int) -> tuple[Segment, ...]:
    """Cut the window [start, stop) out of the stack of ``blocks``; what lies past its end is padding."""
    out, offset = [], 0
    for block in blocks:
        low, high = max(start, offset), min(stop, offset + block.length)
        if low < high:
            out.append(Segment(block.tensor, block.start + low - offset, block.start + high - offset))
        offset += block.length
    if stop > offset:
        out.append(Segment(None, 0, stop - max(start, offset)))
    return tuple(out)


def peers_of(by_rank: Sequence[Sequence[Shard]]) -> tuple[Peers, ...]:
    """Return the Peers of ranks that hold arbitrary shards; index of the outer sequence is the rank."""
    ranks: dict[tuple[Pattern, ...], list[int]] = defaultdict(list)
    for rank, shards in enumerate(by_rank):
        ranks[alike(shards)].append(rank)
    return tuple(Peers(tuple(members), patterns) for patterns, members in ranks.items())


def alike(shards: Iterable[Shard]) -> tuple[Pattern, ...]:
    """Return the patterns that shards make, as a tuple of Pattern.

    The first two numbers between dots in a tensor's name are taken for its layer and its expert.
    """
    places: dict[Shard, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for shard in shards:
        for kind, (layer, expert) in _kinds(shard):
            places[kind][layer].add(expert)
    patterns = []
    for kind, experts_of in places.items():
        layers_with: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for layer, experts in experts_of.items():
            layers_with[tuple(sorted(experts))].append(layer)
        patterns += [Pattern(kind, tuple(sorted(layers)), experts) for experts, layers in layers_with.items()]
    return tuple(patterns)


def _kinds(shard: Shard) -> Iterator[tuple[Shard, tuple[int, int]]]:
    """Yield a shard with its numbers replaced, and what they were.

    Where its tensors have different numbers, there is one shard for each, in which the others are padding.
    """
    name, own = _numbers(shard.name)
    found = {s.tensor: _numbers(s.tensor) for s in shard.segments if s.tensor is not None}
    for place in dict.fromkeys(place for _, place in found.values()) or ((0, 0),):
        segments = tuple(
            replace(s, tensor=found[s.tensor][0] if s.tensor in found and found[s.tensor][1] == place else None)
            for s in shard.segments
        )
        yield replace(shard, name=name if own == place else shard.name, segments=segments), place


def _numbers(name: str) -> tuple[str, tuple[int, int]]:
    """Return a name with ``{i}`` and ``{e}`` for its first two numbers, and these, 0 for what is missing."""
    marks, found = iter(("{i}", "{e}")), [0, 0]
    for at, number in enumerate(_NUMBER.findall(name)[:2]):
        found[at] = int(number)
    return _NUMBER.sub(lambda _: next(marks), name, count=2), (found[0], found[1])
