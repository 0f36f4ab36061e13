"""Who holds what of every tensor: cells, each of which some ranks hold whole and the others not at all.

A box is a rectangle of the tensors of some layers and experts. Sets of layers and of experts are bits of an int, so
that whole blocks of a model are intersected at once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from megarl.weights.shard import Peers

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Box:
    """The range of each dim in ``spans``, of the tensors of every layer and expert whose bit is set."""

    layers: int
    experts: int
    spans: tuple[Span, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.layers.bit_count() * self.experts.bit_count() * math.prod(b - a for a, b in self.spans)

    def overlap(self, other: Box) -> Box | None:
        """Return the Box that is in both, None where there is none."""
        layers, experts = self.layers & other.layers, self.experts & other.experts
        if not layers or not experts:
            return None
        spans = spans_in_both(self.spans, other.spans)
        return None if spans is None else Box(layers, experts, spans)


@dataclass(frozen=True, slots=True)
class Window:
    """Where a box lies in a parameter: from index ``starts`` of its dims. The name has ``{i}`` and ``{e}``."""

    name: str
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A box of ``tensor``, and where it lies."""

    tensor: str
    box: Box
    window: Window

    def window_of(self, box: Box) -> Window:
        """Return the Window of a box within this one."""
        shifts = (inner[0] - outer[0] for inner, outer in zip(box.spans, self.box.spans, strict=True))
        return Window(self.window.name, tuple(a + b for a, b in zip(self.window.starts, shifts, strict=True)))


@dataclass(frozen=True, eq=False)
class Holders:
    """Ranks that hold the same cells, in order. by_node: those of each node."""

    ranks: tuple[int, ...]
    by_node: Mapping[int, tuple[int, ...]]

    def senders(self, node: int) -> tuple[int, ...]:
        """Return the ranks that send to ``node``, as a tuple of ints: those of them on it, or all where none is."""
        return self.by_node.get(node, self.ranks)


@dataclass(frozen=True, slots=True)
class Cell:
    """A box of a tensor with its holders. parts: what it is a piece of, by the index of the peers that hold that."""

    box: Box
    holders: Holders
    parts: tuple[tuple[int, Part], ...]


@dataclass(frozen=True)
class Sources:
    """The cells of every tensor that some rank holds."""

    peers: tuple[Peers, ...]
    ranks_per_node: int
    cells: Mapping[str, tuple[Cell, ...]]


def spans_in_both(some: tuple[Span, ...], others: tuple[Span, ...]) -> tuple[Span, ...] | None:
    """Return the range of each dim that is in both, as a tuple of spans; None where one is empty."""
    spans = []
    for (a, b), (c, d) in zip(some, others, strict=True):
        low, high = a if a > c else c, b if b < d else d
        if low >= high:
            return None
        spans.append((low, high))
    return tuple(spans)


@lru_cache(maxsize=4096)
def indices(bits: int) -> tuple[int, ...]:
    """Return the indices of the bits that are set, in order, as a tuple of ints."""
    return tuple(i for i in range(bits.bit_length()) if bits >> i & 1)


def parts_of(peers: Peers) -> Iterator[Part]:
    """Yield all that peers hold, without padding."""
    for pattern in peers.patterns:
        shard, offset = pattern.shard, 0
        layers, experts = (sum(1 << n for n in numbers) for numbers in (pattern.layers, pattern.experts))
        for seg in shard.segments:
            if seg.tensor is not None and layers and experts:
                spans = tuple((seg.start, seg.stop) if d == shard.dim else (0, n) for d, n in enumerate(shard.shape))
                starts = tuple(offset if d == shard.dim else 0 for d in range(len(shard.shape)))
                yield Part(seg.tensor, Box(layers, experts, spans), Window(shard.name, starts))
            offset += seg.length


Held = tuple[int, Part]


def cells_of(sources: Sequence[Peers], ranks_per_node: int) -> Sources:
    """Return the Sources that peers are. Node n has ranks [n * ranks_per_node, (n + 1) * ranks_per_node)."""
    held: dict[str, list[Held]] = defaultdict(list)
    for index, peers in enumerate(sources):
        for part in parts_of(peers):
            held[part.tensor].append((index, part))
    holders_of: dict[tuple[int, ...], Holders] = {}

    def holders(parts: Sequence[Held]) -> Holders:
        key = tuple(sorted({index for index, _ in parts}))
        if key not in holders_of:
            ranks = tuple(sorted({rank for index in key for rank in sources[index].ranks}))
            holders_of[key] = _holders(ranks, ranks_per_node)
        return holders_of[key]

    cells = {
        tensor: tuple(Cell(box, holders(inside), tuple(inside)) for box, inside in _disjoint(parts))
        for tensor, parts in held.items()
    }
    return Sources(tuple(sources), ranks_per_node, cells)


def _holders(ranks: tuple[int, ...], ranks_per_node: int) -> Holders:
    by_node: dict[int, tuple[int, ...]] = defaultdict(tuple)
    for rank in ranks:
        by_node[rank // ranks_per_node] += (rank,)
    return Holders(ranks, dict(by_node))


def _disjoint(parts: list[Held]) -> Iterator[tuple[Box, list[Held]]]:
    """Yield boxes that don't overlap, each with the parts that it is in: together all of ``parts``."""
    for layers, of_layers in _by_bits(parts, lambda box: box.layers):
        for experts, of_experts in _by_bits(of_layers, lambda box: box.experts):
            for spans, inside in _by_spans(of_experts, 0):
                yield Box(layers, experts, spans), inside


def _by_bits(parts: list[Held], bits_of: Callable[[Box], int]) -> Iterator[tuple[int, list[Held]]]:
    """Yield sets of layers, or experts, that the same parts have."""
    sets: list[int] = []
    for bits in dict.fromkeys(bits_of(part.box) for _, part in parts):
        both = [(known & bits, known & ~bits) for known in sets]
        fresh = bits
        for known in sets:
            fresh &= ~known
        sets = [some for pair in (*both, (fresh, 0)) for some in pair if some]
    for some in sets:
        yield some, [held for held in parts if bits_of(held[1].box) & some]


def _by_spans(parts: list[Held], dim: int) -> Iterator[tuple[tuple[Span, ...], list[Held]]]:
    """Yield ranges of ``dim`` and the dims after it that the same parts have."""
    if dim == len(parts[0][1].box.spans):
        yield (), parts
        return
    starting: dict[int, list[Held]] = defaultdict(list)
    cuts = set()
    for held in parts:
        low, high = held[1].box.spans[dim]
        starting[low].append(held)
        cuts |= {low, high}
    inside: list[Held] = []
    for low, high in pairwise(sorted(cuts)):
        inside = [held for held in inside if held[1].box.spans[dim][1] > low] + starting[low]
        if inside:
            for rest, these in _by_spans(inside, dim + 1):
                yield ((low, high), *rest), these
