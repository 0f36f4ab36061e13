from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.errors import ModelFolderError
from megarl.weights.folder import resolve_model_folder
from megarl.weights.model_shape import _NEUTRAL, FAMILIES, ModelShape, Rope, parse_model_shape, read_model_shape


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
    ("architectures", "found"),
    [
        (["Qwen4ForCausalLM"], "Qwen4ForCausalLM"),
        (["GPT2LMHeadModel"], "GPT2LMHeadModel"),
        (["BertForTokenClassification"], "BertForTokenClassification"),
        ([], "(none)"),
        (None, "(none)"),
    ],
)
def test_an_unknown_architecture_is_an_error_that_names_the_supported_and_proposes_none_of_them(
    architectures: list[str] | None, found: str
) -> None:
    text = _error(_config() | {"architectures": architectures})
    assert f"architecture '{found}' is not supported; supported are {', '.join(FAMILIES)}, and on FSDP" in text


@pytest.mark.parametrize("architectures", [5, "Qwen3ForCausalLM", {"a": 1}, [5], [None]])
def test_an_architecture_that_is_no_list_of_names_is_an_error(architectures: object) -> None:
    assert "architectures = " in _error(_config() | {"architectures": architectures})


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("attention_bias", True, "only false"),
        ("mlp_bias", True, "only false"),
        ("use_sliding_window", True, "only false"),
        ("hidden_act", "gelu", 'only "silu"'),
        ("bias", True, "only false"),
        ("qk_norm", True, "only false"),
        ("is_causal", False, "only true"),
        ("sliding_window", 4096, "only null"),
        ("attention_chunk_size", 8192, "only null"),
        ("dual_chunk_attention_config", {"chunk_size": 4}, "only null"),
        ("partial_rotary_factor", 0.5, "only 1"),
        ("logit_scale", 0.5, "only 1"),
        ("model_type", "mistral", 'only "llama"'),
        ("layer_types", ["full_attention", "sliding_attention"], "only 'full_attention' for each of the 2 layers"),
        ("layer_types", ["full_attention"], "only 'full_attention' for each of the 2 layers"),
        ("per_layer_config", {"0": {"head_dim": 8}}, "only null"),
    ],
)
def test_what_would_change_the_mathematics_unseen_is_refused(field: str, value: object, allowed: str) -> None:
    assert f"{field} = {value!r} is not supported, {allowed}" in _error(_config(**{field: value}))


def test_mixtrals_sliding_window_and_router_noise_are_refused() -> None:
    config = _config("MixtralForCausalLM", num_local_experts=8, num_experts_per_tok=2)
    assert "sliding_window = 4096 is not supported, only null" in _error(config | {"sliding_window": 4096})
    assert "router_jitter_noise = 0.1 is not supported, only 0" in _error(config | {"router_jitter_noise": 0.1})


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
def test_quantized_weights_are_refused(field: str) -> None:
    assert "give the unquantized model" in _error(_config(**{field: {"quant_method": "fp8"}}))


def test_the_biases_of_a_dense_qwen2_are_always_there() -> None:
    assert "qkv_bias = False is not supported, only true" in _error(_config("Qwen2ForCausalLM", qkv_bias=False))


def test_settings_that_say_what_holds_anyway_are_accepted() -> None:
    plain = {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "hidden_act": "silu"}
    more = {"partial_rotary_factor": 1.0, "layer_types": ["full_attention"] * 2, "model_type": "qwen3"}
    family = "Qwen3ForCausalLM"
    assert parse_model_shape(_config(family, **plain, **more, sliding_window=4096), "") == parse_model_shape(
        _config(family), ""
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_that_is_not_there_is_what_transformers_makes_of_it(family: str) -> None:
    from transformers import AutoConfig

    model_type = family.removesuffix("ForCausalLM").lower().replace("moe", "_moe")
    theirs = AutoConfig.for_model(model_type)
    fields = {**EXPERTS, "num_attention_heads": 64, "hidden_size": 64 * 64, "num_key_value_heads": None}
    shape = parse_model_shape(_config(family, **fields), "")
    assert shape.norm_eps == theirs.rms_norm_eps
    assert shape.init_std == theirs.initializer_range
    assert shape.tied == theirs.tie_word_embeddings
    assert shape.rope.theta == type(theirs).default_theta
    kv_heads = 64 if model_type == "llama" else theirs.num_key_value_heads
    assert shape.num_kv_heads == kv_heads
    assert shape.head_dim == (128 if model_type == "qwen3" else 64)
    if shape.num_experts and model_type != "mixtral":
        assert (shape.norm_topk_prob, shape.dense_layers) == (theirs.norm_topk_prob, ())


@pytest.mark.parametrize("field", sorted(_config().keys() - {"architectures", "num_key_value_heads"}))
def test_a_missing_field_is_an_error_that_names_it(field: str) -> None:
    assert f"lacks the field '{field}'" in _error(_config(**{field: None}))


@pytest.mark.parametrize("value", ["many", "100", [1], math.nan, math.inf, 1.5, True, 0, -1, 10**12, 10**400])
def test_a_size_that_is_no_whole_number_in_its_range_is_an_error(value: object) -> None:
    text = _error(_config(vocab_size=value))
    assert "vocab_size = " in text and "must be a whole number from 1 to 67,108,864" in text
    assert len(text) < 200


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"])
def test_an_absurd_size_is_an_error_in_no_time(field: str) -> None:
    assert f"{field} = 1000000000000 must be a whole number from 1 to" in _error(_config(**{field: 10**12}))


def test_as_many_experts_as_no_machine_holds_are_an_error_in_no_time() -> None:
    config = _config("Qwen3MoeForCausalLM", **EXPERTS | {"num_experts": 8192}, num_hidden_layers=2048)
    assert "num_experts = 8192 x num_hidden_layers = 2048 must be at most 65,536" in _error(config)


def test_two_numbers_of_experts_are_an_error() -> None:
    config = _config("Qwen3MoeForCausalLM", **EXPERTS | {"num_local_experts": 4})
    assert "num_experts = 8 contradicts num_local_experts = 4" in _error(config)


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta", "initializer_range"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-6, "1e-6", 10**400, True])
def test_a_number_that_is_none_or_not_finite_or_negative_is_an_error(field: str, value: object) -> None:
    text = _error(_config(**{field: value}))
    assert f"{field} = " in text and "must be a number" in text


@pytest.mark.parametrize("value", ["false", 0, 1, [], {}])
def test_a_switch_that_is_neither_true_nor_false_is_an_error(value: object) -> None:
    assert "must be true or false" in _error(_config(tie_word_embeddings=value))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 must divide num_attention_heads = 4"),
        ({"hidden_size": 66}, "num_attention_heads = 4 must divide hidden_size = 66"),
        ({"head_dim": 15}, "head_dim = 15 must be even"),
    ],
)
def test_heads_that_do_not_come_out_even_are_an_error(fields: dict[str, Any], says: str) -> None:
    assert says in _error(_config(**fields))


ROPE_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"rope_type": "linear", "factor": 0}, "rope_scaling.factor = 0 must be a number above 0"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "rope_scaling.partial_rotary_factor = 0.5 is not"),
    ({"rope_type": "default", "mrope_section": [1]}, "rope_scaling.mrope_section = [1] is not supported"),
    ({"full_attention": {"rope_type": "default"}}, "rope_scaling.full_attention = "),
    ({"rope_type": 5}, "rope_scaling.rope_type = 5 must be a text"),
    ({"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}, "must be above low_freq_factor = 1"),
]


@pytest.mark.parametrize(("rope", "says"), ROPE_MISTAKES)
def test_what_is_wrong_in_a_rotary_embedding_is_named(rope: dict[str, Any], says: str) -> None:
    assert says in _error(_config(rope_scaling=rope))


def test_two_rotary_embeddings_are_an_error() -> None:
    both = {"rope_scaling": {"rope_type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}
    assert "contradicts rope_parameters" in _error(_config(**both))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from([10**12, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
_ROPES = st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta", *LLAMA3]), _JSON | st.just("llama3"))
_FIELDS = sorted(
    {*_config(), *EXPERTS, *_NEUTRAL, "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"}
    | {"tie_word_embeddings", "qkv_bias", "qk_norm", "initializer_range", "id2label", "num_labels", "model_type"}
    | {"sliding_window", "layer_types", "quantization_config", "decoder_sparse_step", "mlp_only_layers"}
    | {"norm_topk_prob"}
)


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from([*FAMILIES, "Qwen3ForSequenceClassification"]),
    st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=4),
    st.none() | _ROPES,
)
def test_no_value_of_any_field_is_answered_with_anything_but_a_shape_or_a_named_error(
    family: str, wrong: dict[str, Any], rope: dict[str, Any] | None
) -> None:
    config = _config(family, **EXPERTS | {"num_local_experts": 8}) | {"id2label": {"0": "a"}, "rope_scaling": rope}
    match _answer({**config, **wrong}):
        case ModelShape() as shape:
            assert shape.num_layers > 0 and math.isfinite(shape.norm_eps + shape.init_std + shape.rope.theta)
        case text:
            assert text.startswith("somewhere/config.json") and len(text) < 500 and text.encode()


def _answer(config: dict[str, Any]) -> ModelShape | str:
    try:
        return parse_model_shape(config, "somewhere/config.json")
    except ModelFolderError as error:
        return str(error)


@pytest.mark.parametrize("field", _FIELDS)
def test_a_value_of_a_wrong_kind_is_an_error_that_names_the_field(field: str) -> None:
    family = "Qwen2ForCausalLM" if field == "qk_norm" else "Qwen2MoeForCausalLM"
    family = "MixtralForCausalLM" if field in ("sliding_window", "num_local_experts") else family
    family = "Qwen3ForSequenceClassification" if field in ("id2label", "num_labels") else family
    text = _error({**_config(family, **EXPERTS), field: {"\ud800": [[[[[[5]]]]]]} if field != "id2label" else 5})
    assert f"{field}" in text
    text.encode()


def test_a_folder_is_read_with_its_tilde_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(_config()))
    assert read_model_shape("~") == read_model_shape(tmp_path) == parse_model_shape(_config(), "")


def test_the_home_of_nobody_is_an_error_that_names_the_key() -> None:
    for read in (read_model_shape, resolve_model_folder):
        with pytest.raises(ModelFolderError, match=r"critic\.model\.path = '~nobody_here/x'"):
            read("~nobody_here/x", "critic.model.path")


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
        (b'{"a":' * 100_000, "is nested so deep"),
        (b'{"vocab_size": ' + b"9" * 9999 + b"}", "is not valid JSON"),
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
