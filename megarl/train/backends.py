"""The backend of a role, by the section of the config that it has."""

from __future__ import annotations

import torch

from megarl.config.schema import FsdpConfig, MegatronConfig
from megarl.roles import Role
from megarl.train.backend import Backend
from megarl.weights.sources import TensorSource


def backend_of(role: Role, source: TensorSource, device: torch.device) -> Backend:
    """Return this rank's part of a role on its backend."""
    match role.backend:
        case MegatronConfig():
            from megarl.train.megatron.backend import MegatronBackend

            return MegatronBackend(role, source, device)
        case FsdpConfig():
            from megarl.train.fsdp.backend import FsdpBackend

            return FsdpBackend(role, source, device)
