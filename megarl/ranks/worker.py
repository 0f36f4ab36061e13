"""One rank: the models and the engine it holds a part of, and what the controller may ask of it.

Imports Megatron, so ``megarl.ranks.spec`` prepares the platform before it imports this.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.algorithm.user_file import load_user_file
from megarl.checkpoint.trainer_state import TrainerState, write_trainer_state
from megarl.checkpoint.whole_folder import whole_folder
from megarl.checks.algorithm import needs_critic, needs_reference, needs_reward_model
from megarl.config.schema import (
    LRSchedulerConfig,
    MegatronConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    SFTConfig,
    TrainedMegatronConfig,
)
from megarl.parallel.layout import layout_of
from megarl.parallel.platform import Platform
from megarl.ranks.publish import Publisher
from megarl.ranks.spec import RunSpec
from megarl.rollout.engine import RolloutEngine
from megarl.train.actor import Actor
from megarl.train.critic import Critic
from megarl.train.megatron.model import ModelSpec
from megarl.train.megatron.optimizer import OptimizerSpec
from megarl.train.policy import Policy
from megarl.train.reward_model import RewardModel
from megarl.train.work import Metrics, OptimizerStep, PolicyLossSpec, ValueLossSpec
from megarl.types import Batch, GenerationRequest, Rollout, Sampling
from megarl.weights.model_shape import ModelShape, read_model_shape
from megarl.weights.sources import RandomSource, SafetensorsSource, TensorSource

Micros = Sequence[Sequence[int]]


class Worker:
    """This rank's share of a run. Every public method is called on all ranks together."""

    def __init__(self, run: RunSpec, platform: Platform) -> None:
        self.device = platform.device(int(os.environ["LOCAL_RANK"]))
        self.folder = Path(run.model_folder)
        self.critic_folder = Path(run.critic_folder or run.model_folder)
        self.shape = read_model_shape(run.model_folder)
        self.ref: Policy | None = None
        self.critic: Critic | None = None
        self.reward_model: RewardModel | None = None
        self.engine: RolloutEngine | None = None
        self.publisher: Publisher | None = None
        if isinstance(run.config, PPOConfig):
            self._build_ppo(run.config, run)
        else:
            self._build_sft(run.config, run)

    def _build_ppo(self, config: PPOConfig, run: RunSpec) -> None:
        if run.algorithm_file is not None:
            load_user_file(run.algorithm_file)
        models = config.actor_rollout_ref
        source = self._source(models.model, config.trainer.seed)
        spec = _model_spec(self.shape, models.model, models.actor.megatron, self.device)
        optimizer = _optimizer_spec(
            models.actor.optim, models.actor.lr_scheduler, models.actor.megatron, run.actor_optimizer_steps
        )
        self.actor = Actor(spec, source, optimizer)
        if needs_reference(config):
            self.ref = Policy(_model_spec(self.shape, models.model, models.ref.megatron, self.device), source)
        if needs_critic(config):
            self.critic = self._build_critic(config, run)
        if needs_reward_model(config):
            self.reward_model = self._build_reward_model(config, run)
        self.engine = _build_engine(config, run.model_folder)
        self.publisher = Publisher(self.actor, self.engine, models.rollout.tensor_model_parallel_size)

    def _build_critic(self, config: PPOConfig, run: RunSpec) -> Critic:
        critic, model = config.critic, config.actor_rollout_ref.model
        assert run.critic_folder is not None
        shape = read_model_shape(run.critic_folder).with_value_head()
        spec = _model_spec(shape, model, critic.megatron, self.device)
        random = critic.model.init == "random"
        source = RandomSource(shape, config.trainer.seed) if random else SafetensorsSource(run.critic_folder, shape)
        steps = run.critic_optimizer_steps
        return Critic(spec, source, _optimizer_spec(critic.optim, critic.lr_scheduler, critic.megatron, steps))

    def _build_reward_model(self, config: PPOConfig, run: RunSpec) -> RewardModel:
        assert run.reward_model_folder is not None
        shape = read_model_shape(run.reward_model_folder)
        spec = _model_spec(shape, config.actor_rollout_ref.model, config.reward.model.megatron, self.device)
        return RewardModel(spec, SafetensorsSource(run.reward_model_folder, shape, may_lack_value_head=False))

    def _build_sft(self, config: SFTConfig, run: RunSpec) -> None:
        spec = _model_spec(self.shape, config.model, config.megatron, self.device)
        optimizer = _optimizer_spec(config.optim, config.lr_scheduler, config.megatron, run.actor_optimizer_steps)
        self.actor = Actor(spec, self._source(config.model, config.trainer.seed), optimizer)

    def _source(self, model: ModelConfig, seed: int) -> TensorSource:
        if model.init == "random":
            return RandomSource(self.shape, seed)
        return SafetensorsSource(self.folder, self.shape)

    def publish(self, policy_version: int) -> None:
        """Move the actor's weights into the engine."""
        assert self.publisher is not None and self.engine is not None
        self.engine.wake_up()
        with self.actor.resident():
            self.publisher.publish(policy_version)

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[tuple[Rollout, ...]]:
        """Generate this replica's rollouts."""
        assert self.engine is not None
        self.engine.wake_up()
        return self.engine.generate(requests, sampling)

    def end_generation(self) -> None:
        """Give the engine's memory back for training."""
        assert self.engine is not None
        self.engine.sleep()

    def logprobs(self, role: str, batch: Batch, micro_batches: Micros, temperature: float) -> Tensor | None:
        """Return the log-probs of this data-parallel rank's rows, on the rank that reports them."""
        model = {"actor": self.actor, "ref": self.ref}[role]
        assert model is not None
        return model.logprobs(batch, micro_batches, temperature)

    def values(self, batch: Batch, micro_batches: Micros) -> Tensor | None:
        """Return the critic's values of this data-parallel rank's rows, on the rank that reports them."""
        assert self.critic is not None
        return self.critic.values(batch, micro_batches)

    def reward_scores(self, batch: Batch, micro_batches: Micros) -> Tensor | None:
        """Return the reward model's scores of this data-parallel rank's rows, on the rank that reports them."""
        assert self.reward_model is not None
        return self.reward_model.scores(batch, micro_batches)

    def update_critic(self, batch: Batch, steps: Sequence[OptimizerStep], loss: ValueLossSpec) -> list[Metrics]:
        """Take the optimizer steps of a value update."""
        assert self.critic is not None
        return self.critic.update(batch, steps, loss)

    def update_actor(self, batch: Batch, steps: Sequence[OptimizerStep], loss: PolicyLossSpec) -> list[Metrics]:
        """Take the optimizer steps of a policy update."""
        return self.actor.update(batch, steps, loss)

    def update_sft(self, batch: Batch, steps: Sequence[OptimizerStep]) -> list[Metrics]:
        """Take optimizer steps on demonstrations."""
        return self.actor.update_sft(batch, steps)

    def evaluate_sft(self, batch: Batch, step: OptimizerStep) -> Metrics:
        """Return the loss on demonstrations."""
        return self.actor.evaluate_sft(batch, step)

    def export(self, out: str, state: TrainerState | None) -> None:
        """Write the actor as a Hugging Face folder, with the critic in critic/, and the controller's state."""
        with whole_folder(Path(out)) as folder:
            self.actor.export(folder, self.folder)
            if self.critic is not None:
                self.critic.export(folder / "critic", self.critic_folder)
            if state is not None and dist.get_rank() == 0:
                write_trainer_state(folder, state)

    def shutdown(self) -> None:
        """Release the engine."""
        if self.engine is not None:
            self.engine.shutdown()


def _model_spec(shape: ModelShape, model: ModelConfig, megatron: MegatronConfig, device: torch.device) -> ModelSpec:
    return ModelSpec(
        shape,
        layout_of(megatron, dist.get_world_size()),
        getattr(torch, model.dtype),
        device,
        packed=model.use_remove_padding,
        param_offload=megatron.param_offload,
        fused_head=model.use_fused_kernels,
        recompute=megatron.recompute if isinstance(megatron, TrainedMegatronConfig) else None,
        transformer_fields=megatron.override_transformer_config,
    )


def _optimizer_spec(
    optim: OptimConfig, scheduler: LRSchedulerConfig, megatron: TrainedMegatronConfig, total_steps: int
) -> OptimizerSpec:
    return OptimizerSpec(
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        betas=(optim.beta[0], optim.beta[1]),
        eps=optim.eps,
        clip_grad=optim.clip_grad,
        schedule=scheduler.type,
        warmup_steps=scheduler.warmup_steps,
        total_steps=total_steps,
        use_distributed_optimizer=megatron.use_distributed_optimizer,
        grad_offload=megatron.grad_offload,
        optimizer_offload=megatron.optimizer_offload,
        optimizer_on_host=megatron.optimizer_on_host,
        moment_dtypes=(getattr(torch, megatron.exp_avg_dtype), getattr(torch, megatron.exp_avg_sq_dtype))
        if megatron.use_precision_aware_optimizer
        else None,
    )


def _build_engine(config: PPOConfig, model_folder: str) -> RolloutEngine:
    from megarl.rollout.vllm import VllmEngine, VllmSpec

    rollout, data = config.actor_rollout_ref.rollout, config.data
    return VllmEngine(
        VllmSpec(
            model_folder=model_folder,
            dtype=config.actor_rollout_ref.model.dtype,
            tensor_parallel_size=rollout.tensor_model_parallel_size,
            max_model_len=data.max_prompt_length + data.max_response_length,
            max_num_seqs=rollout.max_num_seqs,
            max_num_batched_tokens=rollout.max_num_batched_tokens,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            enforce_eager=rollout.enforce_eager,
            seed=config.trainer.seed,
            disable_log_stats=rollout.disable_log_stats,
            free_cache_engine=rollout.free_cache_engine,
        )
    )
