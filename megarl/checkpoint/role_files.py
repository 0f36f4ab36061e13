"""What a rank writes of its roles, and reads again on any layout and backend.

A tensor of these files is a rectangle of a Hugging Face tensor: ``exp_avg/model.norm.weight[0:64]``. How many ranks
wrote which is of no matter to whoever reads.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megarl.checkpoint.shared_writing import written_here
from megarl.errors import CheckpointError
from megarl.train.backend import Backend
from megarl.train.held_state import WEIGHT, Held
from megarl.weights.rectangles import Rectangle, parsed, pieces_of

FOLDER = "state"
_FILE = re.compile(r"(?P<role>\w+)-\d{5}\.safetensors")


def file_name(role: str, rank: int) -> str:
    """Return the name of what a rank writes of a role."""
    return f"{FOLDER}/{role}-{rank:05d}.safetensors"


def own_tensors(backend: Backend, device: torch.device) -> dict[str, Tensor]:
    """Return views of what this rank writes of a role, by their names. Collective; read them while ``updating``."""
    views = {
        f"{kind}/{piece.rectangle}": piece.view(values)
        for held in backend.held()
        for kind, values in held.values.items()
        for piece in pieces_of(held.shard, held.start, held.stop)
    }
    mine = written_here(list(views), device)
    return {name: view for (name, view), is_mine in zip(views.items(), mine, strict=True) if is_mine}


@dataclass(frozen=True)
class _Saved:
    """A rectangle in a file."""

    rectangle: Rectangle
    path: Path
    key: str


class SavedRole:
    """A role's weights and moments in a checkpoint. Raises CheckpointError where the checkpoint lacks some."""

    def __init__(self, folder: Path, role: str) -> None:
        self.folder, self.role = folder, role
        self._open: dict[Path, safe_open] = {}
        self._saved: dict[tuple[str, str], list[_Saved]] = defaultdict(list)
        for path in sorted((folder / FOLDER).glob("*.safetensors")):
            found = _FILE.fullmatch(path.name)
            if found is not None and found["role"] == role:
                self._list(path)
        if not self._saved:
            raise CheckpointError(f"{folder} has no state of the {role}; take a checkpoint of a run that trains it")

    def _list(self, path: Path) -> None:
        for key in self._file(path).keys():  # noqa: SIM118 (safe_open is no mapping)
            kind, _, text = key.partition("/")
            rectangle = parsed(text)
            if rectangle is None or tuple(self._file(path).get_slice(key).get_shape()) != rectangle.sizes:
                raise CheckpointError(f"{path} has a tensor {key!r}, which is no part of a model; take another one")
            self._saved[kind, rectangle.tensor].append(_Saved(rectangle, path, key))

    def _file(self, path: Path) -> safe_open:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} can't be read: {error}; take another checkpoint") from error
        return self._open[path]

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) along ``dim`` of the weights of tensor ``name``: a TensorSource."""
        saved = self._saved.get((WEIGHT, name))
        if not saved:
            raise CheckpointError(f"{self.folder} lacks {name} of the {self.role}: it is of another model")
        ends = tuple(max(s.rectangle.spans[d][1] for s in saved) for d in range(len(saved[0].rectangle.spans)))
        spans = tuple((start, stop) if d == dim else (0, end) for d, end in enumerate(ends))
        wanted = Rectangle(name, spans)
        values = torch.empty(wanted.sizes)
        self._read(WEIGHT, wanted, values)
        return values

    def fill(self, held: Held) -> None:
        """Write the values of what a rank holds."""
        for piece in pieces_of(held.shard, held.start, held.stop):
            for kind, values in held.values.items():
                self._read(kind, piece.rectangle, piece.view(values))

    @torch.no_grad()
    def _read(self, kind: str, wanted: Rectangle, values: Tensor) -> None:
        """Fill ``values`` with a rectangle of what was saved, from as many files as have parts of it."""
        parts = list(self._parts(kind, wanted))
        for saved, inner in parts:
            read = self._file(saved.path).get_slice(saved.key)[saved.rectangle.index(inner)]
            wanted.part_of(values, inner).copy_(read)
        if not _is_covered(wanted, (inner for _, inner in parts)):
            raise CheckpointError(f"{self.folder} lacks a part of {kind} of {wanted} of the {self.role}")

    def _parts(self, kind: str, wanted: Rectangle) -> Iterator[tuple[_Saved, Rectangle]]:
        for saved in self._saved.get((kind, wanted.tensor), ()):
            if (inner := saved.rectangle.overlap(wanted)) is not None:
                yield saved, inner


def _is_covered(wanted: Rectangle, parts: Iterable[Rectangle]) -> bool:
    """Whether parts that may overlap, as those of stages that tie their embeddings do, are all of a rectangle."""
    found = torch.zeros(wanted.sizes, dtype=torch.bool)
    for part in parts:
        wanted.part_of(found, part).fill_(True)
    return bool(found.all())
