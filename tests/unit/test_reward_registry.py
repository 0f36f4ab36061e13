from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megarl.errors import RewardError
from megarl.reward.registry import load_reward, register, require_functions, unmatchable


def score(response: str, data_source: str = "", finish_reason: str = "stop", name: str | None = None) -> float:
    function = load_reward(name)
    extra_info = {"finish_reason": finish_reason}
    return function(data_source=data_source, solution_str=response, ground_truth="5", extra_info=extra_info)


def write(folder: Path, source: str) -> str:
    path = folder / "my_reward.py"
    path.write_text(source)
    return str(path)


@pytest.mark.parametrize("data_source", ["gsm8k", "openai/gsm8k", "gsm8k_flexible", "exact_match", "verbs"])
def test_without_a_name_each_row_goes_to_the_function_of_its_data_source(data_source: str) -> None:
    right = "5" if data_source == "exact_match" else "#### 5"
    assert score(right, data_source) == 1.0
    assert score("#### 6", data_source) == 0.0


def test_gsm8k_is_strict_and_its_flexible_variant_is_not() -> None:
    assert score("the answer is 5", "gsm8k") == 0.0
    assert score("the answer is 5", "gsm8k_flexible") == 1.0


@pytest.mark.parametrize(
    ("response", "finish_reason", "reward"),
    [
        ("2 + 3 = 5 #### 5", "stop", 1.0),
        ("2 + 4 = 6\n#### $1,006.50\n", "stop", 0.2),
        ("#### 5", "length", 0.0),
        ("#### 4 #### 5", "stop", 0.0),
        ("#### 5 apples", "stop", 0.0),
        ("####", "stop", 0.0),
        ("5", "stop", 0.0),
    ],
)
def test_the_form_of_an_answer_earns_a_fifth_and_the_right_number_all(
    response: str, finish_reason: str, reward: float
) -> None:
    assert score(response, name="gsm8k_format", finish_reason=finish_reason) == reward


def test_a_named_function_scores_every_data_source() -> None:
    assert score("5", data_source="verbs", name="exact_match") == 1.0


def test_a_response_that_did_not_stop_earns_nothing_in_verbs() -> None:
    assert score("#### 5", "verbs", finish_reason="stop") == 1.0
    assert score("#### 5", "verbs", finish_reason="length") == 0.0


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(RewardError, match=r"reward\.name = 'gsm8': .* did you mean 'gsm8k'\?"):
        load_reward("gsm8")


def test_an_unknown_data_source_is_found_before_the_run() -> None:
    require_functions(["verbs", "openai/gsm8k"])
    with pytest.raises(RewardError, match=r"data_source = 'my/task': no such reward function.*reward\.path"):
        require_functions(["verbs", "my/task"])


def test_a_name_can_be_given_once_only() -> None:
    with pytest.raises(RewardError, match="'gsm8k' exists already"):
        register("gsm8k")(lambda **_: 0.0)


def test_a_function_of_verl_is_used_as_it_is(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"
        "    return 0.5 * (solution_str == ground_truth) + 0.25 * (data_source == 'x')\n",
    )
    function = load_reward(path=path)
    assert function(data_source="x", solution_str="5", ground_truth="5", extra_info={}) == 0.75


def test_a_function_can_have_another_name(tmp_path: Path) -> None:
    path = write(tmp_path, "def brevity(solution_str, **_):\n    return -len(solution_str)\n")
    function = load_reward(path=path, function="brevity")
    assert function(data_source="", solution_str="four", ground_truth="", extra_info={}) == -4


def test_a_file_may_define_dataclasses(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Score:\n    value: float\n"
        "def compute_score(**_):\n    return Score(1.5).value\n",
    )
    assert load_reward(path=path)(data_source="", solution_str="", ground_truth="", extra_info={}) == 1.5


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"reward\.path = .*none\.py.* no such \.py file"):
        load_reward(path=str(tmp_path / "none.py"))


def test_a_missing_function_lists_those_there(tmp_path: Path) -> None:
    path = write(tmp_path, "def compute_scores(**_):\n    return 0\n")
    with pytest.raises(RewardError, match=r"no such function\. it has: compute_scores\. did you mean 'compute_scores'"):
        load_reward(path=path)


@pytest.mark.parametrize(
    "source", ["def compute_score(:", "import nothing_of_this_name", "1 / 0", "raise SystemExit(3)"]
)
def test_a_file_that_fails_is_named(tmp_path: Path, source: str) -> None:
    with pytest.raises(RewardError, match=r"my_reward\.py': the file failed: \w+: "):
        load_reward(path=write(tmp_path, source))


def test_a_function_with_other_arguments_is_refused_before_the_run(tmp_path: Path) -> None:
    path = write(tmp_path, "def compute_score(prompt, response):\n    return 0\n")
    with pytest.raises(RewardError, match="can't be called with data_source, solution_str, ground_truth"):
        load_reward(path=path)


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="both set"):
        load_reward("gsm8k", path=write(tmp_path, ""))
    with pytest.raises(RewardError, match=r"reward\.function = 'mine' has no effect without reward\.path"):
        load_reward(function="mine")
    with pytest.raises(RewardError, match=r"reward\.kwargs = .* has no effect without reward\.path"):
        load_reward("gsm8k", kwargs={"weight": 1})


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("async def compute_score(**_):\n    return 1\n", "an async function"),
        ("def compute_score(**_):\n    yield 1\n", "a generator function"),
        ("async def compute_score(**_):\n    yield 1\n", "a generator function"),
        ("class compute_score:\n    def __init__(self, **_): ...\n", "a class"),
        ("class Judge:\n    async def __call__(self, **_): ...\ncompute_score = Judge()\n", "an async function"),
        (
            "import functools\nasync def judge(**_): ...\ncompute_score = functools.partial(judge, a=1)\n",
            "an async function",
        ),
    ],
)
def test_what_gives_no_number_when_called_is_refused_before_the_run(tmp_path: Path, source: str, kind: str) -> None:
    with pytest.raises(RewardError, match=f"reward.function = 'compute_score': it is {kind} in .*plain `def`"):
        load_reward(path=write(tmp_path, source))


def test_an_object_with_a_plain_call_and_a_wrapper_of_an_async_function_are_functions(tmp_path: Path) -> None:
    source = (
        "import asyncio, functools\nasync def judge(**_):\n    return 2\n"
        "@functools.wraps(judge)\ndef compute_score(**row):\n    return asyncio.run(judge(**row))\n"
        "class Judge:\n    def __call__(self, **_):\n        return 3\nobject_score = Judge()\n"
    )
    row = {"data_source": "", "solution_str": "", "ground_truth": ""}
    path = write(tmp_path, source)
    assert load_reward(path=path)(**row, extra_info={}) == 2
    assert load_reward(path=path, function="object_score")(**row, extra_info={}) == 3


def test_a_file_may_import_those_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "beside_my_reward.py").write_text("VALUE = 0.75\n")
    path = write(tmp_path, "from beside_my_reward import VALUE\ndef compute_score(**_):\n    return VALUE\n")
    assert load_reward(path=path)(data_source="", solution_str="", ground_truth="", extra_info={}) == 0.75


def test_keyword_arguments_that_a_function_lacks_or_that_rows_give_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    return 0\n")
    with pytest.raises(RewardError, match=r"with reward\.kwargs wieght: got an unexpected keyword argument 'wieght'"):
        load_reward(path=path, kwargs={"wieght": 1})
    with pytest.raises(RewardError, match=r"reward\.kwargs names extra_info, which every row gives"):
        load_reward(path=path, kwargs={"extra_info": {}})


@pytest.mark.parametrize("ground_truth", ["eighteen", "", "1/2", "1e5", "#### 18", "18 eggs", "nan"])
def test_a_ground_truth_without_a_number_is_one_that_no_number_matches(ground_truth: str) -> None:
    for name in ("gsm8k", "openai/gsm8k", "gsm8k_flexible"):
        assert unmatchable(name, ground_truth) == "it is no number"


@pytest.mark.parametrize("ground_truth", ["18", "18.0", "-3", "$1,234.50", ".5", " 7 "])
def test_a_ground_truth_with_a_number_is_matched_by_it(ground_truth: str) -> None:
    for name in ("gsm8k", "gsm8k_flexible"):
        assert unmatchable(name, ground_truth) == ""
        answer = {"solution_str": f"#### {ground_truth.strip()}", "ground_truth": ground_truth}
        assert load_reward(name)(**answer, data_source=name, extra_info={}) == 1.0


def test_a_mark_in_the_ground_truth_can_not_be_matched_where_it_ends_the_reasoning() -> None:
    assert "separates the answer" in unmatchable("verbs", "#### 5")
    assert unmatchable("verbs", "5") == unmatchable("exact_match", "#### 5") == unmatchable("my own", "x") == ""
