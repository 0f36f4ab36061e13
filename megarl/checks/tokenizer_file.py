"""Which token has which number, by the tokenizer.json of a Hugging Face folder. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarl.errors import ModelFolderError


def differing_token(folder: str | Path, other: str | Path) -> str | None:
    """Return, in words, the first token of ``folder`` that ``other`` has not or has by another number, else None.

    None also where one of them has no tokenizer.json: there is nothing to compare. Raises ModelFolderError for a file
    that is no tokenizer.
    """
    files = [Path(each).expanduser() / "tokenizer.json" for each in (folder, other)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return None
    ours, others = map(_tokens, files)
    for number, token in sorted(ours.items()):
        if others.get(number) != token:
            found = f"is {others[number]!r}" if number in others else "is none"
            return f"token {number}, the actor's {token!r}, {found} there"
    return None


def largest_token(folder: str | Path) -> tuple[int, str] | None:
    """Return the largest number of a token in a folder, and the token, else None.

    Of tokenizer.json, or vocab.json where there is none, and of tokens that were added in the other files. None where
    no file says: a SentencePiece model alone. Raises ModelFolderError for a file that is no tokenizer.
    """
    path = Path(folder).expanduser()
    tokens: dict[int, str] = {}
    for name, read in _FILES.items():
        if (path / name).is_file() and not (name == "vocab.json" and tokens):
            tokens |= read(path / name)
    return max(tokens.items()) if tokens else None


def _tokens(file: Path) -> dict[int, str]:
    """Return the tokens of a tokenizer.json by their numbers, added ones included."""
    with _named(file):
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            tokens = _by_number(vocabulary)
        else:  # unigram: pairs of a token and its score
            tokens = {number: str(token) for number, (token, _) in enumerate(vocabulary)}
        added = content.get("added_tokens") or ()
        return tokens | {int(token["id"]): str(token["content"]) for token in added}


def _numbers(file: Path) -> dict[int, str]:
    """Return the tokens of a file that says of each its number, as vocab.json and added_tokens.json do."""
    with _named(file):
        return _by_number(json.loads(file.read_text(encoding="utf-8")))


def _decoder(file: Path) -> dict[int, str]:
    """Return the added tokens that a tokenizer_config.json names."""
    with _named(file):
        added = json.loads(file.read_text(encoding="utf-8")).get("added_tokens_decoder") or {}
        return {int(number): str(token["content"]) for number, token in added.items()}


_FILES: dict[str, Callable[[Path], dict[int, str]]] = {
    "tokenizer.json": _tokens,
    "vocab.json": _numbers,
    "added_tokens.json": _numbers,
    "tokenizer_config.json": _decoder,
}


def _by_number(numbers: dict[str, Any]) -> dict[int, str]:
    return {int(number): str(token) for token, number in numbers.items()}


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Name the file in what goes wrong inside."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelFolderError(f"{file} is truncated or not a tokenizer; copy it from the base model") from error
