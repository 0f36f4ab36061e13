"""A role's model as a Hugging Face folder, from any backend."""

from __future__ import annotations

from pathlib import Path

import torch

from megarl.train.backend import Backend
from megarl.weights.hf_export import export_hf
from megarl.weights.name_map import hf_shapes, hf_zeros


def export_model(backend: Backend, out: Path, template: Path) -> None:
    """Write ``out`` in the role's dtype, with config and tokenizer files of the folder ``template``. Collective.

    Raises ResourceError on every rank where the disk is too small.
    """
    shape = backend.role.shape
    with backend.resident():
        export_hf(
            out,
            template=template,
            shapes=hf_shapes(shape),
            sources=backend.peers(),
            parameters=backend.parameters(),
            dtype=getattr(torch, backend.role.dtype),
            device=backend.device,
            zeros=hf_zeros(shape),
            fields=shape.critic_fields() if shape.value_head else {},
        )
