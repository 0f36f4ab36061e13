from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megarl.errors import ModelFolderError
from megarl.weights.model_shape import FAMILIES, ModelShape, Rope, parse_model_shape, read_model_shape


def _config(family: str = "LlamaForCausalLM", /, **fields: object) -> dict[str, Any]:
    """Return the fields of a config.json that every model has, and ``fields``; None takes one away."""
    config = {
        "architectures": [family],
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 100,
        "max_position_embeddings": 512,
        **fields,
    }
    return {name: value for name, value in config.items() if value is not None}


EXPERTS = {
    "num_experts": 8,
    "num_local_experts": None,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}


def _error(config: dict[str, Any]) -> str:
    with pytest.raises(ModelFolderError) as caught:
        parse_model_shape(config, "somewhere/config.json")
    assert str(caught.value).startswith("somewhere/config.json")
    return str(caught.value)


def test_every_size_is_read_from_the_field_that_names_it() -> None:
    shape = parse_model_shape(_config(rms_norm_eps=1e-5, initializer_range=0.01, tie_word_embeddings=True), "")
    assert shape == ModelShape(
        family="LlamaForCausalLM",
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        ffn_size=96,
        vocab_size=100,
        max_positions=512,
        norm_eps=1e-5,
        rope=Rope(10000.0),
        tied=True,
        qkv_bias=False,
        qk_norm=False,
        init_std=0.01,
    )


@pytest.mark.parametrize(
    ("family", "qkv_bias", "qk_norm"),
    [
        ("LlamaForCausalLM", False, False),
        ("Qwen2ForCausalLM", True, False),
        ("Qwen3ForCausalLM", False, True),
        ("Qwen2MoeForCausalLM", True, False),
        ("Qwen3MoeForCausalLM", False, True),
        ("MixtralForCausalLM", False, False),
    ],
)
def test_the_family_decides_biases_and_norms_of_attention(family: str, qkv_bias: bool, qk_norm: bool) -> None:
    shape = parse_model_shape(_config(family, **EXPERTS), "")
    assert (shape.qkv_bias, shape.qk_norm) == (qkv_bias, qk_norm)
    assert family in FAMILIES


def test_the_first_qwens_with_experts_may_have_no_biases() -> None:
    assert not parse_model_shape(_config("Qwen2MoeForCausalLM", **EXPERTS, qkv_bias=False), "").qkv_bias


def test_a_model_without_experts_has_none_on_any_layer() -> None:
    shape = parse_model_shape(_config(), "")
    assert (shape.num_experts, shape.has_experts(0), shape.has_experts(1)) == (0, False, False)


def test_mixtral_has_experts_of_the_feed_forward_size_on_every_layer() -> None:
    config = _config("MixtralForCausalLM", num_local_experts=8, num_experts_per_tok=2)
    shape = parse_model_shape(config, "")
    assert (shape.num_experts, shape.experts_per_token, shape.expert_ffn_size) == (8, 2, 96)
    assert shape.norm_topk_prob and shape.dense_layers == () and shape.rope == Rope(1e6)
    assert parse_model_shape(config | {"rope_theta": 5e5}, "").rope == Rope(5e5)


@pytest.mark.parametrize("word", ["num_experts", "num_local_experts"])
def test_qwen3_says_how_its_experts_differ_from_its_dense_layers(word: str) -> None:
    config = EXPERTS | {"num_experts": None, word: 8}
    shape = parse_model_shape(_config("Qwen3MoeForCausalLM", **config, norm_topk_prob=True), "")
    assert (shape.num_experts, shape.experts_per_token, shape.expert_ffn_size, shape.ffn_size) == (8, 2, 24, 96)
    assert shape.norm_topk_prob and (shape.shared_expert_ffn_size, shape.gated_shared_expert) == (0, False)


def test_unless_told_qwen_leaves_the_weights_of_the_chosen_experts_as_they_are() -> None:
    assert not parse_model_shape(_config("Qwen3MoeForCausalLM", **EXPERTS), "").norm_topk_prob


def test_the_first_qwens_with_experts_have_one_more_that_every_token_takes() -> None:
    shape = parse_model_shape(_config("Qwen2MoeForCausalLM", **EXPERTS), "")
    assert (shape.shared_expert_ffn_size, shape.gated_shared_expert) == (40, True)


@pytest.mark.parametrize(
    ("fields", "dense"),
    [
        ({}, ()),
        ({"mlp_only_layers": [0, 3]}, (0, 3)),
        ({"decoder_sparse_step": 2}, (0, 2, 4)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, (0, 1, 2, 3, 4)),
    ],
)
def test_layers_are_dense_where_listed_and_between_the_steps(fields: dict[str, Any], dense: tuple[int, ...]) -> None:
    shape = parse_model_shape(_config("Qwen3MoeForCausalLM", **EXPERTS | fields, num_hidden_layers=5), "")
    assert shape.dense_layers == dense
    assert [shape.has_experts(i) for i in range(5)] == [i not in dense for i in range(5)]


@pytest.mark.parametrize("count", [0, 9])
def test_a_token_takes_no_more_experts_than_there_are(count: int) -> None:
    config = _config("Qwen3MoeForCausalLM", **EXPERTS | {"num_experts_per_tok": count})
    assert f"num_experts_per_tok = {count} must be from 1 to the model's 8 experts" in _error(config)


def test_one_expert_a_token_with_weights_of_sum_one_is_refused() -> None:
    config = _config("Qwen3MoeForCausalLM", **EXPERTS | {"num_experts_per_tok": 1}, norm_topk_prob=True)
    assert "the router would learn nothing" in _error(config)


@pytest.mark.parametrize("field", ["num_experts", "num_experts_per_tok", "moe_intermediate_size"])
def test_a_missing_field_of_experts_is_an_error_that_names_it(field: str) -> None:
    config = _config("Qwen3MoeForCausalLM", **EXPERTS | {field: None})
    assert f"lacks the field '{field}'" in _error(config)


@pytest.mark.parametrize(
    ("family", "head_dim", "expected"),
    [
        ("LlamaForCausalLM", None, 16),
        ("Qwen2ForCausalLM", None, 16),
        ("Qwen3ForCausalLM", None, 128),
        ("LlamaForCausalLM", 32, 32),
        ("Qwen3ForCausalLM", 32, 32),
    ],
)
def test_a_head_is_as_large_as_transformers_makes_it(family: str, head_dim: int | None, expected: int) -> None:
    assert parse_model_shape(_config(family, head_dim=head_dim), "").head_dim == expected


def test_without_key_value_heads_every_head_has_its_own() -> None:
    assert parse_model_shape(_config(num_key_value_heads=None), "").num_kv_heads == 4


@pytest.mark.parametrize(("vocab", "tp", "padded"), [(100, 1, 100), (100, 8, 104), (104, 8, 104), (1, 4, 4)])
def test_a_vocabulary_is_padded_to_a_multiple_of_the_ranks(vocab: int, tp: int, padded: int) -> None:
    assert parse_model_shape(_config(vocab_size=vocab), "").padded_vocab(tp) == padded


def test_a_critic_has_a_value_head_and_nothing_tied_to_the_embedding() -> None:
    shape = parse_model_shape(_config(tie_word_embeddings=True), "").with_value_head()
    assert (shape.value_head, shape.tied) == (True, False)


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_a_token_classification_model_of_one_label_is_a_critic(family: str) -> None:
    critic = parse_model_shape(_config(family, tie_word_embeddings=True), "").with_value_head()
    saved = _config(family, tie_word_embeddings=True) | critic.critic_fields()
    assert saved["architectures"] == [family.replace("ForCausalLM", "ForTokenClassification")]
    assert parse_model_shape(saved, "") == critic


@pytest.mark.parametrize("fields", [{}, {"id2label": {"0": "no", "1": "yes"}}])
def test_a_classifier_of_several_labels_is_no_critic(fields: dict[str, Any]) -> None:
    text = _error(_config("Qwen3ForTokenClassification", **fields))
    assert "Qwen3ForTokenClassification must have one label to be a critic, see id2label" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_classification_model_of_one_label_is_a_reward_model(family: str) -> None:
    fields = {**EXPERTS, "num_local_experts": 8, "tie_word_embeddings": True}
    language_model = parse_model_shape(_config(family, **fields), "")
    architecture = family.replace("ForCausalLM", "ForSequenceClassification")
    saved = _config(architecture, **fields, id2label={"0": "LABEL_0"})
    assert parse_model_shape(saved, "") == language_model.with_value_head()


@pytest.mark.parametrize("fields", [{}, {"id2label": {"0": "no", "1": "yes"}}])
def test_a_classifier_of_several_labels_is_no_reward_model(fields: dict[str, Any]) -> None:
    text = _error(_config("LlamaForSequenceClassification", **fields))
    assert "LlamaForSequenceClassification must have one label to be a reward model, see id2label" in text


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        pytest.param({}, Rope(10000.0), id="nothing"),
        pytest.param({"rope_theta": 5e5, "rope_scaling": None}, Rope(5e5), id="theta"),
        pytest.param({"rope_theta": 1000000}, Rope(1e6), id="integer theta"),
        pytest.param(
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
            Rope(5e5, "linear", 2.0),
            id="linear, as before rope_type",
        ),
        pytest.param(
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
            id="llama3 before transformers 5",
        ),
        pytest.param({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, Rope(1e6), id="transformers 5"),
        pytest.param(
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
            Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
            id="llama3 of transformers 5",
        ),
    ],
)
def test_the_rotary_embedding_is_read_in_the_words_of_every_version(fields: dict[str, Any], rope: Rope) -> None:
    assert parse_model_shape(_config(**fields), "").rope == rope


@pytest.mark.parametrize("word", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "mrope"])
def test_an_unsupported_rotary_embedding_is_an_error_that_names_the_supported(word: str, kind: str) -> None:
    text = _error(_config(**{word: {"rope_type": kind, "factor": 4.0}}))
    assert f"rope type '{kind}' is not supported; supported are default, linear, llama3" in text


def test_a_rotary_embedding_without_its_factor_is_an_error_that_names_the_field() -> None:
    assert "lacks the field 'factor'" in _error(_config(rope_scaling={"rope_type": "linear"}))


@pytest.mark.parametrize(
    ("architectures", "found", "hint"),
    [
        (["Qwen4ForCausalLM"], "Qwen4ForCausalLM", "did you mean 'Qwen3ForCausalLM'?"),
        (["GPT2LMHeadModel"], "GPT2LMHeadModel", ""),
        (["BertForTokenClassification"], "BertForTokenClassification", ""),
        ([], "(none)", ""),
        (None, "(none)", ""),
    ],
)
def test_an_unknown_architecture_is_an_error_with_the_nearest_known(
    architectures: list[str] | None, found: str, hint: str
) -> None:
    text = _error(_config() | {"architectures": architectures})
    assert f"architecture '{found}' is not supported; supported are {', '.join(FAMILIES)}" in text
    assert text.endswith(hint)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("attention_bias", True, "only false"),
        ("mlp_bias", True, "only false"),
        ("use_sliding_window", True, "only false"),
        ("hidden_act", "gelu", "only 'silu'"),
    ],
)
def test_what_would_change_the_mathematics_unseen_is_refused(field: str, value: object, allowed: str) -> None:
    assert f"{field} = {value!r} is not supported, {allowed}" in _error(_config(**{field: value}))


def test_mixtrals_sliding_window_and_router_noise_are_refused() -> None:
    config = _config("MixtralForCausalLM", num_local_experts=8, num_experts_per_tok=2)
    assert "sliding_window = 4096 is not supported, only null" in _error(config | {"sliding_window": 4096})
    assert "router_jitter_noise = 0.1 is not supported, only 0" in _error(config | {"router_jitter_noise": 0.1})


def test_quantized_weights_are_refused() -> None:
    assert "give the unquantized model" in _error(_config(quantization_config={"quant_method": "fp8"}))


def test_settings_that_say_what_holds_anyway_are_accepted() -> None:
    plain = {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "hidden_act": "silu"}
    assert parse_model_shape(_config(**plain, sliding_window=4096), "") == parse_model_shape(_config(), "")


@pytest.mark.parametrize("field", sorted(_config().keys() - {"architectures", "num_key_value_heads"}))
def test_a_missing_field_is_an_error_that_names_it(field: str) -> None:
    assert f"lacks the field '{field}'" in _error(_config(**{field: None}))


@pytest.mark.parametrize("value", ["many", [1], math.nan])
def test_a_size_that_is_no_number_is_an_error(value: object) -> None:
    assert "a field that isn't the number it should be" in _error(_config(vocab_size=value))


def test_a_folder_is_read_with_its_tilde_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(_config()))
    assert read_model_shape("~") == read_model_shape(tmp_path) == parse_model_shape(_config(), "")


def _folder_error(folder: Path) -> str:
    with pytest.raises(ModelFolderError) as caught:
        read_model_shape(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_missing_folder_and_a_folder_without_config_are_told_apart(tmp_path: Path) -> None:
    assert "no such folder; give a Hugging Face model folder" in _folder_error(tmp_path / "nowhere")
    assert "no config.json in this folder; give a Hugging Face model folder" in _folder_error(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is not valid JSON"),
        (b'{"a": ', "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[]", "object"),
    ],
)
def test_a_broken_config_is_an_error_that_names_the_file(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    text = _folder_error(tmp_path)
    assert str(tmp_path / "config.json") in text and told in text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_is_read_back(tmp_path: Path, family: str, tied: bool) -> None:
    from transformers import (
        LlamaConfig,
        MixtralConfig,
        PretrainedConfig,
        Qwen2Config,
        Qwen2MoeConfig,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    kinds: dict[str, type[PretrainedConfig]] = {
        "LlamaForCausalLM": LlamaConfig,
        "Qwen2ForCausalLM": Qwen2Config,
        "Qwen3ForCausalLM": Qwen3Config,
        "Qwen2MoeForCausalLM": Qwen2MoeConfig,
        "Qwen3MoeForCausalLM": Qwen3MoeConfig,
        "MixtralForCausalLM": MixtralConfig,
    }
    kinds[family](
        architectures=[family],
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=3,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    ).save_pretrained(tmp_path)
    shape = read_model_shape(tmp_path)
    assert (shape.family, shape.tied, shape.hidden_size, shape.num_kv_heads) == (family, tied, 48, 3)
    assert shape.rope == Rope(5e5)
