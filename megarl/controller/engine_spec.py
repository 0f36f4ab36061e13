"""What a run's config says of its engine and of how it samples."""

from __future__ import annotations

from typing import Any

from megarl.algorithm.advantage import estimators
from megarl.config.schema import SGLANG, PPOConfig
from megarl.launchers.sglang_environment import sglang_python
from megarl.parallel.environment import platform_name
from megarl.roles import Role, engines_share_devices, is_served
from megarl.rollout.sglang import SglangSpec
from megarl.rollout.vllm import VllmSpec
from megarl.types import Sampling


def engine_spec(config: PPOConfig, actor: Role) -> VllmSpec | SglangSpec:
    """Return the spec of a run's engine."""
    rollout, shape = config.actor_rollout_ref.rollout, actor.shape
    of_both: dict[str, Any] = {
        "model_folder": actor.model.here(),
        "dtype": actor.dtype,
        "tensor_parallel_size": rollout.tensor_model_parallel_size,
        "max_model_len": actor.scoring.sequence_tokens,
        "max_num_seqs": rollout.max_num_seqs,
        "max_num_batched_tokens": rollout.max_num_batched_tokens,
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        "enforce_eager": rollout.enforce_eager,
        "seed": config.trainer.seed,
    }
    if rollout.name == SGLANG:
        # What makes its memory one that can be given back costs an engine on devices of its own for nothing.
        frees = rollout.free_cache_engine and engines_share_devices(config)
        return SglangSpec(python=sglang_python(config), free_cache_engine=frees, **of_both)
    return VllmSpec(
        **of_both,
        # vLLM refuses to spread what isn't there.
        expert_parallel_size=rollout.expert_parallel_size if shape.num_experts or not shape.is_mapped else 1,
        disable_log_stats=rollout.disable_log_stats,
        free_cache_engine=rollout.free_cache_engine,
        # An engine in processes of its own takes its steps one by one, and its ranks must draw the same noise.
        reproducible=is_served(config)
        or (platform_name() == "cpu" if rollout.reproducible is None else rollout.reproducible),
    )


def train_sampling(config: PPOConfig, stop_token_ids: tuple[int, ...]) -> Sampling:
    """Return the Sampling of rollouts for training."""
    rollout = config.actor_rollout_ref.rollout
    return Sampling(
        n=rollout.n,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=config.data.max_response_length,
        stop_token_ids=stop_token_ids,
        ignore_eos=rollout.ignore_eos,
        with_greedy=estimators.needs(config.algorithm.adv_estimator).greedy_baseline,
    )


def val_sampling(config: PPOConfig, stop_token_ids: tuple[int, ...]) -> Sampling:
    """Return the Sampling of rollouts for validation."""
    kwargs = config.actor_rollout_ref.rollout.val_kwargs
    return Sampling(
        n=kwargs.n,
        temperature=kwargs.temperature,
        top_p=kwargs.top_p,
        top_k=kwargs.top_k,
        max_tokens=config.data.max_response_length,
        stop_token_ids=stop_token_ids,
    )
