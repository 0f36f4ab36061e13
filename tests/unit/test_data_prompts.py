from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from megarl.data.prompts import Overlong, PromptSet, load_prompts
from megarl.data.template import ChatTemplate
from megarl.data.verbs import verbs_tokenizer
from megarl.errors import DataError

SHORT, LONG = "Tom has 8 apples", "Tom has 8 apples and loses 3. How many?"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return verbs_tokenizer()


def row(prompt: object = SHORT, **changes: object) -> dict[str, object]:
    standard = {"prompt": prompt, "data_source": "verbs", "reward_model": {"style": "rule", "ground_truth": "5"}}
    return {name: value for name, value in (standard | changes).items() if value is not ...}


def load(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *rows: dict[str, object],
    max_prompt_length: int = 16,
    overlong: Overlong = "filter",
) -> PromptSet:
    path = folder / "train.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return load_prompts(
        [str(path)],
        ChatTemplate(tokenizer),
        prompt_key="prompt",
        max_prompt_length=max_prompt_length,
        overlong=overlong,
    )


def test_a_prompt_carries_its_tokens_and_what_its_reward_needs(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    loaded = load(tmp_path, tokenizer, row([{"role": "user", "content": SHORT}], extra_info={"index": 3}))
    (prompt,) = loaded.prompts
    assert prompt.text == f"<|user|> {SHORT} <|assistant|>"
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    assert (prompt.uid, prompt.data_source, prompt.ground_truth) == ("0:0", "verbs", "5")
    assert prompt.origin == f"{tmp_path}/train.parquet:0"
    assert prompt.extra_info == {"index": 3}


def test_a_string_and_one_user_message_are_the_same_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    of_text = load(tmp_path, tokenizer, row(SHORT)).prompts[0]
    of_messages = load(tmp_path, tokenizer, row([{"role": "user", "content": SHORT}])).prompts[0]
    assert of_text == of_messages


def test_several_files_are_merged_in_order(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    files = []
    for name, verb in (("a", "wins"), ("b", "drops")):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist([row(f"Tom {verb} 1"), row(f"Tom {verb} 2")]), path)
        files.append(str(path))
    loaded = load_prompts(files, ChatTemplate(tokenizer), prompt_key="prompt", max_prompt_length=16, overlong="error")
    assert [p.uid for p in loaded.prompts] == ["0:0", "0:1", "1:0", "1:1"]
    assert loaded.file_sizes == (2, 2)
    assert [p.text.split()[2] for p in loaded.prompts] == ["wins", "wins", "drops", "drops"]


def test_another_column_can_hold_the_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist([row(..., question=SHORT)]), path)
    loaded = load_prompts(
        [str(path)], ChatTemplate(tokenizer), prompt_key="question", max_prompt_length=16, overlong="error"
    )
    assert SHORT in loaded.prompts[0].text


def test_overlong_prompts_are_left_out_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = load(tmp_path, tokenizer, row(LONG), row(SHORT), row(LONG), max_prompt_length=12)
    assert (len(loaded.prompts), loaded.num_overlong) == (1, 2)
    assert loaded.prompts[0].uid.endswith(":1")


def test_a_prompt_of_exactly_the_limit_is_kept(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = load(tmp_path, tokenizer, row(LONG), max_prompt_length=13)
    assert (len(loaded.prompts[0].token_ids), loaded.num_overlong) == (13, 0)


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ("left", "3 . How many ? <|assistant|>"),
        ("right", "<|user|> Tom has 8 apples and"),
        ("middle", "<|user|> Tom has many ? <|assistant|>"),
    ],
)
def test_an_overlong_prompt_can_be_cut_and_is_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, where: Overlong, left: str
) -> None:
    loaded = load(tmp_path, tokenizer, row(LONG), row("Tom"), max_prompt_length=6, overlong=where)
    cut, whole = loaded.prompts
    assert (len(cut.token_ids), cut.text, loaded.num_overlong) == (6, left, 1)
    assert tokenizer.decode(cut.token_ids) == left
    assert whole.text == "<|user|> Tom <|assistant|>"


def test_a_prompt_of_several_turns_as_json_text_is_the_chat_it_says(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    messages = [{"role": "user", "content": "Tom"}, {"role": "assistant", "content": "8"}]
    messages += [{"role": "user", "content": "Ana"}]
    loaded = load(tmp_path, tokenizer, row(json.dumps(messages)))
    assert loaded.prompts[0].text == "<|user|> Tom <|assistant|> 8 <|end|> <|user|> Ana <|assistant|>"


def test_what_the_template_refuses_is_found_by_its_row(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    calls = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]
    with pytest.raises(DataError, match=r"train\.parquet, row group 0, row 1: the last message calls a tool"):
        load(tmp_path, tokenizer, row([calls[0]]), row(calls))


def test_a_column_of_tools_is_rendered_or_refused(tmp_path: Path) -> None:
    tokenizer = verbs_tokenizer()
    tools = [{"type": "function", "function": {"name": "wins"}}]
    with pytest.raises(DataError, match="row 0: the chat template leaves out the tool 'wins'"):
        load(tmp_path, tokenizer, row(tools=tools))
    tokenizer.chat_template = "{% for t in tools %}{{ t.function.name }} {% endfor %}" + tokenizer.chat_template
    assert load(tmp_path, tokenizer, row(tools=tools)).prompts[0].text == f"wins <|user|> {SHORT} <|assistant|>"


def test_an_overlong_prompt_is_an_error_if_that_was_asked_for(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match=r"row 1: the prompt has 13 tokens; data\.max_prompt_length = 12"):
        load(tmp_path, tokenizer, row(SHORT), row(LONG), max_prompt_length=12, overlong="error")


def test_a_filter_that_leaves_nothing_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"no prompt is left .* all 2 are longer than data\.max_prompt_length = 5"):
        load(tmp_path, tokenizer, row(), row(LONG), max_prompt_length=5)


def test_files_without_rows_are_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist([row()]).slice(0, 0), path)
    with pytest.raises(DataError, match="0 rows"):
        load_prompts([str(path)], ChatTemplate(tokenizer), prompt_key="prompt", max_prompt_length=16, overlong="filter")


def test_a_number_may_be_the_ground_truth(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert load(tmp_path, tokenizer, row(reward_model={"ground_truth": 5})).prompts[0].ground_truth == "5"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data_source": ...}, "no column 'data_source'"),
        ({"reward_model": ...}, "no column 'reward_model'"),
        ({"data_source": None}, "row 0: data_source is None"),
        ({"data_source": ""}, "row 0: data_source is ''"),
        ({"reward_model": None}, "row 0: reward_model is None"),
        ({"reward_model": {"style": "rule"}}, "a struct with ground_truth"),
        ({"reward_model": {"ground_truth": None}}, "ground_truth is None; allowed: a string or a number"),
        ({"reward_model": {"ground_truth": ["5"]}}, "ground_truth is ['5']; allowed: a string or a number"),
        ({"extra_info": "x"}, "extra_info is 'x'"),
    ],
)
def test_a_row_without_what_its_reward_needs_says_so(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, tokenizer, row(**changes))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("value", "text"), [(18.0, "18"), (-3.0, "-3"), (2.5, "2.5"), (1e22, "1" + "0" * 22), (1e-7, "0.0000001")]
)
def test_a_float_is_a_ground_truth_as_a_person_writes_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, value: float, text: str
) -> None:
    assert load(tmp_path, tokenizer, row(reward_model={"ground_truth": value})).prompts[0].ground_truth == text


def test_a_ground_truth_that_is_not_finite_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="ground_truth is nan; allowed: a string or a finite number"):
        load(tmp_path, tokenizer, row(reward_model={"ground_truth": float("nan")}))
