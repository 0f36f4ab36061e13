"""For each accommodation of the CPU platform, something that Megatron does which goes wrong without it.

A probe says what has to be true in terms of what Megatron does, not of how we change it. Probes have the names of
the accommodations, and run in processes of their own: this module imports no Megatron before it has the platform.
"""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_WARNINGS: list[str] = []


def torch_view() -> None:
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    assert get_grad_norm_fp32([torch.tensor([3.0, -4.0])], norm_type=torch.inf) == 4.0


def tensor_cuda() -> None:
    from megatron.core.tensor_parallel import broadcast_data

    tokens = torch.arange(3)
    assert broadcast_data(["tokens"], {"tokens": tokens}, torch.int64)["tokens"].equal(tokens)


def tensor_type() -> None:
    _Trainer().step()


def rng_states() -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[assignment, method-assign]
    logging.getLogger("megatron.core.tensor_parallel.random").addHandler(handler)
    draws = []
    for _ in range(2):
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        outside = torch.get_rng_state()
        for _ in range(2):
            with get_cuda_rng_tracker().fork():
                draws.append(torch.rand(()).item())
            assert torch.equal(torch.get_rng_state(), outside), "the state outside isn't what it was before fork()"
    assert draws[0] != draws[1], "fork() started over"
    assert draws[:2] == draws[2:], "the same seed drew other numbers"
    assert not records, f"it warned: {records[0].getMessage()}"


def no_jit() -> None:
    from megatron.core.fusions.fused_bias_swiglu import swiglu

    assert not hasattr(swiglu, "_torchdynamo_orig_callable"), "a fused function is compiled"


def uneven_gather() -> None:
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    mine = torch.full((1 + dist.get_rank(), 2), float(dist.get_rank()))
    gathered = gather_from_sequence_parallel_region(mine, group=dist.group.WORLD, output_split_sizes=[1, 2])
    assert gathered.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    # Experts that no token has chosen get none from any rank.
    nothing = gather_from_sequence_parallel_region(mine[:0], group=dist.group.WORLD, output_split_sizes=[0, 0])
    assert nothing.shape == (0, 2)


def moe_split_sizes() -> None:
    from megatron.core.tensor_parallel.mappings import all_to_all
    from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu

    # Each rank sends two rows to rank 0 and one row to rank 1.
    sent = maybe_move_tensor_to_cpu(torch.tensor([2, 1]), as_numpy=True)
    received = maybe_move_tensor_to_cpu(torch.tensor([[2, 2], [1, 1]][dist.get_rank()]), as_numpy=True)
    rows = all_to_all(dist.group.WORLD, 3.0 * dist.get_rank() + torch.arange(3), received, sent)
    assert rows.tolist() == [[0.0, 1.0, 3.0, 4.0], [2.0, 5.0]][dist.get_rank()]


def one_gloo_device() -> None:
    for _ in range(5):
        dist.all_reduce(torch.ones(1), group=dist.new_group(range(dist.get_world_size())))
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    loops = threads.count("gloo_tcp_loop")
    assert loops == 1, f"{loops} event loops poll"


def quiet_warnings() -> None:
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer  # noqa: F401
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    gather_from_sequence_parallel_region(torch.ones(1, 1), group=dist.group.WORLD)
    _Trainer().step()
    # torch's own warnings about torch.jit are shown to nobody by default: Python hides them outside __main__.
    heard = [text for text in _WARNINGS if "torch.jit" not in text]
    assert not heard, f"heard {heard}"


class _Trainer:
    """Two linear layers under Megatron's DistributedDataParallel and distributed optimizer."""

    def __init__(self) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import MegatronModule
        from megatron.core.transformer.transformer_config import TransformerConfig

        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, cuda_graph_scope=[])
        torch.manual_seed(0)
        module = MegatronModule(config)
        module.layers = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
        self.model: Any = DistributedDataParallel(config, ddp, module)
        adam = OptimizerConfig(optimizer="adam", lr=0.1, weight_decay=0.1, use_distributed_optimizer=True)
        self.optimizer: Any = get_megatron_optimizer(adam, [self.model])

    def step(self) -> None:
        self.model.zero_grad_buffer()
        self.model.module.layers(torch.tensor([1.0, 2.0])).sum().backward()
        self.model.finish_grad_sync()
        self.optimizer.step()


@dataclass(frozen=True)
class ProbeRun:
    """One process of a run of probes: which ones, on which rank, and without which accommodation."""

    names: Collection[str]
    without: Collection[str]
    world_size: int
    store: Path


def run_probes(run: ProbeRun, rank: int, connection: Connection) -> None:
    """Send {name: ""} for the probes that hold and {name: traceback} for those that don't."""
    os.environ |= {"MEGARL_PLATFORM": "cpu", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "0"}
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, category, filename, *_: _WARNINGS.append(f"{filename}: {message}")
    from megarl.parallel.platform import install_platform

    install_platform(run.without)
    from megatron.core import parallel_state

    store = dist.FileStore(str(run.store), run.world_size)  # type: ignore[attr-defined] # torch doesn't list it
    dist.init_process_group("gloo", store=store, rank=rank, world_size=run.world_size, timeout=timedelta(seconds=30))
    parallel_state.initialize_model_parallel()
    connection.send({name: _error(name) for name in run.names})


def _error(name: str) -> str:
    try:
        globals()[name]()
    except Exception:  # noqa: BLE001 - which error it is, the guard test judges
        return traceback.format_exc()
    return ""
