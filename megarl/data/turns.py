"""Which tokens of a conversation are trained: the turns of the assistant, from the prompt before them to their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megarl.data.messages import Chat
from megarl.data.template import ChatTemplate, require_all
from megarl.errors import DataError

TokenIds = tuple[int, ...]
_SHOWN = 60  # characters of a text in an error


@dataclass(frozen=True)
class Masking:
    """What is trained of a conversation.

    turns: all of the assistant's, or the last. start: of a turn, where the prompt of a rollout ends (``prompt``), or
    where the template's rendering of the turn leaves that prompt (``rendering``). stops: tokens that end a response.
    """

    turns: Literal["all", "last"] = "all"
    start: Literal["prompt", "rendering"] = "prompt"
    stops: tuple[int, ...] = ()


def encode_example(template: ChatTemplate, chat: Chat, masking: Masking) -> tuple[TokenIds, tuple[bool, ...]]:
    """Render a whole conversation. Return its token ids, and a mask that is True on what is trained.

    A turn ends with its end-of-turn token. Raises DataError if no message is the assistant's, and where the template
    renders a turn so that no token can be said to begin or to end it, with the choice that would help.
    """
    try:
        return _encoded(template, chat, masking)
    except _AmbiguousTurn as error:
        raise DataError(f"{error}. fix: {_cure(template, chat, masking)}") from error


class _AmbiguousTurn(DataError):
    """A turn that the template renders in more than one way."""


def _cure(template: ChatTemplate, chat: Chat, masking: Masking) -> str:
    """Return the settings with which the conversation can be trained, or what else to do."""
    cures: dict[str, int] = {}
    for turns, start in _CHOICES:
        try:
            _encoded(template, chat, replace(masking, turns=turns, start=start))
        except DataError:
            continue
        keys = {"data.trained_turns": (turns, masking.turns), "data.response_start": (start, masking.start)}
        changes = [f"{key}={value}" for key, (value, now) in keys.items() if value != now]
        what = "the last turn alone" if turns == "last" else "every turn"
        how = " as the template renders it" if start == "rendering" else ""
        cures[f"{' '.join(changes)} trains {what}{how}"] = len(changes)
    simplest = [cure for cure, num_changes in cures.items() if num_changes == min(cures.values())]
    return " or ".join(simplest) or (
        "end the conversation with the assistant's message, or use a template that renders it the same everywhere"
    )


_CHOICES: tuple[tuple[Literal["all", "last"], Literal["prompt", "rendering"]], ...] = (
    ("last", "prompt"),
    ("all", "rendering"),
    ("last", "rendering"),
)


def _encoded(template: ChatTemplate, chat: Chat, masking: Masking) -> tuple[TokenIds, tuple[bool, ...]]:
    turns = [turn for turn, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if not turns:
        roles = ", ".join(message["role"] for message in chat.messages)
        raise DataError(f"no message is the assistant's, so there is nothing to train on. roles: {roles}")
    turns = turns[-1:] if masking.turns == "last" else turns
    text = template.rendered(chat)
    require_all(text, chat, turns)
    token_ids = template.token_ids(text)
    mask = [False] * len(token_ids)
    for turn in turns:
        start = _start(template, chat, turn, text, token_ids, masking)
        end = _end(template, chat, turn, start, token_ids, masking)
        mask[start:end] = [True] * (end - start)
    return token_ids, tuple(mask)


def end_of_turn(template: ChatTemplate, stops: tuple[int, ...]) -> int:
    """Return the token with which the template ends a turn of the assistant, of several one of ``stops``.

    Raises DataError where there is none, or the template refuses a chat of two messages.
    """
    chat = Chat(({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}))
    token_ids, mask = encode_example(template, chat, Masking("last", "rendering", stops))
    return [token for token, is_trained in zip(token_ids, mask, strict=True) if is_trained][-1]


def _start(template: ChatTemplate, chat: Chat, turn: int, text: str, token_ids: TokenIds, masking: Masking) -> int:
    """Return the index of the first token of a turn's response."""
    if turn == 0:
        raise DataError("message 0 is the assistant's: no prompt comes before it. fix: begin with the user's message")
    prompt = template.rendered(chat.before(turn), add_generation_prompt=True)
    before = template.token_ids(prompt)
    shared = _num_shared(before, token_ids)
    if shared == len(before):
        return shared
    if masking.start == "rendering":
        # What the prompt has besides the messages is its last words alone: the opening of the assistant's turn.
        closed = template.token_ids(template.rendered(chat.before(turn)))
        if shared >= _num_shared(before, closed):
            return shared
    if text.startswith(prompt):
        raise DataError(
            f"the first characters of message {turn} and the last of the prompt before it are one token, which no "
            "rollout would see. fix: take the spaces and line breaks from the start of the message"
        )
    raise _AmbiguousTurn(
        f"the prompt that a rollout would see before message {turn} is not the beginning of the rendered conversation: "
        f"{_parting(template, before, token_ids, shared, ('the prompt', 'the conversation'))}"
    )


def _end(template: ChatTemplate, chat: Chat, turn: int, start: int, token_ids: TokenIds, masking: Masking) -> int:
    """Return the index behind a turn's response, which the token that ends the turn closes."""
    special = template.special_ids | frozenset(masking.stops)
    if turn + 1 == len(chat.messages):
        return _closing(template, token_ids, start, turn, special, masking)[0] + 1
    alone = template.token_ids(template.rendered(chat.before(turn + 1)))
    until = _num_shared(alone, token_ids)
    if until > start and all(_is_closing(template, token, special) for token in alone[until:]):
        return _closing(template, token_ids[:until], start, turn, special, masking)[0] + 1
    if masking.start == "rendering":
        # The turn is another one alone, but ends with the same token, before the next message's text.
        until = _num_shared(template.token_ids(template.rendered(_with_other_text(chat, turn + 1))), token_ids)
        for place in _closing(template, alone, start, turn, special, masking):
            if alone[place] in token_ids[start:until]:
                return token_ids.index(alone[place], start) + 1
    raise _AmbiguousTurn(
        f"the chat template renders message {turn} otherwise once others follow: "
        f"{_parting(template, alone, token_ids, until, ('alone', 'in the conversation'))}"
    )


def _closing(
    template: ChatTemplate, token_ids: TokenIds, start: int, turn: int, special: frozenset[int], masking: Masking
) -> list[int]:
    """Return where special tokens close a turn, which begins at ``start`` and ends with ``token_ids``: the best first.

    Many templates write more behind the end of a turn: a line break, or the end of the text. The first token that stops
    a response is the best end, where none does the last special one.
    """
    ends = [place for place in range(start, len(token_ids)) if token_ids[place] in special]
    if not ends:
        raise DataError(
            f"the chat template puts no special token after message {turn}, so the model would never learn to stop. "
            f"fix: end assistant messages with the end-of-turn token in the chat template"
        )
    first = ends[-1]
    while first > start and _is_closing(template, token_ids[first - 1], special):
        first -= 1
    stopping = [place for place in ends if place >= first and token_ids[place] in masking.stops]
    return [*stopping, *(place for place in reversed(ends) if place >= first and place not in stopping)]


def _with_other_text(chat: Chat, number: int) -> Chat:
    """Return the chat with another beginning of the text of a message."""
    message = chat.messages[number]
    other = {**message, "content": "\u2042" + message.get("content", "")}
    return replace(chat, messages=(*chat.messages[:number], other, *chat.messages[number + 1 :]))


def _is_closing(template: ChatTemplate, token: int, special: frozenset[int]) -> bool:
    return token in special or not template.tokenizer.decode([token]).strip()


def _num_shared(a: TokenIds, b: TokenIds) -> int:
    """Return the number of tokens that two sequences have in common at their start."""
    return next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))


def _parting(template: ChatTemplate, a: Sequence[int], b: Sequence[int], place: int, names: tuple[str, str]) -> str:
    """Return in words where two sequences part, with a little of what they share."""
    texts = (template.tokenizer.decode(list(ids[max(0, place - 4) : place + 12]))[:_SHOWN] for ids in (a, b))
    return ", ".join(f"{name} {text!r}" for name, text in zip(names, texts, strict=True))
