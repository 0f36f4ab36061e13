"""Which of the ranks that hold the same writes it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist


def written_here(names: Sequence[str], device: torch.device) -> list[bool]:
    """Return for each of this rank's names whether this rank writes it, so that each is written once. Collective.

    Names travel as hashes of 8 bytes; which of the ranks that hold a name writes it follows from its hash, so that
    ranks which hold the same share the writing.
    """
    own = torch.tensor([_hash(name) for name in names], dtype=torch.int64, device=device)
    num_held = torch.tensor([len(own)], device=device)
    counts = [torch.zeros_like(num_held) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, num_held)
    most = max(int(count) for count in counts)
    padded = torch.zeros(most, dtype=torch.int64, device=device)
    padded[: len(own)] = own
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    holders = torch.stack(
        [torch.isin(own, theirs[: int(count)]) for theirs, count in zip(gathered, counts, strict=True)]
    )
    turn = own.abs() % holders.sum(0).clamp(min=1)
    # The turn-th of the holders, counted from 0.
    is_turn = holders & (holders.cumsum(0) == turn + 1)
    return [bool(mine) for mine in is_turn[dist.get_rank()].tolist()]


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
