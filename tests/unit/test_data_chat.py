from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from megarl.data.chat import encode_example, encode_prompt, load_tokenizer
from megarl.data.tiny_qwen3 import tiny_qwen3
from megarl.data.verbs import verbs_tokenizer
from megarl.data.write import write_fresh_model
from megarl.errors import DataError, ModelFolderError


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return verbs_tokenizer()


def trained_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    token_ids, mask = encode_example(tokenizer, messages)
    assert len(token_ids) == len(mask)
    return tokenizer.decode([token for token, trained in zip(token_ids, mask, strict=True) if trained])


def test_a_prompt_ends_where_the_assistant_speaks(tokenizer: PreTrainedTokenizerBase) -> None:
    text, token_ids = encode_prompt(tokenizer, [user("Tom has 8")])
    assert text == "<|user|> Tom has 8 <|assistant|>"
    assert tokenizer.convert_ids_to_tokens(list(token_ids)) == ["<|user|>", "Tom", "has", "8", "<|assistant|>"]


def test_only_the_response_and_its_end_are_trained_on(tokenizer: PreTrainedTokenizerBase) -> None:
    assert trained_text(tokenizer, [user("Tom has 8"), assistant("8 - 3 = 5")]) == "8 - 3 = 5 <|end|>"


def test_every_response_of_a_conversation_is_trained_on(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [user("Tom"), assistant("8"), user("Ana"), assistant("9"), user("Sam")]
    assert trained_text(tokenizer, messages) == "8 <|end|> 9 <|end|>"


def test_what_is_trained_on_begins_where_a_rollout_would(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [user("Tom has 8"), assistant("5")]
    token_ids, mask = encode_example(tokenizer, messages)
    assert token_ids[: mask.index(True)] == encode_prompt(tokenizer, messages[:1])[1]


def test_what_a_template_writes_after_the_end_of_a_turn_is_not_trained_on(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> and {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    token_ids, mask = encode_example(tokenizer, [user("Tom"), assistant("8")])
    assert tokenizer.decode(token_ids) == "<|user|> Tom <|end|> and <|assistant|> 8 <|end|> and"
    assert [i for i, trained in enumerate(mask) if trained] == [5, 6]


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|> {% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}"
        " <|end|> {% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert trained_text(tokenizer, [user("Tom"), assistant("8")]) == "8 <|end|>"
    with pytest.raises(DataError, match="not prefix-stable"):
        encode_example(tokenizer, [user("Tom"), assistant("8"), user("Ana"), assistant("9")])


def test_a_template_whose_prompt_is_no_beginning_of_the_conversation_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} <|end|> {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(DataError, match="not prefix-stable"):
        encode_example(tokenizer, [user("Tom"), assistant("8")])


def test_a_template_that_never_ends_a_response_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(DataError, match="never learn to stop"):
        encode_example(tokenizer, [user("Tom"), assistant("8")])


def test_a_conversation_without_the_assistant_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"nothing to train on\. roles: user, user"):
        encode_example(tokenizer, [user("Tom"), user("Ana")])


def test_what_a_template_objects_to_is_passed_on(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        encode_prompt(tokenizer, [user("Tom")])


def test_a_tokenizer_survives_its_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    write_fresh_model(tmp_path, tokenizer, tiny_qwen3(tokenizer, max_position_embeddings=128))
    loaded = load_tokenizer(str(tmp_path))
    messages = [user("Tom has 8"), assistant("5 #### 5")]
    assert encode_example(loaded, messages) == encode_example(tokenizer, messages)
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
