"""Which program and which main config a recipe or a file is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarl.checks.run import check_ppo, check_sft
from megarl.config.command_line import CommandLine, parse_command_line
from megarl.config.files import OURS, names_in
from megarl.config.programs import MEGATRON, PPO, PROGRAMS, SFT, for_recipe, main_config_of_recipe
from megarl.errors import ConfigError, Problem
from tests.unit.composed_configs import composed_values


def _line(*typed: str) -> CommandLine:
    return parse_command_line(typed, PPO.config_name)


def test_every_recipe_of_ours_says_its_main_config() -> None:
    for recipe in names_in(None, "experiment"):
        text = (OURS / "experiment" / f"{recipe}.yaml").read_text()
        of_rollouts = MEGATRON if "megatron:" in text else "ppo_trainer"
        expected = of_rollouts if "\nactor_rollout_ref:" in text else "sft_trainer"
        assert main_config_of_recipe(None, recipe) == expected, recipe


@pytest.mark.parametrize(
    ("typed", "config_name"),
    [
        (("experiment=gsm8k_tiny",), MEGATRON),
        (("+experiment=gsm8k_tiny",), MEGATRON),
        (("experiment=quickstart",), "ppo_trainer"),
        (("experiment=quickstart_sft",), "sft_trainer"),
        (("experiment=nothing",), "ppo_trainer"),
        ((), "ppo_trainer"),
        (("--config-name=mine", "experiment=quickstart"), "mine"),
        ((f"--config-name={MEGATRON}", "experiment=quickstart"), MEGATRON),
    ],
)
def test_a_recipe_brings_its_main_config_where_none_is_named(typed: tuple[str, ...], config_name: str) -> None:
    assert for_recipe(_line(*typed), PROGRAMS).config_name == config_name


def test_a_recipe_of_the_users_own_may_fit_any_main_config(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "small.yaml").write_text("data: {train_batch_size: 6}\n")
    assert for_recipe(_line(f"--config-dir={tmp_path}", "experiment=small"), PROGRAMS).config_name == "ppo_trainer"


@pytest.mark.parametrize(
    ("programs", "typed", "problem"),
    [
        (
            (PPO,),
            ("experiment=quickstart_sft",),
            Problem(
                "experiment",
                "quickstart_sft",
                "is a recipe of megarl.main_sft",
                "python -m megarl.main_sft with the same arguments",
            ),
        ),
        (
            (SFT,),
            ("experiment=quickstart",),
            Problem(
                "experiment",
                "quickstart",
                "is a recipe of megarl.main_ppo",
                "python -m megarl.main_ppo with the same arguments",
            ),
        ),
        (
            (PPO,),
            ("--config-name=ppo_trainer", "experiment=gsm8k_tiny"),
            Problem(
                "experiment",
                "gsm8k_tiny",
                "is a recipe for ppo_megatron_trainer",
                "--config-name=ppo_megatron_trainer, or leave that out",
            ),
        ),
    ],
)
def test_the_wrong_program_for_a_recipe_is_one_sentence(
    programs: tuple[type, ...], typed: tuple[str, ...], problem: Problem
) -> None:
    with pytest.raises(ConfigError) as caught:
        for_recipe(_line(*typed), programs)
    assert caught.value.problems == (problem,)


def test_the_wrong_program_for_a_config_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"is a config of megarl\.main_sft, which is another program") as caught:
        check_ppo(composed_values("sft_trainer"))
    assert len(caught.value.problems) == 1
    with pytest.raises(ConfigError, match=r"is a config of megarl\.main_ppo, which is another program"):
        check_sft(composed_values("ppo_trainer"))


def test_mistakes_of_every_kind_are_reported_at_once(tmp_path: Path) -> None:
    missing = [str(tmp_path / "a.parquet")]
    changes = {
        "foo": 1,
        "data.train_batch_size": "x",
        "data.val_batch_size": 0,
        "trainer.loger": "x",
        "algorithm.adv_estimator": "grpo",
        "trainer.logger": ["consol"],
        "data.train_files": missing,
        "data.val_files": missing,
    }
    with pytest.raises(ConfigError) as caught:
        check_ppo(composed_values("ppo_megatron_trainer", **changes))
    assert [p.key for p in caught.value.problems] == [
        "foo", "data.train_batch_size", "data.val_batch_size", "trainer.loger",
        "actor_rollout_ref.rollout.n", "actor_rollout_ref.model.path", "trainer.logger",
        "data.train_files", "data.val_files",
    ]  # fmt: skip


def test_what_a_wrong_value_would_lead_to_is_not_guessed_at() -> None:
    files = {"data.train_files": 3, "data.val_files": 3, "actor_rollout_ref.model.path": 5}
    wrong = {**files, "actor_rollout_ref.rollout.n": "many", "algorithm.adv_estimator": "grpo"}
    with pytest.raises(ConfigError) as caught:
        check_ppo(composed_values("ppo_megatron_trainer", **wrong))
    assert {p.key for p in caught.value.problems} == {*files, "actor_rollout_ref.rollout.n", "critic.model.path"}


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("actor_rollout_ref.actor.optim.lr", 1e6, "must be at most 1"),
        ("critic.optim.min_lr", 2.0, "must be at most 1"),
        ("actor_rollout_ref.rollout.temperature", 100, "must be at most 10"),
        ("actor_rollout_ref.rollout.val_kwargs.temperature", 100, "must be at most 10"),
        ("actor_rollout_ref.actor.clip_ratio_high", 300, "must be at most 10, or null"),
        ("actor_rollout_ref.actor.entropy_coeff", 1e3, "must be at most 10"),
        ("actor_rollout_ref.actor.kl_loss_coef", 1e3, "must be at most 100"),
        ("algorithm.kl_ctrl.kl_coef", 1e3, "must be at most 100"),
        ("data.train_batch_size", 10**12, "must be at most 1048576"),
        ("data.max_response_length", 10**12, "must be at most 16777216"),
        ("reward.timeout_s", 1e12, "must be at most 604800"),
    ],
)
def test_a_slip_of_the_finger_is_out_of_range(key: str, value: float, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_ppo(composed_values("ppo_megatron_trainer", **{key: value}))
    assert [p.allowed for p in caught.value.problems if p.key == key] == [allowed]
