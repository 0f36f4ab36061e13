"""Examples for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megarl.data.chat import encode_example
from megarl.data.messages import row_messages
from megarl.data.parquet import Row, read_rows
from megarl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SFTExample:
    """A tokenized conversation. loss_mask: True on the tokens of the assistant, end-of-turn token included."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


def load_sft_examples(
    files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    messages_key: str,
    max_length: int,
    overlong: Literal["filter", "error"],
) -> tuple[SFTExample, ...]:
    """Read, check and tokenize the conversations of several parquet files, in file order.

    max_length: in tokens, template included. A longer conversation is left out (``filter``) or is an error: cut off,
    it would lack the end-of-turn token. Raises DataError on any row that can't be used, and if no example is left.
    """
    examples = []
    for row in read_rows(files, {messages_key: f"data.messages_key = {messages_key!r}"}):
        example = _example(row, tokenizer, messages_key)
        if len(example.token_ids) <= max_length:
            examples.append(example)
        elif overlong == "error":
            raise row.error(
                f"the conversation has {len(example.token_ids)} tokens; data.max_length = {max_length}. "
                f"fix: raise data.max_length, or data.overlong_examples=filter"
            )
    if not examples:
        raise DataError(f"no example of {', '.join(files)} has at most data.max_length = {max_length} tokens")
    return tuple(examples)


def _example(row: Row, tokenizer: PreTrainedTokenizerBase, messages_key: str) -> SFTExample:
    messages = row_messages(row, messages_key)
    try:
        return SFTExample(*encode_example(tokenizer, messages))
    except DataError as error:
        raise row.error(str(error)) from error
