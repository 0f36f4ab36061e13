"""One process as any rank of a world of any size, whose other ranks aren't there: collectives leave data as it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Be ``rank`` of a world of so many ranks for the duration. Nobody may be in another world."""
    new_group = dist.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **kwargs | {"backend": "fake", "pg_options": None})

    placed = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    with mock.patch.dict(os.environ, placed):  # gone afterwards: what this process starts is no rank
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        dist.new_group = distributed_c10d.new_group = fake_group
        try:
            yield
        finally:
            dist.new_group = distributed_c10d.new_group = new_group
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
