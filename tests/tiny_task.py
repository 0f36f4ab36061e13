"""A task so small that a run takes as long as its start: a fresh Qwen3 of two layers on a few word problems."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3MoeConfig

from megarl.data.verbs import held_out_problems, sft_problems, train_problems, verbs_tokenizer
from megarl.data.write import write_fresh_model, write_parquet
from megarl.weights.model_shape import read_model_shape
from megarl.weights.name_map import hf_shapes
from megarl.weights.sources import RandomSource

_SHARED_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *(
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "initializer_range",
        "pad_token_id",
        "eos_token_id",
    ),
)
NUM_TRAIN, NUM_TEST, NUM_SFT = 24, 8, 64
NUM_RANKS = 2

_RL = """
defaults: [ppo_megatron_trainer, _self_]
data:
  train_files: [train.parquet]
  val_files: [test.parquet]
  train_batch_size: 8
  val_batch_size: 8
  max_prompt_length: 16
  max_response_length: 6
actor_rollout_ref:
  model: {path: model, init: random, dtype: float32}
  actor:
    optim: {lr: 1.0e-3}
    lr_scheduler: {type: constant, warmup_steps: 1}
    ppo_mini_batch_size: 16
    ppo_micro_batch_size_per_gpu: 8
    use_kl_loss: true
    megatron: {tensor_model_parallel_size: 2}
  rollout: {temperature: 1.0, n: 4, tensor_model_parallel_size: 2}
reward: {path: reward.py}
algorithm: {adv_estimator: grpo}
trainer: {n_gpus_per_node: 2, total_training_steps: 3, num_sampled_rollouts: 2, run_dir: run}
"""
# The same on FSDP.
_RL_FSDP = _RL.replace("ppo_megatron_trainer", "ppo_trainer").replace(
    "megatron: {tensor_model_parallel_size: 2}", "strategy: fsdp2"
)
_SFT = """
defaults: [sft_trainer, _self_]
data:
  train_files: [sft.parquet]
  val_files: [sft.parquet]
  train_batch_size: 32
  micro_batch_size_per_gpu: 16
  max_length: 32
model: {path: model, init: random, dtype: float32}
optim: {lr: 5.0e-3}
lr_scheduler: {type: constant, warmup_steps: 2}
megatron: {pipeline_model_parallel_size: 2}
trainer: {n_gpus_per_node: 2, total_training_steps: 30, run_dir: run}
"""
# Unlike the reward of the task itself, one that a fresh model gets some of.
_REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info):
    words = solution_str.split()
    digits = sum(word.isdigit() for word in words) / max(len(words), 1)
    return {"score": digits, "digits": digits, "length": len(words)}
"""


def write_tiny_task(folder: Path) -> Path:
    """Write model/, parquet files, reward.py and the recipes into ``folder``; return it.

    Files are named relative to the folder: runs start in it, with ``--config-dir=.``.
    """
    tokenizer = verbs_tokenizer()
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        dtype="float32",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        initializer_range=0.1,  # unlike 0.02, gives answers that differ between prompts
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    write_fresh_model(folder / "model", tokenizer, config)
    train, test = train_problems(0)[:NUM_TRAIN], held_out_problems()[:NUM_TEST]
    write_parquet(folder / "train.parquet", [p.prompt_row("train", i) for i, p in enumerate(train)])
    write_parquet(folder / "test.parquet", [p.prompt_row("test", i) for i, p in enumerate(test)])
    write_parquet(folder / "sft.parquet", [p.sft_row() for p in sft_problems(0)[:NUM_SFT]])
    (folder / "rl.yaml").write_text(_RL)
    (folder / "rl_fsdp.yaml").write_text(_RL_FSDP)
    (folder / "sft.yaml").write_text(_SFT)
    (folder / "reward.py").write_text(_REWARD)
    return folder


def write_experts(model: Path) -> None:
    """Make the folder's config that of a Qwen3-MoE of the same size with four experts, of which a token takes two."""
    config = json.loads((model / "config.json").read_text())
    experts = Qwen3MoeConfig(
        **{name: config[name] for name in _SHARED_SIZES},
        architectures=["Qwen3MoeForCausalLM"],
        dtype="float32",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
    experts.save_pretrained(model)


def write_weights(model: Path) -> None:
    """Write the random weights of the folder's config as model.safetensors."""
    shape = read_model_shape(model)
    source = RandomSource(shape, seed=0)
    tensors = {name: source.read(name, 0, 0, size[0]) for name, size in hf_shapes(shape).items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
