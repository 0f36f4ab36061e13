"""GSM8K: grade-school word problems (Cobbe et al., 2021, https://arxiv.org/abs/2110.14168)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.data.parquet import read_rows
from megarl.data.tiny_qwen3 import tiny_qwen3
from megarl.data.write import write_fresh_model, write_parquet
from megarl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
_SPLITS = ("train", "test")
# A downloaded copy of openai/gsm8k keeps its files in main/; beside it, socratic/ asks the same questions differently.
_PATTERNS = ("{split}.jsonl", "{split}.parquet", "{split}-*.parquet", "main/{split}-*.parquet")
_CALCULATION = re.compile(r"<<[^>]*>>")  # written for a calculator, not for a reader: 48/2 = <<48/2=24>>24
_TINY_VOCABULARY = 2048
_SPECIAL = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Question:
    """One question, its worked answer as published, and the number it ends with."""

    question: str
    answer: str
    number: str

    @property
    def prompt(self) -> str:
        """Return the user's message."""
        return f"{self.question} {INSTRUCTION}"

    @property
    def response(self) -> str:
        """Return the worked answer as a reader wants it, ending with ``#### number``."""
        return _CALCULATION.sub("", self.answer)

    def sft_row(self) -> dict[str, Any]:
        """Return the question as a demonstration."""
        roles = (("user", self.prompt), ("assistant", self.response))
        return {"messages": [{"role": role, "content": content} for role, content in roles]}

    def prompt_row(self, split: str, index: int) -> dict[str, Any]:
        """Return the question as a prompt with its ground truth."""
        return {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": self.prompt}],
            "reward_model": {"style": "rule", "ground_truth": self.number},
            "extra_info": {"split": split, "index": index, "question": self.question, "answer": self.answer},
        }


def prepare_gsm8k(source: Path, out: Path, *, tiny_model: bool) -> dict[Path, str]:
    """Write a parquet file for each split that the source has, and sft.parquet from the training split.

    tiny_model: also write model/, a small fresh Qwen3 whose tokenizer is trained on the questions and answers.
    Return what was written, with its size in words. Raises DataError if the source can't be used.
    """
    splits = {split: read_questions(file) for split, file in find_splits(source).items()}
    written = {}
    for split, questions in splits.items():
        write_parquet(out / f"{split}.parquet", [q.prompt_row(split, i) for i, q in enumerate(questions)])
        written[out / f"{split}.parquet"] = f"{len(questions):,} rows"
    if "train" in splits:
        write_parquet(out / "sft.parquet", [q.sft_row() for q in splits["train"]])
        written[out / "sft.parquet"] = f"{len(splits['train']):,} rows"
    if tiny_model:
        tokenizer = train_tokenizer(next(iter(splits.values())))
        write_fresh_model(out / "model", tokenizer, tiny_qwen3(tokenizer, max_position_embeddings=2048))
        written[out / "model"] = f"tokenizer of {len(tokenizer):,} tokens and the config of a fresh model"
    return written


def find_splits(source: Path) -> dict[str, Path]:
    """Return the file of each split: of a folder, those it holds; of a file, the one its name tells."""
    if source.is_file():
        splits = {split: source for split in _SPLITS if split in source.name}
        if len(splits) != 1:
            raise DataError(f"{source}: the name of a file has to say which split it is: allowed: train or test")
        return splits
    if not source.is_dir():
        raise DataError(f"{source} does not exist. fix: give --source a file or a folder of GSM8K")
    splits = {split: file for split in _SPLITS if (file := _first_match(source, split))}
    if not splits:
        wanted = ", ".join(pattern.format(split="train") for pattern in _PATTERNS)
        raise DataError(f"{source} holds no GSM8K. looked for: {wanted}, and the same for test")
    return splits


def _first_match(folder: Path, split: str) -> Path | None:
    return next((file for p in _PATTERNS for file in sorted(folder.glob(p.format(split=split)))), None)


def read_questions(file: Path) -> tuple[Question, ...]:
    """Read the questions of a jsonl or parquet file. Raises DataError on a row that isn't one of GSM8K."""
    if file.suffix == ".parquet":
        origin = "GSM8K has question and answer"
        rows = read_rows([str(file)], {"question": origin, "answer": origin})
        questions = tuple(_question(f"{file}, row {row.index}", row.values) for row in rows)
    else:
        lines = enumerate(file.read_text(encoding="utf-8").split("\n"), 1)
        questions = tuple(_parse_line(f"{file}, line {number}", line) for number, line in lines if line.strip())
    if not questions:
        raise DataError(f"{file} has no rows")
    return questions


def _parse_line(where: str, line: str) -> Question:
    try:
        return _question(where, json.loads(line))
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error}") from error


def _question(where: str, row: Any) -> Question:
    question, answer = (row.get("question"), row.get("answer")) if isinstance(row, dict) else (None, None)
    if not isinstance(question, str) or not isinstance(answer, str):
        raise DataError(f"{where}: allowed: an object with question and answer, both text")
    _, mark, number = answer.rpartition("#### ")
    if not mark or not number.strip():
        raise DataError(f"{where}: the answer does not end with '#### <number>'")
    return Question(question, answer, number.strip().replace(",", ""))


def train_tokenizer(questions: Sequence[Question]) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer on prompts and responses. A small source gives fewer tokens than 2,048."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TINY_VOCABULARY,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{q.prompt}\n{q.response}" for q in questions), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_CHAT_TEMPLATE,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=_SPECIAL[1:4],
    )
