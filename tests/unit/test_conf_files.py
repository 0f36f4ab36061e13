from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarl.checks.rules import require
from megarl.config.build import build_config
from megarl.config.schema import PPOConfig, SFTConfig
from megarl.roles import batch_plan
from tests.unit.composed_configs import composed_values, problems_without_files, roles_in

REPOSITORY = Path(__file__).resolve().parents[2]
CONF = REPOSITORY / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def _main_of(experiment: str) -> str:
    """Return the main config that a recipe is for."""
    recipe = yaml.safe_load((CONF / "experiment" / f"{experiment}.yaml").read_text())
    return "ppo_megatron_trainer" if "actor_rollout_ref" in recipe else "sft_trainer"


def _recipes() -> list[tuple[str, str]]:
    """Return every recipe with a main config that it is for; what doesn't name an axis of Megatron's is for both."""
    found = [(_main_of(experiment), experiment) for experiment in EXPERIMENTS]
    both = [name for _, name in found if "megatron:" not in (CONF / "experiment" / f"{name}.yaml").read_text()]
    return found + [("ppo_trainer", name) for name in both if _main_of(name) == "ppo_megatron_trainer"]


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_a_main_config_has_a_value_for_every_key_of_the_schema(name: str) -> None:
    schema = SFTConfig if name == "sft_trainer" else PPOConfig
    assert isinstance(build_config(schema, composed_values(name)), schema)


@pytest.mark.parametrize(("main", "experiment"), _recipes())
def test_a_recipe_breaks_no_rule_and_its_batches_divide(main: str, experiment: str) -> None:
    if main == "sft_trainer":
        config: PPOConfig | SFTConfig = build_config(SFTConfig, composed_values(main, f"experiment={experiment}"))
    else:
        # Some recipes leave the model to their launch script.
        values = composed_values(main, f"experiment={experiment}", **{"actor_rollout_ref.model.path": "model"})
        config = build_config(PPOConfig, values)
    require(problems_without_files(config))
    for role in roles_in(config):
        if role.is_trained:
            batch_plan(config, role)


def test_a_recipe_wins_over_the_main_config_and_the_command_line_over_both() -> None:
    values = composed_values("ppo_megatron_trainer", "experiment=quickstart", "data.train_batch_size=7")
    assert values["data"]["train_batch_size"] == 7
    assert values["data"]["max_prompt_length"] == 16
    assert values["data"]["prompt_key"] == "prompt"


@pytest.mark.parametrize("prefix", ["actor_rollout_ref.ref", "critic", "reward.model"])
def test_a_role_takes_the_actors_axes_unless_it_has_its_own(prefix: str) -> None:
    actors = {"actor_rollout_ref.actor.megatron.tensor_model_parallel_size": 4}
    own = {f"{prefix}.megatron.tensor_model_parallel_size": 2}
    for changes, expected in ((actors, 4), (actors | own, 2)):
        values = composed_values("ppo_megatron_trainer", **changes)
        section: Any = values
        for name in prefix.split("."):
            section = section[name]
        assert section["megatron"]["tensor_model_parallel_size"] == expected


def _main_ppo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megarl.main_ppo", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_file_of_the_users_own_starts_from_ours_and_only_prints_what_it_composes_to(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [ppo_megatron_trainer, _self_]\n"
        "algorithm: {adv_estimator: grpo}\n"
        "actor_rollout_ref:\n"
        "  actor: {optim: {lr: 1e-6}, megatron: {tensor_model_parallel_size: 8}}\n"
    )
    options = ["--config-dir=.", "--config-name=mine", "--cfg", "job", "--resolve"]
    done = _main_ppo(tmp_path, *options, "data.train_batch_size=256")
    assert done.returncode == 0, done.stderr
    values = yaml.safe_load(done.stdout)
    assert values["algorithm"]["adv_estimator"] == "grpo"
    assert values["data"]["train_batch_size"] == 256
    assert values["actor_rollout_ref"]["ref"]["megatron"]["tensor_model_parallel_size"] == 8
    assert build_config(PPOConfig, values).actor_rollout_ref.actor.optim.lr == 1e-6
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_mistakes_of_the_command_line_end_a_run_before_it_starts_with_all_of_them(tmp_path: Path) -> None:
    done = _main_ppo(
        tmp_path,
        "--config-name=ppo_megatron_trainer",
        "data.trian_batch_size=4",
        "data.max_prompt_length=x",
        "~data.prompt_key",
    )
    assert done.returncode == 2
    write = "fix: correct data.train_files or data.val_files, or write it: python -m megarl.data.prepare --help"
    assert done.stderr == (
        "ConfigError: 7 problems in the configuration:\n"
        "  1. data.trian_batch_size = 4  (command line): no such key\n"
        "      fix: did you mean 'train_batch_size'?\n"
        "  2. data.max_prompt_length = 'x'  (command line): must be an integer\n"
        "  3. data.prompt_key  (command line): is missing\n"
        "      fix: start from one of megarl's own configs, or set data.prompt_key\n"
        "  4. critic.model.path = None  (conf/critic/common.yaml:3, from actor_rollout_ref.model.path at "
        "conf/model/hf_model.yaml:1): must name a Hugging Face folder\n"
        "      fix: critic.model.path=/path/to/model\n"
        "  5. actor_rollout_ref.model.path = None  (conf/model/hf_model.yaml:1): must name a Hugging Face folder\n"
        "      fix: actor_rollout_ref.model.path=/path/to/model\n"
        "  6. data.train_files = '~/data/gsm8k/train.parquet'  (conf/data/legacy_data.yaml:1): "
        f"~/data/gsm8k/train.parquet does not exist. {write}\n"
        "  7. data.val_files = '~/data/gsm8k/test.parquet'  (conf/data/legacy_data.yaml:3): "
        f"~/data/gsm8k/test.parquet does not exist. {write}\n"
    )
    assert not any(tmp_path.iterdir())
