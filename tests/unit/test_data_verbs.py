from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from megarl.data.prompts import load_prompts
from megarl.data.sft import SFTExample, load_sft_examples
from megarl.data.template import ChatTemplate
from megarl.data.tokenizer import load_tokenizer
from megarl.data.turns import Masking
from megarl.data.verbs import (
    ADD,
    KNOWN,
    NEW,
    Problem,
    held_out_problems,
    is_held_out,
    prepare_verbs,
    sft_problems,
    train_problems,
)
from megarl.types import Prompt

# Of the token ids of seed 0, in the order they are written. The learning curves in the docs were measured on these.
SFT_DIGEST = "6212c5bdd8e998db"
TRAIN_DIGEST = "d5a594a561a792bc"
TEST_DIGEST = "3bd353a43d3d55a0"

QUESTION = re.compile(r"\w+ has (\d+) \w+ and (\w+) (\d+)\. How many\?")


def digest(rows: list[tuple[int, ...]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def triple(problem: Problem) -> tuple[str, int, int]:
    match = QUESTION.fullmatch(problem.question)
    assert match is not None
    return match[2], int(match[1]), int(match[3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verbs")
    prepare_verbs(out, seed=0)
    return out


def examples(folder: Path) -> tuple[SFTExample, ...]:
    tokenizer = load_tokenizer(str(folder / "model"))
    file = str(folder / "sft.parquet")
    return load_sft_examples(
        [file], ChatTemplate(tokenizer), Masking(), messages_key="messages", max_length=21, overlong="error"
    )


def prompts(folder: Path, split: str) -> tuple[Prompt, ...]:
    tokenizer = load_tokenizer(str(folder / "model"))
    file = str(folder / f"{split}.parquet")
    return load_prompts(
        [file], ChatTemplate(tokenizer), prompt_key="prompt", max_prompt_length=13, overlong="error"
    ).prompts


def test_demonstrations_are_the_tokens_the_curves_were_measured_on(folder: Path) -> None:
    loaded = examples(folder)
    assert digest([example.token_ids for example in loaded]) == SFT_DIGEST
    assert {example.loss_mask for example in loaded} == {(False,) * 13 + (True,) * 8}


@pytest.mark.parametrize(("split", "expected"), [("train", TRAIN_DIGEST), ("test", TEST_DIGEST)])
def test_prompts_are_the_tokens_the_curves_were_measured_on(folder: Path, split: str, expected: str) -> None:
    loaded = prompts(folder, split)
    assert digest([prompt.token_ids for prompt in loaded]) == expected
    assert {len(prompt.token_ids) for prompt in loaded} == {13}
    assert {prompt.data_source for prompt in loaded} == {"verbs"}


def test_held_out_problems_occur_nowhere_else() -> None:
    seen = {triple(problem) for seed in (0, 1) for problem in sft_problems(seed) + train_problems(seed)}
    assert not seen & {triple(problem) for problem in held_out_problems()}
    assert all(is_held_out(*triple(problem)) for problem in held_out_problems())


def test_reinforcement_learning_meets_only_verbs_whose_meaning_was_withheld() -> None:
    verbs = {problem.verb for problem in train_problems(0)} | {problem.verb for problem in held_out_problems()}
    assert verbs == set(NEW)


def test_demonstrations_tell_the_meaning_of_known_verbs_and_nothing_of_new_ones() -> None:
    problems = sft_problems(0)
    right = {verb: [shows_the_right_operation(p) for p in problems if p.verb == verb] for verb in KNOWN + NEW}
    assert all(all(right[verb]) for verb in KNOWN)
    assert all(0.45 < sum(right[verb]) / len(right[verb]) < 0.55 for verb in NEW)


def shows_the_right_operation(problem: Problem) -> bool:
    return problem.response.split()[1] == ("+" if problem.verb in ADD else "-")


def test_the_answer_is_right_even_where_the_demonstration_is_not() -> None:
    for problem in sft_problems(0)[:500]:
        verb, a, b = triple(problem)
        assert int(problem.answer) == (a + b if verb in ADD else a - b)
        says_the_answer = problem.response.endswith(f"#### {problem.answer}")
        assert says_the_answer == shows_the_right_operation(problem)


def test_seeds_have_their_own_training_data_and_share_the_test() -> None:
    assert train_problems(0) != train_problems(1)
    assert sft_problems(0) != sft_problems(1)
    assert held_out_problems() == held_out_problems()


def test_the_model_folder_makes_a_model_of_804_224_parameters(folder: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "model"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 804_224
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.config.eos_token_id == load_tokenizer(str(folder / "model")).eos_token_id


def test_a_response_reads_the_same_after_the_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder / "model"))
    assert len(tokenizer) == 64
    example = examples(folder)[0]
    assert tokenizer.decode(example.token_ids[13:], skip_special_tokens=True) == sft_problems(0)[0].response
