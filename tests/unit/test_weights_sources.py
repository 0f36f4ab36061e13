from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megarl.errors import ModelFolderError
from megarl.parallel.layout import Layout
from megarl.weights.model_shape import FAMILIES, VALUE_HEAD, ModelShape
from megarl.weights.name_map import VALUE_HEAD_BIAS, hf_shapes, megatron_shards
from megarl.weights.shard import Shard
from megarl.weights.sources import RandomSource, SafetensorsSource, TensorSource, fill
from tests.unit.model_shapes import model_shape

SHAPE = model_shape()
EMBEDDING = "model.embed_tokens.weight"


def _tensors(shape: ModelShape = SHAPE) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(size) for name, size in hf_shapes(shape).items()}


def _single_file(folder: Path, tensors: dict[str, Tensor]) -> Path:
    path = folder / "model.safetensors"
    save_file(tensors, path)
    return path


def _two_files(folder: Path, tensors: dict[str, Tensor]) -> list[Path]:
    """Write a folder as large models come: every other tensor in a second file, and an index."""
    names = list(tensors)
    paths = [folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for path, part in zip(paths, (names[::2], names[1::2]), strict=True):
        save_file({name: tensors[name] for name in part}, path)
    weight_map = {name: paths[i % 2].name for i, name in enumerate(names)}
    _index(folder).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths


def _index(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


def _error(folder: Path, shape: ModelShape = SHAPE) -> str:
    with pytest.raises(ModelFolderError) as caught:
        SafetensorsSource(folder, shape)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("write", [_single_file, _two_files])
def test_every_range_of_a_folder_is_read_as_it_was_written(tmp_path: Path, write: object) -> None:
    tensors = _tensors()
    assert callable(write)
    write(tmp_path, tensors)
    source = SafetensorsSource(tmp_path, SHAPE)
    for name, tensor in tensors.items():
        torch.testing.assert_close(source.read(name, 0, 0, len(tensor)), tensor, rtol=0, atol=0)
        torch.testing.assert_close(source.read(name, 0, 1, 3), tensor[1:3], rtol=0, atol=0)
        if tensor.dim() == 2:
            torch.testing.assert_close(source.read(name, 1, 2, 5), tensor[:, 2:5], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_frequencies_that_the_config_says_as_well_are_left_alone(tmp_path: Path, name: str) -> None:
    _single_file(tmp_path, {**_tensors(), name: torch.ones(2)})
    assert SafetensorsSource(tmp_path, SHAPE).read(EMBEDDING, 0, 0, 1).shape == (1, SHAPE.hidden_size)


def test_a_folder_without_weights_is_an_error_that_names_the_way_to_do_without(tmp_path: Path) -> None:
    assert "has neither model.safetensors nor" in _error(tmp_path)
    assert "model.init=random" in _error(tmp_path)


def test_missing_tensors_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    tensors = _tensors()
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    _single_file(tmp_path, tensors)
    text = _error(tmp_path)
    assert f"lacks 2 of {len(hf_shapes(SHAPE))} tensors, first 'model.norm.weight'" in text
    assert "the download is incomplete" in text


def test_a_tensor_of_another_shape_is_an_error_that_gives_both_shapes(tmp_path: Path) -> None:
    _single_file(tmp_path, {**_tensors(), EMBEDDING: torch.zeros(11, 6)})
    assert f"{EMBEDDING} has shape (11, 6), config.json implies (10, 6)" in _error(tmp_path)


def test_a_file_that_the_index_names_but_is_not_there_is_an_error(tmp_path: Path) -> None:
    missing = _two_files(tmp_path, _tensors())[1]
    missing.unlink()
    assert f"{missing} is named by the index but missing; complete the download" in _error(tmp_path)


def test_a_file_without_a_tensor_that_the_index_says_it_has_is_an_error(tmp_path: Path) -> None:
    tensors = _tensors()
    first, _ = _two_files(tmp_path, tensors)
    save_file({"other": torch.zeros(1)}, first)
    assert f"{first} lacks {EMBEDDING}, which the index says it has" in _error(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_an_error_that_gives_its_size(tmp_path: Path, share: float) -> None:
    path = _single_file(tmp_path, _tensors())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    text = _error(tmp_path)
    assert f"{path} is truncated or not a safetensors file ({int(share * len(whole)):,} bytes" in text
    assert "download it again" in text


@pytest.mark.parametrize("content", ["", '{"weight_map": {"a"', '{"a":' * 100_000])
def test_a_broken_index_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    _two_files(tmp_path, _tensors())
    _index(tmp_path).write_text(content)
    text = _error(tmp_path)
    assert str(_index(tmp_path)) in text and "no index of safetensors files" in text


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": [1]}', '{"weight_map": "a"}', "5"])
def test_an_index_without_a_map_of_files_is_an_error_that_names_the_field(tmp_path: Path, content: str) -> None:
    _two_files(tmp_path, _tensors())
    _index(tmp_path).write_text(content)
    assert "is no index of safetensors files: weight_map = " in _error(tmp_path)


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "", ".", 5, None, "x"])
def test_weights_are_read_from_the_folder_alone(tmp_path: Path, file: object) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "x.safetensors").write_bytes(_single_file(tmp_path, _tensors()).read_bytes())
    _index(folder).write_text(json.dumps({"weight_map": dict.fromkeys(_tensors(), file)}))
    text = _error(folder)
    assert f"the file of '{EMBEDDING}' = {file!r} must be a .safetensors file in this folder" in text


def test_the_links_of_a_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    _single_file(blobs, _tensors()).rename(blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert SafetensorsSource(snapshot, SHAPE).read(EMBEDDING, 0, 0, 1).shape == (1, SHAPE.hidden_size)


def test_a_folder_in_the_place_of_a_file_is_an_error(tmp_path: Path) -> None:
    path = _two_files(tmp_path, _tensors())[0]
    path.unlink()
    path.mkdir()
    assert f"{path} is no file" in _error(tmp_path)


def test_two_sets_of_weights_are_an_error(tmp_path: Path) -> None:
    _two_files(tmp_path, _tensors())
    _single_file(tmp_path, _tensors())
    assert "has both model.safetensors and model.safetensors.index.json" in _error(tmp_path)


WRONG_DTYPES = {
    torch.int8: "I8",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}


@pytest.mark.parametrize("dtype", WRONG_DTYPES)
def test_weights_that_are_no_plain_floating_point_numbers_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    _single_file(tmp_path, {**_tensors(), "model.norm.weight": torch.ones(6).to(dtype)})
    assert f"model.norm.weight has dtype {WRONG_DTYPES[dtype]}; supported are F64, F32, BF16, F16" in _error(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_every_floating_point_dtype_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in _tensors().items()}
    _single_file(tmp_path, tensors)
    read = SafetensorsSource(tmp_path, SHAPE).read(EMBEDDING, 0, 0, 10)
    torch.testing.assert_close(read, tensors[EMBEDDING], rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_called_so_with_file_and_tensor(tmp_path: Path, value: float) -> None:
    tensors = _tensors()
    tensors[EMBEDDING][3, 2:4] = value
    path = _single_file(tmp_path, tensors)
    source = SafetensorsSource(tmp_path, SHAPE)
    assert source.read(EMBEDDING, 0, 0, 3).shape[0] == 3
    with pytest.raises(ModelFolderError, match=f"{path}: {EMBEDDING} holds 2 numbers that are NaN or infinite"):
        source.read(EMBEDDING, 0, 0, 10)


def test_large_numbers_whose_sum_no_dtype_holds_are_read(tmp_path: Path) -> None:
    tensors = {**_tensors(), EMBEDDING: torch.full((10, 6), 3e38)}
    _single_file(tmp_path, tensors)
    assert torch.equal(SafetensorsSource(tmp_path, SHAPE).read(EMBEDDING, 0, 0, 10), tensors[EMBEDDING])


def test_tensors_that_the_config_does_not_imply_are_refused_with_the_first_names(tmp_path: Path) -> None:
    others = [f"model.layers.{i}.self_attn.q_proj.bias" for i in range(5)]
    _single_file(tmp_path, {**_tensors(), **{name: torch.zeros(16) for name in others}})
    text = _error(tmp_path)
    assert all(f"'{name}'" in text for name in others[:3]) and "and 2 more" in text and others[3] not in text
    assert "supported are the tensors of Qwen3ForCausalLM" in text


@pytest.mark.parametrize("name", ["score.weight", "model.layers.3.mlp.gate_proj.weight", "visual.weight"])
def test_a_tensor_of_another_model_is_refused(tmp_path: Path, name: str) -> None:
    _single_file(tmp_path, {**_tensors(), name: torch.ones(1, 6)})
    assert f"implies no place for: '{name}'" in _error(tmp_path)


def test_a_tied_output_layer_may_be_there_if_it_is_the_embedding(tmp_path: Path) -> None:
    shape = model_shape(tied=True)
    tensors = _tensors(shape)
    _single_file(tmp_path, {**tensors, "lm_head.weight": tensors[EMBEDDING].clone()})
    assert SafetensorsSource(tmp_path, shape).read(EMBEDDING, 0, 0, 1).shape == (1, 6)
    for other in (tensors[EMBEDDING] + 1, tensors[EMBEDDING][:-1].clone()):
        _single_file(tmp_path, {**tensors, "lm_head.weight": other})
        assert f"lm_head.weight differs from {EMBEDDING}" in _error(tmp_path, shape)


def test_a_critic_that_starts_from_a_language_model_has_a_value_head_of_zeros(tmp_path: Path) -> None:
    shape = SHAPE.with_value_head()
    _single_file(tmp_path, _tensors())
    assert SafetensorsSource(tmp_path, shape).read(VALUE_HEAD, 0, 0, 1).tolist() == [[0.0] * 6]
    assert RandomSource(shape, seed=0).read(VALUE_HEAD, 0, 0, 1).tolist() == [[0.0] * 6]
    _single_file(tmp_path, {**_tensors(), VALUE_HEAD: torch.ones(1, 6)})
    assert SafetensorsSource(tmp_path, shape).read(VALUE_HEAD, 0, 0, 1).tolist() == [[1.0] * 6]


def test_a_reward_model_has_a_value_head_of_its_own(tmp_path: Path) -> None:
    _single_file(tmp_path, _tensors())
    with pytest.raises(ModelFolderError, match=f"first '{VALUE_HEAD}'"):
        SafetensorsSource(tmp_path, SHAPE.with_value_head(), may_lack_value_head=False)


def test_a_critics_bias_is_refused_unless_it_is_zero_since_megarls_value_head_has_none(tmp_path: Path) -> None:
    shape = SHAPE.with_value_head()
    critic = {**_tensors(), VALUE_HEAD: torch.ones(1, 6)}
    _single_file(tmp_path, {**critic, VALUE_HEAD_BIAS: torch.zeros(1)})
    assert SafetensorsSource(tmp_path, shape).read(VALUE_HEAD, 0, 0, 1).tolist() == [[1.0] * 6]
    _single_file(tmp_path, {**critic, VALUE_HEAD_BIAS: torch.ones(1)})
    assert f"{VALUE_HEAD_BIAS} isn't zero" in _error(tmp_path, shape)


@pytest.mark.parametrize("family", ["Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM"])
def test_fused_experts_are_read_as_if_they_were_apart(tmp_path: Path, family: str) -> None:
    shape = model_shape(family)
    tensors = _tensors(shape)
    _single_file(tmp_path, _fused(tensors, shape.num_experts))
    source = SafetensorsSource(tmp_path, shape)
    for name, tensor in tensors.items():
        torch.testing.assert_close(source.read(name, 0, 0, len(tensor)), tensor, rtol=0, atol=0)
        if tensor.dim() == 2:
            torch.testing.assert_close(source.read(name, 0, 1, 3), tensor[1:3], rtol=0, atol=0)
            torch.testing.assert_close(source.read(name, 1, 2, 5), tensor[:, 2:5], rtol=0, atol=0)


def test_fused_experts_of_another_number_are_an_error_that_gives_both_shapes(tmp_path: Path) -> None:
    shape = model_shape("MixtralForCausalLM")
    _single_file(tmp_path, _fused(_tensors(shape), num_experts=3))
    text = _error(tmp_path, shape)
    assert "model.layers.0.mlp.experts.gate_up_proj has shape (3, 16, 6), config.json implies (4, 16, 6)" in text


def _fused(tensors: dict[str, Tensor], num_experts: int) -> dict[str, Tensor]:
    """Return a checkpoint as transformers 5 has it in memory: the experts of a layer in two tensors."""
    words = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
    for mixtrals, word in words.items():
        tensors = {name.replace(mixtrals, word): tensor for name, tensor in tensors.items()}
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for first in (name for name in tensors if name.endswith(".experts.0.gate_proj.weight")):
        of_layer = first.removesuffix("0.gate_proj.weight")
        gates, ups, downs = (
            torch.stack([tensors[f"{of_layer}{e}.{part}_proj.weight"] for e in range(num_experts)])
            for part in ("gate", "up", "down")
        )
        found |= {of_layer + "gate_up_proj": torch.cat([gates, ups], 1), of_layer + "down_proj": downs}
    return found


class CountingSource:
    """Reads from another source and counts how often each row of each tensor is asked for."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self.rows: dict[str, Counter[int]] = {}

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        self.rows.setdefault(name, Counter()).update(range(start, stop))
        return self.source.read(name, dim, start, stop)


def _filled(layout: Layout, rank: int, source: TensorSource, shape: ModelShape = SHAPE) -> dict[str, Tensor]:
    shards = megatron_shards(shape, layout, rank)
    parameters = {s.name: torch.full(s.shape, float("nan")) for s in shards}
    fill(parameters, shards, source)
    return parameters


@pytest.mark.parametrize("layout", [Layout(1), Layout(4, tp=2, pp=2), Layout(4, tp=4), Layout(3, pp=3)])
def test_a_rank_reads_the_rows_that_it_holds_once_and_no_others(tmp_path: Path, layout: Layout) -> None:
    _single_file(tmp_path, _tensors())
    for rank in range(layout.world_size):
        source = CountingSource(SafetensorsSource(tmp_path, SHAPE))
        _filled(layout, rank, source)
        held: dict[str, Counter[int]] = {}
        for shard in megatron_shards(SHAPE, layout, rank):
            for segment in shard.segments:
                if segment.tensor is not None:
                    held.setdefault(segment.tensor, Counter()).update(range(segment.start, segment.stop))
        assert source.rows == held


def _gathered(layout: Layout, source: TensorSource, shape: ModelShape) -> dict[str, Tensor]:
    """Return the checkpoint that the ranks of a layout hold together after filling from ``source``."""
    found = {name: torch.full(size, float("nan")) for name, size in hf_shapes(shape).items()}
    for rank in range(layout.world_size):
        parameters = _filled(layout, rank, source, shape)
        for shard in megatron_shards(shape, layout, rank):
            _copy_back(shard, parameters[shard.name], found)
    return found


def _copy_back(shard: Shard, parameter: Tensor, found: dict[str, Tensor]) -> None:
    offset = 0
    for segment in shard.segments:
        rows = parameter.narrow(shard.dim, offset, segment.length)
        if segment.tensor is None:
            assert not rows.any()  # padding is zero
        else:
            found[segment.tensor].narrow(shard.dim, segment.start, segment.length).copy_(rows)
        offset += segment.length


LAYOUTS = [
    Layout(1),
    Layout(2, tp=2),
    Layout(4, tp=4),
    Layout(3, pp=3),
    Layout(4, tp=2, pp=2),
    Layout(4, tp=2, pp=2, ep=2, etp=1),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_arrives_whole_on_every_layout(tmp_path: Path, layout: Layout, family: str, tied: bool) -> None:
    shape = model_shape(family, tied=tied)
    tensors = _tensors(shape)
    _single_file(tmp_path, tensors)
    torch.testing.assert_close(_gathered(layout, SafetensorsSource(tmp_path, shape), shape), tensors, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_random_weights_are_the_same_on_every_layout(layout: Layout) -> None:
    shape = model_shape("Qwen2ForCausalLM")
    alone = _gathered(Layout(1), RandomSource(shape, seed=3), shape)
    torch.testing.assert_close(_gathered(layout, RandomSource(shape, seed=3), shape), alone, rtol=0, atol=0)


def test_random_weights_depend_on_the_seed_and_differ_between_tensors_of_one_shape() -> None:
    names = ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
    drawn = [RandomSource(SHAPE, seed).read(name, 0, 0, 8) for seed in (0, 1) for name in names]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_random_weights_are_normal_with_the_configs_deviation_norms_one_and_biases_zero() -> None:
    shape = model_shape("Qwen2ForCausalLM")
    source = RandomSource(shape, seed=0)
    whole = {name: source.read(name, 0, 0, size[0]) for name, size in hf_shapes(shape).items()}
    assert {float(t.unique()) for n, t in whole.items() if n.endswith("norm.weight")} == {1.0}
    assert {float(t.unique()) for n, t in whole.items() if n.endswith(".bias")} == {0.0}
    matrices = torch.cat([t.flatten() for t in whole.values() if t.dim() == 2])
    assert abs(float(matrices.mean())) < 0.002
    assert float(matrices.std()) == pytest.approx(shape.init_std, rel=0.05)
