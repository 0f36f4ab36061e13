"""A disk that is too small for a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megarl.errors import ResourceError
from megarl.weights.hf_export import export_hf

ROWS, COLUMNS = 2**40, 2**10  # an array of a petabyte and more


@pytest.fixture
def world_of_one() -> Iterator[None]:
    """Make this process a world."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


def test_an_export_that_does_not_fit_is_an_error_with_both_numbers_and_writes_nothing(
    tmp_path: Path, world_of_one: None
) -> None:
    with pytest.raises(ResourceError, match=r"needs 4,503,599,627,370,496 bytes, the disk has [\d,]+ free; make room"):
        export_hf(
            tmp_path / "final",
            template=tmp_path,
            shapes={"embedding": (ROWS, COLUMNS)},
            sources=[[]],
            parameters={},
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
    assert list(tmp_path.iterdir()) == []
