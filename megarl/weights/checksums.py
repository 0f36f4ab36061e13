"""Checksums of rows that move: taken of what is sent and of what has arrived, and compared by parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from megarl.errors import PublishError
from megarl.weights.flow import Rows

_CHUNK = 2**15  # words summed at once
_ODD = 0x5851F42D4C957F2D  # the multiplier of Knuth's MMIX generator
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NUM_NAMED = 3


def checksum(values: Tensor) -> Tensor:
    """Return a number [] (int64) of the bits of ``values`` in order; another value of any one word changes it.

    It is the sum of all words modulo 2**64, each times an odd number that its place has. Words have 8 bytes where these
    divide the values, else an element each.
    """
    words = _words(values.contiguous().flatten())
    weights = torch.arange(1, 2 * min(_CHUNK, words.numel()), 2, device=values.device)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for chunk in words.split(_CHUNK):
        total = total * _ODD + (weights[: chunk.numel()] * chunk).sum()
    return total


def _words(elements: Tensor) -> Tensor:
    size = elements.element_size()
    if elements.nbytes % 8:
        return elements.view(_WORDS[size])
    aligned = elements if elements.storage_offset() * size % 8 == 0 else elements.clone()
    return aligned.view(torch.int64)


def checksums(rows: Iterable[Rows], values: Callable[[Rows], Tensor]) -> tuple[int, ...]:
    """Return the checksum of each of ``rows``. values: of the rows, as they are where they are compared."""
    sums = [checksum(values(each)) for each in rows]
    return tuple(torch.stack(sums).tolist()) if sums else ()


def check_arrived(sent: Sequence[int], found: Sequence[int], rows: Iterable[Rows], sender: int, receiver: str) -> None:
    """Raise PublishError with the parameters that don't hold what was sent.

    sent, found: checksums of ``rows``, from rank ``sender`` of the trainer. receiver: names who holds them.
    """
    differing = [each for each, a, b in zip(rows, sent, found, strict=True) if a != b]
    if differing:
        named = ", ".join(map(_named, differing[:_NUM_NAMED])) + (", ..." if len(differing) > _NUM_NAMED else "")
        raise PublishError(
            f"{receiver} doesn't hold what rank {sender} of the trainer sent: {len(differing)} of {len(found)} "
            f"checksums differ, of {named}"
        )


def _named(rows: Rows) -> str:
    """Return ``parameter[first row:last row + 1]``."""
    target = rows.move.target
    first = target.starts[0] + rows.first_row
    return f"{target.name.format(i=rows.layer, e=rows.expert)}[{first}:{first + rows.num_rows}]"
