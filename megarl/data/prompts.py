"""The prompts of a run: read, checked, rendered and tokenized."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal

from megarl.data.messages import TOOLS, row_chat
from megarl.data.parquet import Row, read_rows
from megarl.data.template import ChatTemplate
from megarl.errors import DataError
from megarl.types import Prompt

Overlong = Literal["filter", "error", "left", "right", "middle"]

_REWARD_COLUMN = "the reward needs it; `python -m megarl.data.prepare --help` lists data sets that are written with it"


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one or several files, in file order. num_overlong: how many were too long, and left out or cut.

    file_sizes: prompts of each file.
    """

    prompts: tuple[Prompt, ...]
    num_overlong: int
    file_sizes: tuple[int, ...]


@dataclass(frozen=True)
class RowFacts:
    """What a row of prompts says beside its prompt. origin: where it lies, for people."""

    origin: str
    data_source: str
    ground_truth: str


def prompt_columns(prompt_key: str) -> dict[str, str]:
    """Return the columns that a file of prompts must have, each with where its name comes from."""
    return {
        prompt_key: f"data.prompt_key = {prompt_key!r}",
        "data_source": _REWARD_COLUMN,
        "reward_model": _REWARD_COLUMN,
    }


def load_prompts(
    files: Sequence[str],
    template: ChatTemplate,
    *,
    prompt_key: str,
    max_prompt_length: int,
    overlong: Overlong,
) -> PromptSet:
    """Read, check and tokenize the prompts of several parquet files.

    prompt_key: the column with chat messages or a string. max_prompt_length: in tokens, template included. A longer
    prompt is left out and counted (``filter``), is an error, or loses its ``left``, ``right`` or ``middle``. Raises
    DataError on any row that can't be used, and if no prompt is left.
    """
    required = prompt_columns(prompt_key)
    prompts: list[Prompt] = []
    num_overlong = 0
    sizes = [0] * len(files)
    for row in read_rows(files, required, optional=("extra_info", TOOLS)):
        prompt = _prompt(row, template, prompt_key)
        if len(prompt.token_ids) > max_prompt_length:
            if overlong == "error":
                raise row.error(_overlong_text(len(prompt.token_ids), max_prompt_length))
            num_overlong += 1
            if overlong == "filter":
                continue
            prompt = _cut(prompt, template, max_prompt_length, overlong)
        prompts.append(prompt)
        sizes[row.place] += 1
    if not prompts:
        raise DataError(_nothing_left_text(files, num_overlong, max_prompt_length))
    return PromptSet(tuple(prompts), num_overlong, tuple(sizes))


def row_facts(row: Row, prompt_key: str) -> RowFacts:
    """Return the facts of a row whose prompt has messages. Raises DataError for one that can't be used."""
    row_chat(row, prompt_key)
    _extra_info(row)
    return RowFacts(row.origin, _data_source(row), _ground_truth(row))


def _prompt(row: Row, template: ChatTemplate, prompt_key: str) -> Prompt:
    chat = row_chat(row, prompt_key)
    try:
        text, token_ids = template.prompt(chat)
    except DataError as error:
        raise row.error(str(error)) from error
    return Prompt(row.uid, token_ids, text, _data_source(row), _ground_truth(row), _extra_info(row), row.origin)


def _cut(prompt: Prompt, template: ChatTemplate, max_tokens: int, where: Literal["left", "right", "middle"]) -> Prompt:
    """Return a prompt without the tokens that are too many, and the text that is left."""
    num_first = {"left": 0, "right": max_tokens, "middle": max_tokens // 2}[where]
    first = prompt.token_ids[:num_first]
    kept = (*first, *prompt.token_ids[len(prompt.token_ids) - (max_tokens - num_first) :])
    return replace(prompt, token_ids=kept, text=template.tokenizer.decode(list(kept)))


def _data_source(row: Row) -> str:
    value = row.values["data_source"]
    if not isinstance(value, str) or not value:
        raise row.error(f"data_source is {value!r}; allowed: the name of the data set, which selects its reward")
    return value


def _ground_truth(row: Row) -> str:
    reward_model = row.values["reward_model"]
    if not isinstance(reward_model, Mapping) or "ground_truth" not in reward_model:
        raise row.error(f"reward_model is {reward_model!r}; allowed: a struct with ground_truth")
    value = reward_model["ground_truth"]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise row.error(f"reward_model.ground_truth is {value!r}; allowed: a string or a number")
    return _number_text(row, value) if isinstance(value, float) else str(value)


def _number_text(row: Row, value: float) -> str:
    """Return a float as a person writes it: 18, not 18.0, which is all that pandas has for a column with nulls."""
    if not math.isfinite(value):
        raise row.error(f"reward_model.ground_truth is {value!r}; allowed: a string or a finite number")
    return str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")


def _extra_info(row: Row) -> Mapping[str, object]:
    value = row.values["extra_info"]
    if value is not None and not isinstance(value, Mapping):
        raise row.error(f"extra_info is {value!r}; allowed: a struct, or no such column")
    return dict(value or {})


def _overlong_text(num_tokens: int, max_prompt_length: int) -> str:
    return (
        f"the prompt has {num_tokens} tokens; data.max_prompt_length = {max_prompt_length}. "
        f"fix: raise data.max_prompt_length, or data.overlong_prompts=filter, left, right or middle"
    )


def _nothing_left_text(files: Sequence[str], num_overlong: int, max_prompt_length: int) -> str:
    names = ", ".join(files)
    if num_overlong:
        return (
            f"no prompt is left of {names}: all {num_overlong} are longer than "
            f"data.max_prompt_length = {max_prompt_length} tokens. fix: raise it"
        )
    return f"no prompt in {names}: every file has 0 rows"
