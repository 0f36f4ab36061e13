from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from megarl.data.sft import SFTExample, load_sft_examples
from megarl.data.template import ChatTemplate
from megarl.data.turns import Masking
from megarl.data.verbs import verbs_tokenizer
from megarl.errors import DataError
from tests.unit.chats import assistant, chatml_tokenizer, tool_calls, user


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return verbs_tokenizer()


def write(path: Path, *conversations: list[str] | None) -> str:
    """Write conversations in which the user and the assistant take turns."""
    roles = ("user", "assistant")
    rows = [
        {"messages": None if c is None else [{"role": roles[i % 2], "content": text} for i, text in enumerate(c)]}
        for c in conversations
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_examples_carry_the_whole_conversation_and_what_to_train_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file = write(tmp_path / "sft.parquet", ["Tom has 8", "5"], ["Ana", "6", "Sam", "7"])
    first, second = load_sft_examples(
        [file], ChatTemplate(tokenizer), Masking(), messages_key="messages", max_length=16, overlong="error"
    )
    assert tokenizer.decode(first.token_ids) == "<|user|> Tom has 8 <|assistant|> 5 <|end|>"
    assert first.loss_mask == (False,) * 5 + (True,) * 2
    assert second.loss_mask == (False,) * 3 + (True,) * 2 + (False,) * 3 + (True,) * 2


def test_overlong_conversations_are_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "sft.parquet", ["Tom has 8", "5"], ["Ana", "6"])
    examples = load_sft_examples(
        [file], ChatTemplate(tokenizer), Masking(), messages_key="messages", max_length=6, overlong="filter"
    )
    assert [tokenizer.decode(example.token_ids) for example in examples] == ["<|user|> Ana <|assistant|> 6 <|end|>"]


def test_an_overlong_conversation_is_an_error_if_that_was_asked_for(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file = write(tmp_path / "sft.parquet", ["Tom has 8", "5"])
    with pytest.raises(DataError, match=r"row 0: the conversation has 7 tokens; data\.max_length = 6"):
        load_sft_examples(
            [file], ChatTemplate(tokenizer), Masking(), messages_key="messages", max_length=6, overlong="error"
        )


def test_a_filter_that_leaves_nothing_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "sft.parquet", ["Tom has 8", "5"])
    with pytest.raises(DataError, match=r"no example .* at most data\.max_length = 6"):
        load_sft_examples(
            [file], ChatTemplate(tokenizer), Masking(), messages_key="messages", max_length=6, overlong="filter"
        )


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (None, "row 1: messages is null"),
        ([], "row 1: messages is an empty list"),
        (["Tom"], "row 1: no message is the assistant's"),
        (["Tom", ""], "row 1: content of message 1 of messages is empty"),
    ],
)
def test_an_example_that_is_none_is_found_by_its_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, second: list[str] | None, reason: str
) -> None:
    file = write(tmp_path / "sft.parquet", ["Tom has 8", "5"], second)
    with pytest.raises(DataError, match=reason):
        load_sft_examples(
            [file], ChatTemplate(tokenizer), Masking(), messages_key="messages", max_length=16, overlong="error"
        )


def test_a_missing_column_names_its_key(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "sft.parquet", ["Tom has 8", "5"])
    with pytest.raises(DataError, match=r"no column 'message' \(data\.messages_key = 'message'\)"):
        load_sft_examples(
            [file], ChatTemplate(tokenizer), Masking(), messages_key="message", max_length=16, overlong="error"
        )


def test_an_example_knows_how_its_turns_end() -> None:
    mask = (False, True, True, False, True, False)
    assert SFTExample((9, 1, 2, 9, 3, 9), mask).ends == {2, 3}
    assert SFTExample((9, 1, 2), (False, True, True)).ends == {2}


def test_a_tool_call_is_trained_with_the_arguments_it_has_alone(tmp_path: Path) -> None:
    answer = {"role": "tool", "content": "b"}
    rows: list[dict[str, object]] = [
        {"messages": [user("a"), tool_calls(look_up={"q": "a"}), answer, assistant("b")]},
        {"messages": [user("a"), tool_calls(order={"sku": 7, "of": {"size": 1}}), answer, assistant("c")]},
    ]
    file = str(tmp_path / "sft.parquet")
    pq.write_table(pa.Table.from_pylist(rows), file)
    tokenizer = chatml_tokenizer()
    examples = load_sft_examples(
        [file], ChatTemplate(tokenizer), Masking(), messages_key="messages", max_length=999, overlong="error"
    )
    texts = [tokenizer.decode([t for t, m in zip(e.token_ids, e.loss_mask, strict=True) if m]) for e in examples]
    assert texts == [
        '<tool_call>{"name": "look_up", "arguments": {"q": "a"}}</tool_call><|im_end|>b<|im_end|>',
        '<tool_call>{"name": "order", "arguments": {"sku": 7, "of": {"size": 1}}}</tool_call><|im_end|>c<|im_end|>',
    ]
