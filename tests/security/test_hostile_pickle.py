"""A pickle that runs a command stands in the place of any file: it is refused, and the command never runs.

Each is tried under the manifest of the checkpoint, and under one that somebody who can write there made to fit.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megarl.checkpoint.folder import CheckpointFolder, Kept, verified_state
from megarl.checkpoint.rank_save import restore_random_states
from megarl.checkpoint.role_files import SavedRole
from megarl.checkpoints import main as checkpoints_main
from megarl.data.tokenizer import load_tokenizer
from megarl.errors import CheckpointError, MegarlError
from megarl.export import main as export_main
from megarl.weights.model_shape import read_model_shape
from megarl.weights.sources import SafetensorsSource
from tests.security.saved_files import FILES, MODEL, records_of, rewrite_manifest

IN_PLACE = tuple(name for name in FILES if name != "manifest.json")
# The critic's tokenizer is there for people: megarl takes the actor's. The other file is for rank 1 to read.
NOT_READ_HERE = (*(f"critic/{name}" for name in MODEL[2:]), "state/random-00001.safetensors")


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def plain(trace: Path) -> bytes:
    """Return the pickle as it is."""
    return pickle.dumps(Hostile(trace))


def as_torch_saves_it(trace: Path) -> bytes:
    """Return the pickle in an archive, as torch.save writes it."""
    archive = io.BytesIO()
    torch.save(Hostile(trace), archive)
    return archive.getvalue()


PICKLES = pytest.mark.parametrize("pickled", [plain, as_torch_saves_it])


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Return the file that is there once the command has run."""
    return tmp_path / "trace"


@pytest.fixture(scope="module")
def first_of_two() -> Iterator[None]:
    """Make this process rank 0 of a world of two, as many as saved, the other of which is never asked."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def ways(run_dir: Path, checkpoint: Path, out: Path) -> Iterator[Callable[[], object]]:
    """Yield every way in which megarl reads a checkpoint, with those that don't verify it themselves."""
    yield lambda: verified_state(checkpoint)
    yield lambda: checkpoints_main([str(run_dir), "--verify"])
    yield lambda: CheckpointFolder(run_dir / "checkpoints").prune(Kept(2, "reward"))
    yield lambda: restore_random_states(checkpoint)
    yield lambda: load_tokenizer(str(checkpoint))
    yield lambda: SavedRole(checkpoint, "actor")
    yield lambda: SavedRole(checkpoint, "critic")
    yield lambda: SafetensorsSource(checkpoint, read_model_shape(checkpoint))
    yield lambda: SafetensorsSource(checkpoint / "critic", read_model_shape(checkpoint / "critic"))
    yield lambda: export_main([str(run_dir), "--out", str(out / "actor")])
    yield lambda: export_main([str(run_dir), "--out", str(out / "critic"), "--role", "critic"])


def errors_of(run_dir: Path, checkpoint: Path, out: Path) -> list[str]:
    """Read a checkpoint in every way, and return the names of the errors; any but megarl's own fails the test."""
    errors = []
    for way in ways(run_dir, checkpoint, out):
        try:
            way()
        except (MegarlError, SystemExit) as error:  # commands tell of an error and exit
            errors.append(type(error).__name__)
    return errors


@PICKLES
def test_the_command_runs_where_something_does_unpickle(trace: Path, pickled: Callable[[Path], bytes]) -> None:
    content = pickled(trace)
    pickle.loads(content) if pickled is plain else torch.load(io.BytesIO(content), weights_only=False)
    assert trace.exists()


def test_every_way_reads_what_was_saved(first_of_two: None, run_dir: Path, newest: Path, tmp_path: Path) -> None:
    assert errors_of(run_dir, newest, tmp_path) == []


@PICKLES
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_the_place_of_a_file_is_refused(
    newest: Path, trace: Path, pickled: Callable[[Path], bytes], name: str
) -> None:
    (newest / name).write_bytes(pickled(trace))
    with pytest.raises(CheckpointError, match=re.escape(name)):
        verified_state(newest)
    assert not trace.exists()


@PICKLES
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_pickle_that_a_manifest_was_made_to_fit_is_never_more_than_bytes(
    first_of_two: None,
    run_dir: Path,
    newest: Path,
    trace: Path,
    tmp_path: Path,
    pickled: Callable[[Path], bytes],
    name: str,
) -> None:
    (newest / name).write_bytes(pickled(trace))
    rewrite_manifest(newest, records_of(newest))
    errors = errors_of(run_dir, newest, tmp_path)
    assert bool(errors) == (name not in NOT_READ_HERE), errors
    assert not trace.exists()


@pytest.mark.parametrize("name", [".metadata", "optimizer.pt", "pytorch_model.bin", "training_args.bin", "a.pkl"])
def test_a_pickle_beside_the_files_is_refused_and_read_by_nobody(
    first_of_two: None, run_dir: Path, newest: Path, trace: Path, tmp_path: Path, name: str
) -> None:
    (newest / name).write_bytes(plain(trace))
    with pytest.raises(CheckpointError, match=re.escape(f"{name} is not in the manifest")):
        verified_state(newest)
    rewrite_manifest(newest, records_of(newest))
    assert errors_of(run_dir, newest, tmp_path) == []
    assert not trace.exists()
