"""Whatever a config says, it ends in a plan or in an error that names the user's own keys, and soon."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megarl.checks.run import check_ppo
from megarl.config.schema import PPOConfig
from megarl.errors import ConfigError, ModelFolderError
from megarl.plan.devices import DEVICES, device
from megarl.plan.of_run import planned
from megarl.plan.report import plan_text
from megarl.plan.run_plan import RunPlan
from megarl.weights.model_facts.shipped import shipped_names
from tests.unit.composed_configs import composed_values

# Measured: 0.9 s, a first plan of Qwen3-235B-A22B on 32 ranks.
SECONDS_A_CONFIG_MAY_TAKE = 5
NUM_CONFIGS = 1000

ACTOR, ROLLOUT, REF = (f"actor_rollout_ref.{role}" for role in ("actor", "rollout", "ref"))
AXES = f"{ACTOR}.megatron"

SIZES = [1, 2, 4, 8, 16]
SWITCH = [False, True]
SENSIBLE: dict[str, list[Any]] = {
    "actor_rollout_ref.model.path": [*shipped_names(), *["nobody/has-this"] * 5],
    "actor_rollout_ref.model.dtype": ["bfloat16", "float32"],
    "critic.model.path": [*shipped_names()[:3], "Qwen/Qwen2.5-7B-Instruct"],
    "reward.model.path": [None, *shipped_names()[:3]],
    "trainer.nnodes": [1, 2, 4, 16, 128],
    "trainer.n_gpus_per_node": [1, 4, 8],
    "data.train_batch_size": [64, 256, 1024],
    "data.max_prompt_length": [128, 1024, 8192],
    "data.max_response_length": [128, 1024, 30000],
    f"{ROLLOUT}.n": [1, 4, 8],
    f"{ROLLOUT}.tensor_model_parallel_size": SIZES,
    f"{ROLLOUT}.gpu_memory_utilization": [0.3, 0.6, 0.9, 1.0],
    f"{ROLLOUT}.free_cache_engine": SWITCH,
    f"{ACTOR}.ppo_mini_batch_size": [64, 256, 1024],
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": [1, 2, 4],
    f"{ACTOR}.log_prob_micro_batch_size_per_gpu": [None, 1, 8],
    f"{ACTOR}.ppo_epochs": [1, 2],
    f"{ACTOR}.use_kl_loss": SWITCH,
    f"{AXES}.tensor_model_parallel_size": SIZES,
    f"{AXES}.pipeline_model_parallel_size": SIZES,
    f"{AXES}.virtual_pipeline_model_parallel_size": [None, 2],
    f"{AXES}.context_parallel_size": [1, 2],
    f"{AXES}.expert_model_parallel_size": SIZES,
    f"{AXES}.expert_tensor_parallel_size": [None, 1, 2],
    f"{AXES}.sequence_parallel": SWITCH,
    f"{AXES}.use_distributed_optimizer": SWITCH,
    f"{AXES}.overlap_grad_reduce": SWITCH,
    f"{AXES}.overlap_param_gather": SWITCH,
    f"{AXES}.ddp_bucket_size": [None, 1000],
    f"{AXES}.param_offload": SWITCH,
    f"{AXES}.grad_offload": SWITCH,
    f"{AXES}.optimizer_offload": SWITCH,
    f"{AXES}.recompute.granularity": [None, "selective", "full"],
    f"{AXES}.recompute.method": [None, "uniform", "block"],
    f"{AXES}.recompute.num_layers": [None, 1, 4],
    "critic.megatron.tensor_model_parallel_size": SIZES,
    f"{REF}.megatron.pipeline_model_parallel_size": SIZES,
    "reward.model.megatron.pipeline_model_parallel_size": SIZES,
    "algorithm.adv_estimator": ["grpo", "gae", "rloo"],
}
NONSENSE = [None, "", "abc", "???!", -1, 0, 3, 7, 1.5, 1e30, float("nan"), float("inf"), True, [], [1], {}, {"a": 1}]
HUGE = [10**6, 10**9]


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a run that mostly makes sense, with some keys changed and, half of the time, some nonsense among them."""
    # The other axes follow the actor's unless drawn.
    drawn: dict[str, Any] = {
        "actor_rollout_ref.model.path": draw(st.sampled_from(shipped_names())),
        "algorithm.adv_estimator": draw(st.sampled_from(["grpo", "gae"])),
        "trainer.nnodes": draw(st.sampled_from([1, 4, 16])),
        f"{ACTOR}.use_kl_loss": True,
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": 1,
        f"{ROLLOUT}.n": 4,
        f"{ROLLOUT}.tensor_model_parallel_size": draw(st.sampled_from([1, 2, 4])),
    }
    keys = draw(st.lists(st.sampled_from(sorted(SENSIBLE)), unique=True, max_size=8))
    drawn |= {key: draw(st.sampled_from(SENSIBLE[key])) for key in keys}
    if draw(st.booleans()):
        for key in draw(st.lists(st.sampled_from(sorted(SENSIBLE)), unique=True, min_size=1, max_size=2)):
            drawn[key] = draw(st.sampled_from([*NONSENSE, *HUGE]))
    return drawn


@cache
def _known_keys() -> frozenset[str]:
    """Return every key of the schema, sections included."""
    found: set[str] = set()

    def visit(section: Any, prefix: str) -> None:
        for name, kind in get_type_hints(section).items():
            found.add(prefix + name)
            inner = kind if is_dataclass(kind) else next((k for k in get_args(kind) if is_dataclass(k)), None)
            if inner is not None:
                visit(inner, f"{prefix}{name}.")

    visit(PPOConfig, "")
    return frozenset(found)


def _is_known(key: str) -> bool:
    """Return whether a problem names keys of the schema: one, or several that are multiplied or added."""
    return all(part in _known_keys() for part in re.split(r" [x+] ", key))


def _outcome(values: Mapping[str, Any], place: str) -> str:
    """Return ``fits``, ``does not fit`` or the name of the error, having looked at what it says."""
    plan = _plan_or_error(values, place)
    if isinstance(plan, ConfigError):
        unknown = [p.key for p in plan.problems if not _is_known(p.key) and p.allowed != "no such key"]
        assert not unknown, f"{unknown} is no key: {plan}"
        assert all(p.allowed for p in plan.problems)
        return "ConfigError"
    if isinstance(plan, ModelFolderError):
        assert "model.path" in str(plan)
        return "ModelFolderError"
    text = plan_text(plan)
    assert all(phase.device_bytes > 0 for phase in plan.phases) and plan.worst.name in text
    return "fits" if plan.fits else "does not fit"


def _plan_or_error(values: Mapping[str, Any], place: str) -> RunPlan | ConfigError | ModelFolderError:
    try:
        checked = check_ppo(values, files_may_be_missing=True)
        return planned(checked, device(place, checked.config.trainer.n_gpus_per_node))
    except (ConfigError, ModelFolderError) as error:
        return error


@pytest.mark.parametrize("count", [NUM_CONFIGS // 25, pytest.param(NUM_CONFIGS, marks=pytest.mark.long)])
def test_every_config_ends_in_a_plan_or_in_an_error_of_the_users_own_keys(count: int, record_property: Any) -> None:
    outcomes: dict[str, int] = {}
    slowest: tuple[float, dict[str, Any]] = (0.0, {})

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(changes(), st.sampled_from([*DEVICES, "cpu"]))
    def every_config(drawn: dict[str, Any], place: str) -> None:
        nonlocal slowest
        values = composed_values("ppo_megatron_trainer", **drawn)
        start = time.process_time()
        outcome = _outcome(values, place)
        taken_s = time.process_time() - start
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        slowest = max(slowest, (taken_s, drawn), key=lambda pair: pair[0])
        assert taken_s < SECONDS_A_CONFIG_MAY_TAKE, f"{taken_s:.1f} s for {drawn}"

    every_config()
    record_property("outcomes", outcomes)
    record_property("slowest_s", slowest)
    # Every kind of outcome is really among them.
    kinds = {"fits", "does not fit", "ConfigError", "ModelFolderError"}
    assert outcomes.keys() <= kinds and (outcomes.keys() == kinds or count < NUM_CONFIGS), outcomes
    assert outcomes["fits"] + outcomes["does not fit"] > count // 10, outcomes
