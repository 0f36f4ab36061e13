"""Every accommodation of the CPU platform is still needed by the installed Megatron, and still works.

The first test to fail after an upgrade of megatron-core says which accommodation to remove or to mend.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from megarl.parallel.cpu.accommodations import NAMES
from tests.dist.platform_probes import ProbeRun, run_probes
from tests.processes import FRESH

# What is seen without the accommodation.
SYMPTOMS = {
    "moe_split_sizes": "all_to_all_single(): incompatible function arguments",
    "no_jit": "a fused function is compiled",
    "one_gloo_device": "event loops poll",
    "quiet_warnings": "Transformer Engine and Apex are not installed",
    "rng_states": "the state outside isn't what it was before fork()",
    "tensor_cuda": "CUDA",
    "tensor_type": "Received torch.FloatTensor",
    "torch_view": "CUDA",
    "uneven_gather": "ProcessGroupGloo::allgather: invalid tensor size",
}
ON_TWO_RANKS = {"moe_split_sizes", "one_gloo_device", "quiet_warnings", "uneven_gather"}
TIMEOUT_S = 60.0


def _probe(names: Collection[str], world_size: int, without: Collection[str] = ()) -> dict[str, str]:
    """Return the errors of all ranks by probe, from fresh processes."""
    with TemporaryDirectory() as folder:
        run = ProbeRun(sorted(names), without, world_size, Path(folder, "store"))
        pipes = [FRESH.Pipe(duplex=False) for _ in range(world_size)]
        processes = [FRESH.Process(target=run_probes, args=(run, r, pipes[r][1])) for r in range(world_size)]
        for process, (_, there) in zip(processes, pipes, strict=True):
            process.start()
            there.close()
        try:
            answers = [here.recv() for here, _ in pipes if here.poll(TIMEOUT_S)]
        finally:
            for process in processes:
                process.kill()
                process.join()
    assert len(answers) == world_size, f"{names} took more than {TIMEOUT_S:.0f} s"
    return {name: "".join(answer[name] for answer in answers) for name in names}


@cache
def _accommodated(world_size: int) -> dict[str, str]:
    return _probe(ON_TWO_RANKS if world_size == 2 else NAMES - ON_TWO_RANKS, world_size)


def test_every_accommodation_has_a_guard() -> None:
    assert set(SYMPTOMS) == NAMES


# All that runs on two ranks needs those of two.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in ON_TWO_RANKS else ()) for name in sorted(NAMES)]
)
def test_megatron_works_with_the_accommodation(name: str) -> None:
    assert _accommodated(2 if name in ON_TWO_RANKS else 1)[name] == ""


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(NAMES))
def test_megatron_does_not_work_without_the_accommodation(name: str) -> None:
    error = _probe({name}, 2 if name in ON_TWO_RANKS else 1, without={name})[name]
    assert SYMPTOMS[name] in error
