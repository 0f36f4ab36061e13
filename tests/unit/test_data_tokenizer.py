from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megarl.data.template import ChatTemplate
from megarl.data.tiny_qwen3 import tiny_qwen3
from megarl.data.tokenizer import load_tokenizer, stop_token_ids
from megarl.data.verbs import verbs_tokenizer
from megarl.data.write import write_fresh_model
from megarl.errors import ModelFolderError
from tests.unit.chats import CHATML, chat, user


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return verbs_tokenizer()


def test_a_tokenizer_survives_its_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    write_fresh_model(tmp_path, tokenizer, tiny_qwen3(tokenizer, max_position_embeddings=128))
    loaded, asked = load_tokenizer(str(tmp_path)), chat(user("Tom has 8"))
    assert ChatTemplate(loaded).prompt(asked) == ChatTemplate(tokenizer).prompt(asked)
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 4)


def test_a_mistyped_folder_is_not_looked_up_on_the_network(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"none is not a folder\. fix: correct the path of the model"):
        load_tokenizer(str(tmp_path / "none"))


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=f"no tokenizer can be loaded from {tmp_path}"):
        load_tokenizer(str(tmp_path))


def test_a_damaged_tokenizer_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ModelFolderError, match=f"no tokenizer can be loaded from {tmp_path}"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelFolderError, match="no chat template"):
        load_tokenizer(str(tmp_path))


def _single_digits(folder: Path) -> Path:
    """Write a model whose tokenizer.json takes digits one by one, and whose vocabulary has 202 too."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        word: i for i, word in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *words, "20", "202"])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [("2", "0"), ("20", "2")]))
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "unk_token": "<|endoftext|>"}
    built = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML, **special)
    write_fresh_model(folder, built, tiny_qwen3(built, max_position_embeddings=128))
    return folder


def _set_class(folder: Path, name: str) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": name}))


def test_a_class_that_splits_otherwise_than_the_file_is_refused_with_a_cure_that_works(tmp_path: Path) -> None:
    folder = _single_digits(tmp_path)
    right = load_tokenizer(str(folder)).tokenize("2023")
    assert right == ["2", "0", "2", "3"]
    _set_class(folder, "GPT2Tokenizer")
    with pytest.raises(ModelFolderError) as caught:
        load_tokenizer(str(folder))
    for part in ("tokenizer.json splits '2023 12345678 3.14159'", "(GPT2Tokenizer)", "'202'", '"TokenizersBackend"'):
        assert part in str(caught.value)
    _set_class(folder, "TokenizersBackend")
    assert load_tokenizer(str(folder)).tokenize("2023") == right


def test_a_token_of_the_template_that_the_file_lacks_is_found(tmp_path: Path) -> None:
    folder = _single_digits(tmp_path)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|im_start|>"]
    file.write_text(json.dumps(content))
    with pytest.raises(ModelFolderError, match=r"splits '<\|im_start\|>user"):
        load_tokenizer(str(folder))


def test_a_length_that_a_tokenizer_file_cuts_or_fills_to_does_not_count(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.save_pretrained(tmp_path)
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    own.enable_truncation(2)
    own.enable_padding(length=9)
    own.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).eos_token_id == 4


@pytest.mark.parametrize(
    ("files", "stops"),
    [
        ({}, (4,)),
        ({"generation_config.json": {"eos_token_id": 7}}, (4, 7)),
        ({"generation_config.json": {"eos_token_id": [7, 4, 9]}}, (4, 7, 9)),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 7}}, (4,)),
        ({"config.json": {"eos_token_id": [7]}}, (4, 7)),
        ({"config.json": {"eos_token_id": None}}, (4,)),
    ],
)
def test_a_response_stops_at_the_ends_that_folder_and_tokenizer_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, files: dict[str, object], stops: tuple[int, ...]
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert stop_token_ids(str(tmp_path), tokenizer) == stops


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1.5]}'])
def test_ends_that_are_no_numbers_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ModelFolderError, match=r"generation_config\.json"):
        stop_token_ids(str(tmp_path), tokenizer)
