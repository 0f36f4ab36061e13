"""The models that layouts are verified with: tiny random ones that this writes, or a folder of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megarl.errors import ConfigError, Problem
from megarl.parallel.layout import Layout
from megarl.weights.model_shape import ModelShape, parse_model_shape, read_model_shape

# Heads that eight ranks can share, and as many layers; heads of 32, the smallest that vLLM's attention takes on CPU.
_SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 99,  # divides by no tensor-parallel size
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.15,  # unlike 0.02, gives distributions that are far from uniform
    }
)
_EXPERTS: Mapping[str, Any] = MappingProxyType(
    {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
)
_ROUTER_LOSSES: Mapping[str, Any] = MappingProxyType(
    {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.01}
)
_TINY: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qwen3": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False},
        "qwen3_tied": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
        "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], "tie_word_embeddings": False, **_EXPERTS},
    }
)


@dataclass(frozen=True)
class Subject:
    """A model to verify. folder: the user's; None: a tiny model that is written when the layouts are known."""

    name: str
    shape: ModelShape
    folder: Path | None = None

    def describe(self) -> str:
        """Return the sizes that decide what can be split."""
        shape = self.shape
        experts = f", {shape.num_experts} experts of which a token takes {shape.experts_per_token}"
        return (
            f"{shape.num_layers} layers of {shape.hidden_size}, {shape.num_heads} heads, {shape.num_kv_heads} "
            f"key-value heads, vocabulary of {shape.vocab_size:,}, embeddings {'tied' if shape.tied else 'untied'}"
            + (experts if shape.num_experts else "")
        )

    def section(self, layout: Layout) -> dict[str, Any]:
        """Return what differs in the backend's section: the router's losses on Megatron, where there are experts."""
        is_added = self.shape.num_experts and not layout.is_fsdp
        return {"override_transformer_config": dict(_ROUTER_LOSSES)} if is_added else {}

    def trains_alike(self, layout: Layout) -> bool:
        """Whether a layout has the losses of one rank of Megatron: FSDP has none of the router."""
        return not (self.shape.num_experts and layout.is_fsdp)

    def write(self, parent: Path) -> Path:
        """Return the model's folder, of float32 weights in ``parent`` unless it is the user's."""
        return self.folder or _write_tiny(self.name, parent / self.name)


def subjects(model_folder: str | None) -> tuple[Subject, ...]:
    """Return the tiny models, or the one in ``model_folder``. Raises ModelFolderError or ConfigError where it can't be.

    Reads no weights.
    """
    if model_folder is None:
        return tuple(Subject(name, parse_model_shape({**_SIZES, **own}, name)) for name, own in _TINY.items())
    shape, folder = read_model_shape(model_folder), Path(model_folder).expanduser().absolute()
    if shape.value_head:
        allowed = "has a value head in place of the output layer, as a critic or reward model; must be a language model"
        raise ConfigError([Problem("--model", model_folder, allowed)])
    return (Subject(folder.resolve().name, shape, folder),)


def _write_tiny(name: str, folder: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig
    from transformers.utils.logging import disable_progress_bar

    fields = {**_SIZES, **_TINY[name]}
    config = (Qwen3MoeConfig if "num_experts" in fields else Qwen3Config)(**fields)
    torch.manual_seed(0)
    disable_progress_bar()
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # Hugging Face starts norms at one, where none can be misplaced
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.save_pretrained(folder)
    return folder
