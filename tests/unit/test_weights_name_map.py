from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.parallel.layout import EngineLayout, Layout
from megarl.weights.model_shape import FAMILIES, VALUE_HEAD, ModelShape, parse_model_shape
from megarl.weights.name_map import hf_shapes, megatron_shards, vllm_shards
from megarl.weights.shard import Segment, Shard
from megarl.weights.split import VLLM_VOCAB_MULTIPLE
from tests.unit.model_shapes import engines_of, layouts_of, model_shape, model_shapes

FACTS = Path(__file__).parents[2] / "megarl" / "weights" / "model_facts"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", {}),
    "Qwen2ForCausalLM": ("qwen2", {}),
    "Qwen3ForCausalLM": ("qwen3", {"head_dim": 8}),
    "Qwen2MoeForCausalLM": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 32}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", {**EXPERTS, "head_dim": 8}),
    "MixtralForCausalLM": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
MODELS = [pytest.param(family, tied, id=f"{family}{'-tied' * tied}") for family in FAMILIES for tied in (False, True)]
REPLICATED = ("norm.weight", "layernorm.weight", VALUE_HEAD, ".gate.weight", ".shared_expert_gate.weight")
VOCABULARIES = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
)


def _dims(shards: Iterable[Shard]) -> dict[str, int]:
    """Return the dim that each tensor is split along; it must be the same in every shard."""
    dims: dict[str, int] = {}
    for shard in shards:
        for segment in shard.segments:
            if segment.tensor is not None:
                assert dims.setdefault(segment.tensor, shard.dim) == shard.dim
    return dims


def _copies(shards: Iterable[Shard]) -> dict[str, Counter[int]]:
    """Return how often each row (along the split dim) of each Hugging Face tensor is held."""
    copies: dict[str, Counter[int]] = {}
    for shard in shards:
        for segment in shard.segments:
            if segment.tensor is not None:
                copies.setdefault(segment.tensor, Counter()).update(range(segment.start, segment.stop))
    return copies


def _assert_consistent(shards: Iterable[Shard], sizes: dict[str, tuple[int, ...]]) -> None:
    """Check that each shard's shape is that of its segments, and that only vocabularies are padded, at their end."""
    for shard in shards:
        assert shard.shape[shard.dim] == sum(s.length for s in shard.segments) > 0
        for i, segment in enumerate(shard.segments):
            assert segment.length > 0
            if segment.tensor is None:
                assert i == len(shard.segments) - 1
                assert shard.name in VOCABULARIES
                continue
            size = sizes[segment.tensor]
            assert 0 <= segment.start < segment.stop <= size[shard.dim]
            assert [n for d, n in enumerate(shard.shape) if d != shard.dim] == [
                n for d, n in enumerate(size) if d != shard.dim
            ]


def _expected(size: tuple[int, ...], dim: int, copies: int) -> Counter[int]:
    return Counter(dict.fromkeys(range(size[dim]), copies))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_ranks_of_a_trainer_replica_hold_every_row_of_the_checkpoint(data: st.DataObject) -> None:
    shape = data.draw(model_shapes())
    shape = shape.with_value_head() if data.draw(st.booleans()) else shape
    layout, sizes = data.draw(layouts_of(shape)), hf_shapes(shape)
    by_rank = [megatron_shards(shape, layout, rank) for rank in range(layout.world_size)]
    for dp in range(layout.dp):
        replica = [s for rank, shards in enumerate(by_rank) if layout.coordinates(rank).dp == dp for s in shards]
        _assert_consistent(replica, sizes)
        dims, copies = _dims(replica), _copies(replica)
        assert {n for n in copies if ".experts." not in n} == {n for n in sizes if ".experts." not in n}
        for name, dim in dims.items():
            if ".experts." in name:
                continue  # its replicas are others
            held_twice = shape.tied and layout.pp > 1 and name == "model.embed_tokens.weight"
            count = layout.tp if name.endswith(REPLICATED) else 2 if held_twice else 1
            assert copies[name] == _expected(sizes[name], dim, count), name


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_ranks_of_a_replica_of_experts_hold_every_row_of_them_once(data: st.DataObject) -> None:
    shape = data.draw(model_shapes().filter(lambda shape: shape.num_experts > 0))
    layout, sizes = data.draw(layouts_of(shape)), hf_shapes(shape)
    by_rank = [megatron_shards(shape, layout, rank) for rank in range(layout.world_size)]
    names = {name for name in sizes if ".experts." in name}
    for edp in range(layout.edp):
        ranks = [rank for rank in range(layout.world_size) if layout.expert_coordinates(rank).edp == edp]
        experts = [s for rank in ranks for s in by_rank[rank] if ".experts." in s.name]
        dims, copies = _dims(experts), _copies(experts)
        assert copies.keys() == names
        for name, dim in dims.items():
            assert copies[name] == _expected(sizes[name], dim, 1), name


@settings(max_examples=200, deadline=None)
@given(st.data(), model_shapes())
def test_the_ranks_of_an_engine_replica_hold_every_row_of_the_checkpoint(
    data: st.DataObject, shape: ModelShape
) -> None:
    engine = data.draw(engines_of(shape))
    tp = engine.tp
    replica, sizes = [s for rank in range(tp) for s in vllm_shards(shape, engine, rank)], hf_shapes(shape)
    _assert_consistent(replica, sizes)
    dims, copies = _dims(replica), _copies(replica)
    assert copies.keys() == sizes.keys()
    for name, dim in dims.items():
        is_kv = any(f".{part}_proj." in name for part in "kv")
        count = tp if name.endswith(REPLICATED) else max(1, tp // shape.num_kv_heads) if is_kv else 1
        assert copies[name] == _expected(sizes[name], dim, count), name


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_tensor_parallel_ranks_hold_parameters_of_the_same_names_and_shapes(data: st.DataObject) -> None:
    shape = data.draw(model_shapes())
    layout = data.draw(layouts_of(shape))
    by_place: dict[tuple[int, int], set[tuple[tuple[str, tuple[int, ...]], ...]]] = {}
    stages: dict[str, set[int]] = {}
    for rank in range(layout.world_size):
        place = layout.expert_coordinates(rank)
        parameters = tuple((s.name, s.shape) for s in megatron_shards(shape, layout, rank))
        assert len({name for name, _ in parameters}) == len(parameters)
        by_place.setdefault((place.pp, place.ep), set()).add(parameters)
        for name, _ in parameters:
            stages.setdefault(name, set()).add(place.pp)
    assert all(len(kinds) == 1 for kinds in by_place.values())
    # No parameter is on two stages: a tied output layer has a name of its own.
    assert all(len(found) == 1 for found in stages.values())
    engines = {
        tuple((s.name, s.shape) for s in vllm_shards(shape, EngineLayout(layout.tp), rank)) for rank in range(layout.tp)
    }
    assert len(engines) == 1


@settings(max_examples=200, deadline=None)
@given(model_shapes(), st.sampled_from([1, 2, 4]))
def test_vocabularies_are_padded_as_each_side_pads_them(shape: ModelShape, tp: int) -> None:
    trainer = [_shard(megatron_shards(shape, Layout(tp, tp), r), "word_embeddings.weight") for r in range(tp)]
    assert sum(s.shape[0] for s in trainer) == shape.padded_vocab(tp) < shape.vocab_size + tp
    engine = [_shard(vllm_shards(shape, EngineLayout(tp), r), "embed_tokens.weight") for r in range(tp)]
    assert sum(s.shape[0] for s in engine) == math.ceil(shape.vocab_size / VLLM_VOCAB_MULTIPLE) * VLLM_VOCAB_MULTIPLE


def _shard(shards: Iterable[Shard], suffix: str) -> Shard:
    [found] = [s for s in shards if s.name.endswith(suffix)]
    return found


def _rows(shard: Shard) -> list[tuple[str, int, int]]:
    return [(str(s.tensor).split(".")[-2], s.start, s.stop) for s in shard.segments]


def test_megatron_takes_the_queries_key_and_value_of_one_kv_head_after_another() -> None:
    shape = model_shape()  # 4 heads, 2 kv heads, of 4
    name = "layers.1.self_attention.linear_qkv.weight"
    first = [("q_proj", 0, 8), ("k_proj", 0, 4), ("v_proj", 0, 4)]
    second = [("q_proj", 8, 16), ("k_proj", 4, 8), ("v_proj", 4, 8)]
    assert _rows(_shard(megatron_shards(shape, Layout(1), 0), name)) == first + second
    halves = [_rows(_shard(megatron_shards(shape, Layout(2, tp=2), rank), name)) for rank in range(2)]
    assert halves == [first, second]


def test_megatron_cuts_the_stack_evenly_where_ranks_outnumber_kv_heads() -> None:
    name = "layers.0.self_attention.linear_qkv.weight"
    quarters = [_rows(_shard(megatron_shards(model_shape(), Layout(4, tp=4), r), name)) for r in range(4)]
    assert quarters == [
        [("q_proj", 0, 8)],
        [("k_proj", 0, 4), ("v_proj", 0, 4)],
        [("q_proj", 8, 16)],
        [("k_proj", 4, 8), ("v_proj", 4, 8)],
    ]


def test_vllm_stacks_queries_keys_and_values_and_repeats_kv_heads_where_ranks_outnumber_them() -> None:
    name = "layers.0.self_attn.qkv_proj.weight"
    halves = [_rows(_shard(vllm_shards(model_shape(), EngineLayout(2), r), name)) for r in range(2)]
    assert halves == [
        [("q_proj", 0, 8), ("k_proj", 0, 4), ("v_proj", 0, 4)],
        [("q_proj", 8, 16), ("k_proj", 4, 8), ("v_proj", 4, 8)],
    ]
    quarters = [_rows(_shard(vllm_shards(model_shape(), EngineLayout(4), r), name)) for r in range(4)]
    assert quarters == [
        [("q_proj", 4 * r, 4 * r + 4), ("k_proj", r // 2 * 4, r // 2 * 4 + 4), ("v_proj", r // 2 * 4, r // 2 * 4 + 4)]
        for r in range(4)
    ]


def test_a_gated_layer_stacks_gate_and_up_of_each_rank() -> None:
    second = megatron_shards(model_shape(), Layout(2, tp=2), 1)
    assert _rows(_shard(second, "layers.2.mlp.linear_fc1.weight")) == [("gate_proj", 4, 8), ("up_proj", 4, 8)]
    down = _shard(second, "layers.2.mlp.linear_fc2.weight")
    assert (_rows(down), down.dim, down.shape) == ([("down_proj", 4, 8)], 1, (6, 4))


def test_a_rank_past_the_vocabularys_end_holds_padding_alone() -> None:
    shards = [_shard(vllm_shards(model_shape(), EngineLayout(2), rank), "embed_tokens.weight") for rank in range(2)]
    assert shards[0].segments == (Segment("model.embed_tokens.weight", 0, 10), Segment(None, 0, 22))
    assert shards[1].segments == (Segment(None, 0, 32),)


@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_a_tied_output_layer_is_the_embedding_except_on_a_stage_of_its_own(family: str, tied: bool) -> None:
    shape = model_shape(family, tied=tied)
    one_stage = {s.name: s for s in megatron_shards(shape, Layout(1), 0)}
    last_stage = {s.name: s for s in megatron_shards(shape, Layout(2, pp=2), 1)}
    engine = {s.name for s in vllm_shards(shape, EngineLayout(1), 0)}
    assert ("output_layer.weight" in one_stage, "lm_head.weight" in engine) == (not tied, not tied)
    source = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert last_stage["output_layer.weight"].segments == (Segment(source, 0, 10),)
    assert "embedding.word_embeddings.weight" not in last_stage


@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_a_critic_has_a_value_head_on_its_last_stage_and_no_output_layer(family: str, tied: bool) -> None:
    shape = model_shape(family, tied=tied).with_value_head()
    names = hf_shapes(model_shape(family)).keys() - {"lm_head.weight"}
    assert hf_shapes(shape) == {n: s for n, s in hf_shapes(model_shape(family)).items() if n in names} | {
        VALUE_HEAD: (1, shape.hidden_size)
    }
    last_stage = {s.name: s for s in megatron_shards(shape, Layout(4, tp=2, pp=2), 3)}
    assert last_stage["output_layer.weight"].segments == (Segment(VALUE_HEAD, 0, 1),)


@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_the_checkpoints_names_and_shapes_are_those_of_transformers(family: str, tied: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, fields = TRANSFORMERS[family]
    config = AutoConfig.for_model(
        kind, architectures=[family], hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=50, max_position_embeddings=64, tie_word_embeddings=tied, **fields
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = parse_model_shape(config.to_diff_dict(), family)
    # named_parameters has a tied tensor once, as a checkpoint does; state_dict names it twice.
    assert hf_shapes(shape) == _apart({name: tuple(p.shape) for name, p in model.named_parameters()}, kind)
    assert model.state_dict().keys() - dict(model.named_parameters()).keys() == ({"lm_head.weight"} if tied else set())


def _apart(shapes: dict[str, tuple[int, ...]], kind: str) -> dict[str, tuple[int, ...]]:
    """Return the tensors that transformers saves: in memory it has the experts of a layer as one, by Qwen's names."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        prefix, is_fused, part = name.rpartition("experts.")
        if not is_fused:
            found[name] = shape
            continue
        experts, rows, columns = shape
        for e in range(experts):
            for each in ("gate", "up") if part == "gate_up_proj" else ("down",):
                size = (rows // 2, columns) if part == "gate_up_proj" else (rows, columns)
                found[f"{prefix}experts.{e}.{each}_proj.weight"] = size
    if kind != "mixtral":
        return found
    words = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for word, mixtrals in words.items():
        found = {name.replace(word, mixtrals): size for name, size in found.items()}
    return found


def test_a_rank_holds_its_slice_of_the_experts_by_their_index_in_the_model() -> None:
    shape = model_shape("Qwen3MoeForCausalLM")  # 4 experts of 12 on layers 1 and 2
    layout = Layout(4, tp=2, ep=2, etp=2)
    shards = megatron_shards(shape, layout, 3)
    experts = "decoder.layers.1.mlp.experts.local_experts."
    assert [s.name for s in shards if s.name.startswith(experts)] == [
        f"{experts}{e}.linear_fc{n}.weight" for n in (1, 2) for e in (2, 3)
    ]
    first = _shard(shards, "layers.1.mlp.experts.local_experts.2.linear_fc1.weight")
    assert [(s.tensor, s.start, s.stop) for s in first.segments] == [
        (f"model.layers.1.mlp.experts.2.{part}_proj.weight", 6, 12) for part in ("gate", "up")
    ]
    second = _shard(shards, "layers.1.mlp.experts.local_experts.2.linear_fc2.weight")
    assert (_rows(second), second.dim, second.shape) == ([("down_proj", 6, 12)], 1, (6, 6))
    assert not any("layers.0.mlp.experts" in s.name or "layers.1.mlp.linear" in s.name for s in shards)


def test_without_an_expert_tensor_axis_of_their_own_experts_are_split_as_the_rest() -> None:
    shape = model_shape("MixtralForCausalLM")
    assert [megatron_shards(shape, Layout(4, tp=2, ep=2), r) for r in range(4)] == [
        megatron_shards(shape, Layout(4, tp=2, ep=2, etp=2), r) for r in range(4)
    ]


def test_vllm_has_the_experts_of_a_layer_as_slices_of_two_parameters_and_splits_each() -> None:
    shards = {s.name: s for s in vllm_shards(model_shape("MixtralForCausalLM"), EngineLayout(2), 1)}  # 4 experts of 8
    block = "model.layers.2.block_sparse_moe."
    assert _rows(shards[block + "experts.routed_experts.w13_weight.3"]) == [("w1", 4, 8), ("w3", 4, 8)]
    assert _rows(shards[block + "experts.routed_experts.w2_weight.3"]) == [("w2", 4, 8)]
    assert shards[block + "gate.weight"].shape == (4, 6)


def test_the_shards_of_a_model_of_235_billion_parameters_take_seconds_on_256_ranks() -> None:
    config = json.loads((FACTS / "Qwen--Qwen3-235B-A22B.json").read_text())
    shape, layout = parse_model_shape(config, ""), Layout(256, tp=4, pp=8, ep=8, etp=1)
    started_s = time.process_time()
    by_rank = [megatron_shards(shape, layout, rank) for rank in range(layout.world_size)]
    engine = [vllm_shards(shape, EngineLayout(8), rank % 8) for rank in range(layout.world_size)]
    assert time.process_time() - started_s < 60
    assert len(hf_shapes(shape)) == 94 * (128 * 3 + 1 + 8) + 3
    assert len(by_rank[0]) == 11 * (16 * 2 + 1 + 6) + 1  # 11 layers of the first stage, 16 experts, the embedding
    assert len(engine[0]) == 94 * (128 * 2 + 1 + 6) + 3


def test_an_engine_that_spreads_experts_has_those_of_a_rank_whole_and_in_a_row() -> None:
    shape = model_shape("Qwen3MoeForCausalLM")  # 4 experts with 12 features, of 6 hidden ones
    last = [s for s in vllm_shards(shape, EngineLayout(2, ep=2), 1) if ".routed_experts." in s.name]
    assert {s.name.rpartition(".")[2] for s in last} == {"2", "3"}
    assert {s.shape for s in last if "w13" in s.name} == {(24, 6)}
    assert {s.shape for s in last if "w2" in s.name} == {(6, 12)}
    parts = [s for s in vllm_shards(shape, EngineLayout(2), 1) if ".routed_experts." in s.name]
    assert {s.name.rpartition(".")[2] for s in parts} == {"0", "1", "2", "3"}
    assert {s.shape for s in parts if "w13" in s.name} == {(12, 6)}
