"""Examples for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megarl.data.messages import TOOLS, row_chat
from megarl.data.parquet import Row, read_rows
from megarl.data.template import ChatTemplate
from megarl.data.turns import Masking, encode_example
from megarl.errors import DataError


@dataclass(frozen=True)
class SFTExample:
    """A tokenized conversation. loss_mask: True on the tokens of the assistant, end-of-turn token included."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    @property
    def ends(self) -> frozenset[int]:
        """The last tokens of the trained turns."""
        trained = zip(self.token_ids, self.loss_mask, (*self.loss_mask[1:], False), strict=True)
        return frozenset(token for token, is_trained, is_next in trained if is_trained and not is_next)


def load_sft_examples(
    files: Sequence[str],
    template: ChatTemplate,
    masking: Masking,
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
    for row in read_rows(files, {messages_key: f"data.messages_key = {messages_key!r}"}, optional=(TOOLS,)):
        example = _example(row, template, masking, messages_key)
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


def _example(row: Row, template: ChatTemplate, masking: Masking, messages_key: str) -> SFTExample:
    chat = row_chat(row, messages_key)
    try:
        return SFTExample(*encode_example(template, chat, masking))
    except DataError as error:
        raise row.error(str(error)) from error
