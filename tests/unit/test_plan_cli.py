from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.forked import ROOT, run_forked
from tests.launch import python, run

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
MICRO = f"{ACTOR}.ppo_micro_batch_size_per_gpu"
GRPO = (
    "algorithm.adv_estimator=grpo",
    f"{ROLLOUT}.n=8",
    f"{ACTOR}.use_kl_loss=true",
    f"{ACTOR}.ppo_mini_batch_size=256",
)
EXPERTS = "actor_rollout_ref.model.path=Qwen/Qwen3-30B-A3B", *GRPO
DENSE = (
    "actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct",
    *GRPO,
    f"{MICRO}=4",
    f"{ROLLOUT}.gpu_memory_utilization=0.4",
)
TOO_MANY = "trainer.nnodes=4096", "data.train_batch_size=32768", f"{ACTOR}.ppo_mini_batch_size=262144"
FITS, DOES_NOT_FIT, MISTAKE = 0, 1, 2


def _plan(*arguments: str) -> tuple[int, str, str]:
    """Return the command's exit code and what it printed to stdout and to stderr.

    The main config is Megatron's, unless a recipe or the arguments say which.
    """
    of_recipe = any(argument.startswith(("experiment=", "--config-name=")) for argument in arguments)
    main = () if of_recipe else ("--config-name=ppo_megatron_trainer",)
    ended = run_forked("plan", ("-m", "tests.unit.plan_program", *main, *arguments), ROOT)
    *errors, loaded = ended.stderr.splitlines()
    assert loaded == "loaded:", "what is heavy"
    return ended.code, ended.stdout, "\n".join(errors)


def test_the_command_by_itself_prints_the_same(tmp_path: Path) -> None:
    arguments = "--config-name=ppo_megatron_trainer", *DENSE, "--device=h200"
    done = run(python("-m", "megarl.plan", *arguments), tmp_path)
    assert (done.code, done.stdout, done.stderr) == _plan(*arguments)


def _typed(values: dict[str, Any]) -> list[str]:
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def test_a_run_that_fits_says_so_and_json_has_the_same_numbers() -> None:
    code, text, errors = _plan(*DENSE, "--device=h200")
    assert (code, errors) == (FITS, "")
    assert "  fits: " in text and "does not fit" not in text
    json_code, printed, _ = _plan(*DENSE, "--device=h200", "--json")
    plan = json.loads(printed)
    assert json_code == FITS and plan["verdict"]["fits"] and plan["verdict"]["changes"] is None
    lines = [line.split() for line in text.splitlines()]
    gib = 2**30
    for phase in plan["memory"]:
        assert sum(item["device_bytes"] for item in phase["items"]) == phase["device_bytes"]
        free = plan["device"]["memory_bytes"] - phase["device_bytes"]
        row = [*phase["phase"].split(), *(f"{n / gib:.1f}" for n in (phase["device_bytes"], free, phase["host_bytes"]))]
        assert any(line[: len(row)] == row for line in lines), row
    assert f"fits: {plan['verdict']['room_bytes'] / gib:.1f} GiB are left" in text
    assert plan["verdict"]["room_bytes"] == min(
        plan["device"]["memory_bytes"] - phase["device_bytes"] for phase in plan["memory"]
    )
    assert f"{plan['engine']['num_cached_tokens']:,} tokens a replica" in text
    assert f"{plan['checkpoint']['num_bytes'] / 1e9:.1f} GB in {plan['checkpoint']['num_files']} files" in text
    assert f"host memory a node: {plan['host_bytes_per_node'] / gib:.0f} GiB" in text
    assert f"keeps {plan['publish']['kept_bytes'] / 1e9:.2f};" in text
    assert f"Time of a step, roughly\n  {sum(plan['seconds'].values()):.1f} s " in text


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(DENSE, id="grpo"),
        pytest.param(
            (*DENSE[:1], "algorithm.adv_estimator=gae", f"{ACTOR}.ppo_mini_batch_size=256", f"{MICRO}=4"),
            id="gae",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_run_that_does_not_fit_names_changes_after_which_it_does(run: tuple[str, ...]) -> None:
    code, text, errors = _plan(*run)
    assert (code, errors) == (DOES_NOT_FIT, "")
    assert "does not fit: " in text
    json_code, printed, _ = _plan(*run, "--json")
    changes = json.loads(printed)["verdict"]["changes"]
    assert json_code == DOES_NOT_FIT and len(changes) == 3
    for change in changes:
        overrides = _typed(change["values"])
        assert f"    {' '.join(overrides)}   (costs {change['cost']})" in text
        assert _plan(*run, *overrides)[0] == FITS, overrides


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((*DENSE, f"{ACTOR}.ppo_mini_batch_size=63"), f"{ACTOR}.ppo_mini_batch_size = 63"),
        ((*DENSE, f"{ACTOR}.ppo_mini_batch_sise=64"), f"{ACTOR}.ppo_mini_batch_sise"),
        ((*DENSE, "actor_rollout_ref.model.path=nobody/has-this"), "model.path = 'nobody/has-this'"),
        ((*DENSE, "--device=H1000"), "--device = 'H1000'"),
        ((*DENSE, "--gpu-memory=-1"), "--gpu-memory = -1.0"),
        ((*DENSE, "--gpu-memory=nan"), "--gpu-memory = nan"),
        ((*DENSE, "--gpu-memory=much"), "--gpu-memory"),
        ((*DENSE, "--gpus=0"), "--gpus = 0"),
        ((*DENSE, "--gpus=12"), "--gpus = 12"),
        ((*DENSE, "--gpus=8", "trainer.n_gpus_per_node=many"), "trainer.n_gpus_per_node = 'many'"),
        ((*DENSE, *TOO_MANY), "trainer.nnodes x trainer.n_gpus_per_node = '4096 x 8'"),
        ((*DENSE, "--advize"), "--advize"),
    ],
)
def test_a_mistake_is_one_error_without_a_traceback(arguments: tuple[str, ...], named: str) -> None:
    code, text, errors = _plan(*arguments)
    assert (code, text) == (MISTAKE, "")
    assert named in errors and "Traceback" not in errors


def test_so_many_gpus_stand_in_nodes_of_the_size_given() -> None:
    for gpus, node in ((4, 4), (32, 8)):
        plan = json.loads(_plan(*DENSE, f"--gpus={gpus}", "--json", f"{MICRO}=1")[1])
        assert (plan["num_ranks"], plan["ranks_per_node"]) == (gpus, node)


@pytest.mark.long
def test_advice_names_layouts_that_fit_when_they_are_planned() -> None:
    devices = "--gpus=32", "--gpu-memory=80"
    code, printed, errors = _plan(*EXPERTS, f"{MICRO}=1", *devices, "--advise", "--json")
    advice = json.loads(printed)
    shown = errors.splitlines()
    assert code == FITS and shown[0].startswith("0 of ") and len(shown) > 2
    done, _, total, _ = shown[-1].split()
    assert done == total
    assert advice["num_ranks"] == 32 and advice["tried"] > 1000
    layouts = advice["layouts"]
    assert len(layouts) == 5
    seconds = [sum(layout["seconds"].values()) for layout in layouts]
    assert seconds == pytest.approx(sorted(seconds), abs=0.1)
    for layout in layouts:
        code, printed, _ = _plan(*EXPERTS, *_typed({MICRO: 1} | layout["values"]), *devices, "--json")
        plan = json.loads(printed)
        assert code == FITS and plan["verdict"]["room_bytes"] == layout["room_bytes"]


def _plan_on_fsdp(*arguments: str) -> tuple[int, str, str]:
    return _plan("--config-name=ppo_trainer", *DENSE, *arguments)


@pytest.mark.long
def test_advice_on_fsdp_names_settings_of_fsdp_that_fit_when_they_are_planned() -> None:
    devices = "--gpus=2", "--gpu-memory=80"
    assert _plan_on_fsdp(*devices)[0] == DOES_NOT_FIT
    code, printed, errors = _plan_on_fsdp(*devices, "--advise", "--json")
    layouts = json.loads(printed)["layouts"]
    assert code == FITS and errors.startswith("0 of ") and len(layouts) == 5
    assert any(f"{ACTOR}.fsdp_config.optimizer_offload" in layout["values"] for layout in layouts)
    assert all(".megatron." not in key for layout in layouts for key in layout["values"])
    fastest = layouts[0]
    code, printed, _ = _plan_on_fsdp(*devices, *_typed(fastest["values"]), "--json")
    plan = json.loads(printed)
    assert code == FITS and plan["verdict"]["room_bytes"] == fastest["room_bytes"]
    assert plan["seconds"] == fastest["seconds"]


def test_advice_on_fsdp_is_given_for_one_device_too() -> None:
    code, text, _ = _plan_on_fsdp("--gpus=1", "--gpu-memory=10", "--advise")
    assert code == DOES_NOT_FIT and text.endswith(" layouts fits 1 x H100 of 10.0 GiB\n")


def test_a_run_on_fsdp_that_nothing_makes_fit_is_told_what_decides_what_takes_the_most() -> None:
    code, text, errors = _plan_on_fsdp("--gpus=1", "--gpu-memory=24")
    assert (code, errors) == (DOES_NOT_FIT, "")
    assert f"actor parameters: 28.4 GiB in load; {ACTOR}.fsdp_config.fsdp_size = -1, " in text
    assert f"{ACTOR}.fsdp_config.param_offload = false" in text
    assert "Time of a step" not in text


def test_no_layout_at_all_is_said_and_counts_as_not_fitting() -> None:
    code, text, _ = _plan(*DENSE, "--gpus=1", "--gpu-memory=10", "--advise")
    assert code == DOES_NOT_FIT
    assert text.startswith("none of ") and text.endswith(" layouts fits 1 x H100 of 10.0 GiB\n")


def test_a_recipe_of_supervised_fine_tuning_is_planned_as_what_it_is() -> None:
    model = "model.path=Qwen/Qwen2.5-7B-Instruct"
    run = ("experiment=quickstart_sft", model, "trainer.n_gpus_per_node=8", "model.dtype=bfloat16")
    code, text, errors = _plan(*run, "trainer.total_training_steps=5")
    assert (code, errors) == (FITS, "")
    assert "  128 examples " in text and "  steps of the run: 5\n" in text
    assert "lr_scheduler.warmup_steps = 20: is cut to 4: the run has 5 optimizer steps" in text
    assert "KV cache" not in text and "publish" not in text and "prompts" not in text
    _, printed, _ = _plan(*run, "trainer.total_training_steps=5", "--json")
    plan = json.loads(printed)
    assert [layout["role"] for layout in plan["layout"]] == ["actor"]
    assert [phase["phase"] for phase in plan["memory"]] == ["load", "actor scoring", "actor update"]
    assert (plan["engine"], plan["publish"], plan["num_steps"]) == (None, None, 5)
    assert [idle["key"] for idle in plan["no_effect"]] == ["lr_scheduler.warmup_steps"]


def test_fine_tuning_that_does_not_fit_names_changes_after_which_it_does() -> None:
    run = (
        "experiment=quickstart_sft",
        "model.path=Qwen/Qwen2.5-7B-Instruct",
        "model.dtype=bfloat16",
        "--gpu-memory=36",
    )
    code, printed, _ = _plan(*run, "--json")
    changes = json.loads(printed)["verdict"]["changes"]
    assert code == DOES_NOT_FIT and changes
    assert _plan(*run, *_typed(changes[0]["values"]))[0] == FITS
    assert _plan(*run, "--advise")[0] == MISTAKE


def test_a_run_that_nothing_makes_fit_is_told_what_takes_the_most_and_what_decides_it() -> None:
    large = (
        "actor_rollout_ref.model.path=Qwen/Qwen3-235B-A22B",
        f"{ACTOR}.megatron.tensor_model_parallel_size=8",
        f"{ACTOR}.megatron.pipeline_model_parallel_size=4",
        "trainer.nnodes=4",
    )
    code, text, errors = _plan(*large)
    assert (code, errors) == (DOES_NOT_FIT, "")
    assert f"engine weights: 437.9 GiB in generate; {ROLLOUT}.tensor_model_parallel_size = 1\n" in text
    assert "GiB in publish; it is there because algorithm.adv_estimator = gae" in text
    assert "critic.ppo_micro_batch_size_per_gpu = 16" in text
    assert "no change of up to three of its settings makes it fit" in text


def test_what_does_nothing_is_the_first_that_a_plan_says() -> None:
    code, text, _ = _plan(*DENSE, "--device=h200", "algorithm.lam=0.5")
    assert code == FITS
    first = "No effect in this run\n  algorithm.lam = 0.5: has no effect on grpo; read by gae\nBatch\n"
    assert text.startswith(first)
    code, _, errors = _plan(*DENSE, "--device=h200", "algorithm.lam=0.5", "trainer.strict=true")
    assert code == MISTAKE and "algorithm.lam = 0.5" in errors
