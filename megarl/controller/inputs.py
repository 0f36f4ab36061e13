"""What a run reads before any rank starts: weights' headers, tokenizer, prompts or chats, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from megarl.checks.data_files import check_rewarded
from megarl.checks.rules import require
from megarl.checks.run import CheckedRun, schedule_problems
from megarl.config.schema import PPOConfig, SFTConfig
from megarl.data.chat import load_tokenizer
from megarl.data.mixing import MixedOrder
from megarl.data.order import Order
from megarl.data.prompts import load_prompts
from megarl.data.sft import SFTExample, load_sft_examples
from megarl.roles import Role, with_total_steps
from megarl.types import Prompt
from megarl.weights.sources import SafetensorsSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["filter", "error"]


@dataclass(frozen=True)
class PPOInputs:
    """The inputs of an RL run. notes: what a person should know of them. roles: with the lengths of their schedules."""

    tokenizer: PreTrainedTokenizerBase
    train_prompts: tuple[Prompt, ...]
    val_prompts: tuple[Prompt, ...]
    order: Order | MixedOrder
    num_steps: int
    notes: tuple[str, ...]
    roles: tuple[Role, ...]


@dataclass(frozen=True)
class SFTInputs:
    """The inputs of an SFT run. roles: with the lengths of their schedules."""

    examples: tuple[SFTExample, ...]
    val_examples: tuple[SFTExample, ...]
    order: Order
    num_steps: int
    roles: tuple[Role, ...]


def read_ppo_inputs(checked: CheckedRun[PPOConfig]) -> PPOInputs:
    """Read the inputs of a checked RL run. Raises the named error of what is wrong before anything starts."""
    config = checked.config
    data, trainer = config.data, config.trainer
    _check_weights(checked.roles)
    tokenizer = load_tokenizer(checked.actor.model.here())
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
    check_rewarded((*train.prompts, *val_prompts), config)
    order: Order | MixedOrder
    if data.train_file_weights:
        weights, size = data.train_file_weights, data.train_batch_size
        order = MixedOrder(train.file_sizes, weights, size, data.train_shuffle, trainer.seed)
    else:
        order = Order(len(train.prompts), data.train_batch_size, data.train_shuffle, trainer.seed)
    num_steps = trainer.total_training_steps or trainer.total_epochs * order.batches_per_epoch
    require(schedule_problems(checked, num_steps))  # once more, now that too long prompts are left out
    return PPOInputs(
        tokenizer,
        train.prompts,
        val_prompts,
        order,
        num_steps,
        notes_on(order, train.num_overlong + val.num_overlong),
        with_total_steps(config, checked.roles, num_steps),
    )


def read_sft_inputs(checked: CheckedRun[SFTConfig]) -> SFTInputs:
    """Read the inputs of a checked SFT run. Raises the named error of what is wrong before anything starts."""
    config, data, trainer = checked.config, checked.config.data, checked.config.trainer
    _check_weights(checked.roles)
    tokenizer = load_tokenizer(checked.actor.model.here())
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
    require(schedule_problems(checked, num_steps))
    return SFTInputs(train, val, order, num_steps, with_total_steps(config, checked.roles, num_steps))


def notes_on(order: Order | MixedOrder, num_overlong: int) -> tuple[str, ...]:
    """Return what a person should know of the prompts."""
    notes = []
    if num_overlong:
        notes.append(f"left out as longer than data.max_prompt_length: {num_overlong} prompts")
    if isinstance(order, MixedOrder):
        for file in order.repeating():
            notes.append(
                f"data.train_file_weights: file {file + 1} of data.train_files has {order.file_sizes[file]} rows and "
                f"gives {order.shares[file]:.4g} to a step: rows of it may come more than once in a step"
            )
    return tuple(notes)


def _check_weights(roles: Sequence[Role]) -> None:
    """Raise ModelFolderError for weights that are missing or truncated: here in a second, on the ranks in a minute."""
    for role in roles:
        if role.model.init == "pretrained":
            SafetensorsSource(role.model.here(), role.shape, may_lack_value_head=role.name == "critic")
