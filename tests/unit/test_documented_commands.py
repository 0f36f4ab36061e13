"""The commands that a tutorial, README.md and docs/extending.md show do what they say, as far as one process can."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from pathlib import Path

import pytest

from megarl.checks.run import CheckedRun, check_ppo, check_sft, without_effect
from megarl.config.command_line import parse_command_line
from megarl.config.compose import compose
from megarl.config.programs import PPO, PROGRAMS, SFT, for_recipe
from megarl.config.schema import PPOConfig
from megarl.errors import ConfigError, ModelFolderError, Problem, RewardError
from megarl.plan.devices import device
from megarl.plan.of_run import planned

REPOSITORY = Path(__file__).resolve().parents[2]
MEGATRON, MODEL = "--config-name=ppo_megatron_trainer", "actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct"

# What the tutorial types after `python -m megarl.main_ppo`, with the settings that then do nothing.
TUTORIAL: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "grpo and a learning rate": (
        ("algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.optim.lr=1e-6", "actor_rollout_ref.rollout.n=4"),
        (),
    ),
    "several files": (("data.train_files=['a.parquet','b.parquet']", "data.train_batch_size=512"), ()),
    "several files on several lines": (
        ("data.train_files=[\n  'a.parquet',\n  'b.parquet'\n]", "data.train_batch_size=512"),
        (),
    ),
    "a mini-batch and a coefficient": (
        ("actor_rollout_ref.actor.ppo_mini_batch_size=128", "algorithm.kl_ctrl.kl_coef=0.01"),
        ("algorithm.kl_ctrl.kl_coef",),
    ),
    "the same with grpo": (
        (
            "algorithm.adv_estimator=grpo",
            "actor_rollout_ref.rollout.n=4",
            "actor_rollout_ref.actor.ppo_mini_batch_size=128",
            "algorithm.kl_ctrl.kl_coef=0.01",
        ),
        ("algorithm.kl_ctrl.kl_coef",),
    ),
    "grpo without a critic": (
        (
            "algorithm.adv_estimator=grpo",
            "actor_rollout_ref.rollout.n=4",
            "actor_rollout_ref.actor.use_kl_loss=true",
            "critic.enable=false",
        ),
        (),
    ),
    "rloo": (("algorithm.adv_estimator=rloo", "actor_rollout_ref.rollout.n=8"), ()),
    "gae": (
        (
            "algorithm.adv_estimator=gae",
            "algorithm.lam=0.95",
            "critic.enable=true",
            "critic.model.path=Qwen/Qwen2.5-7B-Instruct",
            "critic.optim.lr=1e-5",
            "actor_rollout_ref.rollout.n=1",
        ),
        (),
    ),
    "an engine of four ranks": (("actor_rollout_ref.rollout.tensor_model_parallel_size=4",), ()),
}


def _checked(*arguments: str) -> CheckedRun[PPOConfig]:
    values = compose(parse_command_line(list(arguments), PPO.config_name)).values()
    return check_ppo(values, files_may_be_missing=True)


@pytest.mark.parametrize("backend", [(), (MEGATRON,)], ids=["fsdp", "megatron"])
@pytest.mark.parametrize("name", TUTORIAL)
def test_a_command_of_the_tutorial_is_checked_and_says_what_does_nothing(name: str, backend: tuple[str, ...]) -> None:
    typed, idle = TUTORIAL[name]
    checked = _checked(*backend, MODEL, *typed)
    assert tuple(problem.key for problem in without_effect(checked, checked.num_steps)) == idle
    assert checked.actor.layout.is_fsdp == (not backend)
    if "data.train_files" in typed[0]:
        assert checked.config.data.train_files == ("a.parquet", "b.parquet")


@pytest.mark.parametrize("name", TUTORIAL)
def test_a_command_of_the_tutorial_fits_eight_devices_of_80_gb_on_the_default_backend(name: str) -> None:
    """A 7B model whole on every device, as Megatron's defaults have it, does not."""
    plan = planned(_checked(MODEL, *TUTORIAL[name][0]), device("A100-80"))
    assert plan.num_ranks == 8 and plan.fits


def test_the_gsm8k_recipe_of_the_tutorial_fits_eight_devices_of_80_gb() -> None:
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    checked = _checked(
        *(MODEL, "algorithm.adv_estimator=grpo", "data.train_batch_size=256", "trainer.total_epochs=10"),
        *("data.max_prompt_length=512", "data.max_response_length=512"),
        *(f"{actor}.optim.lr=1e-6", f"{actor}.ppo_mini_batch_size=64", f"{actor}.ppo_micro_batch_size_per_gpu=4"),
        *(f"{actor}.use_kl_loss=true", f"{actor}.kl_loss_coef=0.001"),
        *(f"{rollout}.n=4", f"{rollout}.temperature=0.6", f"{rollout}.gpu_memory_utilization=0.4"),
    )
    plan = planned(checked, device("A100-80"))
    batch = plan.batches["actor"]
    assert (batch.num_rollouts, batch.num_optimizer_steps) == (1024, 16)
    assert (batch.rollouts_per_pass, batch.num_accumulation_steps) == (32, 2)
    assert plan.fits and plan.time is not None and plan.time.total > 0


# The tutorial's own files, and what a plan has of them.
FILES = {
    "my_config": """
defaults: [ppo_trainer]
algorithm: {adv_estimator: grpo}
data: {train_files: ['~/data/gsm8k/train.parquet'], train_batch_size: 256}
actor_rollout_ref:
  model: {path: Qwen/Qwen2.5-7B-Instruct}
  actor: {optim: {lr: 1e-6}}
  rollout: {name: vllm, n: 4}
trainer: {n_gpus_per_node: 8, total_epochs: 10}
""",
    "large_model": """
defaults: [ppo_megatron_trainer, _self_]
actor_rollout_ref:
  model: {path: Qwen/Qwen3-235B-A22B}
  actor: {megatron: {tensor_model_parallel_size: 8, pipeline_model_parallel_size: 4}}
trainer: {n_gpus_per_node: 8, nnodes: 4}
""",
}


@pytest.mark.parametrize("defaults", ["[ppo_trainer]", "[ppo_trainer, _self_]"])
def test_values_of_a_file_of_the_tutorial_win_with_and_without_self_and_it_fits(tmp_path: Path, defaults: str) -> None:
    (tmp_path / "my_config.yaml").write_text(FILES["my_config"].replace("[ppo_trainer]", defaults))
    checked = _checked(f"--config-dir={tmp_path}", "--config-name=my_config")
    config = checked.config
    assert (config.data.train_batch_size, config.actor_rollout_ref.rollout.n) == (256, 4)
    assert (config.algorithm.adv_estimator, config.trainer.total_epochs) == ("grpo", 10)
    assert checked.actor.layout.is_fsdp and planned(checked, device("A100-80")).fits


def test_a_file_of_the_tutorial_for_a_large_model_is_laid_out_as_it_says(tmp_path: Path) -> None:
    (tmp_path / "large_model.yaml").write_text(FILES["large_model"])
    checked = _checked(f"--config-dir={tmp_path}", "--config-name=large_model")
    assert checked.config.trainer.n_gpus_per_node == 8
    assert (checked.actor.layout.tp, checked.actor.layout.pp, len(checked.roles)) == (8, 4, 2)


def test_a_critic_and_a_reward_model_are_put_on_fsdp_beside_an_actor_on_megatron() -> None:
    checked = _checked(MEGATRON, MODEL, "algorithm.adv_estimator=gae", "critic=dp_critic", "reward=dp_reward")
    assert {role.name: role.layout.is_fsdp for role in checked.roles} == {"actor": False, "critic": True}
    model = checked.config.reward.model
    assert model.fsdp_config is not None and model.megatron is None
    page = (REPOSITORY / "docs" / "fsdp.md").read_text(encoding="utf-8")
    assert "`reward=dp_reward`" in page and "`critic=dp_critic`" in page


def _commands(page: str) -> list[list[str]]:
    """Return the commands of a page's shell blocks as words, without what a comment says."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def _of_trainers() -> list[list[str]]:
    """Return the commands of README.md and docs/extending.md that train or plan, from the program's name on."""
    commands = [c for page in ("README.md", "docs/extending.md") for c in _commands(page)]
    found = [c[c.index("-m") + 1 :] for c in commands if "-m" in c]
    return [c for c in found if c[0] in ("megarl.main_ppo", "megarl.main_sft", "megarl.plan")]


MADE_BEFORE = re.compile(r"is neither a folder nor a model|there is no such \.py file|must name a Hugging Face folder")


def test_the_pages_show_commands_of_every_program() -> None:
    assert {command[0] for command in _of_trainers()} == {"megarl.main_ppo", "megarl.main_sft", "megarl.plan"}


@pytest.mark.parametrize("command", _of_trainers(), ids=" ".join)
def test_a_documented_command_composes_and_all_its_keys_exist(command: list[str]) -> None:
    program, *typed = command
    own = ("--device", "--gpus", "--advise", "...")
    arguments = [word for word in typed if not (program == "megarl.plan" and word.startswith(own)) and word != "..."]
    main, programs = {"megarl.main_ppo": (PPO, (PPO,)), "megarl.main_sft": (SFT, (SFT,))}.get(program, (PPO, PROGRAMS))
    values = compose(for_recipe(parse_command_line(arguments, main.config_name), programs)).values()
    problems: tuple[Problem, ...] = ()
    with suppress(ModelFolderError, RewardError):  # of folders and files that the commands before it make
        try:
            check = check_ppo if "actor_rollout_ref" in values else check_sft
            check(values, files_may_be_missing=True)
        except ConfigError as error:
            problems = error.problems
    assert [p.key for p in problems if not MADE_BEFORE.search(p.allowed)] == []
