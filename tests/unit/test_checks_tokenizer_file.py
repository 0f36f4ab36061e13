from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarl.checks.tokenizer_file import differing_token, largest_token
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


@pytest.mark.parametrize(
    ("files", "largest"),
    [
        ({}, None),
        ({"tokenizer.json": {"model": {"vocab": VOCABULARY}, "added_tokens": ADDED}}, (2, "<end>")),
        ({"tokenizer.json": {"model": {"vocab": {"z": 9, "a": 0}}}}, (9, "z")),
        ({"tokenizer.json": {"model": {"vocab": [["a", 0.0], ["b", 0.0]]}}}, (1, "b")),
        # An older vocabulary beside the one that is read counts for nothing.
        ({"tokenizer.json": {"model": {"vocab": VOCABULARY}}, "vocab.json": {"old": 7}}, (1, "b")),
        ({"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"<pad>": 5}}, (5, "<pad>")),
        (
            {
                "tokenizer.json": {"model": {"vocab": VOCABULARY}},
                "tokenizer_config.json": {"added_tokens_decoder": {"8": {"content": "<x>"}}},
            },
            (8, "<x>"),
        ),
        ({"tokenizer_config.json": {"chat_template": "x"}}, None),
    ],
)
def test_the_largest_token_is_found_in_whatever_file_names_it(
    tmp_path: Path, files: dict[str, Any], largest: tuple[int, str] | None
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    assert largest_token(tmp_path) == largest


BROKEN = ["{", "[]", "{}", '{"model": {"vocab": {"a": "x"}}}', '{"model": {"vocab": {"a": 1e999}}}', '{"a":' * 100_000]


@pytest.mark.parametrize("text", BROKEN)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelFolderError, match="is truncated or not a tokenizer"):
        differing_token(_folder(tmp_path, "ours"), tmp_path)
    with pytest.raises(ModelFolderError, match="is truncated or not a tokenizer"):
        largest_token(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", "5", '{"added_tokens_decoder": {"a": 5}, "b": "x"}'])
def test_another_file_that_is_no_tokenizer_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelFolderError, match=f"{name} is truncated or not a tokenizer"):
        largest_token(tmp_path)
