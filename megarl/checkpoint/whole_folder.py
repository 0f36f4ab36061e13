"""A checkpoint folder that appears whole or not at all, however many writers and parts it has."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield the folder to write, ``<out>.partial``, which takes the place of ``out`` once all ranks are done.

    Collective. After an error the partial folder stays, and ``out`` as it was.
    """
    partial = out.with_name(f"{out.name}.partial")
    yield partial
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    dist.barrier()
