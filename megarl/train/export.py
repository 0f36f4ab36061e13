"""A role's model as a Hugging Face folder, from any backend."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megarl.train.backend import Backend
from megarl.weights.hf_export import copy_template, export_hf, raise_everywhere, refusal_of
from megarl.weights.name_map import hf_shapes, hf_zeros


def export_model(backend: Backend, out: Path, *, weights: bool) -> None:
    """Write ``out`` in the role's dtype, with config and tokenizer of the folder that it started from. Collective.

    weights: whether they are in it. All is there on every rank once this returns. Raises ResourceError on every rank
    where the disk is too small.
    """
    shape, template = backend.role.shape, Path(backend.role.model.here())
    dtype, fields = getattr(torch, backend.role.dtype), shape.critic_fields() if shape.value_head else {}
    if not weights:
        refusal = ""
        if dist.get_rank() == 0:
            refusal = refusal_of(out, partial(copy_template, template, out, dtype, fields))
        raise_everywhere(refusal)
        return
    with backend.resident():
        export_hf(
            out,
            template=template,
            shapes=hf_shapes(shape),
            sources=backend.peers(),
            parameters=backend.parameters(),
            dtype=dtype,
            device=backend.device,
            zeros=hf_zeros(shape),
            fields=fields,
        )
