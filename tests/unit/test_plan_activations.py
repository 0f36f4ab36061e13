from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.config.schema import RecomputeConfig
from megarl.parallel.layout import Layout
from megarl.plan.activations import Pass, chunk_bytes, head_bytes, layer_bytes, recomputed_bytes
from megarl.weights.model_shape import ModelShape
from tests.unit.model_shapes import layouts_of, model_shape, model_shapes

TOKENS = 24
FULL_1, FULL_2 = RecomputeConfig("full", "uniform", 1), RecomputeConfig("full", "uniform", 2)
BLOCK_1 = RecomputeConfig("full", "block", 1)
MIXED = replace(model_shape("Qwen3MoeForCausalLM"), num_layers=8, dense_layers=(0, 5))


def _all_chunks(p: Pass, recompute: RecomputeConfig | None) -> list[int]:
    return [chunk_bytes(p, stage, chunk, recompute) for chunk in range(p.layout.vpp) for stage in range(p.layout.pp)]


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([2, 4]), st.booleans(), st.sampled_from([None, FULL_1, BLOCK_1]))
def test_chunks_keep_together_what_one_stage_does_and_their_outputs(
    data: st.DataObject, dtype_bytes: int, fused: bool, recompute: RecomputeConfig | None
) -> None:
    shape: ModelShape = data.draw(model_shapes())
    layout: Layout = data.draw(layouts_of(shape))
    if recompute == BLOCK_1:
        shape = replace(shape, num_layers=layout.pp * layout.vpp)  # as many layers are computed again in every chunk
    split = Pass(shape, layout, TOKENS, dtype_bytes, fused)
    whole = Pass(
        shape, replace(layout, world_size=layout.world_size // layout.pp, pp=1, vpp=1), TOKENS, dtype_bytes, fused
    )
    again = replace(BLOCK_1, num_layers=shape.num_layers) if recompute == BLOCK_1 else recompute
    chunks = _all_chunks(split, recompute)
    outputs = (len(chunks) - 1) * TOKENS * dtype_bytes * shape.hidden_size
    assert sum(chunks) == chunk_bytes(whole, 0, 0, again) + outputs


def test_a_chunk_keeps_the_layers_of_its_own_turn() -> None:
    """On two stages with two chunks each, the dense layers 0 and 5 are in the first chunk and in the third."""
    p = Pass(MIXED, Layout(2, pp=2, vpp=2), TOKENS, 2, fused=True)
    output = TOKENS * 2 * MIXED.hidden_size
    dense, experts = layer_bytes(p, 0), layer_bytes(p, 1)
    assert dense != experts
    assert chunk_bytes(p, 0, 0) == dense + experts + TOKENS * 2 * 8 + output
    assert chunk_bytes(p, 1, 0) == 2 * experts + output
    assert chunk_bytes(p, 0, 1) == dense + experts + output
    assert chunk_bytes(p, 1, 1) == 2 * experts + head_bytes(p)


def test_what_is_computed_again_is_the_largest_group_less_what_is_gone_by_then() -> None:
    p = Pass(MIXED, Layout(1), TOKENS, 2, fused=True)
    hidden = TOKENS * 2 * MIXED.hidden_size
    stages = replace(p, layout=Layout(2, pp=2))
    sizes = [layer_bytes(p, i) for i in range(8)]
    assert recomputed_bytes(stages, 0, 0, None) == 0
    assert recomputed_bytes(stages, 0, 0, FULL_1) == max(sizes[4 - 1 - i] - (i + 1) * hidden for i in range(4))
    assert recomputed_bytes(stages, 0, 0, FULL_2) == max(sum(sizes[2:4]) - hidden, sum(sizes[:2]) - 2 * hidden)
    assert recomputed_bytes(stages, 0, 0, BLOCK_1) == max(0, sizes[0] - hidden - sum(sizes[1:4]))
    head = head_bytes(stages)
    assert recomputed_bytes(stages, 1, 0, FULL_1) == max(0, *(sizes[7 - i] - (i + 1) * hidden - head for i in range(4)))


@pytest.mark.parametrize("stage", [0, 1])
def test_recomputing_more_at_once_keeps_less_and_exceeds_it_by_more(stage: int) -> None:
    p = Pass(replace(MIXED, vocab_size=4), Layout(2, pp=2), TOKENS, 2, fused=True)
    choices = [RecomputeConfig("full", "uniform", n) for n in (1, 2, 4)]
    assert all(a > b for a, b in pairwise(chunk_bytes(p, stage, 0, c) for c in [None, *choices]))
    assert all(a < b for a, b in pairwise(recomputed_bytes(p, stage, 0, c) for c in [None, *choices]))
