"""What a run reads before any rank starts: tokenizer, prompts, their order, and the arithmetic of its batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from megarl.batching.plan import BatchPlan
from megarl.checks.algorithm import needs_reward_function
from megarl.checks.rules import require, schedule_problems
from megarl.checks.run import CheckedPPO, CheckedSFT
from megarl.config.schema import ModelConfig, PPOConfig
from megarl.data.chat import load_tokenizer
from megarl.data.mixing import MixedOrder
from megarl.data.order import Order
from megarl.data.prompts import load_prompts
from megarl.data.sft import SFTExample, load_sft_examples
from megarl.reward.registry import require_functions
from megarl.types import Prompt
from megarl.weights.model_shape import ModelShape, read_model_shape
from megarl.weights.sources import SafetensorsSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["filter", "error"]


@dataclass(frozen=True)
class PPOInputs:
    """Of an RL run. num_overlong: prompts left out as longer than data.max_prompt_length.

    critic_plan: the critic's share of the batch arithmetic, None without one. shape, critic_shape, reward_shape: of the
    models.
    """

    tokenizer: PreTrainedTokenizerBase
    train_prompts: tuple[Prompt, ...]
    val_prompts: tuple[Prompt, ...]
    order: Order | MixedOrder
    batch_plan: BatchPlan
    critic_plan: BatchPlan | None
    num_steps: int
    num_overlong: int
    shape: ModelShape
    critic_shape: ModelShape | None
    reward_shape: ModelShape | None = None

    def actor_optimizer_steps(self, config: PPOConfig) -> int:
        """Return the optimizer steps of the actor in the whole run."""
        idle = config.critic.warmup_steps if self.critic_plan else 0
        return (self.num_steps - idle) * self.batch_plan.num_optimizer_steps

    def critic_optimizer_steps(self) -> int:
        """Return the optimizer steps of the critic in the whole run."""
        return self.num_steps * self.critic_plan.num_optimizer_steps if self.critic_plan else 0


@dataclass(frozen=True)
class SFTInputs:
    """Of an SFT run."""

    examples: tuple[SFTExample, ...]
    val_examples: tuple[SFTExample, ...]
    order: Order
    batch_plan: BatchPlan
    num_steps: int


def read_ppo_inputs(checked: CheckedPPO) -> PPOInputs:
    """Read a checked RL run's inputs. Raises the named error of what is wrong before anything starts."""
    config = checked.config
    data, actor, trainer = config.data, config.actor_rollout_ref.actor, config.trainer
    plan, critic_plan, model_folder = checked.batch, checked.critic_batch, checked.model.here()
    _check_weights(config.actor_rollout_ref.model, model_folder)
    if checked.reward_model:
        SafetensorsSource(checked.reward_model.here(), checked.reward_model.shape, may_lack_value_head=False)
    tokenizer = load_tokenizer(model_folder)
    train, val = (
        load_prompts(
            files,
            tokenizer,
            prompt_key=data.prompt_key,
            max_prompt_length=data.max_prompt_length,
            overlong=cast(Overlong, data.overlong_prompts),
        )
        for files in (data.train_files, data.val_files)
    )
    val_order = Order(len(val.prompts), len(val.prompts), data.val_shuffle, trainer.seed)
    val_prompts = tuple(val.prompts[i] for i in val_order.batch(0)[: data.max_val_prompts])
    if needs_reward_function(config) and not config.reward.name and not config.reward.path:
        require_functions({p.data_source for p in (*train.prompts, *val_prompts)})
    order: Order | MixedOrder
    if data.train_file_weights:
        weights, size = data.train_file_weights, data.train_batch_size
        order = MixedOrder(train.file_sizes, weights, size, data.train_shuffle, trainer.seed)
    else:
        order = Order(len(train.prompts), data.train_batch_size, data.train_shuffle, trainer.seed)
    num_steps = trainer.total_training_steps or trainer.total_epochs * order.batches_per_epoch
    num_overlong = train.num_overlong + val.num_overlong
    inputs = PPOInputs(
        tokenizer,
        train.prompts,
        val_prompts,
        order,
        plan,
        critic_plan,
        num_steps,
        num_overlong,
        checked.model.shape,
        checked.critic.shape if checked.critic else None,
        checked.reward_model.shape if checked.reward_model else None,
    )
    # Once more, now that too long prompts are left out.
    steps = inputs.actor_optimizer_steps(config)
    require(schedule_problems("actor_rollout_ref.actor.lr_scheduler", actor.lr_scheduler, steps))
    if critic_plan:
        steps = inputs.critic_optimizer_steps()
        require(schedule_problems("critic.lr_scheduler", config.critic.lr_scheduler, steps))
    return inputs


def read_sft_inputs(checked: CheckedSFT) -> SFTInputs:
    """Read a checked SFT run's inputs. Raises the named error of what is wrong before anything starts."""
    config, plan, model_folder = checked.config, checked.batch, checked.model.here()
    data, trainer = config.data, config.trainer
    _check_weights(config.model, model_folder)
    tokenizer = load_tokenizer(model_folder)
    train, val = (
        load_sft_examples(
            files,
            tokenizer,
            messages_key=data.messages_key,
            max_length=data.max_length,
            overlong=cast(Overlong, data.overlong_examples),
        )
        if files
        else ()
        for files in (data.train_files, data.val_files)
    )
    order = Order(len(train), data.train_batch_size, data.train_shuffle, trainer.seed)
    num_steps = trainer.total_training_steps or trainer.total_epochs * order.batches_per_epoch
    require(schedule_problems("lr_scheduler", config.lr_scheduler, num_steps))
    return SFTInputs(train, val, order, plan, num_steps)


def _check_weights(model: ModelConfig, folder: str) -> None:
    """Raise ModelFolderError for weights that are missing or truncated: here in a second, on the ranks in a minute."""
    if model.init == "pretrained":
        SafetensorsSource(folder, read_model_shape(folder))
