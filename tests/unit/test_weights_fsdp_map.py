from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from megarl.parallel.layout import EngineLayout, Layout
from megarl.weights.fsdp_map import fsdp_peers, fsdp_shards, parameter_shapes, rows_of
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import EMBEDDING, OUTPUT, hf_shapes, vllm_peers, vllm_shards
from tests.unit.model_shapes import model_shape
from tests.unit.test_weights_reshard import Case, check

UNEVEN = replace(model_shape(), vocab_size=1003)
EXPERTS, MIXTRAL = model_shape("Qwen2MoeForCausalLM"), model_shape("MixtralForCausalLM")


@pytest.mark.parametrize(
    ("size", "num_parts", "sizes"), [(10, 4, [3, 3, 3, 1]), (8, 4, [2] * 4), (4, 3, [2, 2, 0]), (1, 3, [1, 0, 0])]
)
def test_rows_are_cut_as_torch_chunks_them(size: int, num_parts: int, sizes: list[int]) -> None:
    rows = [rows_of(size, part, num_parts) for part in range(num_parts)]
    assert [len(r) for r in rows] == sizes
    assert [row for r in rows for row in r] == list(range(size))


@pytest.mark.parametrize("shape", [UNEVEN, EXPERTS, MIXTRAL], ids=["uneven", "experts", "mixtral"])
@pytest.mark.parametrize("layout", [Layout(4, fsdp=4), Layout(6, fsdp=3), Layout(4, cp=2, fsdp=4)])
def test_every_row_is_on_one_rank_of_every_copy(shape: ModelShape, layout: Layout) -> None:
    expected = {name: Counter(range(size[0])) for name, size in hf_shapes(shape).items()}
    for copy in range(layout.world_size // layout.fsdp):
        held: dict[str, Counter[int]] = {name: Counter() for name in expected}
        for rank in range(copy * layout.fsdp, (copy + 1) * layout.fsdp):
            for shard in fsdp_shards(shape, layout, rank):
                for segment in shard.segments:
                    assert segment.tensor is not None
                    held[segment.tensor].update(range(segment.start, segment.stop))
        assert held == expected


@pytest.mark.parametrize("shape", [UNEVEN, EXPERTS], ids=["uneven", "experts"])
@pytest.mark.parametrize(("layout", "tp"), [(Layout(4, fsdp=4), 2), (Layout(3, fsdp=3), 1), (Layout(4, fsdp=2), 4)])
def test_a_publication_from_rows_reaches_every_part_of_an_engine(shape: ModelShape, layout: Layout, tp: int) -> None:
    """FSDP cuts every tensor along dim 0, the engine some along dim 1."""
    ranks = range(layout.world_size)
    before = [fsdp_shards(shape, layout, rank) for rank in ranks]
    after = [vllm_shards(shape, EngineLayout(tp), rank % tp) for rank in ranks]
    check(
        Case(hf_shapes(shape), before, after, fsdp_peers(shape, layout), vllm_peers(shape, EngineLayout(tp), ranks), 2),
        1000,
    )


def test_a_tied_output_layer_is_the_embedding_and_a_value_head_stands_where_it_would() -> None:
    tied = parameter_shapes(model_shape(tied=True))
    assert EMBEDDING in tied and OUTPUT not in tied
    critic = model_shape().with_value_head()
    assert parameter_shapes(critic)[OUTPUT] == (1, critic.hidden_size)


def test_the_experts_of_a_layer_are_one_parameter_and_apart_in_shards() -> None:
    sizes = parameter_shapes(MIXTRAL)
    hidden = MIXTRAL.hidden_size
    assert sizes["model.layers.1.mlp.experts.gate_up_proj"] == (4, 16, hidden)
    assert sizes["model.layers.1.mlp.experts.down_proj"] == (4, hidden, 8)
    assert sizes["model.layers.1.mlp.gate.weight"] == (4, hidden)
    names = {shard.name for shard in fsdp_shards(MIXTRAL, Layout(3, fsdp=3), 1)}
    experts = {name for name in names if name.startswith("model.layers.0.mlp.experts.down_proj")}
    assert experts == {f"model.layers.0.mlp.experts.down_proj.{e}" for e in (2, 3)}
    assert sum(map(math.prod, sizes.values())) == sum(map(math.prod, hf_shapes(MIXTRAL).values()))
