from __future__ import annotations

import pytest

from megarl.config.compose import hydra_arguments


@pytest.mark.parametrize(
    ("typed", "head", "tail"),
    [
        ([], [], []),
        (["--config-name=x", "data.n=1"], ["--config-name=x"], ["++data.n=1"]),
        (["data.n=1", "--cfg", "job"], [], ["++data.n=1", "--cfg", "job"]),
        (["--cfg", "job", "experiment=quickstart"], ["--cfg", "job"], ["experiment=quickstart"]),
        (["--config-dir=.", "--config-name", "x"], ["--config-dir=.", "--config-name", "x"], []),
        (["~data.n", "data.m=2"], [], ["~data.n", "++data.m=2"]),
    ],
)
def test_hydras_own_settings_stand_beside_the_users_overrides(
    typed: list[str], head: list[str], tail: list[str]
) -> None:
    arguments = hydra_arguments(typed)
    assert arguments[: len(head)] == head
    assert arguments[len(arguments) - len(tail) :] == tail
    own = arguments[len(head) : len(arguments) - len(tail)]
    assert "hydra.output_subdir=null" in own and all(a.startswith("hydra") for a in own)


@pytest.mark.parametrize(
    "typed",
    ["+data.n=1", "++data.n=1", "model@actor_rollout_ref.model=tiny", "hydra.verbose=true", "experiment=quickstart"],
)
def test_overrides_that_set_no_value_of_ours_are_passed_on_as_typed(typed: str) -> None:
    assert hydra_arguments([typed])[-1] == typed


@pytest.mark.parametrize("typed", ["data.files=['a=b','c']", "a.b.c={x: 1}", "a.b=", "a.b=-1e-6"])
def test_values_of_any_kind_are_set_whether_or_not_their_key_exists(typed: str) -> None:
    assert hydra_arguments([typed])[-1] == f"++{typed}"
