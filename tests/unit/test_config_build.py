from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.config.build import build_config
from megarl.config.schema import key
from megarl.errors import Absent, ConfigError, Problem


@dataclass(frozen=True)
class Engine:
    name: str = key("which", choices=("vllm", "sglang"))
    top_k: int | None = key("tokens", low=1)
    top_p: float = key("mass", above=0.0, high=1.0)


@dataclass(frozen=True)
class Config:
    num_steps: int = key("steps", low=1)
    share: float | None = key("share", low=0.0, high=1.0)
    shuffle: bool = key("order")
    files: tuple[str, ...] = key("files")
    betas: tuple[float, ...] = key("decay")
    engine: Engine = key("engine")


def _values(**changes: Any) -> dict[str, Any]:
    values = {
        "num_steps": 3,
        "share": None,
        "shuffle": True,
        "files": ["a"],
        "betas": [0.9, 1],
        "engine": {"name": "vllm", "top_k": None, "top_p": 1},
    }
    return values | changes


def _engine(**changes: Any) -> dict[str, Any]:
    return _values(engine={"name": "vllm", "top_k": None, "top_p": 1.0, **changes})


def _problems(values: dict[str, Any]) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        build_config(Config, values)
    return caught.value.problems


def _problem(values: dict[str, Any]) -> Problem:
    [problem] = _problems(values)
    value = "" if isinstance(problem.value, Absent) else f" = {problem.value!r}"
    assert f"{problem.key}{value}: {problem.allowed}" in str(ConfigError([problem]))
    return problem


def test_values_become_dataclasses_with_lists_as_tuples_and_integers_as_floats_where_asked() -> None:
    config = build_config(Config, _values())
    assert config == Config(3, None, True, ("a",), (0.9, 1.0), Engine("vllm", None, 1.0))
    assert isinstance(config.engine.top_p, float)
    assert build_config(Config, asdict(config)) == config


def test_one_file_may_be_given_without_a_list() -> None:
    assert build_config(Config, _values(files="a.parquet")).files == ("a.parquet",)


@pytest.mark.parametrize(("text", "number"), [("1e-6", 1e-6), ("0.5", 0.5), ("1E-1", 0.1)])
def test_numbers_that_yaml_reads_as_text_are_numbers(text: str, number: float) -> None:
    assert build_config(Config, _values(share=text)).share == number


@pytest.mark.parametrize(
    ("values", "path", "fix"),
    [
        (_values(num_step=4), "num_step", "did you mean 'num_steps'?"),
        (_values(expermient=4), "expermient", "did you mean 'experiment'?"),
        (_engine(topk=4), "engine.topk", "did you mean 'top_k'?"),
        (_engine(zzzzzz=4), "engine.zzzzzz", "keys here: name, top_k, top_p"),
    ],
)
def test_an_unknown_key_is_an_error_with_the_nearest_known(values: dict[str, Any], path: str, fix: str) -> None:
    assert _problem(values) == Problem(path, 4, "no such key", fix)


def test_a_missing_key_is_an_error_that_says_how_to_come_by_it() -> None:
    values = _values()
    del values["engine"]["top_p"]
    problem = _problem(values)
    assert (problem.key, problem.allowed) == ("engine.top_p", "is missing")
    assert problem.fix == "start from one of megarl's own configs, or set engine.top_p"


@pytest.mark.parametrize(
    ("values", "path", "allowed"),
    [
        (_values(num_steps=1.5), "num_steps", "must be an integer"),
        (_values(num_steps=True), "num_steps", "must be an integer"),
        (_values(num_steps="3"), "num_steps", "must be an integer"),
        (_values(num_steps=None), "num_steps", "must be an integer"),
        (_values(share="half"), "share", "must be a number, or null"),
        (_values(share=True), "share", "must be a number, or null"),
        (_values(shuffle="yes"), "shuffle", "must be true or false"),
        (_values(shuffle=1), "shuffle", "must be true or false"),
        (_values(files=3), "files", "must be a list"),
        (_values(files=["a", 3]), "files", "each item must be a string"),
        (_values(betas=["x"]), "betas", "each item must be a number"),
        (_values(engine="vllm"), "engine", "must be a section with keys of its own"),
        (_values(engine=None), "engine", "must be a section with keys of its own"),
        (_engine(name=3), "engine.name", "must be a string"),
        (_engine(top_k=0.5), "engine.top_k", "must be an integer, or null"),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_that_says_what_is_right(
    values: dict[str, Any], path: str, allowed: str
) -> None:
    problem = _problem(values)
    assert (problem.key, problem.allowed) == (path, allowed)


@pytest.mark.parametrize(
    ("values", "path", "allowed"),
    [
        (_values(num_steps=0), "num_steps", "must be at least 1"),
        (_values(share=-0.1), "share", "must be at least 0, or null"),
        (_values(share=1.5), "share", "must be at most 1, or null"),
        (_engine(top_p=0.0), "engine.top_p", "must be greater than 0"),
        (_engine(top_k=-1), "engine.top_k", "must be at least 1, or null"),
        (_values(share=float("nan")), "share", "must be a finite number, or null"),
        (_values(share="nan"), "share", "must be a finite number, or null"),
        (_engine(top_p=float("inf")), "engine.top_p", "must be a finite number"),
    ],
)
def test_a_value_out_of_range_is_an_error_that_gives_the_range(values: dict[str, Any], path: str, allowed: str) -> None:
    problem = _problem(values)
    assert (problem.key, problem.allowed) == (path, allowed)


@given(st.floats(0.0, 1.0, exclude_min=True))
def test_values_within_the_range_are_kept_as_they_are(top_p: float) -> None:
    assert build_config(Config, _engine(top_p=top_p)).engine.top_p == top_p


def test_an_unknown_choice_is_an_error_with_the_nearest_one() -> None:
    problem = _problem(_engine(name="vlm"))
    assert problem == Problem("engine.name", "vlm", "must be one of vllm, sglang", "did you mean 'vllm'?")


def test_all_problems_are_reported_together_and_always_in_the_same_order() -> None:
    values = _values(num_steps=0, bogus_a=1, bogus_b=2, shuffle="no", engine={"name": "x", "bogus": 1, "top_p": "?"})
    problems = _problems(values)
    assert [p.key for p in problems] == [
        "bogus_a", "bogus_b", "num_steps", "shuffle", "engine.bogus", "engine.name", "engine.top_k", "engine.top_p",
    ]  # fmt: skip
    assert str(ConfigError(problems)).startswith("8 problems in the configuration:\n  1. bogus_a = 1: no such key")
