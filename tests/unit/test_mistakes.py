"""Mistakes that users of such stacks report: each is named before anything starts, with its key and what is allowed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from megarl.checks.run import CheckedRun, check_ppo
from megarl.config.command_line import parse_command_line
from megarl.config.compose import Composition, compose
from megarl.config.schema import PPOConfig
from megarl.errors import ConfigError, DataError, MegarlError, ModelFolderError, RewardError
from tests.launch import python, run

MAIN = "ppo_megatron_trainer"
MODEL, ACTOR, ROLLOUT = "actor_rollout_ref.model", "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
REF, ALGORITHM = "actor_rollout_ref.ref", "algorithm"
CORRECTION, RANKS = "algorithm.rollout_correction", "trainer.n_gpus_per_node"
JUDGE = "reward.model.path"
AXES, REF_AXES = f"{ACTOR}.megatron", f"{REF}.megatron"
RECOMPUTE, OVERRIDES = f"{AXES}.recompute", f"{AXES}.override_transformer_config"
FSDP, ULYSSES = f"{ACTOR}.fsdp_config", "ulysses_sequence_parallel_size"
TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP, EP, ETP = (
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
MINI, MICRO = f"{ACTOR}.ppo_mini_batch_size", f"{ACTOR}.ppo_micro_batch_size_per_gpu"

# A strict run of 8 prompts x 4 = 32 rollouts on 2 ranks that makes no mistake. Its model has 2 layers, 4 heads and 2
# key-value heads; 64 positions; the one named moe also has 4 experts.
SOUND = {
    f"{MODEL}.path": "model",
    f"{MODEL}.init": "random",
    "data.train_files": "[train.parquet]",
    "data.val_files": "[test.parquet]",
    "data.train_batch_size": "8",
    "data.max_prompt_length": "16",
    "data.max_response_length": "6",
    f"{ACTOR}.lr_scheduler.warmup_steps": "1",
    MINI: "16",
    MICRO: "4",
    f"{ACTOR}.use_kl_loss": "true",
    f"{ROLLOUT}.n": "4",
    "reward.path": "reward.py",
    f"{ALGORITHM}.adv_estimator": "grpo",
    RANKS: "2",
    "trainer.total_training_steps": "3",
    "trainer.strict": "true",
}
GAE = (f"{ALGORITHM}.adv_estimator=gae", f"{ACTOR}.use_kl_loss=false")
FOUR = (f"{RANKS}=4",)
MOE = f"{MODEL}.path=moe"


@dataclass(frozen=True)
class Mistake:
    """What is typed beside SOUND, the keys that the error names and what it says of the first.

    error: of a file of the user's, which names it and no key.
    """

    typed: tuple[str, ...]
    keys: tuple[str, ...]
    says: str
    error: type[MegarlError] = ConfigError


def _of(*typed: str, says: str, keys: Sequence[str] | None = None) -> Mistake:
    """Return a mistake in a key: in the last one typed, unless ``keys`` says which."""
    last = typed[-1].lstrip("+~").partition("=")[0]
    return Mistake(typed, (last,) if keys is None else tuple(keys), says)


def _in_file(*typed: str, says: str, error: type[MegarlError]) -> Mistake:
    return Mistake(typed, (), says, error)


def _axes_of(*typed: str, says: str, axis: str) -> Mistake:
    """Return a mistake in the actor's axes, which the reference takes over."""
    return Mistake(typed, (f"{AXES}.{axis}",), says)


def _of_fsdp(*typed: str, says: str, axis: str) -> Mistake:
    """Return a mistake in the actor's section of FSDP, which the reference takes over."""
    return Mistake(("--config-name=ppo_trainer", *typed), (f"{FSDP}.{axis}",), says)


MISTAKES = {
    # How models are split.
    "TP that doesn't divide the heads": Mistake(
        (f"{RANKS}=3", f"{MINI}=3", "data.train_batch_size=3", f"{MICRO}=1", f"{REF_AXES}.{TP}=1", f"{AXES}.{TP}=3"),
        (f"{AXES}.{TP}",) * 3,
        "must divide the model's 4 attention heads",
    ),
    "TP beside key-value heads": _of(
        f"{RANKS}=3", f"{MINI}=3", f"{MICRO}=1", "data.train_batch_size=3", f"{MODEL}.path=wide", f"{AXES}.{TP}=3",
        says="must divide the model's 4 key-value heads, or be a multiple of them",
    ),
    "an engine wider than the model": _of(
        f"{RANKS}=8", f"{MICRO}=2", f"{ROLLOUT}.{TP}=8", says="must divide the model's 4 attention heads"
    ),
    "an engine that doesn't divide the ranks": _of(f"{ROLLOUT}.{TP}=4", says="must divide the 2 ranks"),
    "more stages than layers": _axes_of(*FOUR, f"{AXES}.{PP}=4", says="at most the model's 2 layers", axis=PP),
    "TP x PP beyond the ranks": Mistake(
        (f"{AXES}.{TP}=2", f"{AXES}.{PP}=2"),
        (f"{AXES}.{TP} x {AXES}.{PP}",),
        "must divide the 2 ranks",
    ),
    "EP without experts": _axes_of(f"{AXES}.{EP}=2", says="the model has no experts", axis=EP),
    "ETP without experts": _axes_of(f"{AXES}.{ETP}=2", says="the model has no experts", axis=ETP),
    "EP that doesn't divide the experts": _axes_of(
        *(MOE, f"{RANKS}=3", f"{MINI}=3", f"{MICRO}=1", "data.train_batch_size=3", f"{AXES}.{EP}=3"),
        says="must divide the model's 4 experts",
        axis=EP,
    ),
    "ETP x EP beyond the ranks": Mistake(
        (MOE, f"{AXES}.{EP}=2", f"{AXES}.{ETP}=2"),
        (f"{AXES}.{ETP} x {AXES}.{EP}",),
        "must divide the 2 ranks",
    ),
    "experts and TP without sequence parallelism": _axes_of(
        *(MOE, f"{AXES}.{TP}=2", f"{AXES}.sequence_parallel=false"),
        says="megatron demands it",
        axis="sequence_parallel",
    ),
    "VPP without PP": _axes_of(f"{AXES}.{VPP}=2", says=f"has no effect where {AXES}.{PP} is 1", axis=VPP),
    "VPP of one": Mistake(
        (f"{AXES}.{VPP}=1",),
        (f"{AXES}.{VPP}", f"{REF_AXES}.{VPP}", f"critic.megatron.{VPP}", f"reward.model.megatron.{VPP}"),
        "at least 2, or null",
    ),
    "a strategy without its section": _of(
        f"{ACTOR}.strategy=fsdp2",
        says=f"is missing, which {ACTOR}.strategy = fsdp2 asks for",
        keys=(f"{ACTOR}.fsdp_config", f"{ACTOR}.strategy"),
    ),
    "a role on two backends": _of(
        "+critic.fsdp_config={fsdp_size: -1, ulysses_sequence_parallel_size: 1, reshard_after_forward: true, "
        "param_offload: false, optimizer_offload: false, enable_gradient_checkpointing: true}",
        says="contradicts critic.megatron",
    ),
    "Ulysses that doesn't divide heads": _of_fsdp(
        *(f"{RANKS}=3", f"{MINI}=3", f"{MICRO}=1", "data.train_batch_size=3", f"{FSDP}.{ULYSSES}=3"),
        says="must divide the model's 4 attention heads",
        axis=ULYSSES,
    ),
    "Ulysses that doesn't divide the ranks": _of_fsdp(
        f"{FSDP}.{ULYSSES}=4", says="must divide the 2 ranks", axis=ULYSSES
    ),
    "copies of a model that don't divide the ranks": _of_fsdp(
        f"{FSDP}.fsdp_size=3", says="must divide the 2 ranks", axis="fsdp_size"
    ),
    "moments of a frozen model that wait on the host": Mistake(
        ("--config-name=ppo_trainer", "+actor_rollout_ref.ref.fsdp_config.optimizer_offload=true"),
        ("actor_rollout_ref.ref.fsdp_config.optimizer_offload",),
        "no such key",
    ),
    "adapters of modules that don't exist": Mistake(
        ("--config-name=ppo_trainer", f"{MODEL}.lora_rank=4", f"{MODEL}.target_modules=[q_prj]"),
        (f"{MODEL}.target_modules",),
        "is no linear module of",
    ),
    "nothing to gather, and nothing to free": _of_fsdp(
        *(f"{FSDP}.fsdp_size=1", f"{FSDP}.reshard_after_forward=false"),
        says="has no effect where",
        axis="reshard_after_forward",
    ),
    "an engine that doesn't tell what it sampled from": _of(
        *(f"{ROLLOUT}.name=sglang", f"{ROLLOUT}.top_p=0.9"), says="must be 1.0 on sglang"
    ),
    "an engine's misspelled name": _of(f"{ROLLOUT}.name=vlm", says="must be one of vllm, sglang"),
    "rollouts on devices of their own": _of("actor_rollout_ref.hybrid_engine=false", says="rollout.placement"),
    "recomputation without a method": Mistake(
        (f"{RECOMPUTE}.granularity=full",),
        (f"{RECOMPUTE}.method", f"{RECOMPUTE}.num_layers"),
        "must be set where granularity is full",
    ),
    "recomputed runs that don't fill a stage": _of(
        *(f"{RECOMPUTE}.granularity=full", f"{RECOMPUTE}.method=uniform", f"{RECOMPUTE}.num_layers=3"),
        says="must divide the layers of every pipeline stage (2)",
    ),
    "more recomputed layers than a stage has": _of(
        *(f"{RECOMPUTE}.granularity=full", f"{RECOMPUTE}.method=block", f"{RECOMPUTE}.num_layers=3"),
        says="at most the 2 layers of a pipeline stage",
    ),
    "a value for a section": _of(f"{RECOMPUTE}=full", says="must be a section with keys of its own"),
    "an unknown field of megatron's": _axes_of(
        f"+{OVERRIDES}.apply_rope_fusoin=true",
        says="is no field of the installed megatron-core's TransformerConfig",
        axis="override_transformer_config.apply_rope_fusoin",
    ),
    "a field that megarl decides": _axes_of(
        f"{OVERRIDES}={{num_layers:3}}", says="is decided by megarl", axis="override_transformer_config.num_layers"
    ),
    # Batches.
    "a mini-batch larger than the rollouts": _of(f"{MINI}=64", says=f"8 x {ROLLOUT}.n 4 = 32 rollouts < 64"),
    "a mini-batch in prompts, as elsewhere": _of(
        "data.train_batch_size=3", f"{MINI}=8", says=f"3 x {ROLLOUT}.n 4 = 12 rollouts; 12 / 8 = 1 remainder 4"
    ),
    "a mini-batch that doesn't divide": _of(f"{MINI}=24", says="it counts rollouts"),
    "a micro-batch that doesn't divide": _of(f"{MICRO}=3", says="3 x 2 ranks = 6 rollouts a pass", keys=[MINI]),
    "a micro-batch larger than a mini-batch": _of(f"{MICRO}=16", says="16 x 2 ranks = 32 rollouts", keys=[MINI]),
    "a critic's own mini-batch": _of(*GAE, "critic.ppo_mini_batch_size=24", says="32 / 24 = 1 remainder 8"),
    "no prompts": _of("data.train_batch_size=0", says="must be at least 1"),
    "fewer rows than a batch": _of(f"{MINI}=64", "data.train_batch_size=32", says="have only 24 rows"),
    # The algorithm.
    "grpo with groups of one": _of(f"{MINI}=8", f"{ROLLOUT}.n=1", says="grpo compares the rollouts of a prompt"),
    "rloo with groups of one": _of(
        *(f"{MINI}=8", f"{ALGORITHM}.adv_estimator=rloo", f"{ROLLOUT}.n=1"), says="rloo compares the rollouts"
    ),
    "no KL, and not said so": _of(f"{ACTOR}.use_kl_loss=false", says="nor algorithm.use_kl_in_reward is on"),
    "KL-free with KL": _of(f"{ALGORITHM}.kl_free=true", says="contradicts"),
    "a KL of weight 0": _of(f"{ACTOR}.kl_loss_coef=0", says="the reference would be kept for nothing"),
    "the weight of a KL that is off": _of(
        *(f"{ACTOR}.use_kl_loss=false", f"{ALGORITHM}.kl_free=true", f"{ACTOR}.kl_loss_coef=0.01"),
        says=f"has an effect only where {ACTOR}.use_kl_loss is on",
    ),
    "an unknown KL": _of(f"{ACTOR}.kl_loss_type=k4", says="must be one of kl, k1"),
    "a critic for grpo": _of("critic.enable=true", says="grpo reads no values"),
    "gae without a critic": _of(*GAE, "critic.enable=false", says="gae needs a critic's values"),
    "a critic of fewer tokens": _of(*GAE, "critic.model.path=few_tokens", says="its vocabulary of 7 doesn't hold"),
    "an actor that never trains": _of(*GAE, "critic.warmup_steps=3", says="less than the run's 3 steps"),
    "an unknown estimator": _of(f"{ALGORITHM}.adv_estimator=groo", says="must be one of gae, grpo"),
    "an unknown policy loss": _of(f"{ACTOR}.policy_loss=gsop", says="must be one of ppo_clip, gspo"),
    "lambda for grpo": _of(f"{ALGORITHM}.lam=0.95", says="has no effect on grpo; read by gae"),
    "a clip for a loss without one": _of(
        *(f"{ACTOR}.policy_loss=gpg", f"{ACTOR}.clip_ratio_high=0.28"),
        says=f"has an effect only where {ACTOR}.policy_loss is ppo_clip",
    ),
    "three clips for two sides": _of(
        *(f"{ACTOR}.clip_ratio_low=0.2", f"{ACTOR}.clip_ratio_high=0.28", f"{ACTOR}.clip_ratio=0.3"),
        says="clip_ratio_low or clip_ratio_high is null",
    ),
    "a cut-off distribution that is corrected": _of(
        f"{CORRECTION}.bypass=true", f"{ROLLOUT}.top_p=0.9", says="must be 1 where algorithm.rollout_correction acts"
    ),
    "a buffer longer than a response": _of(
        "reward.overlong_buffer.enable=true", says="data.max_response_length = 6", keys=["reward.overlong_buffer.len"]
    ),
    "a buffer that is off": _of("reward.overlong_buffer.len=4", says="where reward.overlong_buffer.enable is true"),
    "dynamic sampling that is off": _of(
        f"{ALGORITHM}.filter_groups.max_num_gen_batches=3", says="where algorithm.filter_groups.enable is true"
    ),
    # Micro-batches by tokens.
    "rollouts that aren't counted": Mistake(
        (f"{ACTOR}.use_dynamic_bsz=true",), (MICRO,), f"has an effect only where {ACTOR}.use_dynamic_bsz is false"
    ),
    "tokens that aren't counted": _of(f"{ACTOR}.ppo_max_token_len_per_gpu=64", says="use_dynamic_bsz is true"),
    "a budget that holds no long rollout": Mistake(
        (f"{ACTOR}.use_dynamic_bsz=true", f"{MICRO}=16", f"{ACTOR}.ppo_max_token_len_per_gpu=21"),
        (f"{ACTOR}.ppo_max_token_len_per_gpu",),
        "must hold the longest rollout by itself: data.max_prompt_length + data.max_response_length = 22",
    ),
    "padding beyond a budget": Mistake(
        (f"{ACTOR}.use_dynamic_bsz=true", f"{MICRO}=16", f"{MODEL}.use_remove_padding=false"),
        (f"{MODEL}.use_remove_padding",),
        "must be true where use_dynamic_bsz is",
    ),
    # Sampling.
    "greedy rollouts": _of(f"{ROLLOUT}.temperature=0", says="must be greater than 0"),
    "several greedy validations": _of(f"{ROLLOUT}.val_kwargs.n=4", says="val_kwargs.temperature is above 0"),
    "all tokens said as -1": _of(f"{ROLLOUT}.top_k=-1", says="must be at least 1, or null"),
    "a stop token of another model": _of(f"{ROLLOUT}.stop_token_ids=[151645]", says="of the model's 64 tokens"),
    "fewer tokens than sequences": _of(f"{ROLLOUT}.max_num_batched_tokens=128", says=f"{ROLLOUT}.max_num_seqs = 256"),
    "no memory": _of(f"{ROLLOUT}.gpu_memory_utilization=0", says="must be greater than 0"),
    "more than all memory": _of(f"{ROLLOUT}.gpu_memory_utilization=1.5", says="must be at most 1"),
    # Names.
    "a typo in data": _of("data.train_bach_size=8", says="no such key"),
    "a typo in the actor": _of(f"{ACTOR}.ppo_mini_batchsize=16", says="no such key"),
    "a typo in the trainer": _of("trainer.total_epoch=1", says="no such key"),
    "a typo in a nested section": _of(f"{ALGORITHM}.kl_ctrl.kl_coeff=0.1", says="no such key"),
    "a typo that is added": _of("+data.trian_files=[train.parquet]", says="no such key"),
    "a typo in the axes": _of(f"{AXES}.tensor_parallel_size=2", says="no such key"),
    "a key of another section": _of(f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=4", says="no such key"),
    "a key that was cut short": _of(f"{ACTOR}.ppo_micro_batch_size=4", says="no such key"),
    "a key of another stack": _of(f"{ACTOR}.use_torch_compile=true", says="no such key"),
    "a section of another stack": _of("reward_model.enable=true", says="no such key", keys=["reward_model"]),
    "an unknown sink": _of("trainer.logger=[console,wand]", says="must be among console, tensorboard, jsonl, wandb"),
    "an unknown recipe": _of("experiment=quikstart", says="no such file in experiment/"),
    "a file for a section": _of("data=train.parquet", says="no such file in data/"),
    "a sweep": _of(f"{ROLLOUT}.n=4,8", says="is several values, and a run has one"),
    "spaces around the sign": Mistake(
        ("trainer.seed", "=", "1"), ("trainer.seed", "=", "1"), "is neither key=value nor a flag"
    ),
    # Values.
    "a word for a number": _of(f"{ACTOR}.optim.lr=abc", says="must be a number"),
    "NaN": _of(f"{ACTOR}.optim.lr=nan", says="must be a finite number"),
    "infinity": _of(f"{ACTOR}.optim.lr=inf", says="must be a finite number"),
    "a negative learning rate": _of(f"{ACTOR}.optim.lr=-1e-6", says="must be at least 0"),
    "one and a half rollouts": _of(f"{ROLLOUT}.n=1.5", says="must be an integer"),
    "true for a number": _of(f"{ROLLOUT}.n=true", says="must be an integer"),
    "a word for true": _of(f"{ACTOR}.use_kl_loss=maybe", says="must be true or false"),
    "one beta": _of(f"{ACTOR}.optim.beta=[0.9]", says="must be two numbers"),
    "a beta of 1": _of(f"{ACTOR}.optim.beta=[0.9,1.0]", says="each at least 0 and less than 1"),
    "a last learning rate above the first": _of(f"{ACTOR}.optim.min_lr=1", says=f"at most {ACTOR}.optim.lr"),
    "a last learning rate of a constant one": _of(
        *(f"{ACTOR}.lr_scheduler.type=constant", f"{ACTOR}.optim.min_lr=1e-7"), says="lr_scheduler.type is constant"
    ),
    "warm-up longer than the run": _of(
        f"{ACTOR}.lr_scheduler.warmup_steps=100", says="is cut to 5: the run has 6 optimizer steps"
    ),
    "never said as -1": _of("trainer.save_freq=-1", says="must be at least 1, or null"),
    "no nodes": _of("trainer.nnodes=0", says="must be at least 1"),
    "half precision": _of(f"{MODEL}.dtype=float16", says="must be one of bfloat16, float32"),
    # Files.
    "no model": _of(f"{MODEL}.path=null", says="must name a Hugging Face folder"),
    "a model that isn't there": _in_file(
        f"{MODEL}.path=nowhere", says="'nowhere' is neither a folder nor a model", error=ModelFolderError
    ),
    "a folder without config.json": _in_file(
        f"{MODEL}.path=no_config", says="no config.json in this folder", error=ModelFolderError
    ),
    "a folder without a tokenizer": _in_file(f"{MODEL}.path=bare", says="has no tokenizer", error=ModelFolderError),
    "an unsupported architecture": _in_file(
        f"{MODEL}.path=gpt2", says="architecture 'GPT2LMHeadModel' is not supported", error=ModelFolderError
    ),
    "a critic for an actor": _of(f"{MODEL}.path=critic", says="has a value head in place of the output layer"),
    "a reward model for an actor": _of(f"{MODEL}.path=judge", says="as a critic or reward model"),
    "a language model that judges": _of(f"{JUDGE}=model", says="is a language model, which scores nothing"),
    "a reward model of several labels": _in_file(
        f"{JUDGE}=labels", says="must have one label to be a reward model", error=ModelFolderError
    ),
    "a reward model of fewer tokens": _of(f"{JUDGE}=few_judge", says="its vocabulary of 7 doesn't hold"),
    "a reward model of other tokens": _of(f"{JUDGE}=other_judge", says="another vocabulary than the actor: token 0"),
    "a reward model of short texts": _of(f"{JUDGE}=short_judge", says="don't hold the longest rollout, 22 tokens"),
    "a reward model that weighs nothing": _of(
        f"{JUDGE}=judge", "reward.model.coef=0", says="would be kept for nothing", keys=["reward.model.coef"]
    ),
    "no data": _of("data.train_files=[]", says="must name at least one parquet file"),
    "data that is null": _of("data.train_files=null", says="must be a list"),
    "data that isn't there": _in_file("data.train_files=[a.parquet]", says="a.parquet does not exist", error=DataError),
    "data of another format": _in_file("data.train_files=[train.jsonl]", says="or not parquet", error=DataError),
    "truncated data": _in_file("data.train_files=[cut.parquet]", says="it is truncated or not", error=DataError),
    "data of another task": _in_file("data.val_files=[sft.parquet]", says="has no column 'prompt'", error=DataError),
    "a column's misspelled name": Mistake(
        ("data.prompt_key=promt",), ("data.train_files", "data.val_files"), "did you mean 'prompt'?"
    ),
    "longer than the model": Mistake(
        ("data.max_prompt_length=60",),
        ("data.max_prompt_length + data.max_response_length",),
        "must be at most the model's max_position_embeddings = 64",
    ),
    "a reward file that isn't there": _of("reward.path=nowhere.py", says="there is no such .py file"),
    "two rewards": _of("reward.name=verbs", says="contradicts reward.path = 'reward.py'"),
    "an unknown reward": _in_file(
        *("reward.path=null", "reward.name=gsm8"), says="did you mean 'gsm8k'?", error=RewardError
    ),
    "a function of no file": _of(
        *("reward.path=null", "reward.function=score"), says="has an effect only where reward.path names a file"
    ),
    "a balancing loss that the layout would change": _of(
        MOE, f"+{OVERRIDES}.moe_aux_loss_coeff=0.01", f"+{OVERRIDES}.moe_router_load_balancing_type=aux_loss",
        says="the layout would change the loss",
    ),
    "a balancing loss of no experts": _of(
        f"+{OVERRIDES}.moe_z_loss_coeff=0.01", says="has no effect: the model has no experts"
    ),
    "an optimizer of Transformer Engine's without it": _of(
        f"{AXES}.use_precision_aware_optimizer=true", says="isn't installed"
    ),
    "quantized products of unpadded rows": _of(
        f"+{OVERRIDES}.fp8=hybrid", says="needs numbers of tokens that 16 divides"
    ),
    "a fused kernel that isn't installed": _of(
        f"+{OVERRIDES}.apply_rope_fusion=true", says="has its kernel in Transformer Engine, which isn't installed"
    ),
    "moments of 16 bits in an optimizer that has none": _of(
        f"{AXES}.exp_avg_dtype=bfloat16", says="has an effect only where"
    ),
}  # fmt: skip

# What the fix says of a name that is nearly right.
NEAREST = {
    "a typo in data": "did you mean 'train_batch_size'?",
    "a typo in the actor": "did you mean 'ppo_mini_batch_size'?",
    "a typo in the trainer": "did you mean 'total_epochs'?",
    "a typo in a nested section": "did you mean 'kl_coef'?",
    "a typo that is added": "did you mean 'train_files'?",
    "a typo in the axes": "did you mean 'tensor_model_parallel_size'?",
    "a key that was cut short": "did you mean 'ppo_micro_batch_size_per_gpu'?",
    "a section of another stack": "did you mean 'reward'?",
    "an unknown field of megatron's": "did you mean 'apply_rope_fusion'?",
    "an unknown sink": "did you mean 'wandb'?",
    "an unknown recipe": "did you mean 'quickstart'?",
    "an unknown policy loss": "did you mean 'gspo'?",
    "an engine's misspelled name": "did you mean 'vllm'?",
}


def _write_files(folder: Path) -> None:
    """Write what mistakes name beside the tiny task's own files."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    _copy_model(folder, "moe", architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", **experts)
    _copy_model(folder, "wide", num_attention_heads=12, num_key_value_heads=4, intermediate_size=96)
    _copy_model(folder, "deep", num_hidden_layers=4, layer_types=["full_attention"] * 4)
    _copy_model(folder, "few_tokens", vocab_size=7)
    _copy_model(folder, "critic", architectures=["Qwen3ForTokenClassification"], id2label={"0": "value"})
    judge: dict[str, Any] = {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    _copy_model(folder, "judge", **judge)
    _copy_model(folder, "labels", **judge | {"id2label": {"0": "no", "1": "yes"}})
    _copy_model(folder, "few_judge", **judge, vocab_size=7)
    _copy_model(folder, "short_judge", **judge | {"max_position_embeddings": 21})
    _copy_model(folder, "other_judge", **judge)
    _rename_token(folder / "other_judge" / "tokenizer.json")
    _copy_model(folder, "gpt2", architectures=["GPT2LMHeadModel"], model_type="gpt2")
    (folder / "bare").mkdir()
    shutil.copy(folder / "model" / "config.json", folder / "bare")
    (folder / "no_config").mkdir()
    whole = (folder / "train.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "train.jsonl").write_text('{"prompt": "1 + 1"}\n')


def _copy_model(folder: Path, name: str, **fields: Any) -> None:
    copy = Path(shutil.copytree(folder / "model", folder / name))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | fields))


def _rename_token(tokenizer: Path) -> None:
    """Call the tokenizer's first token by another name."""
    content = json.loads(tokenizer.read_text())
    for token in content["added_tokens"]:
        token["content"] = "another" if token["id"] == 0 else token["content"]
    tokenizer.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folder(tiny_task: Path) -> Path:
    """Return the folder of the tiny task with files that can't be used beside its own."""
    _write_files(tiny_task)
    return tiny_task


def _line(*typed: str) -> list[str]:
    """Return the command line of SOUND with ``typed``, which win."""
    keys = {override.lstrip("+~").partition("=")[0] for override in typed}
    return [*(f"{key}={value}" for key, value in SOUND.items() if key not in keys), *typed]


@cache
def _sound() -> Composition:
    return compose(parse_command_line(_line(), MAIN))


def _checked(*typed: str) -> CheckedRun[PPOConfig]:
    """Do in this process what main_ppo does before it starts anything.

    Where values of keys that there are is all that is typed, they are set in what was composed once, as Hydra does.
    """
    sound, overrides = _sound(), parse_command_line(list(typed), MAIN).overrides
    if len(overrides) < len(typed) or not all(_only_sets_a_value(o, sound.config) for o in overrides):
        return check_ppo(compose(parse_command_line(_line(*typed), MAIN)).values())
    config = sound.config.copy()
    for override in overrides:
        OmegaConf.update(config, override.key_or_group, override.value())
    return check_ppo(replace(sound, config=config).values())


def _only_sets_a_value(override: Override, config: DictConfig) -> bool:
    section, _, name = override.key_or_group.rpartition(".")
    parent = OmegaConf.select(config, section) if section else None
    is_there = isinstance(parent, DictConfig) and name in parent and not OmegaConf.is_dict(parent[name])
    return is_there and override.type is OverrideType.CHANGE and not isinstance(override.value(), dict)


def test_the_run_that_mistakes_are_made_in_makes_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    checked = _checked()
    assert (checked.num_rows, checked.num_steps, checked.notes) == (24, 3, ())
    assert checked.batches["actor"].num_rollouts == 32


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_key_and_what_is_allowed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(folder)
    mistake = MISTAKES[name]
    with pytest.raises(mistake.error) as caught:
        _checked(*mistake.typed)
    assert type(caught.value) is mistake.error
    if isinstance(caught.value, ConfigError):
        assert tuple(p.key for p in caught.value.problems) == mistake.keys
        assert mistake.says in caught.value.problems[0].allowed
        assert NEAREST.get(name, "") in caught.value.problems[0].fix
    else:
        assert mistake.says in str(caught.value)


def test_every_axis_may_be_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    chunks = (f"{MODEL}.path=deep", f"{AXES}.{PP}=2", f"{AXES}.{VPP}=2")
    for typed in ((f"{AXES}.{CP}=2",), chunks, (MOE, f"{AXES}.{EP}=2")):
        assert check_ppo(compose(parse_command_line(_line(*typed), MAIN)).values()).notes == ()


# The interpreter's own list of what was loaded, printed last.
_MAIN_PPO = """
import atexit, runpy, sys
atexit.register(lambda: print("loaded:", *sys.modules))
runpy.run_module("megarl.main_ppo", run_name="__main__", alter_sys=True)
"""
HEAVY = {"torch", "ray", "megatron", "vllm", "transformers"}


@pytest.mark.parametrize(
    "name",
    [
        "truncated data",
        "an unknown field of megatron's",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("a typo in data", "an unsupported architecture")),
    ],
)
def test_a_mistake_ends_the_command_with_code_2_before_anything_heavy_is_loaded(folder: Path, name: str) -> None:
    mistake = MISTAKES[name]
    done = run(python("-c", _MAIN_PPO, f"--config-name={MAIN}", *_line(*mistake.typed)), folder)
    assert done.code == 2, done.output
    assert mistake.says in done.stderr and "Traceback" not in done.stderr
    assert all(key in done.stderr for key in mistake.keys)
    said, _, loaded = done.stdout.rpartition("loaded:")
    assert said == "" and "megarl.checks.run" in loaded.split()
    assert not HEAVY & {module.partition(".")[0] for module in loaded.split()}
