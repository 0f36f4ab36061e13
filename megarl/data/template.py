"""A model's chat template: from chats to text and token ids. It is a program, which may fail in any way."""

from __future__ import annotations

import inspect
import json
import re
import signal
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import FrameType
from typing import TYPE_CHECKING, Any

from megarl.data.messages import Chat, Message, tool_name
from megarl.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "data.apply_chat_template_kwargs"
RENDER_LIMIT_S = 2.0  # of processor time: a template takes milliseconds
_SHOWN = 60  # characters of a text in an error


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, with the arguments that a run gives it besides the chat."""

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = {"messages", *inspect.signature(self.tokenizer.apply_chat_template).parameters}
        if taken := sorted(own & self.arguments.keys()):
            allowed = "is what megarl sets itself; allowed: arguments that the chat template reads, as enable_thinking"
            raise ConfigError([Problem(f"{KEY}.{name}", self.arguments[name], allowed) for name in taken])

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokens that stand for no text."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset((*self.tokenizer.all_special_ids, *(number for number, token in added if token.special)))

    def prompt(self, chat: Chat) -> tuple[str, tuple[int, ...]]:
        """Render a chat up to where the assistant speaks; return the text and its token ids.

        A chat that ends with the assistant's words goes on behind them. Raises DataError where the template fails or
        leaves out a message.
        """
        last = chat.messages[-1]
        goes_on = last["role"] == "assistant"
        if goes_on and "tool_calls" in last:
            raise DataError("the last message calls a tool, and nobody answers it. fix: add the tool's answer")
        text = self.rendered(chat, add_generation_prompt=not goes_on, continue_final_message=goes_on)
        require_all(text, chat, {len(chat.messages) - 1})
        return text, self.token_ids(text)

    def rendered(self, chat: Chat, *, add_generation_prompt: bool = False, continue_final_message: bool = False) -> str:
        """Render a chat. Raises DataError where the template fails, or takes longer than RENDER_LIMIT_S."""
        from jinja2 import TemplateSyntaxError

        try:
            with _limited():
                text = self.tokenizer.apply_chat_template(
                    list(chat.messages),
                    tools=list(chat.tools) or None,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    **self.arguments,
                )
        except _OverTime as error:
            raise DataError(f"the chat template runs longer than {RENDER_LIMIT_S:g} s: an endless loop?") from error
        except TemplateSyntaxError as error:
            raise DataError(f"the chat template has a mistake in its line {error.lineno}: {error.message}") from error
        except Exception as error:  # whatever a program of the model's folder does
            roles = ", ".join(message["role"] for message in chat.messages)
            raise DataError(
                f"the chat template refuses these messages ({roles}): {type(error).__name__}: {error}"
            ) from error
        return str(text)

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a rendered text, special ones where the template has written them."""
        if not _is_unicode(text):
            raise DataError("the text holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def notes(self) -> tuple[str, ...]:
        """Return a note of each argument that the template doesn't mention."""
        template = self.tokenizer.chat_template or ""
        text = template if isinstance(template, str) else "\n".join(template.values())
        unread = [name for name in self.arguments if not re.search(rf"\b{re.escape(name)}\b", text)]
        return tuple(
            f"no effect in this run: {KEY}.{name}: the model's chat template doesn't read it" for name in unread
        )


def require_all(text: str, chat: Chat, turns: Collection[int]) -> None:
    """Raise DataError for a message, a call or a tool that a rendered text lacks, whatever its spaces.

    turns: the assistant's messages that must be there; templates may leave out what it thought in others.
    """
    there, wanted = _squeezed(text), Counter[str]()
    for number, message in enumerate(chat.messages):
        for part in _parts(message, message["role"] != "assistant" or number in turns):
            wanted[part] += 1
            as_json = json.dumps(part, ensure_ascii=False)[1:-1]  # as some templates write what tools answer
            if max(there.count(_squeezed(part)), there.count(_squeezed(as_json))) < wanted[part]:
                raise DataError(
                    f"the chat template leaves out message {number}, or a part of it: {_cut(part)!r} of the role "
                    f"{message['role']!r} is not in what it renders, {_cut(text)!r}. "
                    f"fix: give the message a role that the template knows, or use a template that renders it"
                )
    for tool in chat.tools:
        if _squeezed(tool_name(tool)) not in there:
            raise DataError(
                f"the chat template leaves out the tool {tool_name(tool)!r}. "
                f"fix: use a template that renders tools, or write the file without the column tools"
            )


def _parts(message: Message, with_text: bool) -> Iterator[str]:
    """Yield the texts of a message that must be found: its own, and the names of the tools that it calls."""
    if with_text and (text := message.get("content", "")).strip():
        yield text
    yield from (str(name) for call in message.get("tool_calls", ()) if (name := tool_name(call)))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _OverTime(Exception):
    """A template took too long."""


@contextmanager
def _limited() -> Iterator[None]:
    """Raise _OverTime inside after RENDER_LIMIT_S. Only the main thread can be interrupted: others have no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _stop)
    # Again and again: an exception that falls into a callback of the interpreter's is lost.
    signal.setitimer(signal.ITIMER_VIRTUAL, RENDER_LIMIT_S, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _stop(signum: int, frame: FrameType | None) -> None:
    raise _OverTime
