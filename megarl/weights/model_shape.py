"""What a Hugging Face config.json says of a model: its family, sizes and rotary embedding. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megarl.errors import ModelFolderError, nearest

FAMILIES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "MixtralForCausalLM",
)
# What transformers calls a family's language model, and its models with a number a token, as a critic is, or a number
# for a whole text, as a reward model is.
_LANGUAGE_MODEL, _CRITIC, _REWARD_MODEL = "ForCausalLM", "ForTokenClassification", "ForSequenceClassification"


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. kind: ``default``, ``linear`` or ``llama3``; the factors are unused where kind is default."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class ModelShape:
    """Everything about an architecture that decides parameters and mathematics.

    value_head: one number a token in place of logits, as a critic and a reward model have.

    num_experts: of every layer but ``dense_layers``; 0 in a dense model, where nothing else about experts means
    anything. A token takes ``experts_per_token`` of them, weighted by its router's ``router_score``, which are divided
    by their sum where ``norm_topk_prob``. A shared expert, which every token takes besides, is weighted by the sigmoid
    of a gate of its own where ``gated_shared_expert``; shared_expert_ffn_size is 0 where there is none.
    ffn_size: of dense layers.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope: Rope
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    init_std: float = 0.02
    value_head: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    shared_expert_ffn_size: int = 0
    gated_shared_expert: bool = False
    norm_topk_prob: bool = False
    router_score: str = "softmax"
    dense_layers: tuple[int, ...] = ()

    def with_value_head(self) -> ModelShape:
        """Return a critic's or reward model's shape: no output layer, so nothing to tie the embedding to."""
        return replace(self, value_head=True, tied=False)

    def critic_fields(self) -> dict[str, Any]:
        """Return the fields of config.json that say of a folder that it has a value head."""
        assert self.value_head
        return {
            "architectures": [self.family.replace(_LANGUAGE_MODEL, _CRITIC)],
            "id2label": {"0": "value"},
            "label2id": {"value": 0},
            "tie_word_embeddings": False,
        }

    def has_experts(self, layer: int) -> bool:
        """Return True for a ``layer`` that is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def active_parameters(self) -> int:
        """Parameters that one token passes through, without the embedding."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        total = 0
        for layer in range(self.num_layers):
            if self.has_experts(layer):
                ffn = self.experts_per_token * self.expert_ffn_size + self.shared_expert_ffn_size
            else:
                ffn = self.ffn_size
            total += attention + 3 * self.hidden_size * ffn
        return total + self.hidden_size * (1 if self.value_head else self.vocab_size)

    def padded_vocab(self, tp: int) -> int:
        """Return the vocabulary rounded up to a multiple of ``tp``."""
        return -(-self.vocab_size // tp) * tp


def read_model_shape(folder: str | Path) -> ModelShape:
    """Read ``folder``/config.json.

    Raises ModelFolderError where the file is absent or broken, or the architecture is not one of FAMILIES.
    """
    path = Path(folder).expanduser() / "config.json"
    if not path.is_file():
        found = "no config.json in this folder" if path.parent.is_dir() else "no such folder"
        raise ModelFolderError(
            f"model.path = {str(folder)!r}: {found}; "
            "give a Hugging Face model folder (config.json, tokenizer files, *.safetensors)"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:  # neither JSON nor, perhaps, text
        raise ModelFolderError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelFolderError(f"{path} holds no fields: it must be a JSON object")
    return parse_model_shape(config, str(path))


def parse_model_shape(config: Mapping[str, Any], source: str) -> ModelShape:
    """Turn the fields of a config.json into a ModelShape; ``source`` names it in errors.

    A token classification model of a supported family is a critic, if it has one label, and a sequence classification
    model a reward model.
    """
    architecture = (config.get("architectures") or ["(none)"])[0]
    family = architecture.replace(_CRITIC, _LANGUAGE_MODEL).replace(_REWARD_MODEL, _LANGUAGE_MODEL)
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ModelFolderError(
            f"{source}: architecture {architecture!r} is not supported; supported are {known}. "
            f"{nearest(architecture, FAMILIES)}".rstrip()
        )
    has_value_head = architecture != family
    if has_value_head and len(config.get("id2label") or "01") != 1:  # transformers has two labels unless told
        role = "critic" if architecture.endswith(_CRITIC) else "reward model"
        raise ModelFolderError(f"{source}: {architecture} must have one label to be a {role}, see id2label")
    _refuse_unsupported(family, config, source)
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return ModelShape(
            family=family,
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or _default_head_dim(family, hidden, heads)),
            ffn_size=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            max_positions=int(config["max_position_embeddings"]),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=_rope(family, config, source),
            tied=bool(config.get("tie_word_embeddings", False)) and not has_value_head,
            qkv_bias=family.startswith("Qwen2") and bool(config.get("qkv_bias", True)),
            qk_norm=family.startswith("Qwen3"),
            init_std=float(config.get("initializer_range", 0.02)),
            value_head=has_value_head,
            **_experts(family, config, source),
        )
    except KeyError as error:
        raise ModelFolderError(f"{source} lacks the field {error}") from error
    except (TypeError, ValueError) as error:
        raise ModelFolderError(f"{source} has a field that isn't the number it should be: {error}") from error


def _experts(family: str, config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return ModelShape's fields about experts; none for a family without."""
    if "Moe" not in family and family != "MixtralForCausalLM":
        return {}
    # transformers 5 writes Mixtral's word for Qwen3's experts as well.
    num_experts = int(config["num_local_experts" if "num_local_experts" in config else "num_experts"])
    per_token = int(config["num_experts_per_tok"])
    if not 1 <= per_token <= num_experts:
        raise ModelFolderError(
            f"{source}: num_experts_per_tok = {per_token} must be from 1 to the model's {num_experts} experts"
        )
    fields: dict[str, Any] = {"num_experts": num_experts, "experts_per_token": per_token}
    if family == "MixtralForCausalLM":
        fields["expert_ffn_size"] = int(config["intermediate_size"])
        fields["norm_topk_prob"] = True
    else:
        step, listed = int(config.get("decoder_sparse_step", 1)), config.get("mlp_only_layers") or []
        layers = range(int(config["num_hidden_layers"]))
        fields["expert_ffn_size"] = int(config["moe_intermediate_size"])
        fields["norm_topk_prob"] = bool(config.get("norm_topk_prob", False))
        fields["dense_layers"] = tuple(i for i in layers if i in listed or (i + 1) % step)
    if family == "Qwen2MoeForCausalLM":
        fields["shared_expert_ffn_size"] = int(config["shared_expert_intermediate_size"])
        fields["gated_shared_expert"] = True
    if per_token == 1 and fields["norm_topk_prob"]:
        raise ModelFolderError(
            f"{source}: num_experts_per_tok = 1 with norm_topk_prob is not supported: every expert's weight would be "
            "1, and the router would learn nothing"
        )
    return fields


def _default_head_dim(family: str, hidden_size: int, num_heads: int) -> int:
    """Return the head_dim that transformers takes where config.json names none."""
    return 128 if family == "Qwen3ForCausalLM" else hidden_size // num_heads


def _refuse_unsupported(family: str, config: Mapping[str, Any], source: str) -> None:
    """Refuse what would change the mathematics unseen."""
    for field in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(field):
            raise ModelFolderError(f"{source}: {field} = {config[field]!r} is not supported, only false")
    if config.get("sliding_window") and family == "MixtralForCausalLM":  # others ask use_sliding_window first
        window = config["sliding_window"]
        raise ModelFolderError(f"{source}: sliding_window = {window!r} is not supported, only null")
    if config.get("router_jitter_noise"):
        noise = config["router_jitter_noise"]
        raise ModelFolderError(f"{source}: router_jitter_noise = {noise!r} is not supported, only 0")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelFolderError(f"{source}: hidden_act = {config['hidden_act']!r} is not supported, only 'silu'")
    if config.get("quantization_config"):
        raise ModelFolderError(f"{source}: quantized weights can't be trained; give the unquantized model")


def _rope(family: str, config: Mapping[str, Any], source: str) -> Rope:
    """Read rope_parameters (transformers 5) or rope_theta with rope_scaling (before)."""
    new = config.get("rope_parameters")
    fields = dict(new or config.get("rope_scaling") or {})
    default = 1e6 if family == "MixtralForCausalLM" else 10000.0
    theta = float(fields.get("rope_theta") or config.get("rope_theta") or default)
    kind = str(fields.get("rope_type") or fields.get("type") or "default")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, float(fields["factor"]))
    if kind == "llama3":
        return Rope(
            theta,
            kind,
            float(fields["factor"]),
            float(fields["low_freq_factor"]),
            float(fields["high_freq_factor"]),
            int(fields["original_max_position_embeddings"]),
        )
    raise ModelFolderError(f"{source}: rope type {kind!r} is not supported; supported are default, linear, llama3")
