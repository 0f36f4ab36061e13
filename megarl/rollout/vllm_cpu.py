"""What vLLM's CPU worker must do otherwise to share a process with a trainer. Imported by vLLM, by its name alone."""

from __future__ import annotations

import os

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from megarl.rollout.shared_memory import check_room, job_name, remove_segments
from megarl.rollout.vllm_cpu_layers import Pack, parameters_kept


class CpuWorker(CPUWorker):
    """A CPU worker whose weights can be written in place and whose shared memory collides with no other job's."""

    _packs: list[Pack]

    def init_device(self) -> None:
        """Join the groups of the replica. Raise ``ResourceError`` where /dev/shm is too small for all ranks."""
        ranks = _replica(self.rank, self.parallel_config.tensor_parallel_size)
        if len(ranks) == 1:
            super().init_device()
            return
        job = job_name()
        remove_segments(job, ranks, self.rank)
        # All ranks check before one of them makes a segment: what follows begins with making groups together.
        check_room(_local_world_size(), torch.get_num_threads())
        # vLLM names the segments by what follows the colon; torch.distributed is already up and reads nothing of it.
        self.distributed_init_method = f"env:{job}"
        super().init_device()
        remove_segments(job, ranks, self.rank)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Build the model from layers that keep their parameters beside what they compute with."""
        with parameters_kept() as self._packs:
            super().load_model(load_dummy_weights=load_dummy_weights)

    def pack_weights(self) -> None:
        """Compute from now on with the parameters as they are now written."""
        for pack in self._packs:
            pack()


def _replica(rank: int, size: int) -> list[int]:
    first = rank // size * size
    return list(range(first, first + size))


def _local_world_size() -> int:
    # Where nothing sets LOCAL_WORLD_SIZE the whole world is an upper bound.
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"])
