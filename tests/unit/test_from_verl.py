"""verl's scripts and keys become ours, and what doesn't is said."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megarl.config.build import build_config, section_of
from megarl.config.defaults import default_values
from megarl.config.schema import PPOConfig
from megarl.config.verl_keys import KINDS, Row, ours_for, verl_row, verl_rows
from megarl.errors import ConfigError
from megarl.from_verl.check import needed, overrides, problems, written
from megarl.from_verl.convert import CONVERTERS, Settings, Unused
from megarl.from_verl.docs import page
from megarl.from_verl.read import VerlRun, parsed, read_run
from megarl.from_verl.report import report_text
from megarl.from_verl.translate import Translation, translated

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "data" / "from_verl"
ACTOR, ROLLOUT, CORRECTION = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "algorithm.rollout_correction"
ROWS = list(verl_rows().values())


@cache
def keys_of(schema: Any = PPOConfig, path: str = "") -> Mapping[str, Any]:
    """Return every key and section of the schema, with its type."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(schema).items():
        key, inner = f"{path}{name}", section_of(kind) or kind
        found[key] = kind
        if dataclasses.is_dataclass(inner):
            found |= keys_of(inner, f"{key}.")
    return found


def script(name: str, *arguments: str) -> Translation:
    return needed(translated(read_run([str(SCRIPTS / name), *arguments])))


def of(*texts: str) -> Translation:
    return translated(read_run(texts))


def leaf(values: Mapping[str, Any], key: str) -> Any:
    for name in key.split("."):
        values = values[name]
    return values


def rows_with_ours() -> Iterator[Row]:
    return (row for row in ROWS if row.kind not in ("none", "missing"))


def test_every_row_has_a_kind_and_a_note_where_it_has_no_key_of_ours() -> None:
    for row in ROWS:
        assert row.kind in KINDS, row
        assert row.note or row.kind not in ("none", "missing", "meaning"), row
        assert (row.by is not None) <= (row.kind in ("converted", "meaning")), row
        assert (row.ours is None) == (row.kind in ("same", "none", "missing")), row


def test_every_key_of_ours_exists() -> None:
    wrong = [row.verl for row in rows_with_ours() if row.our_key(row.verl).removesuffix(".*") not in keys_of()]
    assert not wrong


def test_every_converter_is_there_and_used() -> None:
    assert {row.by for row in ROWS if row.by} == set(CONVERTERS)


def test_a_row_is_there_for_each_default_that_differs_and_for_no_other() -> None:
    ours = translated(VerlRun({"actor_rollout_ref.rollout.n": 4})).defaults
    assert ours[f"{ACTOR}.ppo_mini_batch_size"] == 1024
    values = default_values("ppo_megatron_trainer")
    assert [key for key, value in ours.items() if value == leaf(values, key)] == []


def test_defaults_of_a_critic_count_where_there_is_one() -> None:
    assert "critic.optim.weight_decay" in of("algorithm.adv_estimator=gae").defaults
    assert not any(key.startswith("critic.") for key in of("algorithm.adv_estimator=grpo").defaults)


@pytest.mark.parametrize(
    ("texts", "ours"),
    [
        (("data.train_batch_size=512",), {"data.train_batch_size": 512}),
        ((f"{ACTOR}.ppo_mini_batch_size=256", f"{ROLLOUT}.n=5"), {f"{ACTOR}.ppo_mini_batch_size": 1280}),
        ((f"{ACTOR}.ppo_micro_batch_size_per_gpu=4",), {f"{ACTOR}.ppo_micro_batch_size_per_gpu": 4}),
        (
            ("data.train_batch_size=1024", f"{ACTOR}.ppo_epochs=2", f"{ACTOR}.optim.lr_warmup_steps=10"),
            {f"{ACTOR}.lr_scheduler.warmup_steps": 80},
        ),
        (
            (f"{ACTOR}.optim.lr_warmup_steps_ratio=0.1", "trainer.total_training_steps=50"),
            {f"{ACTOR}.lr_scheduler.lr_warmup_steps_ratio": 0.1},
        ),
        (("trainer.save_freq=-1", "trainer.test_freq=5"), {"trainer.save_freq": None, "trainer.test_freq": 5}),
        ((f"{ACTOR}.policy_loss.loss_mode=vanilla",), {f"{ACTOR}.policy_loss": "ppo_clip"}),
        (
            (f"{ACTOR}.policy_loss.loss_mode=gspo",),
            {f"{ACTOR}.policy_loss": "gspo", f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean"},
        ),
        (
            (f"{ACTOR}.policy_loss.loss_mode=kl_cov", f"{ACTOR}.policy_loss.kl_cov_ratio=0.002",
             f"{ACTOR}.policy_loss.clip_cov_ratio=0.1"),
            {f"{ACTOR}.policy_loss_settings.cov_share": 0.002},
        ),
        (("data.truncation=left",), {"data.overlong_prompts": "left"}),
        (("data.truncation=middle",), {"data.overlong_prompts": "middle"}),
        (("data.truncation=left", "data.filter_overlong_prompts=True"), {"data.overlong_prompts": "filter"}),
        (("+data.apply_chat_template_kwargs.enable_thinking=False",),
         {"data.apply_chat_template_kwargs.enable_thinking": False}),
        (("data.truncation=error",), {"data.overlong_prompts": "error"}),
        (("custom_reward_function.path=a.py", "custom_reward_function.name=f"),
         {"reward.path": "a.py", "reward.function": "f"}),
        ((f"{ROLLOUT}.log_prob_use_dynamic_bsz=True",), {f"{ACTOR}.log_prob_use_dynamic_bsz": True}),
        ((f"{ROLLOUT}.val_kwargs.temperature=1.0",), {f"{ROLLOUT}.val_kwargs.temperature": 0}),
        ((f"{ROLLOUT}.val_kwargs.temperature=1.0", f"{ROLLOUT}.val_kwargs.do_sample=True"),
         {f"{ROLLOUT}.val_kwargs.temperature": 1.0}),
        ((f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_is_threshold=3"),
         {f"{CORRECTION}.level": "token", f"{CORRECTION}.cap": 3}),
        ((f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_is_threshold='0.5_4.0'"),
         {f"{CORRECTION}.level": "token", f"{CORRECTION}.band": [0.5, 4.0]}),
        ((f"{CORRECTION}.rollout_rs='token_k1,seq_mean_k3'", f"{CORRECTION}.rollout_rs_threshold='0.25_2,0.01'"),
         {f"{CORRECTION}.rejections": [
             {"criterion": "token", "low": 0.5, "high": 4.0},
             {"criterion": "sequence_k3", "low": 0.0, "high": 0.01},
         ]}),
        (("algorithm.rollout_is=True", "algorithm.rollout_is_threshold=2.0", "algorithm.rollout_is_level=sequence"),
         {f"{CORRECTION}.level": "sequence", f"{CORRECTION}.cap": 2.0}),
        ((f"{ACTOR}.tis_imp_ratio_cap=2",), {f"{CORRECTION}.level": "token", f"{CORRECTION}.cap": 2}),
        (("reward_model.enable=True", "reward_model.model.path=rm"), {"reward.model.path": "rm"}),
        (("trainer.logger=['console','swanlab']",), {"trainer.logger": ["console"]}),
        (("algorithm.adv_estimator=rloo_vectorized",), {"algorithm.adv_estimator": "rloo"}),
        (("algorithm.adv_estimator=gdpo", "+algorithm.gdpo_reward_keys=['format','acc']",
          "+algorithm.gdpo_reward_weights=[1.0,0.5]"),
         {"algorithm.adv_estimator": "gdpo", "algorithm.gdpo_reward_keys": ["format", "acc"],
          "algorithm.gdpo_reward_weights": [1.0, 0.5]}),
        (("custom_reward_function.path=a.py", "+custom_reward_function.reward_kwargs.weight=0.5"),
         {"reward.path": "a.py", "reward.kwargs.weight": 0.5}),
        ((f"{CORRECTION}.bypass_mode=True", f"{CORRECTION}.rollout_rs=seq_mean_k1",
          f"{CORRECTION}.rollout_rs_threshold='0.5_2'", f"{CORRECTION}.rollout_is=token"),
         {f"{CORRECTION}.bypass": True, f"{CORRECTION}.level": None,
          f"{CORRECTION}.rejections": [{"criterion": "geometric", "low": 0.5, "high": 2.0}]}),
        ((f"{ACTOR}.policy_loss.loss_mode=gspo", f"{CORRECTION}.bypass_mode=True"),
         {f"{ACTOR}.policy_loss": "ppo_clip"}),
        ((f"{CORRECTION}.bypass_mode=True", f"{CORRECTION}.loss_type=reinforce", f"{CORRECTION}.rollout_is=token",
          f"{CORRECTION}.rollout_is_threshold=2", f"{ACTOR}.policy_loss.loss_mode=vanilla"),
         {f"{CORRECTION}.bypass": True, f"{ACTOR}.policy_loss": "gpg", f"{CORRECTION}.level": "token",
          f"{CORRECTION}.cap": 2}),
    ],
)  # fmt: skip
def test_values_become_ours(texts: tuple[str, ...], ours: dict[str, Any]) -> None:
    found = of(*texts).ours
    assert {key: found.get(key) for key in ours} == ours


@pytest.mark.parametrize(
    ("texts", "what"),
    [
        ((f"{ACTOR}.policy_loss.loss_mode=dppo_kl",), "the policy loss dppo_kl"),
        (("algorithm.adv_estimator=optimal_token_baseline",), "the estimator optimal_token_baseline"),
        ((f"{CORRECTION}.bypass_mode=True", f"{CORRECTION}.loss_type=other"), "the loss other beside a bypass"),
        (("actor_rollout_ref.model.lora.rank=8",), "LoRA"),
        (
            ("actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora_adapter_path=adapter"),
            "LoRA that starts from an adapter",
        ),
        ((f"{ROLLOUT}.multi_turn.enable=True",), "multi-turn rollouts"),
        ((f"{ACTOR}.megatron.override_transformer_config.num_layers_in_last_pipeline_stage=11",), "stages of other"),
        (("trainer.resume_mode=auto",), "resuming"),
        ((f"{CORRECTION}.rollout_rs=seq_max_k2", f"{CORRECTION}.rollout_rs_threshold=1"), "rejection by seq_max_k2"),
        (("no.such.key=1",), "isn't known"),
    ],
)
def test_what_is_not_there_is_named(texts: tuple[str, ...], what: str) -> None:
    assert any(what in text for text in of(*texts).missing.values())


@pytest.mark.parametrize(
    "text",
    [
        "actor_rollout_ref.model.lora.rank=0",
        f"{ROLLOUT}.multi_turn.enable=False",
        f"{ROLLOUT}.data_parallel_size=1",
        "trainer.resume_mode=disable",
        "reward_model.enable=False",
        "reward_model.reward_manager=naive",
        "trainer.balance_batch=True",
        f"{ACTOR}.megatron.override_transformer_config.persist_layer_norm=True",
        "actor_rollout_ref.model.use_remove_padding=False",
        f"{ACTOR}.clip_ratio=0.3",
        f"{CORRECTION}.loss_type=ppo_clip",
        "custom_reward_function.reward_kwargs.weight=0.5",
        f"{ACTOR}.fsdp_config.param_offload=True",
    ],
)
def test_what_asks_for_nothing_is_no_override(text: str) -> None:
    found = translated(VerlRun({"model_engine": "megatron", **read_run([text]).given}))
    assert not found.ours
    assert not found.missing
    assert any(line.startswith(text.partition("=")[0]) for line in found.unused)


def test_grpo_without_kl_is_said_by_name() -> None:
    assert of("algorithm.adv_estimator=grpo").ours["algorithm.kl_free"] is True
    assert "algorithm.kl_free" not in of("algorithm.adv_estimator=grpo", f"{ACTOR}.use_kl_loss=True").ours


def test_adam_on_the_host_leaves_nothing_to_move() -> None:
    run = Settings({f"{ACTOR}.optim.override_optimizer_config.optimizer_cpu_offload": True})
    assert isinstance(CONVERTERS["actor_optimizer_offload"](True, run, ""), Unused)
    assert isinstance(CONVERTERS["actor_precision_aware"](True, run, ""), Unused)
    assert CONVERTERS["actor_precision_aware"](True, Settings({}), "") is True


def test_a_share_of_the_run_gives_way_to_steps() -> None:
    given = {"critic.optim.lr_warmup_steps_ratio": 0.1}
    assert CONVERTERS["critic_warmup_ratio"](0.1, Settings(given), "") == 0.1
    answer = CONVERTERS["critic_warmup_ratio"](0.1, Settings({**given, "critic.optim.lr_warmup_steps": 5}), "")
    assert isinstance(answer, Unused)


def test_a_dense_run_passes_the_checks() -> None:
    found = script("dense_grpo.sh")
    assert problems(found) == []
    assert not found.missing and not found.opened
    assert found.ours[f"{ACTOR}.ppo_mini_batch_size"] == 1280
    assert found.ours["data.train_files"] == ["~/data/gsm8k/train.parquet", "~/data/math/train.parquet"]
    assert found.ours[f"{ACTOR}.log_prob_micro_batch_size_per_gpu"] == 8
    assert found.ours["trainer.save_freq"] is None
    assert found.defaults[f"{ACTOR}.lr_scheduler.type"] == "constant"
    assert any("256 prompts x 5 = 1,280 rollouts" in line for line in found.changed)


def test_a_run_with_experts_passes_the_checks_and_names_what_is_missing_and_open() -> None:
    found = script("experts_dapo.sh")
    assert problems(found) == []
    assert set(found.missing) == {"trainer.resume_mode"}
    assert found.opened == ["trainer.experiment_name=run_$(date +%Y%m%d)"]
    expected = {
        f"{ACTOR}.ppo_max_token_len_per_gpu": 20480,
        f"{ACTOR}.megatron.expert_model_parallel_size": 8,
        f"{ACTOR}.megatron.optimizer_on_host": True,
        f"{ACTOR}.megatron.recompute.granularity": "full",
        f"{ACTOR}.lr_scheduler.warmup_steps": 160,
        f"{ACTOR}.policy_loss": "gspo",
        f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean",
        f"{ROLLOUT}.gpu_memory_utilization": 0.6,
        f"{CORRECTION}.level": "token",
        "reward.overlong_buffer.len": 4096,
        "data.overlong_prompts": "left",
        "trainer.nnodes": 2,
    }
    assert {key: found.ours.get(key) for key in expected} == expected
    assert found.defaults[f"{CORRECTION}.cap"] == 2.0
    for idle in ("ppo_micro_batch_size_per_gpu", "kl_loss_coef", "megatron.optimizer_offload"):
        assert f"{ACTOR}.{idle}" not in found.ours


def test_variables_of_a_script_and_further_overrides_are_given_beside_it() -> None:
    found = script("experts_dapo.sh", "NNODES=4", "ENGINE=sglang", "data.train_batch_size=256", "ACTOR_TP=8")
    assert found.ours["trainer.nnodes"] == 4
    assert found.ours[f"{ROLLOUT}.gpu_memory_utilization"] == 0.5
    assert found.ours["data.train_batch_size"] == 256
    assert found.ours[f"{ACTOR}.megatron.expert_model_parallel_size"] == 4


def test_a_run_with_a_critic_passes_the_checks_without_what_is_missing() -> None:
    found = script("critic_lora.sh")
    assert problems(found) == []
    assert set(found.missing.values()) == {"LoRA", "the engine's own options"}
    assert found.ours["critic.lr_scheduler.lr_warmup_steps_ratio"] == 0.1
    assert found.defaults["critic.megatron.tensor_model_parallel_size"] == 1


def test_a_report_is_a_command_and_comments() -> None:
    found = script("experts_dapo.sh")
    command, *comments = report_text(found, problems(found)).split("\n\n")
    assert command.startswith("python -m megarl.main_ppo --config-name=ppo_megatron_trainer \\\n")
    assert r'"trainer.experiment_name=\"run_$(date +%Y%m%d)\""' in command
    assert all(line.startswith("#") for comment in comments for line in comment.splitlines())
    checked = subprocess.run(["bash", "-n"], input=command, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        1e-6,
        "plain",
        "~/a b.parquet",
        "it's [odd], {x}",
        'say "x"',
        "a\\b",
        'a\\"',
        "a\\",
        "null",
        "1",
        [1, "~/x"],
    ],
)
def test_a_written_value_is_read_as_it_is(value: Any) -> None:
    assert parsed(written(value)) == value


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("trainer.critic_warmup", 3, "verl's trainer.critic_warmup is critic.warmup_steps here"),
        (f"{ROLLOUT}.calculate_log_probs", True, "has no effect here: they are always there"),
        ("actor_rollout_ref.model.lora_adapter_path", "a", "isn't there yet: LoRA that starts from an adapter"),
        (
            "custom_reward_function",
            {"path": "x.py", "name": "f"},
            "custom_reward_function.name is reward.function here",
        ),
        ("trainer.bogus", 1, "keys here"),
    ],
)
def test_an_unknown_key_that_is_verls_is_answered_with_ours(key: str, value: Any, fix: str) -> None:
    values: dict[str, Any] = {"actor_rollout_ref": {"rollout": {}, "model": {}}, "trainer": {}}
    *sections, name = key.split(".")
    leaf(values, ".".join(sections)).__setitem__(name, value) if sections else values.__setitem__(name, value)
    with pytest.raises(ConfigError) as caught:
        build_config(PPOConfig, values)
    assert [fix in problem.fix for problem in caught.value.problems if problem.key == key] == [True]


def test_a_key_of_ours_is_answered_with_nothing() -> None:
    assert ours_for("data.train_batch_size", 1) == ""
    assert verl_row(f"{ROLLOUT}.engine_kwargs.vllm.x") is verl_rows()[f"{ROLLOUT}.engine_kwargs.*"]


def test_a_yaml_of_overrides_and_one_of_sections_say_the_same(tmp_path: Path) -> None:
    one, other = tmp_path / "a.yaml", tmp_path / "b.yaml"
    one.write_text("- trainer.critic_warmup=2\n- +data.seed=1\n")
    other.write_text("defaults: [ppo_trainer]\ntrainer: {critic_warmup: 2}\ndata: {seed: 1}\n")
    assert read_run([str(one)]) == read_run([str(other)])


@pytest.mark.parametrize(
    ("text", "name", "allowed"),
    [
        ("echo hello", "run.sh", "calls no trainer"),
        ("python3 -m verl.trainer.main_ppo 'a b'", "run.sh", "is not key=value"),
        ("a: [", "run.yaml", "can't be read as YAML"),
        ("3", "run.yaml", "must be a list"),
    ],
)
def test_what_cannot_be_read_is_an_error(tmp_path: Path, text: str, name: str, allowed: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=allowed):
        read_run([str(tmp_path / name)])


def test_a_config_of_the_users_own_is_an_open_point(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text("python -m verl.trainer.main_ppo --config-name my_megatron data.seed=1\n")
    found = translated(read_run([str(tmp_path / "run.sh")]))
    assert "--config-name=my_megatron" in found.opened[0]
    assert found.ours == {"trainer.seed": 1}


def test_a_run_on_fsdp_gets_the_config_of_that_backend() -> None:
    found = of(f"{ACTOR}.fsdp_config.param_offload=True")
    assert found.backend == "ppo_trainer"
    assert found.ours == {f"{ACTOR}.fsdp_config.param_offload": True}
    assert not [problem for problem in problems(found) if "fsdp" in str(problem)]


def test_all_overrides_are_ones_that_hydra_reads() -> None:
    assert all("=" in text for text in overrides(script("dense_grpo.sh")))


@pytest.mark.parametrize(("arguments", "code"), [(["data.seed=1"], 0), (["no_such_file.sh"], 2), ([], 2), (["-h"], 0)])
def test_the_exit_code_says_whether_the_input_was_read(arguments: list[str], code: int) -> None:
    command = [sys.executable, "-m", "megarl.from_verl", *arguments]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == code


def test_the_page_is_up_to_date() -> None:
    stale = "docs/from_verl.md is stale: python -m megarl.from_verl.docs > docs/from_verl.md"
    assert (ROOT / "docs" / "from_verl.md").read_text(encoding="utf-8") == page(), stale
