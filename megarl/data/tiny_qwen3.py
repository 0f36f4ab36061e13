"""The config of a Qwen3 that is small enough to train on a laptop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def tiny_qwen3(tokenizer: PreTrainedTokenizerBase, *, max_position_embeddings: int) -> PretrainedConfig:
    """Return a config of 4 layers of 128: 804,224 parameters with a vocabulary of 64.

    Embeddings are untied, so that with pipeline parallelism the first and the last stage own different tensors.
    """
    from transformers import Qwen3Config

    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        dtype="float32",
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=max_position_embeddings,
        initializer_range=0.02,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
