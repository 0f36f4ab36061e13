"""Weights that go between real ranks, in few and in many exchanges, arrive where the name map says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.errors import PublishError
from megarl.parallel.layout import EngineLayout, Layout
from megarl.verify.pool import RankPool
from megarl.weights.cells import cells_of
from megarl.weights.engine_parameters import EngineParameters
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import hf_shapes, megatron_peers, megatron_shards, vllm_peers, vllm_shards
from megarl.weights.reshard import Resharder
from megarl.weights.reshard_plan import plan_reshard
from megarl.weights.shard import Peers, Segment, Shard, peers_of
from megarl.weights.sources import fill
from tests.unit.model_shapes import model_shape

CPU = torch.device("cpu")
MOE = replace(model_shape("Qwen3MoeForCausalLM"), num_layers=4)
DENSE = replace(model_shape(tied=True), num_layers=4)


class Counted:
    """Whole tensors in which every element has a number of its own, up to rounding."""

    def __init__(self, shape: ModelShape) -> None:
        self.tensors, first = {}, 1
        for name, size in hf_shapes(shape).items():
            numel = torch.Size(size).numel()
            self.tensors[name] = torch.arange(first, first + numel, dtype=torch.float32).reshape(size)
            first += numel

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) along ``dim`` of tensor ``name``."""
        return self.tensors[name].narrow(dim, start, stop - start)


def _filled(shards: Sequence[Shard], counted: Counted) -> dict[str, Tensor]:
    tensors = {shard.name: torch.zeros(shard.shape) for shard in shards}
    fill(tensors, shards, counted)
    return tensors


def _reshard(
    shape: ModelShape,
    sources: tuple[Peers, ...],
    held: Sequence[Sequence[Shard]],
    engine: EngineLayout,
    engine_ranks: tuple[int, ...],
    bucket_bytes: int,
) -> tuple[int, list[str]]:
    """Publish in bfloat16; return the number of exchanges, and the names of the parameters that are wrong here."""
    rank, counted = dist.get_rank(), Counted(shape)
    at = engine_ranks.index(rank) % engine.tp if rank in engine_ranks else None
    needed = () if at is None else vllm_shards(shape, engine, at)
    expected = {name: tensor.bfloat16() for name, tensor in _filled(needed, counted).items()}
    targets = _stacked({name: torch.zeros_like(tensor) for name, tensor in expected.items()})
    views = {} if at is None else EngineParameters(targets, shape, engine, at).by_name(targets)
    plan = plan_reshard(cells_of(sources, 2), vllm_peers(shape, engine, engine_ranks), rank)
    resharder = Resharder(plan, dtype=torch.bfloat16, bucket_bytes=bucket_bytes)
    for _ in range(2):
        resharder.run(_filled(held[rank], counted), views, CPU)
    resharder.verify(_filled(held[rank], counted), views, CPU)
    expected = _stacked(expected)
    return resharder.num_exchanges, [name for name, tensor in expected.items() if not tensor.equal(targets[name])]


def _verified_with_a_wrong_bit(layout: Layout, wrong_rank: int, name: str) -> str:
    """Publish to two engines of two ranks, of which one then holds another bit; return what this rank says to it."""
    rank, counted = dist.get_rank(), Counted(DENSE)
    sources = _filled(megatron_shards(DENSE, layout, rank), counted)
    targets = {shard.name: torch.zeros(shard.shape) for shard in vllm_shards(DENSE, EngineLayout(2), rank % 2)}
    cells = cells_of(megatron_peers(DENSE, layout), 2)
    resharder = Resharder(
        plan_reshard(cells, vllm_peers(DENSE, EngineLayout(2), (0, 1, 2, 3)), rank), dtype=torch.float32
    )
    resharder.run(sources, targets, CPU)
    if rank == wrong_rank:
        targets[name].view(torch.uint8)[0, 0] ^= 1
    try:
        resharder.verify(sources, targets, CPU)
    except PublishError as error:
        return str(error)
    return ""


def _stacked(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters as vLLM has them: the experts of a layer in one."""
    found: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}
    for name, tensor in parameters.items():
        stack, _, last = name.rpartition(".")
        if last.isdecimal():
            stacks.setdefault(stack, []).append(tensor)
        else:
            found[name] = tensor
    return found | {name: torch.stack(tensors) for name, tensors in stacks.items()}


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 500])
@pytest.mark.parametrize(
    ("shape", "layout", "engine", "engine_ranks"),
    [
        (DENSE, Layout(4, tp=2, pp=2, vpp=2), EngineLayout(2), (0, 1, 2, 3)),
        (DENSE, Layout(4, pp=4), EngineLayout(4), (0, 1, 2, 3)),
        (MOE, Layout(4, tp=2, pp=2, ep=2, etp=1), EngineLayout(2), (0, 1, 2, 3)),
        (MOE, Layout(4, tp=2, ep=2), EngineLayout(1), (0, 1, 2, 3)),
        (MOE, Layout(4, tp=2, ep=2), EngineLayout(2, ep=2), (0, 1, 2, 3)),
        (MOE, Layout(2, tp=2), EngineLayout(2), (2, 3)),
        (DENSE, Layout(3, pp=3), EngineLayout(1), (3,)),
    ],
    ids=["chunks", "pp4_tp4", "experts", "experts_of_tp", "spread_experts", "disjoint_experts", "disjoint"],
)
def test_a_trainers_weights_arrive(
    ranks: RankPool,
    shape: ModelShape,
    layout: Layout,
    engine: EngineLayout,
    engine_ranks: tuple[int, ...],
    bucket_bytes: int,
) -> None:
    held = [megatron_shards(shape, layout, rank) if rank < layout.world_size else () for rank in range(4)]
    sources = megatron_peers(shape, layout)
    answers = ranks.run(_reshard, shape, sources, held, engine, engine_ranks, bucket_bytes)
    assert [wrong for _, wrong in answers] == [[]] * 4
    (num_exchanges,) = {count for count, _ in answers}
    assert (num_exchanges > 1) == (bucket_bytes < 1000)


@pytest.mark.parametrize(
    ("layer", "sender"), [(0, 0), (3, 2)], ids=["of the rank itself", "of a rank of another stage"]
)
def test_a_rank_that_holds_another_bit_than_was_sent_says_of_which_parameter(
    ranks: RankPool, layer: int, sender: int
) -> None:
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    answers = ranks.run(_verified_with_a_wrong_bit, Layout(4, tp=2, pp=2), 0, name)
    says = f"the engine on rank 0 doesn't hold what rank {sender} of the trainer sent: 1 of "
    assert says in answers[0] and f" checksums differ, of {name}[0:" in answers[0]
    assert answers[1:] == ["", "", ""]


def test_rows_of_every_tensor_arrive_where_engines_split_columns(ranks: RankPool) -> None:
    held: list[list[Shard]] = [[], [], [], []]
    for name, size in hf_shapes(MOE).items():
        for rank in range(4):
            low, high = size[0] * rank // 4, size[0] * (rank + 1) // 4
            if low < high:
                held[rank].append(Shard(name, (high - low, *size[1:]), 0, (Segment(name, low, high),)))
    answers = ranks.run(_reshard, MOE, peers_of(held), held, EngineLayout(2), (0, 1, 2, 3), 1000)
    assert [wrong for _, wrong in answers] == [[]] * 4
