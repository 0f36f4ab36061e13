"""Models outside of the name map: what is known of them before a run, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from megarl.checks.backends import a_model_outside_the_map_is_served, sequences_can_be_packed
from megarl.errors import ModelFolderError
from megarl.parallel.layout import Layout
from megarl.verify.roles import TRAINING, role_on
from megarl.weights.any_model import InitialSource, read_shape
from tests.dist.tiny_models import save_tiny_classifier, save_tiny_model

WITH_MEGARLS_ATTENTION = ("gemma2", "gemma3", "phi3", "mistral", "gpt2")


def _folder(tmp_path: Path, config: str, **fields: Any) -> Path:
    """Write the config.json alone of a class of transformers with the sizes of its own but for ``fields``."""
    import transformers

    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    made: PretrainedConfig = getattr(transformers, config)(**sizes | fields)
    with torch.device("meta"):
        made.architectures = [type(AutoModelForCausalLM.from_config(made)).__name__]
    made.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", [*WITH_MEGARLS_ATTENTION, "bloom"])
def test_a_shape_has_the_tensors_of_a_checkpoint_and_knows_whose_attention_it_runs(tmp_path: Path, family: str) -> None:
    save_tiny_model(f"{family}-{'untied' if family in ('phi3', 'mistral') else 'tied'}", tmp_path)
    shape, model = read_shape(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert dict(shape.tensors) == {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert shape.own_attention == (family == "bloom")
    assert (shape.num_layers, shape.num_heads, shape.vocab_size) == (2, 4, 99)
    assert shape.tied == (family not in ("phi3", "mistral"))


@pytest.mark.parametrize("family", ["gemma2-tied", "gpt2-tied"])
def test_weights_are_drawn_as_the_models_class_does(tmp_path: Path, family: str) -> None:
    """Gemma's norms begin at zero, to which one is added; those of others at one."""
    save_tiny_model(family, tmp_path)
    fresh = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tmp_path).config)
    source, again = InitialSource(tmp_path, seed=1), InitialSource(tmp_path, seed=1)
    for name, parameter in fresh.named_parameters():
        drawn = source.read(name, 0, 0, len(parameter))
        assert drawn.equal(again.read(name, 0, 0, len(parameter)))
        if parameter.dim() == 1:
            assert drawn.equal(parameter), name
    matrix = next(name for name, parameter in fresh.named_parameters() if parameter.dim() == 2)
    size = len(dict(fresh.named_parameters())[matrix])
    assert not source.read(matrix, 0, 0, size).equal(InitialSource(tmp_path, seed=2).read(matrix, 0, 0, size))
    assert float(source.read(matrix, 0, 0, size).std()) == pytest.approx(0.15, rel=0.1)


@pytest.mark.parametrize(
    ("config", "fields", "said"),
    [
        ("OlmoeConfig", {}, "it has experts"),
        ("Gemma3TextConfig", {"use_bidirectional_attention": True}, "it attends to what follows"),
    ],
)
def test_what_cannot_be_trained_as_it_is_is_refused(
    tmp_path: Path, config: str, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(ModelFolderError, match=said):
        read_shape(_folder(tmp_path, config, **fields))


def test_a_model_that_transformers_does_not_know_is_an_error_that_says_so(tmp_path: Path) -> None:
    fields = {"architectures": ["FooForCausalLM"], "model_type": "foo"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelFolderError, match=r"can't load architecture 'FooForCausalLM': .*foo"):
        read_shape(tmp_path)


def test_quantized_weights_are_refused_of_any_family(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "Phi3Config", pad_token_id=0)
    fields = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelFolderError, match="give the unquantized model"):
        read_shape(folder)


def _classifier(tmp_path: Path, model: str, **fields: Any) -> Path:
    """Write a reward model of a family, and change fields of its config.json."""
    save_tiny_classifier(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("model", "family"),
    [("gemma2-tied", "Gemma2ForCausalLM"), ("gemma3-tied", "Gemma3ForCausalLM"), ("gpt2-tied", "GPT2LMHeadModel")],
)
def test_a_reward_model_is_a_language_model_with_a_score_whatever_its_class_is_called(
    tmp_path: Path, model: str, family: str
) -> None:
    shape = read_shape(_classifier(tmp_path, model))
    assert (shape.family, shape.value_head, shape.tied) == (family, True, False)
    assert {name: tuple(t.shape) for name, t in load_file(tmp_path / "model.safetensors").items()} == dict(
        shape.tensors
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"id2label": {"0": "bad", "1": "good"}}, "must have one label to be a reward model"),
        ({"architectures": ["PhiForSequenceClassification"]}, "of such a config transformers makes a GPT2ForSeq"),
        (
            {"architectures": ["GPT2ForTokenClassification"]},
            r"differs at classifier\.bias from GPT2LMHeadModel with score",
        ),
    ],
    ids=["labels", "another class", "another head"],
)
def test_a_classifier_that_is_no_reward_model_or_critic_is_refused(
    tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(ModelFolderError, match=said):
        read_shape(_classifier(tmp_path, "gpt2-tied", **fields))


def test_a_critic_is_refused_whose_class_in_transformers_has_another_head(tmp_path: Path) -> None:
    layout = Layout(2, fsdp=2)
    for model in ("gemma2-tied", "gemma3-tied", "gpt2-tied"):
        save_tiny_model(model, tmp_path / model)
    roles = {path.name: role_on(layout, path, "critic", training=TRAINING) for path in tmp_path.iterdir()}
    (problem,) = a_model_outside_the_map_is_served(roles["gpt2-tied"])
    assert (
        problem.key.endswith(".path") and "its GPT2ForTokenClassification differs at classifier.bias" in problem.allowed
    )
    for model in ("gemma2-tied", "gemma3-tied"):  # of the latter transformers has no such class
        assert not list(a_model_outside_the_map_is_served(roles[model]))


def test_a_rotary_embedding_that_changes_with_the_length_bounds_it(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    folder = _folder(
        tmp_path,
        "Phi3Config",
        pad_token_id=0,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters={**rope, "original_max_position_embeddings": 16},
    )
    assert read_shape(folder).max_positions == 16


def test_on_megatron_the_way_out_is_named_and_on_fsdp_what_a_model_cannot_do(tmp_path: Path) -> None:
    save_tiny_model("bloom-tied", tmp_path)
    ulysses, whole = Layout(2, fsdp=2, cp=2), Layout(2, fsdp=2)
    (megatron,) = a_model_outside_the_map_is_served(role_on(Layout(2), tmp_path, training=TRAINING))
    assert "BloomForCausalLM trains on FSDP alone" in megatron.allowed and "strategy=fsdp2" in str(megatron.fix)
    (fused,) = a_model_outside_the_map_is_served(role_on(whole, tmp_path, training=TRAINING, fused_head=True))
    assert fused.key.endswith(".use_fused_kernels")
    (split,) = a_model_outside_the_map_is_served(role_on(ulysses, tmp_path, training=TRAINING))
    assert split.key.endswith("fsdp_config.ulysses_sequence_parallel_size") and "must be 1" in split.allowed
    role = role_on(whole, tmp_path, training=TRAINING)
    assert not list(a_model_outside_the_map_is_served(role))
    (padded,) = sequences_can_be_packed(role, "model.use_remove_padding", asked=True)
    assert padded.key == "model.use_remove_padding" and "its sequences are padded" in padded.allowed
