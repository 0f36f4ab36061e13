"""Write a sharded model as a Hugging Face folder. Every rank writes files of its own; none holds the whole model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megarl.errors import ResourceError
from megarl.weights.cells import cells_of
from megarl.weights.files import MAX_FILE_BYTES, Shapes, plan_files
from megarl.weights.reshard import Resharder, node_size
from megarl.weights.reshard_plan import plan_reshard
from megarl.weights.shard import Peers, peers_of, whole
from megarl.weights.sources import TensorSource

_COPIED = (".json", ".txt", ".model", ".jinja")
# Of a checkpoint that a run starts from: they tell of that one, and a new one writes its own.
_OF_A_CHECKPOINT = ("manifest.json", "trainer_state.json")
_SYSTEM_ERROR = "(os error "
_WEIGHTS_INDEX = "model.safetensors.index.json"

_NOTHING: Mapping[str, Any] = MappingProxyType({})


def export_hf(
    out: Path,
    *,
    template: Path,
    shapes: Shapes,
    sources: Sequence[Peers],
    parameters: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    zeros: Shapes = _NOTHING,
    fields: Mapping[str, Any] = _NOTHING,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write ``out``: weights in ``dtype``, with config and tokenizer of the folder ``template``. Collective.

    shapes: of the tensors that ranks hold. sources: what all ranks hold. parameters: this rank's. zeros: shapes of
    tensors that no rank holds, which are zero. fields: of config.json, to replace. What ``out`` held before is gone.
    Raises ResourceError on every rank where the disk is too small, or refuses a file of one.
    """
    sizes = {**shapes, **zeros}
    files = plan_files(sizes, dtype.itemsize, max_file_bytes)
    total_bytes = sum(torch.Size(s).numel() for s in sizes.values()) * dtype.itemsize
    _make_room(out, total_bytes)
    rank, world_size, refusal = dist.get_rank(), dist.get_world_size(), ""
    held = cells_of(sources, node_size(device))
    for first in range(0, len(files), world_size):
        wave = files[first : first + world_size]
        targets = peers_of([[whole(n, shapes[n]) for n in names if n in shapes] for names in wave])
        own = [n for n in wave[rank] if n in shapes] if rank < len(wave) else []
        tensors = {n: torch.empty(shapes[n], dtype=dtype, device=device) for n in own}
        Resharder(plan_reshard(held, targets, rank), dtype=dtype).run(parameters, tensors, device)
        if rank < len(wave):
            filled = {n: t.cpu() for n, t in tensors.items()}
            filled |= {n: torch.zeros(zeros[n], dtype=dtype) for n in wave[rank] if n in zeros}
            path = out / _file_name(first + rank, len(files))
            refusal = refusal or refusal_of(path, partial(_write_weights, path, filled))
    if rank == 0:
        refusal = refusal or refusal_of(out, partial(_write_index, out, files, total_bytes))
        refusal = refusal or refusal_of(out, partial(copy_template, template, out, dtype, fields))
    raise_everywhere(refusal)


def refusal_of(path: Path, write: Callable[[], None]) -> str:
    """Write, and return why the disk refuses it, empty where it doesn't: other ranks may wait for this one."""
    try:
        write()
    except OSError as error:
        return _refusal(path, error.strerror or str(error))
    except SafetensorError as error:  # which is what that library makes of an error of the system
        if _SYSTEM_ERROR not in str(error):
            raise
        return _refusal(path, str(error))
    return ""


def _refusal(path: Path, why: str) -> str:
    free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free
    return f"{path} can't be written: {why}; the disk has {free:,} bytes free; make room, or take a larger disk"


def raise_everywhere(refusal: str) -> None:
    """Raise ResourceError on every rank where the disk refused a file of one. Collective; no rank is ahead of it."""
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, refusal)
    if first := next(filter(None, found), None):
        raise ResourceError(first)


def _write_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that is as readable as any other new file; safetensors makes its own for the owner."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def _make_room(folder: Path, needed_bytes: int) -> None:
    """Rank 0 makes the folder anew; all ranks raise where the disk lacks room."""
    free = [0]
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = [shutil.disk_usage(folder.parent).free]
        if free[0] >= needed_bytes:
            folder.mkdir()
    dist.broadcast_object_list(free, src=0)
    _refuse_lack_of_room(folder, free[0], needed_bytes)


def _refuse_lack_of_room(folder: Path, free_bytes: int, needed_bytes: int) -> None:
    if free_bytes < needed_bytes:
        raise ResourceError(
            f"saving to {folder} needs {needed_bytes:,} bytes, the disk has {free_bytes:,} free; "
            "make room, or point trainer.run_dir at a larger disk"
        )


def _file_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _write_index(folder: Path, files: Sequence[Sequence[str]], total_bytes: int) -> None:
    if len(files) == 1:
        return
    weight_map = {name: _file_name(i, len(files)) for i, names in enumerate(files) for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / _WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_template(template: Path, out: Path, dtype: torch.dtype, fields: Mapping[str, Any]) -> None:
    """Copy tokenizer and configuration files; config.json has ``fields`` and names the dtype of the weights."""
    out.mkdir(exist_ok=True)
    for file in template.iterdir():
        if file.suffix in _COPIED and not file.name.endswith(".index.json") and file.name not in _OF_A_CHECKPOINT:
            shutil.copyfile(file, out / file.name)
    config = json.loads((template / "config.json").read_text())
    config.pop("torch_dtype", None)
    config |= {**fields, "dtype": str(dtype).removeprefix("torch.")}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def export_source(
    out: Path,
    *,
    source: TensorSource,
    template: Path,
    shapes: Shapes,
    dtype: torch.dtype,
    zeros: Shapes = _NOTHING,
    fields: Mapping[str, Any] = _NOTHING,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write ``out`` as ``export_hf`` does, from one process, which holds one file of ``source`` at a time.

    Raises ResourceError where the disk is too small or refuses the weights.
    """
    sizes = {**shapes, **zeros}
    files = plan_files(sizes, dtype.itemsize, max_file_bytes)
    total_bytes = sum(torch.Size(s).numel() for s in sizes.values()) * dtype.itemsize
    out.mkdir(parents=True)
    _refuse_lack_of_room(out, shutil.disk_usage(out).free, total_bytes)
    for i, names in enumerate(files):
        read = {name: source.read(name, 0, 0, shapes[name][0]).to(dtype) for name in names if name in shapes}
        read |= {name: torch.zeros(zeros[name], dtype=dtype) for name in names if name in zeros}
        path = out / _file_name(i, len(files))
        if refusal := refusal_of(path, partial(_write_weights, path, read)):
            raise ResourceError(refusal)
    _write_index(out, files, total_bytes)
    copy_template(template, out, dtype, fields)
