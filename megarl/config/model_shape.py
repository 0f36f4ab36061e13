"""What a Hugging Face config.json says of a model: its family, sizes and rotary embedding. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megarl.errors import ModelFolderError, nearest

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


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

    value_head: one number a token in place of logits, as a critic has.
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

    def with_value_head(self) -> ModelShape:
        """Return the critic's shape: no output layer, so nothing to tie the embedding to."""
        return replace(self, value_head=True, tied=False)

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
    """Turn the fields of a config.json into a ModelShape; ``source`` names it in errors."""
    family = (config.get("architectures") or ["(none)"])[0]
    if family not in FAMILIES:
        hint = nearest(family, FAMILIES)
        raise ModelFolderError(
            f"{source}: architecture {family!r} is not supported; supported are {', '.join(FAMILIES)}. {hint}".rstrip()
        )
    _refuse_unsupported(config, source)
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
            rope=_rope(config, source),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "Qwen2ForCausalLM",
            qk_norm=family == "Qwen3ForCausalLM",
            init_std=float(config.get("initializer_range", 0.02)),
        )
    except KeyError as error:
        raise ModelFolderError(f"{source} lacks the field {error}") from error
    except (TypeError, ValueError) as error:
        raise ModelFolderError(f"{source} has a field that isn't the number it should be: {error}") from error


def _default_head_dim(family: str, hidden_size: int, num_heads: int) -> int:
    """Return what transformers takes for a head_dim that config.json doesn't name."""
    return 128 if family == "Qwen3ForCausalLM" else hidden_size // num_heads


def _refuse_unsupported(config: Mapping[str, Any], source: str) -> None:
    """Refuse what would change the mathematics unseen."""
    for field in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(field):
            raise ModelFolderError(f"{source}: {field} = {config[field]!r} is not supported, only false")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelFolderError(f"{source}: hidden_act = {config['hidden_act']!r} is not supported, only 'silu'")
    if config.get("quantization_config"):
        raise ModelFolderError(f"{source}: quantized weights can't be trained; give the unquantized model")


def _rope(config: Mapping[str, Any], source: str) -> Rope:
    """Read rope_parameters (transformers 5) or rope_theta with rope_scaling (before)."""
    new = config.get("rope_parameters")
    fields = dict(new or config.get("rope_scaling") or {})
    theta = float(fields.get("rope_theta") or config.get("rope_theta") or 10000.0)
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
