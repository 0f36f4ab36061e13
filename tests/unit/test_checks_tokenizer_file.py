from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarl.checks.tokenizer_file import differing_token
from megarl.errors import ModelFolderError

VOCABULARY = {"a": 0, "b": 1}
ADDED = [{"id": 2, "content": "<end>"}]


def _folder(parent: Path, name: str, vocabulary: Any = VOCABULARY, added: Any = ADDED) -> Path:
    folder = parent / name
    folder.mkdir()
    content = {"model": {"vocab": vocabulary}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("vocabulary", "added"),
    [
        (VOCABULARY, ADDED),
        ({"b": 1, "a": 0}, ADDED),
        (VOCABULARY | {"c": 3}, [*ADDED, {"id": 4, "content": "<pad>"}]),  # more tokens, which the actor never gives
        (VOCABULARY | {"<end>": 2}, []),
        ([["a", -1.0], ["b", -2.0]], ADDED),  # as unigram tokenizers are written
    ],
)
def test_tokens_that_mean_the_same_do_not_differ(tmp_path: Path, vocabulary: Any, added: Any) -> None:
    assert differing_token(_folder(tmp_path, "ours"), _folder(tmp_path, "other", vocabulary, added)) is None


@pytest.mark.parametrize(
    ("vocabulary", "added", "said"),
    [
        ({"b": 0, "a": 1}, ADDED, "token 0, the actor's 'a', is 'b' there"),
        ({"a": 0}, ADDED, "token 1, the actor's 'b', is none there"),
        (VOCABULARY, [{"id": 2, "content": "<stop>"}], "token 2, the actor's '<end>', is '<stop>' there"),
        (VOCABULARY, [], "token 2, the actor's '<end>', is none there"),
    ],
)
def test_the_first_token_that_means_another_thing_is_named(
    tmp_path: Path, vocabulary: Any, added: Any, said: str
) -> None:
    assert differing_token(_folder(tmp_path, "ours"), _folder(tmp_path, "other", vocabulary, added)) == said


def test_a_folder_without_a_tokenizer_is_not_compared(tmp_path: Path) -> None:
    assert differing_token(_folder(tmp_path, "ours"), tmp_path / "bare") is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"vocab": {"a": "x"}}}'])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelFolderError, match="is truncated or not a tokenizer"):
        differing_token(_folder(tmp_path, "ours"), tmp_path)
