from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megarl.config.command_line import parse_command_line
from megarl.config.compose import compose
from megarl.config.provenance import Origin, Source, describe_origin, find_origins, shown_path, with_origins
from megarl.errors import Absent, ConfigError, Problem

BASE = Source("", "base.yaml", "a:\n  x: 1\n  y: [1, 2]\n  z: {p: 1, q: 2}\nb: ${a.x}\n")


def places(*sources: Source, **overrides: object) -> dict[str, str]:
    found = find_origins(sources, [(k.replace("__", "."), v) for k, v in overrides.items()])
    return {key: str(origin) for key, origin in found.items()}


def test_every_leaf_has_the_line_of_its_key() -> None:
    assert places(BASE) == {
        "a.x": "base.yaml:2",
        "a.y": "base.yaml:3",
        "a.y[0]": "base.yaml:3",
        "a.y[1]": "base.yaml:3",
        "a.z.p": "base.yaml:4",
        "a.z.q": "base.yaml:4",
        "b": "base.yaml:5",
    }


def test_the_last_file_that_sets_a_value_has_it_and_the_command_line_comes_after() -> None:
    mine = Source("", "mine.yaml", "defaults: [base]\na:\n  x: 3\n  z:\n    q: 4\n")
    found = places(BASE, mine, a__z__p=5, c={"d": {"e": 1}})
    assert found["a.x"] == "mine.yaml:3"
    assert found["a.z.q"] == "mine.yaml:5"
    assert found["a.z.p"] == found["c.d.e"] == "command line"
    assert found["a.y"] == "base.yaml:3"
    assert "defaults[0]" not in found


def test_the_content_of_a_file_goes_under_its_package() -> None:
    assert places(Source("m.n", "f.yaml", "x: 1\n")) == {"m.n.x": "f.yaml:1"}


def test_a_list_replaces_a_list_and_a_section_and_a_value_replace_each_other() -> None:
    mine = Source("", "mine.yaml", "a:\n  y: [{low: 1}]\n  z: null\n  x: {k: 1}\n")
    found = places(BASE, mine)
    assert set(found) == {"a.x.k", "a.y", "a.y[0].low", "a.z", "b"}
    assert {place for key, place in found.items() if key != "b"} == {"mine.yaml:2", "mine.yaml:3", "mine.yaml:4"}


def test_an_empty_section_takes_nothing_away() -> None:
    found = places(BASE, Source("", "mine.yaml", "a: {z: {}, w: {}}\n"))
    assert found["a.z.p"] == "base.yaml:4"
    assert found["a.w"] == "mine.yaml:1"


def test_a_value_yet_to_be_given_leaves_the_one_that_is_there() -> None:
    found = places(BASE, Source("", "mine.yaml", "a:\n  x: ???\n  w: ???\n"))
    assert (found["a.x"], found["a.w"]) == ("base.yaml:2", "mine.yaml:3")


def test_what_is_merged_in_by_an_alias_gives_way_to_what_stands_beside_it() -> None:
    text = "x: &x\n  p: 1\n  q: 2\ny:\n  p: 3\n  <<: *x\n"
    found = places(Source("", "f.yaml", text))
    assert (found["y.p"], found["y.q"]) == ("f.yaml:5", "f.yaml:3")


def test_a_value_taken_from_another_key_says_where_that_was_set() -> None:
    critic = Source("c", "critic.yaml", "m: ${a.z}\nk: ${b}\nown: ${.k}\nloop: ${c.loop}\n")
    origins = find_origins([BASE, critic], [("a.x", 7)])
    assert describe_origin("c.k", origins) == "critic.yaml:2, from b at base.yaml:5, from a.x at command line"
    assert describe_origin("c.own", origins).startswith("critic.yaml:3, from c.k at critic.yaml:2, from b at")
    assert describe_origin("c.m.p", origins) == "critic.yaml:1, from a.z.p at base.yaml:4"
    assert describe_origin("c.loop", origins) == "critic.yaml:4"


@pytest.mark.parametrize("key", ["nobody", "a", "a.z", "a.nobody", "c.d"])
def test_what_no_file_sets_has_no_origin(key: str) -> None:
    assert describe_origin(key, find_origins([BASE], [])) == ""


def test_an_item_has_its_own_line_and_one_that_is_missing_that_of_its_list() -> None:
    origins = find_origins([Source("", "f.yaml", "r:\n  - low: 1\n  -\n    low: 2\n")], [])
    assert str(origins["r[1].low"]) == "f.yaml:4"
    assert describe_origin("r[1].low", origins) == "f.yaml:4"
    assert describe_origin("r[5].low", origins) == "f.yaml:1"


@pytest.mark.parametrize(
    ("key", "printed"),
    [
        ("a.x", "a.x = 0  (base.yaml:2): wrong"),
        ("a.x x a.z.p", "a.x x a.z.p = 0  (a.x: base.yaml:2; a.z.p: base.yaml:4): wrong"),
        ("a.x + nobody.here", "a.x + nobody.here = 0  (base.yaml:2): wrong"),
        ("nobody.here", "nobody.here = 0: wrong"),
    ],
)
def test_a_problem_prints_the_origin_of_every_key_it_names(key: str, printed: str) -> None:
    error = with_origins(ConfigError([Problem(key, 0, "wrong")]), find_origins([BASE], []))
    assert str(error) == f"1 problem in the configuration:\n  1. {printed}"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_problem_without_a_value_prints_none() -> None:
    problem = pickle.loads(pickle.dumps(Problem("--flag", Absent(), "no such flag", "--other")))
    assert str(problem) == "--flag: no such flag\n      fix: --other"


def test_an_origin_that_is_known_already_stays() -> None:
    error = with_origins(ConfigError([Problem("a.x", 0, "wrong", origin="there")]), {"a.x": Origin("here", 1)})
    assert error.problems[0].origin == "there"


def test_a_path_is_shown_relative_where_it_lies_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "a/b.yaml") == "a/b.yaml"
    assert shown_path(tmp_path.parent / "b.yaml") == str(tmp_path.parent / "b.yaml")


def _leaves(values: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@pytest.mark.parametrize("base", ["ppo_trainer", "ppo_megatron_trainer", "sft_trainer"])
def test_every_leaf_of_a_composed_config_has_an_origin_in_a_line_that_names_it(base: str) -> None:
    recipe = "quickstart_sft" if base == "sft_trainer" else "quickstart"
    run = compose(parse_command_line([f"experiment={recipe}", "trainer.seed=3"], base))
    values = OmegaConf.to_container(run.config, resolve=False)
    assert isinstance(values, dict)
    conf = Path(__file__).parents[2]
    leaves = list(_leaves({str(k): v for k, v in values.items()}))
    error = run.located(ConfigError([Problem(key, 0, "wrong") for key in leaves]))
    assert len(leaves) > 30
    for problem in error.problems:
        place = problem.origin.split(",")[0]
        if problem.key == "trainer.seed":
            assert place == "command line"
        else:
            file, _, line = place.partition(":")
            named = (conf / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
            assert problem.key.rpartition(".")[2] in named, problem
