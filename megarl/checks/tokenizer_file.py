"""Which token has which number, by the tokenizer.json of a Hugging Face folder. Standard library only."""

from __future__ import annotations

import json
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


def _tokens(file: Path) -> dict[int, str]:
    """Return the tokens of a tokenizer.json by their numbers, added ones included."""
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            tokens = {int(number): str(token) for token, number in vocabulary.items()}
        else:  # unigram: pairs of a token and its score
            tokens = {number: str(token) for number, (token, _) in enumerate(vocabulary)}
        added = content.get("added_tokens") or ()
        return tokens | {int(token["id"]): str(token["content"]) for token in added}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFolderError(f"{file} is truncated or not a tokenizer; copy it from the base model") from error
