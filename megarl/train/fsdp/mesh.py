"""The ranks of a role on FSDP: those that share a copy of the model, and those that share sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megarl.parallel.layout import Layout

_COPIES, _PARTS = "copies", "parts"


@dataclass(frozen=True)
class Ranks:
    """Process groups of a layout. mesh: as ``fully_shard`` takes it, [copies, parts] or [parts].

    parts: ranks that have one copy of the model between them. context: that share every sequence, None where none do.
    """

    mesh: DeviceMesh
    parts: dist.ProcessGroup
    context: dist.ProcessGroup | None


def ranks_of(layout: Layout, device: torch.device) -> Ranks:
    """Return this rank's groups. Collective."""
    context = None
    if layout.cp > 1:
        sizes = (layout.world_size // layout.cp, layout.cp)
        context = init_device_mesh(device.type, sizes, mesh_dim_names=("data", "context")).get_group("context")
    if layout.fsdp == layout.world_size:
        mesh = init_device_mesh(device.type, (layout.fsdp,), mesh_dim_names=(_PARTS,))
    else:
        sizes = (layout.world_size // layout.fsdp, layout.fsdp)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=(_COPIES, _PARTS))
    return Ranks(mesh, mesh.get_group(_PARTS), context)
