"""The quickstart task: word problems in which the meaning of most verbs can be learned from the reward alone.

``Tom has 8 apples and loses 3. How many?`` is answered by ``8 - 3 = 5 #### 5``. A verb adds or subtracts. The
demonstrations use four KNOWN verbs with the right operation, and eight NEW verbs with an operation drawn at random.
The random operations are deliberate: a model trained on them has the format, the arithmetic and the habit of looking at
the verb, but knows nothing of the NEW verbs, so it answers about half of their problems. Prompts for reinforcement
learning use NEW verbs only. What the model gains on problems held out from both, it learned from the reward.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.data.tiny_qwen3 import tiny_qwen3
from megarl.data.write import write_fresh_model, write_parquet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = ["Tom", "Ana", "Sam", "Mia", "Leo", "Eva", "Ben", "Zoe"]
ITEMS = ["apples", "pens", "books", "coins", "eggs", "cards", "cups", "balls"]
ADD = ["buys", "finds", "gets", "wins", "earns", "takes"]
SUBTRACT = ["sells", "loses", "drops", "gives", "breaks", "wastes"]
KNOWN = ADD[:2] + SUBTRACT[:2]
NEW = ADD[2:] + SUBTRACT[2:]
LARGEST = 10

NUM_SFT, NUM_TRAIN, NUM_TEST = 12_800, 4_096, 480
_SFT_STREAM, _TRAIN_STREAM, _TEST_STREAM = 1_000, 5_000, 7_000_000

_SPECIAL = ["<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|end|>"]
_WORDS = ["has", "and", ".", "How", "many", "?", "+", "-", "="]
_NUMBERS = [str(number) for number in range(2 * LARGEST + 1)]
# A special token with a space after it for each role. Only the assistant's turn ends with a token of its own.
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] }}"
    "{{ ' <|end|> ' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Problem:
    """One word problem. response: what a demonstration says, which for a NEW verb may be wrong."""

    question: str
    verb: str
    response: str
    answer: str

    def sft_row(self) -> dict[str, Any]:
        """Return the problem as a demonstration."""
        roles = (("user", self.question), ("assistant", self.response))
        return {"messages": [{"role": role, "content": content} for role, content in roles]}

    def prompt_row(self, split: str, index: int) -> dict[str, Any]:
        """Return the problem as a prompt with its ground truth."""
        return {
            "data_source": "verbs",
            "prompt": [{"role": "user", "content": self.question}],
            "reward_model": {"style": "rule", "ground_truth": self.answer},
            "extra_info": {"split": split, "index": index, "verb": self.verb},
        }


def prepare_verbs(out: Path, seed: int) -> dict[Path, str]:
    """Write sft.parquet, train.parquet, test.parquet and model/. Return what was written, with its size in words.

    test.parquet is the same for every seed, so that runs can be compared.
    """
    rows = {
        "sft": [problem.sft_row() for problem in sft_problems(seed)],
        "train": [problem.prompt_row("train", i) for i, problem in enumerate(train_problems(seed))],
        "test": [problem.prompt_row("test", i) for i, problem in enumerate(held_out_problems())],
    }
    written = {}
    for split, content in rows.items():
        write_parquet(out / f"{split}.parquet", content)
        written[out / f"{split}.parquet"] = f"{len(content):,} rows"
    tokenizer = verbs_tokenizer()
    write_fresh_model(out / "model", tokenizer, tiny_qwen3(tokenizer, max_position_embeddings=128))
    return written | {out / "model": f"tokenizer of {len(tokenizer)} words and the config of a fresh model"}


def sft_problems(seed: int) -> list[Problem]:
    """Draw the demonstrations: half with KNOWN verbs, half with NEW verbs and a random operation."""
    rng = random.Random(_SFT_STREAM + seed)
    return [_draw(rng, KNOWN if rng.random() < 0.5 else NEW, held_out=False, guess=True) for _ in range(NUM_SFT)]


def train_problems(seed: int) -> list[Problem]:
    """Draw the problems for reinforcement learning."""
    rng = random.Random(_TRAIN_STREAM + seed)
    return [_draw(rng, NEW, held_out=False) for _ in range(NUM_TRAIN)]


def held_out_problems() -> list[Problem]:
    """Draw the problems whose (verb, a, b) occurs neither in the demonstrations nor in training."""
    return [_draw(random.Random(_TEST_STREAM + i), NEW, held_out=True) for i in range(NUM_TEST)]


def is_held_out(verb: str, a: int, b: int) -> bool:
    """Tell whether a triple is kept for the test: about one in eight, whatever the seed."""
    return int(hashlib.md5(f"{verb},{a},{b}".encode(), usedforsecurity=False).hexdigest(), 16) % 8 == 0


def _draw(rng: random.Random, verbs: list[str], *, held_out: bool, guess: bool = False) -> Problem:
    while True:
        a = rng.randint(1, LARGEST)
        b = rng.randint(1, a)  # b <= a for both operations, so the numbers don't give the operation away
        verb = rng.choice(verbs)
        if is_held_out(verb, a, b) == held_out:
            break
    question = f"{rng.choice(NAMES)} has {a} {rng.choice(ITEMS)} and {verb} {b}. How many?"
    right = "+" if verb in ADD else "-"
    shown = rng.choice("+-") if guess and verb in NEW else right
    result = _apply(a, shown, b)
    return Problem(question, verb, f"{a} {shown} {b} = {result} #### {result}", str(_apply(a, right, b)))


def _apply(a: int, operation: str, b: int) -> int:
    return a + b if operation == "+" else a - b


def verbs_tokenizer() -> PreTrainedTokenizerBase:
    """Build a tokenizer of whole words. Its 64 tokens split evenly over any number of ranks that is a power of two."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL, "####", *_NUMBERS, *NAMES, *ITEMS, *ADD, *SUBTRACT, *_WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # splits off punctuation too
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_CHAT_TEMPLATE,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|end|>",
    )
