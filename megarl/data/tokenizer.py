"""The tokenizer of a model's folder: loaded, compared with the folder's own file; and what ends a response."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.data.messages import Chat
from megarl.data.template import ChatTemplate
from megarl.errors import DataError, ModelFolderError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# What tokenizers of one family split differently: digits, runs of spaces, words at the start, other scripts.
_PROBES = (
    "2023 12345678 3.14159",
    "a b  c   d    e\n\n\tf \n",
    " leading, trailing ",
    "It's DON'T we'll",
    "Gr\u00fc\u00dfe, na\u00efve caf\u00e9 e\u0301",
    "\u4f60\u597d\uff0c\u4e16\u754c \u043f\u0440\u0438\u0432\u0435\u0442 \U0001f642\U0001f44d\U0001f3fd",
    "def f(x):\n    return x**2  # x_1 != <y>",
)
_PROBE_CHAT = Chat(({"role": "user", "content": "How many are 17 + 25?"},))


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face folder or name.

    Raises ModelFolderError if it can't be loaded, has no chat template, or gives other tokens than its tokenizer.json.
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
    if (path / "tokenizer.json").is_file():
        _require_the_files_tokens(tokenizer, path / "tokenizer.json")
    return tokenizer


def stop_token_ids(folder: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens at which an engine ends a response by itself.

    They are eos_token_id of generation_config.json, of config.json where that file is missing, and the tokenizer's.
    Raises ModelFolderError where they are no numbers.
    """
    file = next((f for n in _ENDS if (f := Path(folder).expanduser() / n).is_file()), None)
    found: Any = [] if file is None else _eos_token_id(file)
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return tuple(dict.fromkeys((*own, *found)))


_ENDS = ("generation_config.json", "config.json")


def _eos_token_id(file: Path) -> list[int]:
    try:
        value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelFolderError(f"{file} is truncated or no JSON object; copy it from the base model") from error
    numbers = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(number) is int for number in numbers):
        raise ModelFolderError(f"{file}: eos_token_id = {value!r}: allowed: a token's number, a list of them, or null")
    return numbers


def _require_the_files_tokens(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Raise ModelFolderError where a tokenizer's tokens differ from those of its file: another class was built."""
    from tokenizers import Tokenizer

    of_file = Tokenizer.from_file(str(file))
    of_file.no_truncation()
    of_file.no_padding()
    for text in _probes(tokenizer):
        loaded = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        meant = of_file.encode(text, add_special_tokens=False).ids
        if loaded == meant:
            continue
        first = next((i for i, pair in enumerate(zip(loaded, meant, strict=False)) if pair[0] != pair[1]), None)
        start = min(len(loaded), len(meant)) if first is None else first
        raise ModelFolderError(
            f"{file} splits {text!r} otherwise than what transformers makes of the folder "
            f"({type(tokenizer).__name__}): from token {start} on the file has {_named(of_file, meant[start:])}, "
            f"transformers {_named(of_file, loaded[start:])}. "
            f'fix: "tokenizer_class": "TokenizersBackend" in tokenizer_config.json, which takes the file as it is'
        )


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield texts to compare on, among them a rendered chat unless the template refuses it."""
    yield from _PROBES
    try:
        yield ChatTemplate(tokenizer).rendered(_PROBE_CHAT, add_generation_prompt=True)
    except DataError:
        return  # rows of the data will say why


def _named(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the first of some tokens in words."""
    shown = ", ".join(f"{i} {tokenizer.id_to_token(i)!r}" for i in ids[:4])
    return f"{shown}{', ...' if len(ids) > 4 else ''}" or "no more"
