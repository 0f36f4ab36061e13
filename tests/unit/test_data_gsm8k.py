from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarl.data.gsm8k import INSTRUCTION, read_questions
from megarl.data.messages import Chat
from megarl.data.prepare import main
from megarl.data.prompts import load_prompts
from megarl.data.sft import load_sft_examples
from megarl.data.template import ChatTemplate
from megarl.data.tokenizer import load_tokenizer
from megarl.data.turns import Masking, encode_example

EXCERPT = Path(__file__).parents[1] / "data" / "gsm8k_excerpt.jsonl"
NUMBERS = ["72", "10", "5", "1080", "-7"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_bytes(EXCERPT.read_bytes())
    return folder


def prepare(source: Path, out: Path, *options: str) -> int:
    return main(["gsm8k", "--source", str(source), "--out", str(out), *options])


def test_ground_truths_are_the_numbers_without_commas() -> None:
    assert [question.number for question in read_questions(EXCERPT)] == NUMBERS


def test_responses_lose_the_notes_for_the_calculator_and_keep_the_answer() -> None:
    question = read_questions(EXCERPT)[0]
    assert question.response.splitlines()[0] == "Natalia sold 48/2 = 24 clips in May."
    assert question.response.endswith("#### 72")


def test_a_folder_becomes_the_files_that_a_run_reads(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(source, tmp_path / "out", "--tiny-model") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "model", "sft.parquet", "test.parquet", "train.parquet",
    ]  # fmt: skip
    assert f"wrote {tmp_path}/out/train.parquet: 5 rows" in capsys.readouterr().out
    tokenizer = load_tokenizer(str(tmp_path / "out" / "model"))
    files = [str(tmp_path / "out" / f"{split}.parquet") for split in ("train", "test")]
    prompts = load_prompts(
        files, ChatTemplate(tokenizer), prompt_key="prompt", max_prompt_length=512, overlong="error"
    ).prompts
    assert [prompt.ground_truth for prompt in prompts] == NUMBERS * 2
    assert {prompt.data_source for prompt in prompts} == {"openai/gsm8k"}
    assert [prompt.extra_info["split"] for prompt in prompts] == ["train"] * 5 + ["test"] * 5
    assert INSTRUCTION in prompts[0].text


def test_demonstrations_are_the_worked_answers(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", "--tiny-model")
    tokenizer = load_tokenizer(str(tmp_path / "out" / "model"))
    file = str(tmp_path / "out" / "sft.parquet")
    example = load_sft_examples(
        [file], ChatTemplate(tokenizer), Masking(), messages_key="messages", max_length=512, overlong="error"
    )[0]
    trained = [token for token, mask in zip(example.token_ids, example.loss_mask, strict=True) if mask]
    assert tokenizer.decode(trained) == read_questions(EXCERPT)[0].response + "<|end|>"


def test_columns_are_those_of_verl(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out")
    row = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()[1]
    published = json.loads(EXCERPT.read_text(encoding="utf-8").splitlines()[1])
    assert row == {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"{published['question']} {INSTRUCTION}"}],
        "reward_model": {"style": "rule", "ground_truth": "10"},
        "extra_info": {"split": "train", "index": 1, **published},
    }


def test_the_tiny_tokenizer_keeps_any_text_and_its_special_tokens_whole(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", "--tiny-model")
    tokenizer = load_tokenizer(str(tmp_path / "out" / "model"))
    text = "caf\u00e9 \u4e2d\u6587 $1,080\n#### 7"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    rendered, token_ids = ChatTemplate(tokenizer).prompt(Chat(({"role": "user", "content": text},)))
    assert rendered == f"<|user|>{text}<|end|><|assistant|>"
    assert [token_ids[0], token_ids[-2], token_ids[-1]] == tokenizer.convert_tokens_to_ids(
        ["<|user|>", "<|end|>", "<|assistant|>"]
    )
    messages = [{"role": role, "content": "4"} for role in ("system", "user", "assistant", "user", "assistant")]
    assert sum(encode_example(ChatTemplate(tokenizer), Chat(messages), Masking())[1]) == 4
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert (config["vocab_size"], config["architectures"]) == (len(tokenizer), ["Qwen3ForCausalLM"])
    assert config["eos_token_id"] == tokenizer.eos_token_id


def test_a_downloaded_copy_is_read_from_its_main_configuration(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in EXCERPT.read_text(encoding="utf-8").splitlines()]
    for name, content in (("main", rows), ("socratic", rows[:1])):
        (tmp_path / "copy" / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(content), tmp_path / "copy" / name / "train-00000-of-00001.parquet")
    assert prepare(tmp_path / "copy", tmp_path / "out") == 0
    assert pq.read_metadata(tmp_path / "out" / "train.parquet").num_rows == 5
    assert not (tmp_path / "out" / "test.parquet").exists()


def test_one_file_is_the_split_that_its_name_says(source: Path, tmp_path: Path) -> None:
    assert prepare(source / "test.jsonl", tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["test.parquet"]


def test_writing_again_replaces_the_files_and_leaves_nothing_else(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", "--tiny-model")
    before = sorted(tmp_path.rglob("*"))
    assert prepare(source, tmp_path / "out", "--tiny-model") == 0
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: allowed: an object with question and answer"),
        ('{"question": "q"}', "line 2: allowed: an object with question and answer"),
        ('{"question": "q", "answer": "5"}', "line 2: the answer does not end with '#### <number>'"),
    ],
)
def test_a_line_that_is_not_gsm8k_is_named_and_nothing_is_written(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, reason: str
) -> None:
    first = EXCERPT.read_text(encoding="utf-8").splitlines()[0]
    (source / "test.jsonl").write_text(f"{first}\n{line}\n")
    assert prepare(source, tmp_path / "out") == 1
    assert f"error: {source}/test.jsonl, {reason}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_source_that_holds_nothing_says_what_was_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(tmp_path, tmp_path / "out") == 1
    assert "looked for: train.jsonl" in capsys.readouterr().err
    assert prepare(tmp_path / "none", tmp_path / "out") == 1
    assert "does not exist" in capsys.readouterr().err


def test_a_file_whose_name_says_no_split_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(EXCERPT, tmp_path / "out") == 1
    assert "allowed: train or test" in capsys.readouterr().err
