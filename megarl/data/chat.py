"""From chat messages to token ids: the prompt of a rollout, the example of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megarl.data.messages import Message
from megarl.errors import DataError, ModelFolderError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face folder or name.

    Raises ModelFolderError if it can't be loaded or has no chat template.
    """
    # Importing transformers takes seconds, which a command that only prints an error should not cost.
    from transformers import AutoTokenizer

    path = Path(folder).expanduser()
    # Without this check a mistyped folder is looked up on the network, and the error tells of that.
    if folder.startswith(("/", ".", "~")) and not path.is_dir():
        raise ModelFolderError(f"{folder} is not a folder. fix: correct the path of the model")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path) if path.is_dir() else folder, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises plain Exception for a damaged tokenizer.json
        raise ModelFolderError(f"no tokenizer can be loaded from {folder}: {type(error).__name__}: {error}") from error
    if not tokenizer.chat_template:
        raise ModelFolderError(
            f"the tokenizer of {folder} has no chat template. fix: use an instruct model, or add chat_template.jinja"
        )
    return tokenizer


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[str, tuple[int, ...]]:
    """Render messages up to where the assistant speaks. Return the text and its token ids."""
    text = _render(tokenizer, messages, add_generation_prompt=True)
    return text, _token_ids(tokenizer, text)


def encode_example(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Render a whole conversation. Return its token ids, and a mask that is True on what the assistant says.

    A response begins where the prompt before it ends, so training and generation see the same tokens, and ends with
    its end-of-turn token. Raises DataError if no message is the assistant's, or if the template renders the beginning
    of a conversation differently once it goes on: then no token could be said to belong to a response.
    """
    token_ids = _token_ids(tokenizer, _render(tokenizer, messages, add_generation_prompt=False))
    mask = [False] * len(token_ids)
    special = frozenset(tokenizer.all_special_ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = _response_span(tokenizer, messages, turn, token_ids, special)
            mask[start:end] = [True] * (end - start)
    if not any(mask):
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"no message is the assistant's, so there is nothing to train on. roles: {roles}")
    return token_ids, tuple(mask)


def _response_span(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    turn: int,
    token_ids: tuple[int, ...],
    special: frozenset[int],
) -> tuple[int, int]:
    """Return where the response of a turn starts, and where it ends: after its last special token.

    Many templates add a line break after the end-of-turn token. The model stops before it, so it is not trained on.
    """
    _, before = encode_prompt(tokenizer, messages[:turn])
    after = token_ids
    if turn + 1 < len(messages):
        after = _token_ids(tokenizer, _render(tokenizer, messages[: turn + 1], add_generation_prompt=False))
    if token_ids[: len(before)] != before or token_ids[: len(after)] != after:
        raise DataError(
            f"the chat template is not prefix-stable: the tokens up to message {turn} change when later messages "
            f"follow. fix: split the conversation so that each example ends with its only assistant message, or use "
            f"a template that renders a message the same wherever it stands"
        )
    ends = [place for place in range(len(before), len(after)) if after[place] in special]
    if not ends:
        raise DataError(
            f"the chat template puts no special token after message {turn}, so the model would never learn to stop. "
            f"fix: end assistant messages with the end-of-turn token in the chat template"
        )
    return len(before), ends[-1] + 1


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise DataError(f"the chat template refuses these messages: {error}") from error
    return str(text)


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    # The template has written the special tokens already.
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
