"""Where layouts are verified: on this machine, or on the ranks that torchrun started."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from megarl.errors import ResourceError
from megarl.launchers.starter import placed_rank
from megarl.verify.pool import Pool, RankPool
from megarl.verify.process import rank_context


@dataclass(frozen=True)
class Site:
    """A pool, and a folder that all its ranks see, for models and exports.

    num_nodes: of how many nodes. ranks_together: of which every so many ranks, counted from the first, are on one node.
    """

    pool: Pool
    scratch: Path
    num_nodes: int
    ranks_together: int


def num_placed_ranks(environ: Mapping[str, str] = os.environ) -> int | None:
    """Return the number of ranks that were started with this process, None where it starts its own."""
    return None if placed_rank(environ) is None else int(environ["WORLD_SIZE"])


def opened(
    size: int, scratch: Path | None, models: Sequence[Path], *, with_engine: bool
) -> AbstractContextManager[Site]:
    """Return the Site of up to ``size`` ranks, to enter. scratch: the user's folder for it. models: that ranks read."""
    if num_placed_ranks() is None:
        return _on_this_machine(size, scratch, with_engine=with_engine)
    return _on_placed_ranks(scratch, models, with_engine=with_engine)


@contextmanager
def _on_this_machine(size: int, scratch: Path | None, *, with_engine: bool) -> Iterator[Site]:
    """Yield the Site of this machine, whose ranks know an address that is theirs meanwhile."""
    with _folder(scratch) as folder, socket.create_server(("127.0.0.1", 0)) as held:
        environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1])}
        own = folder / "ranks"
        own.mkdir()
        pool = RankPool(own, size, rank_context(with_engine), environ)
        try:
            yield Site(pool, folder, 1, size)
        finally:
            pool.stop()


@contextmanager
def _on_placed_ranks(scratch: Path | None, models: Sequence[Path], *, with_engine: bool) -> Iterator[Site]:
    """Yield the Site of all ranks that were started. Raises ResourceError where their nodes can't work together."""
    from megarl.verify.torchrun_pool import torchrun_pool

    with ExitStack() as stack:
        pool = stack.enter_context(torchrun_pool(with_engine=with_engine))
        folder = stack.enter_context(_folder(scratch or (Path.cwd() if pool.num_nodes > 1 else None)))
        stack.callback(pool.close)  # before the folder goes
        pool.check_folders(folder, models)
        yield Site(pool, folder, pool.num_nodes, pool.ranks_together)


@contextmanager
def _folder(parent: Path | None) -> Iterator[Path]:
    """Yield a new folder in ``parent``, by default where temporary files go. Raises ResourceError where it can't be."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="megarl_verify_", dir=parent)).absolute()
    except OSError as error:
        raise ResourceError(f"no folder can be made in {parent}: {error.strerror}. fix: --scratch=FOLDER") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
