"""Megatron's process groups, one set a role.

``megatron.core.parallel_state`` keeps the groups of one model in module globals. Each role (actor, reference, ...)
may have a layout of its own in the same ranks, so each owns a snapshot of those globals, which stands in while the
role runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from torch.distributed.constants import default_pg_timeout

from megarl.parallel.layout import Layout

SEED = 1234


def _globals() -> dict[str, Any]:
    """Return a copy of parallel_state's module globals (lists and dicts copied one level deep)."""
    state = {k: v for k, v in vars(mpu).items() if k.startswith("_") and not k.startswith("__") and not callable(v)}
    return {k: v.copy() if isinstance(v, list | dict) else v for k, v in state.items()}


def world_timeout_s() -> float:
    """Return the seconds that a collective of all ranks may take, as it now stands; torch's own where none is kept."""
    world = dist.group.WORLD
    assert world is not None
    options = [world._get_backend(device).options for device in world._device_types]
    limits = [option._timeout for option in options if option is not None]  # torch's fake backend has none
    return max(limits, default=default_pg_timeout).total_seconds()


def _put(state: dict[str, Any]) -> None:
    for name, value in state.items():
        setattr(mpu, name, value)


class ParallelGroups:
    """The process groups and random-number states of one layout. Creating it is collective over all ranks."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.place = layout.coordinates(dist.get_rank())
        before = _globals()
        mpu.destroy_model_parallel()
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.expert_tp,
            order="tp-cp-ep-dp-pp",
            distributed_timeout_minutes=math.ceil(world_timeout_s() / 60),
        )
        model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)
        self._state, self._rng = _globals(), get_cuda_rng_tracker().get_states()
        _put(before)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Put this layout's groups in place for the duration, then the former ones back."""
        before, rng_before = _globals(), get_cuda_rng_tracker().get_states()
        _put(self._state)
        get_cuda_rng_tracker().set_states(self._rng)
        try:
            yield
        finally:
            self._state, self._rng = _globals(), get_cuda_rng_tracker().get_states()
            _put(before)
            get_cuda_rng_tracker().set_states(rng_before)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds the tokens, in its first model chunk."""
        return self.place.pp == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes logits and the loss, in its last model chunk."""
        return self.place.pp == self.layout.pp - 1

    @property
    def is_output_rank(self) -> bool:
        """Whether this rank reports the results of its data-parallel rank."""
        return self.is_last_stage and self.place.tp == 0 and self.place.cp == 0
