"""A rank's part of a save: the state of its roles and its random generators, and the hashes of all that it writes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megarl.checkpoint.manifest import FileRecord, files_of, hashed
from megarl.checkpoint.role_files import FOLDER, file_name, own_tensors
from megarl.checkpoint.tensor_file import write_tensors
from megarl.errors import CheckpointError, ResourceError
from megarl.monitor.disk import refusals_named
from megarl.train.backend import Backend
from megarl.train.held_state import UpdateCounts

RANDOM = "random"  # the name of the generators' states where roles have theirs


@dataclass(frozen=True)
class SavedPart:
    """What a rank wrote. updates: of the roles that are trained. failure: why not all is written, None where it is."""

    files: tuple[FileRecord, ...] = ()
    updates: Mapping[str, UpdateCounts] = field(default_factory=dict)
    failure: str | None = None


class RankSave:
    """Writes this rank's part of a checkpoint into ``folder``. Making it is collective; nothing else is.

    Where ``in_background``, the state is copied to host memory first, and a thread writes what later updates then don't
    reach. The hashes of files that are there already, of an exported model, are shared by the ranks.
    """

    def __init__(
        self, folder: Path, roles: Mapping[str, Backend], device: torch.device, *, in_background: bool
    ) -> None:
        self.folder, self.rank = folder, dist.get_rank()
        self.updates = {name: backend.counts() for name, backend in roles.items()}
        exported = [name for name in files_of(folder) if not name.startswith(f"{FOLDER}/")]
        self._exported = exported[self.rank :: dist.get_world_size()]
        dist.barrier()  # nobody writes before all have seen what was exported
        self._files: list[FileRecord] = []
        self._failure: str | None = None
        self._thread: threading.Thread | None = None
        copies: dict[str, dict[str, Tensor]] = {RANDOM: random_states()}
        for name, backend in roles.items():
            with backend.updating():
                tensors = own_tensors(backend, device)
                if in_background:
                    copies[name] = {key: view.detach().to("cpu", copy=True) for key, view in tensors.items()}
                else:
                    self._write({name: tensors})
        if in_background:
            self._thread = threading.Thread(target=self._end, args=(copies,), name="save")
            self._thread.start()
        else:
            self._end(copies)

    def is_done(self) -> bool:
        """Whether all is written, or can't be."""
        return self._thread is None or not self._thread.is_alive()

    def result(self) -> SavedPart:
        """Wait for the end, and return what was written."""
        if self._thread is not None:
            self._thread.join()
        return SavedPart(tuple(self._files), self.updates, self._failure)

    def _end(self, copies: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._write(copies)
        for name in self._exported:
            self._add(partial(hashed, self.folder, name))

    def _write(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, own in tensors.items():
            self._add(partial(write_tensors, self.folder, file_name(name, self.rank), own))

    def _add(self, write: Callable[[], FileRecord]) -> None:
        """Add a file, or the first reason why the disk refuses one: all ranks come to the end of a save."""
        try:
            with refusals_named(self.folder / FOLDER):
                self._files.append(write())
        except ResourceError as error:
            self._failure = self._failure or str(error)


def random_states() -> dict[str, Tensor]:
    """Return the states of torch's generators on this rank, by device."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_random_states(folder: Path) -> None:
    """Set torch's generators on this rank to what they were, where as many ranks saved theirs as there are now."""
    if len(list((folder / FOLDER).glob(f"{RANDOM}-*"))) != dist.get_world_size():
        return
    path = folder / file_name(RANDOM, dist.get_rank())
    try:
        states = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} can't be read: {error}; take another checkpoint") from error
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
