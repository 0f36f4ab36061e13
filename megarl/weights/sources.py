"""Where weights come from: the safetensors files of a Hugging Face folder, or a seeded random initialisation.

Both answer for ranges, so that each rank reads (or draws) only what it holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megarl.errors import ModelFolderError
from megarl.weights.fused_experts import fused_parts
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import VALUE_HEAD, hf_shapes, hf_zeros
from megarl.weights.shard import Shard


class TensorSource(Protocol):
    """Gives ranges of Hugging Face tensors."""

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) along ``dim`` of tensor ``name``."""
        ...


class SafetensorsSource:
    """Reads ranges from ``model.safetensors`` or the files of ``model.safetensors.index.json``.

    A value head that the folder lacks is zero where it ``may_lack_value_head``: a critic that starts from a language
    model values every state at 0.
    Experts may be apart or fused. Raises ModelFolderError where files or tensors are missing, truncated or of the wrong
    shape, or a tensor that has no place in megarl's model isn't zero.
    """

    def __init__(self, folder: str | Path, shape: ModelShape, *, may_lack_value_head: bool = True) -> None:
        self.folder = Path(folder).expanduser()
        self._file_of = self._index()
        self._open: dict[Path, safe_open] = {}
        expected = hf_shapes(shape)
        fresh = (VALUE_HEAD,) if may_lack_value_head else ()
        self._fresh = {n: expected.pop(n) for n in fresh if n in expected and n not in self._file_of}
        self._fused = fused_parts(expected, shape.num_experts, self._file_of)
        in_files = {n: s for n, s in expected.items() if n not in self._fused}
        self._check(in_files | {part.name: part.shape for part in self._fused.values()})
        for name in (n for n in hf_zeros(shape) if n in self._file_of):
            if self._handle(name).get_tensor(name).any():
                raise ModelFolderError(
                    f"{self._file_of[name]}: {name} isn't zero, and megarl's critic has no such tensor; "
                    "a critic that megarl saved has zeros there"
                )

    def _index(self) -> dict[str, Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            return {name: self.folder / file for name, file in _weight_map(index).items()}
        single = self.folder / "model.safetensors"
        if not single.is_file():
            raise ModelFolderError(
                f"{self.folder} has neither model.safetensors nor model.safetensors.index.json; "
                "give a folder with weights, or start from config.json alone with model.init=random"
            )
        return dict.fromkeys(_opened(single).keys(), single)

    def _handle(self, name: str) -> safe_open:
        path = self._file_of[name]
        if path not in self._open:
            self._open[path] = _opened(path)
        return self._open[path]

    def _check(self, expected: Mapping[str, Sequence[int]]) -> None:
        missing = [n for n in expected if n not in self._file_of]
        if missing:
            raise ModelFolderError(
                f"{self.folder} lacks {len(missing)} of {len(expected)} tensors, first {missing[0]!r}; "
                "its config.json and its weights belong to different models, or the download is incomplete"
            )
        for name, size in expected.items():
            found = self._shape(name)
            if found != tuple(size):
                raise ModelFolderError(
                    f"{self._file_of[name]}: {name} has shape {found}, config.json implies {tuple(size)}"
                )

    def _shape(self, name: str) -> tuple[int, ...]:
        try:
            return tuple(self._handle(name).get_slice(name).get_shape())
        except SafetensorError as error:
            raise ModelFolderError(
                f"{self._file_of[name]} lacks {name}, which the index says it has; download the folder again"
            ) from error

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) along ``dim``, reading only those from the file."""
        if name in self._fresh:
            return torch.zeros(self._fresh[name]).narrow(dim, start, stop - start)
        if part := self._fused.get(name):
            fused: Tensor = self._handle(part.name).get_slice(part.name)[part.rows(dim, start, stop)]
            return fused
        view = self._handle(name).get_slice(name)
        rows: Tensor = view[start:stop] if dim == 0 else view[:, start:stop]
        return rows


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFolderError(
            f"{index} is truncated or not an index of safetensors files; download it again"
        ) from error
    return weight_map


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise ModelFolderError(f"{path} is named by the index but missing; complete the download") from error
    except SafetensorError as error:
        raise ModelFolderError(
            f"{path} is truncated or not a safetensors file ({path.stat().st_size:,} bytes: {error}); download it again"
        ) from error


class RandomSource:
    """Draws weights from config.json alone: normal(0, initializer_range), norms 1, biases and value head 0.

    Each tensor has a generator of its own, seeded by the run's seed and its name, so that the weights are the same
    on every layout.
    """

    def __init__(self, shape: ModelShape, seed: int) -> None:
        self.sizes, self.std, self.seed = hf_shapes(shape), shape.init_std, seed
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) along ``dim`` of the tensor drawn for ``name``."""
        if self._last[0] != name:
            self._last = (name, self._draw(name))
        return self._last[1].narrow(dim, start, stop - start)

    def _draw(self, name: str) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(self.sizes[name])
        if name.endswith(".bias") or name == VALUE_HEAD:
            return torch.zeros(self.sizes[name])
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(self.sizes[name], generator=generator) * self.std


@torch.no_grad()
def fill(parameters: Mapping[str, Tensor], shards: Sequence[Shard], source: TensorSource) -> None:
    """Fill every shard's parameter from ``source``; padding becomes zero."""
    for shard in shards:
        parameter = parameters[shard.name]
        offset = 0
        for seg in shard.segments:
            view = parameter.narrow(shard.dim, offset, seg.length)
            if seg.tensor is None:
                view.zero_()
            else:
                view.copy_(source.read(seg.tensor, shard.dim, seg.start, seg.stop))
            offset += seg.length
