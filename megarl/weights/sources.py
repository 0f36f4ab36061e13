"""Where weights come from: the safetensors files of a Hugging Face folder, or a seeded random initialisation.

Both answer for ranges, so that each rank reads (or draws) only what it holds.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megarl.errors import ModelFolderError
from megarl.weights.any_model import InitialSource
from megarl.weights.config_fields import read_json, shown
from megarl.weights.fused_experts import fused_parts
from megarl.weights.model_shape import VALUE_HEAD, ModelShape
from megarl.weights.name_map import EMBEDDING, OUTPUT, hf_shapes, hf_zeros
from megarl.weights.shard import Shard

# As safetensors names them. Others are quantized, with scales beside them, or no weights.
_DTYPES = ("F64", "F32", "BF16", "F16")
# Tensors of older checkpoints that config.json says as well: the frequencies of rotary embeddings.
_WITHOUT_MEANING = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
_ROWS_COMPARED = 4096


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
    shape or dtype, lie outside the folder, or where a tensor has no place in megarl's model and isn't known to mean
    nothing there.
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
        in_files |= {part.name: part.shape for part in self._fused.values()}
        self._check(in_files)
        self._refuse_others({*in_files, *hf_zeros(shape)}, shape)
        for name in (n for n in hf_zeros(shape) if n in self._file_of):
            if self._handle(name).get_tensor(name).any():
                raise ModelFolderError(
                    f"{self._file_of[name]}: {name} isn't zero, and megarl's critic has no such tensor; "
                    "a critic that megarl saved has zeros there"
                )

    def _index(self) -> dict[str, Path]:
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if index.is_file() and single.is_file():
            raise ModelFolderError(
                f"{self.folder} has both {single.name} and {index.name}, which may hold different weights; remove one"
            )
        if index.is_file():
            return {name: self.folder / file for name, file in _weight_map(index)}
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
            found, dtype = self._shape(name)
            if found != tuple(size):
                raise ModelFolderError(
                    f"{self._file_of[name]}: {name} has shape {found}, config.json implies {tuple(size)}"
                )
            if dtype not in _DTYPES:
                raise ModelFolderError(
                    f"{self._file_of[name]}: {name} has dtype {dtype}; supported are {', '.join(_DTYPES)}; give the "
                    "unquantized model"
                )

    def _refuse_others(self, known: set[str], shape: ModelShape) -> None:
        """Refuse tensors that the model of config.json hasn't, and that would be left out unseen."""
        others = [n for n in self._file_of if n not in known and not _WITHOUT_MEANING.fullmatch(n)]
        if OUTPUT in others and (shape.value_head or (shape.tied and self._are_equal(OUTPUT, EMBEDDING))):
            others.remove(OUTPUT)  # a value head takes its place, or the embedding is the same
        if OUTPUT in others and shape.tied:
            raise ModelFolderError(
                f"{self._file_of[OUTPUT]}: {OUTPUT} differs from {EMBEDDING}, which config.json's tie_word_embeddings "
                "puts in its place; set tie_word_embeddings to false if the model has an output layer of its own"
            )
        if others:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            raise ModelFolderError(
                f"{self.folder} has tensors that its config.json implies no place for: "
                f"{', '.join(map(shown, others[:3]))}{more}; supported are the tensors of {shape.family}"
                + (" with a value head" if shape.value_head else "")
                + "; its config.json and its weights belong to different models, or it has parts that megarl hasn't"
            )

    def _are_equal(self, name: str, other: str) -> bool:
        if self._shape(name) != self._shape(other):
            return False
        one, two = (self._handle(n).get_slice(n) for n in (name, other))
        starts = range(0, one.get_shape()[0], _ROWS_COMPARED)
        return all(torch.equal(one[i : i + _ROWS_COMPARED], two[i : i + _ROWS_COMPARED]) for i in starts)

    def _shape(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return the shape and the dtype of a tensor."""
        try:
            found = self._handle(name).get_slice(name)
            return tuple(found.get_shape()), str(found.get_dtype())
        except SafetensorError as error:
            raise ModelFolderError(
                f"{self._file_of[name]} lacks {name}, which the index says it has; download the folder again"
            ) from error

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) along ``dim``, reading only those from the file.

        Raises ModelFolderError where they hold NaN or infinity.
        """
        if name in self._fresh:
            return torch.zeros(self._fresh[name]).narrow(dim, start, stop - start)
        part = self._fused.get(name)
        in_file = part.name if part else name
        view = self._handle(in_file).get_slice(in_file)
        rows: Tensor = view[part.rows(dim, start, stop) if part else (slice(None),) * dim + (slice(start, stop),)]
        # The sum is one pass without a copy; it is infinite as well where large numbers are summed.
        if not rows.sum(dtype=torch.float32).isfinite() and not rows.isfinite().all():
            raise ModelFolderError(
                f"{self._file_of[in_file]}: {in_file} holds {int((~rows.isfinite()).sum()):,} numbers that are NaN or "
                "infinite; what wrote it had diverged, or overflowed in its dtype: give a checkpoint from before that"
            )
        return rows


def _weight_map(index: Path) -> Iterable[tuple[str, str]]:
    """Return the tensors of an index with the name of their file, in the index's folder."""
    content = read_json(index, "index of safetensors files")
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise ModelFolderError(
            f"{index} is no index of safetensors files: weight_map = {shown(found)} must be an object that names "
            "the file of each tensor; download it again"
        )
    for name, file in found.items():
        path = PurePosixPath(file) if isinstance(file, str) else None
        if path is None or path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
            raise ModelFolderError(
                f"{index}: the file of {shown(name)} = {shown(file)} must be a .safetensors file in this folder"
            )
    return found.items()


def _opened(path: Path) -> safe_open:
    if not path.exists():
        raise ModelFolderError(f"{path} is named by the index but missing; complete the download")
    if not path.is_file():
        raise ModelFolderError(f"{path} is no file; download it again")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ModelFolderError(
            f"{path} is truncated or not a safetensors file ({path.stat().st_size:,} bytes: {error}); download it again"
        ) from error
    except OSError as error:
        raise ModelFolderError(f"{path} can't be read: {error}") from error


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


def drawn_weights(shape: ModelShape, folder: str | Path | None, seed: int) -> TensorSource:
    """Return the weights that a model begins with at random. folder: has its config.json; the map needs none."""
    if shape.is_mapped:
        return RandomSource(shape, seed)
    assert folder is not None, "a run is checked with its files"
    return InitialSource(folder, seed)


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
