"""Safetensors files, written tensor by tensor: what is written is hashed on its way and never held twice in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarl.checkpoint.manifest import FileRecord

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
_ALIGNMENT = 8  # of the data, as the safetensors library pads it


def write_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write ``folder``/``name`` to the disk itself, and return its FileRecord. Tensors may be views on any device."""
    header: dict[str, dict[str, object]] = {}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest, num_bytes = hashlib.sha256(), 0
    path = folder / name
    path.parent.mkdir(exist_ok=True)  # alone: on a node that doesn't see the folder above, it would be another one
    with path.open("xb") as file:
        for content in _contents(text, tensors.values()):
            digest.update(content)
            file.write(content)
            num_bytes += len(content)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(name, num_bytes, digest.hexdigest())


def _contents(header: bytes, tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Yield the parts of a safetensors file in order: the header's length, the header, the bytes of every tensor."""
    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in tensors:
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
