"""What a run reads before any rank starts: weights' headers, tokenizer, prompts or chats, and their order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, cast

from megarl.checks.backends import notes_on_backend
from megarl.checks.data_files import check_rewarded
from megarl.checks.rules import require
from megarl.checks.run import CheckedRun, schedule_problems
from megarl.config.schema import PPOConfig, SFTConfig
from megarl.data.fingerprint import fingerprint
from megarl.data.mixing import MixedOrder
from megarl.data.order import Order
from megarl.data.prompts import Overlong, load_prompts
from megarl.data.sft import SFTExample, load_sft_examples
from megarl.data.template import ChatTemplate
from megarl.data.tokenizer import load_tokenizer, stop_token_ids
from megarl.data.turns import Masking, end_of_turn
from megarl.errors import DataError
from megarl.roles import Role, with_total_steps
from megarl.types import Prompt
from megarl.weights.sources import SafetensorsSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PPOInputs:
    """The inputs of an RL run.

    stop_token_ids: what ends a response besides the engine's own stops. notes: what a person should know of the inputs.
    roles: with the lengths of their schedules.
    """

    tokenizer: PreTrainedTokenizerBase
    train_prompts: tuple[Prompt, ...]
    val_prompts: tuple[Prompt, ...]
    order: Order | MixedOrder
    num_steps: int
    stop_token_ids: tuple[int, ...]
    notes: tuple[str, ...]
    roles: tuple[Role, ...]

    @cached_property
    def data(self) -> str:
        """The prompts and what their rewards need, as a fingerprint."""
        return fingerprint(
            (p.token_ids, json.dumps([p.data_source, p.ground_truth, p.extra_info], default=repr))
            for p in self.train_prompts
        )


@dataclass(frozen=True)
class SFTInputs:
    """The inputs of an SFT run. roles: with the lengths of their schedules. notes: what the user should know."""

    examples: tuple[SFTExample, ...]
    val_examples: tuple[SFTExample, ...]
    order: Order
    num_steps: int
    roles: tuple[Role, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def data(self) -> str:
        """The examples, as a fingerprint."""
        return fingerprint(
            (e.token_ids, "".join("01"[is_trained] for is_trained in e.loss_mask)) for e in self.examples
        )


def read_ppo_inputs(checked: CheckedRun[PPOConfig]) -> PPOInputs:
    """Read the inputs of a checked RL run. Raises the named error of what is wrong before anything starts."""
    config = checked.config
    data, trainer = config.data, config.trainer
    _check_weights(checked.roles)
    folder = checked.actor.model.here()
    template = ChatTemplate(load_tokenizer(folder), data.apply_chat_template_kwargs)
    overlong = cast(Overlong, data.overlong_prompts)
    train, val = (
        load_prompts(
            files,
            template,
            prompt_key=data.prompt_key,
            max_prompt_length=data.max_prompt_length,
            overlong=overlong,
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
    stops, stop_notes = _stops(config, folder, template)
    notes = (*notes_on(order, train.num_overlong + val.num_overlong, overlong), *template.notes(), *stop_notes)
    notes += notes_on_backend(config)
    roles = with_total_steps(config, checked.roles, num_steps)
    return PPOInputs(template.tokenizer, train.prompts, val_prompts, order, num_steps, stops, notes, roles)


def read_sft_inputs(checked: CheckedRun[SFTConfig]) -> SFTInputs:
    """Read the inputs of a checked SFT run. Raises the named error of what is wrong before anything starts."""
    config, data, trainer = checked.config, checked.config.data, checked.config.trainer
    _check_weights(checked.roles)
    folder = checked.actor.model.here()
    tokenizer = load_tokenizer(folder)
    template, stops = ChatTemplate(tokenizer, data.apply_chat_template_kwargs), stop_token_ids(folder, tokenizer)
    turns, start = (
        cast(Literal["all", "last"], data.trained_turns),
        cast(Literal["prompt", "rendering"], data.response_start),
    )
    train, val = (
        load_sft_examples(
            files,
            template,
            Masking(turns, start, stops),
            messages_key=data.messages_key,
            max_length=data.max_length,
            overlong=cast(Literal["filter", "error"], data.overlong_examples),
        )
        if files
        else ()
        for files in (data.train_files, data.val_files)
    )
    order = Order(len(train), data.train_batch_size, data.train_shuffle, trainer.seed)
    num_steps = trainer.total_training_steps or trainer.total_epochs * order.batches_per_epoch
    require(schedule_problems(checked, num_steps))
    notes = (*template.notes(), *_unstopping_ends(train, template, folder, stops), *notes_on_backend(config))
    return SFTInputs(train, val, order, num_steps, with_total_steps(config, checked.roles, num_steps), notes)


def _stops(config: PPOConfig, folder: str, template: ChatTemplate) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the tokens that end a response, with which the template ends a turn among them, and notes of it."""
    rollout, own = config.actor_rollout_ref.rollout, stop_token_ids(folder, template.tokenizer)
    if rollout.ignore_eos:
        return rollout.stop_token_ids, ()
    stops = tuple(dict.fromkeys((*rollout.stop_token_ids, *own)))
    try:
        end = end_of_turn(template, stops)
    except DataError as error:
        return stops, (f"a response ends at {_named(template, stops)}: what ends a turn is unknown, for {error}",)
    if end in stops:
        return stops, ()
    note = (
        f"a response ends at {_named(template, (end,))} too, with which the chat template ends a turn: the model's "
        f"folder has only {_named(template, own)}"
    )
    return (*stops, end), (note,)


def _unstopping_ends(
    examples: Sequence[SFTExample], template: ChatTemplate, folder: str, stops: tuple[int, ...]
) -> Iterator[str]:
    """Yield a note of trained turns whose end stops no engine by itself."""
    ends = sorted({end for example in examples for end in example.ends} - set(stops))
    if ends:
        yield (
            f"turns are trained to end with {_named(template, ends)}, which is no stop token of {folder} "
            f"({_named(template, stops)}). megarl's rollouts stop there all the same; for other engines add it to "
            "eos_token_id in generation_config.json of the folder that this run saves"
        )


def _named(template: ChatTemplate, token_ids: Sequence[int]) -> str:
    tokens = template.tokenizer.convert_ids_to_tokens(list(token_ids))
    return ", ".join(f"{token!r} ({number})" for token, number in zip(tokens, token_ids, strict=True)) or "no token"


def notes_on(order: Order | MixedOrder, num_overlong: int, overlong: Overlong) -> tuple[str, ...]:
    """Return notes on the prompts, for a person. num_overlong: of them were too long; overlong: what then."""
    notes = []
    if num_overlong:
        became = "left out" if overlong == "filter" else f"cut ({overlong})"
        notes.append(f"{became} as longer than data.max_prompt_length: {num_overlong} prompts")
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
