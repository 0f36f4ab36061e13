"""What a model's folder and the engine make impossible is named before anything starts."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megarl.checks.rules import (
    a_prompt_fits_an_engine_step,
    the_engine_splits_the_model,
)
from megarl.checks.run import CheckedRun, check_ppo, check_sft
from megarl.checks.vllm_facts import CPU_HEAD_SIZES, vllm_serves
from megarl.config.schema import PPOConfig
from megarl.data.tokenizer import load_tokenizer
from megarl.errors import ConfigError, ModelFolderError
from megarl.parallel.layout import EngineLayout
from tests.unit.composed_configs import composed_values, ppo_config
from tests.unit.model_shapes import model_shape

REPOSITORY = Path(__file__).resolve().parents[2]
ROLLOUT = "actor_rollout_ref.rollout"
SPREAD = f"{ROLLOUT}.expert_parallel_size"
MODEL, TP, STEP = (
    "actor_rollout_ref.model.path",
    f"{ROLLOUT}.tensor_model_parallel_size",
    f"{ROLLOUT}.max_num_batched_tokens",
)
GAE = {"algorithm.adv_estimator": "gae", "actor_rollout_ref.actor.use_kl_loss": False}


@pytest.fixture
def folder(tiny_task: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the tiny task, which is also the working directory."""
    monkeypatch.chdir(tiny_task)
    return tiny_task


def _copied(folder: Path, name: str, **fields: Any) -> str:
    """Copy the tiny task's model to ``name``, with other fields of config.json."""
    copy = Path(shutil.copytree(folder / "model", folder / name, dirs_exist_ok=True))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | fields))
    return name


def _checked(changes: Mapping[str, object], **kind: Any) -> CheckedRun[PPOConfig]:
    """Check the tiny task's run on one rank with ``changes``."""
    sound: dict[str, object] = {
        MODEL: "model",
        "data.train_files": ["train.parquet"],
        "data.val_files": ["test.parquet"],
        "data.train_batch_size": 8,
        "data.max_prompt_length": 16,
        "data.max_response_length": 6,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 16,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.actor.use_kl_loss": True,
        "actor_rollout_ref.actor.lr_scheduler.warmup_steps": 1,
        f"{ROLLOUT}.n": 4,
        "reward.path": "reward.py",
        "algorithm.adv_estimator": "grpo",
        "trainer.n_gpus_per_node": 1,
        "trainer.total_training_steps": 3,
    }
    return check_ppo(composed_values("ppo_megatron_trainer", **sound | dict(changes)), **kind)


def _problem(check: Callable[[], object]) -> tuple[str, str]:
    """Return the key of the one problem, and what is allowed."""
    with pytest.raises(ConfigError) as caught:
        check()
    [problem] = caught.value.problems
    return problem.key, problem.allowed


def test_the_run_that_mistakes_are_made_in_makes_none(folder: Path) -> None:
    assert _checked({}).notes == ()


def test_a_tokenizer_larger_than_the_embedding_is_an_error_of_every_run(folder: Path) -> None:
    name = _copied(folder, "small", vocab_size=7)
    key, said = _problem(lambda: _checked({MODEL: name}))
    assert key == MODEL
    assert re.match(r"its tokenizer has token \d+, '.+', but its embedding only the 7 of", said)
    sft: dict[str, object] = {
        "model.path": name,
        "data.train_files": ["sft.parquet"],
        "data.val_files": ["sft.parquet"],
        "data.train_batch_size": 32,
        "data.max_length": 32,
    }
    assert _problem(lambda: check_sft(composed_values("sft_trainer", **sft))) == ("model.path", said)


def test_a_broken_tokenizer_is_an_error_that_names_the_file(folder: Path) -> None:
    name = _copied(folder, "broken")
    (folder / name / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFolderError, match=f"{name}/tokenizer.json is truncated or not a tokenizer"):
        _checked({MODEL: name})


@pytest.mark.parametrize(
    ("vocab_size", "tp", "padded"), [(1003, 3, 1024), (1003, 2, None), (99, 4, None), (64, 3, 64), (192, 3, None)]
)
def test_an_engines_ranks_share_the_padded_vocabulary_evenly(vocab_size: int, tp: int, padded: int | None) -> None:
    shape = replace(model_shape(), num_heads=12, num_kv_heads=12, ffn_size=24, vocab_size=vocab_size)
    problems = list(the_engine_splits_the_model(ROLLOUT, shape, EngineLayout(tp)))
    assert [p.key for p in problems] == ([] if padded is None else [TP])
    if padded:
        assert f"vocabulary of {vocab_size} padded to a multiple of 64, {padded}" in problems[0].allowed


def test_an_engines_ranks_share_the_shared_expert_evenly() -> None:
    shape = replace(model_shape("Qwen2MoeForCausalLM"), shared_expert_ffn_size=15)
    assert [p.key for p in the_engine_splits_the_model(ROLLOUT, shape, EngineLayout(2))] == [TP]


@pytest.mark.parametrize(
    ("engine", "key", "allowed"),
    [
        (EngineLayout(4), TP, "must divide the 6 of an expert's feed-forward size"),
        (EngineLayout(4, ep=4), None, ""),
        (EngineLayout(4, ep=2), SPREAD, "vLLM spreads experts over all ranks or over none"),
        (EngineLayout(8, ep=8), SPREAD, "must divide the model's 4 experts"),
    ],
)
def test_an_engines_ranks_have_experts_or_parts_of_them(engine: EngineLayout, key: str | None, allowed: str) -> None:
    shape = replace(model_shape("Qwen3MoeForCausalLM"), expert_ffn_size=6, num_heads=8, num_kv_heads=8)
    problems = [p for p in the_engine_splits_the_model(ROLLOUT, shape, engine) if p.key in (TP, SPREAD)]
    assert [p.key for p in problems if "expert" in p.allowed] == ([key] if key else [])
    assert not key or any(allowed in p.allowed for p in problems)
    if key == TP:
        assert problems[0].fix == f"{SPREAD}=4, which keeps experts whole"


def test_a_run_whose_engine_cannot_split_the_vocabulary_is_refused(folder: Path) -> None:
    sizes = {"vocab_size": 1003, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 96}
    changes = {MODEL: _copied(folder, "three", **sizes), TP: 3, "trainer.n_gpus_per_node": 3}
    batch = {"data.train_batch_size": 12, "actor_rollout_ref.actor.ppo_mini_batch_size": 48}
    key, said = _problem(lambda: _checked({**changes, **batch}))
    assert key == TP and "vocabulary of 1003 padded to a multiple of 64, 1024: vLLM demands it" in said


def test_heads_that_vllm_serves_on_no_cpu_are_refused_there_alone(folder: Path) -> None:
    name = _copied(folder, "heads_of_48", head_dim=48)
    key, said = _problem(lambda: _checked({MODEL: name}, platform="cpu"))
    assert key == MODEL and "head_dim = 48 is none that vLLM serves on cpu: 32, 64, 80" in said
    assert _checked({MODEL: name}, platform="cuda").notes == ()


@pytest.mark.parametrize(("size", "served"), [(8, True), (20, False), (32, True), (33, True), (48, True), (512, True)])
def test_on_cuda_heads_are_served_by_one_attention_or_another(size: int, served: bool) -> None:
    assert vllm_serves(size, "cuda") == served


def test_the_heads_of_a_qwen2_are_its_hidden_size_together(folder: Path) -> None:
    fields = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": 32}
    key, said = _problem(lambda: _checked({MODEL: _copied(folder, "qwen2", **fields)}))
    assert key == MODEL and "head_dim = 32 x 4 heads isn't its hidden_size = 64" in said


def test_the_sizes_of_heads_are_those_of_the_installed_vllm() -> None:
    found = find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vllm isn't installed")
    source = Path(found.submodule_search_locations[0], "v1", "attention", "backends", "cpu_attn.py").read_text()
    sizes = re.search(r"def get_supported_head_sizes.*?return (\[.*?\])", source, re.DOTALL)
    assert sizes is not None and tuple(ast.literal_eval(sizes[1])) == CPU_HEAD_SIZES


def test_a_step_of_the_engine_holds_the_longest_rollout_on_cpu() -> None:
    config = ppo_config(**{STEP: 1000})
    [problem] = a_prompt_fits_an_engine_step(config, "cpu", 1001)
    assert problem.key == STEP and "data.max_prompt_length + data.max_response_length = 1001 on CPU" in problem.allowed
    assert not list(a_prompt_fits_an_engine_step(config, "cpu", 1000))
    assert not list(a_prompt_fits_an_engine_step(config, "cuda", 1001))
    assert not list(a_prompt_fits_an_engine_step(ppo_config(), "cpu", 10**6))


def test_a_run_with_a_step_below_its_longest_rollout_is_refused_on_cpu(folder: Path) -> None:
    changes = {STEP: 21, f"{ROLLOUT}.max_num_seqs": 8}
    assert _problem(lambda: _checked(changes, platform="cpu"))[0] == STEP
    _checked(changes, platform="cuda")
    _checked({**changes, STEP: 22}, platform="cpu")


@pytest.mark.parametrize("at", ["nowhere", "empty"])
def test_a_missing_folder_is_named_by_the_key_of_its_model(folder: Path, at: str) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    missing = str(folder / at)
    with pytest.raises(ModelFolderError) as caught:
        _checked({**GAE, "critic.model.path": missing})
    assert str(caught.value).startswith(f"critic.model.path = {missing!r}")


def test_a_model_that_is_planned_by_nearly_its_name_has_a_nearest_one(folder: Path) -> None:
    with pytest.raises(ModelFolderError, match="did you mean 'Qwen/Qwen3-235B-A22B'") as caught:
        _checked({MODEL: "Qwen/Qwen3-235B"}, files_may_be_missing=True)
    assert str(caught.value).startswith(f"{MODEL} = 'Qwen/Qwen3-235B'")


def test_a_tokenizer_runs_no_code_of_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name, asked, ran = _copied(folder, "custom", model_type="custom"), [], tmp_path / "ran"
    (folder / name / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Own: pass\n")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / name / "tokenizer_config.json").write_text(json.dumps(config))

    def answer(prompt: str = "") -> str:
        asked.append(prompt)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    with pytest.raises(ModelFolderError, match="no tokenizer can be loaded from"):
        load_tokenizer(str(folder / name))
    assert asked == [] and not ran.exists()


def test_nothing_of_transformers_or_vllm_is_loaded_that_could_run_a_folders_code() -> None:
    trusting, seen = [], 0
    for path in sorted((REPOSITORY / "megarl").rglob("*.py")):
        for call in (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name not in ("from_pretrained", "LLM"):
                continue
            seen += 1
            words = {word.arg: word.value for word in call.keywords}
            value = words.get("trust_remote_code")
            if not (isinstance(value, ast.Constant) and value.value is False):
                trusting.append(f"{path.relative_to(REPOSITORY)}:{call.lineno}")
    assert seen >= 3 and trusting == []
