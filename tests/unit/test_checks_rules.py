from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

from megarl.catalog import SINKS
from megarl.checks import algorithm as algorithm_rules
from megarl.checks import effects, idle, rules
from megarl.checks.rules import model_problems, require
from megarl.config.schema import PPOConfig, SFTConfig
from megarl.errors import ConfigError, Problem
from megarl.weights.model_shape import ModelShape
from tests.unit.composed_configs import ppo_config, problems_without_files, roles_in, sft_config
from tests.unit.model_shapes import model_shape

Changes = Mapping[str, object]

MODELS = "actor_rollout_ref"
ACTOR, ROLLOUT, REF = f"{MODELS}.actor", f"{MODELS}.rollout", f"{MODELS}.ref"
TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP, EP = "virtual_pipeline_model_parallel_size", "expert_model_parallel_size"
RECOMPUTE = f"{ACTOR}.megatron.recompute"
OVERRIDES, REF_OVERRIDES = (f"{role}.megatron.override_transformer_config" for role in (ACTOR, REF))
CORRECTION = "algorithm.rollout_correction"
REJECTION = {"criterion": "token", "low": 0, "high": 2}

GAE: Changes = {"algorithm.adv_estimator": "gae", f"{ROLLOUT}.n": 1, f"{ACTOR}.use_kl_loss": False}
RLOO: Changes = {"algorithm.adv_estimator": "rloo", f"{ACTOR}.use_kl_loss": False}

GDPO: Changes = {"algorithm.adv_estimator": "gdpo", "algorithm.gdpo_reward_keys": ["correct", "format"]}
BYPASSED_GPG: Changes = {
    f"{CORRECTION}.bypass": True, f"{CORRECTION}.level": "token", f"{ACTOR}.policy_loss": "gpg"
}  # fmt: skip

SERVED: Changes = {f"{ROLLOUT}.placement": "server"}

SHARED: Changes = SERVED | {f"{ROLLOUT}.n_gpus_per_node": 0}

AHEAD: Changes = SERVED | {"trainer.mode": "one_step_off", f"{CORRECTION}.preset": "token_tis"}

ASYNC: Changes = AHEAD | {"trainer.mode": "async"}

JUDGE: Changes = {"reward.model.path": "judge"}

# Any python file does here: what it registers is seen when it is loaded.
OWN: Changes = {"algorithm.path": __file__, "algorithm.adv_estimator": "mine"}

# What is changed in a config without problems, the keys of the problems that follow, and what the first one says.
BROKEN: list[tuple[Changes, list[str], str]] = [
    ({f"{MODELS}.model.path": None}, [f"{MODELS}.model.path"], "must name a Hugging Face folder"),
    (
        {f"{MODELS}.model.lora_rank": 8, f"{MODELS}.model.target_modules": ["nothing"]},
        [f"{MODELS}.model.lora_rank"],
        "has adapters on FSDP only",
    ),
    ({f"{ACTOR}.optim.beta": [0.9]}, [f"{ACTOR}.optim.beta"], "two numbers"),
    ({f"{ACTOR}.optim.beta": [0.9, 1.0]}, [f"{ACTOR}.optim.beta"], "less than 1"),
    ({f"{ACTOR}.optim.beta": [0.9, float("nan")]}, [f"{ACTOR}.optim.beta"], "less than 1"),
    (
        {f"{ACTOR}.lr_scheduler.warmup_steps": 50, f"{ACTOR}.lr_scheduler.lr_warmup_steps_ratio": 0.1},
        [f"{ACTOR}.lr_scheduler.lr_warmup_steps_ratio"],
        f"contradicts {ACTOR}.lr_scheduler.warmup_steps = 50",
    ),
    ({f"{ACTOR}.optim.min_lr": 1.0}, [f"{ACTOR}.optim.min_lr"], f"at most {ACTOR}.optim.lr = 1e-06"),
    (
        {f"{ACTOR}.megatron.{TP}": 3, f"{REF}.megatron.{TP}": 1},
        [f"{ACTOR}.megatron.{TP}"],
        "must divide the 8 ranks (trainer.nnodes x trainer.n_gpus_per_node); products that do: 1, 2, 4, 8",
    ),
    ({f"{REF}.megatron.{PP}": 5}, [f"{REF}.megatron.{PP}"], "must divide the 8 ranks"),
    (
        {f"{ACTOR}.megatron.{TP}": 4, f"{ACTOR}.megatron.{PP}": 4, f"{REF}.megatron.{PP}": 1},
        [f"{ACTOR}.megatron.{TP} x {ACTOR}.megatron.{PP}"],
        "must divide the 8 ranks",
    ),
    (
        {f"{ACTOR}.megatron.{TP}": 2, f"{ACTOR}.megatron.{EP}": 8, f"{REF}.megatron.{EP}": 1},
        [f"{ACTOR}.megatron.{TP} x {ACTOR}.megatron.{EP}"],
        "must divide the 8 ranks",
    ),
    (
        {f"{REF}.megatron.{CP}": 3},
        [f"{REF}.megatron.{CP}"],
        "must divide the 8 ranks",
    ),
    (
        {f"{ACTOR}.megatron.{VPP}": 2, f"{REF}.megatron.{VPP}": None},
        [f"{ACTOR}.megatron.{VPP}"],
        f"has no effect where {ACTOR}.megatron.{PP} is 1",
    ),
    ({f"{RECOMPUTE}.granularity": "full"}, [f"{RECOMPUTE}.method", f"{RECOMPUTE}.num_layers"], "must be set where"),
    (
        {f"{RECOMPUTE}.granularity": "selective", f"{RECOMPUTE}.num_layers": 1},
        [f"{RECOMPUTE}.num_layers"],
        "has no effect where actor_rollout_ref.actor.megatron.recompute.granularity is selective",
    ),
    ({f"{RECOMPUTE}.method": "block"}, [f"{RECOMPUTE}.method"], "granularity is null"),
    (
        {f"{ACTOR}.megatron.optimizer_on_host": True, f"{ACTOR}.megatron.optimizer_offload": True},
        [f"{ACTOR}.megatron.optimizer_offload"],
        f"contradicts {ACTOR}.megatron.optimizer_on_host=true",
    ),
    (
        {f"{ACTOR}.megatron.optimizer_on_host": True, f"{ACTOR}.megatron.use_distributed_optimizer": False},
        [f"{ACTOR}.megatron.use_distributed_optimizer"],
        f"must be true where {ACTOR}.megatron.optimizer_on_host is true",
    ),
    ({OVERRIDES: {"num_layers": 4}, REF_OVERRIDES: {}}, [f"{OVERRIDES}.num_layers"], "is decided by megarl"),
    ({OVERRIDES: {"apply_rope_fusoin": 4}, REF_OVERRIDES: {}}, [f"{OVERRIDES}.apply_rope_fusoin"], "is no field of"),
    (
        {f"{ACTOR}.lr_scheduler.type": "constant", f"{ACTOR}.optim.min_lr": 1e-7},
        [f"{ACTOR}.optim.min_lr"],
        "has no effect where actor_rollout_ref.actor.lr_scheduler.type is constant",
    ),
    (
        {**GAE, "critic.lr_scheduler.type": "constant", "critic.optim.min_lr": 1e-7},
        ["critic.optim.min_lr"],
        "has no effect where critic.lr_scheduler.type is constant",
    ),
    (
        {f"{ROLLOUT}.name": "sglang", f"{ROLLOUT}.expert_parallel_size": 2},
        [f"{ROLLOUT}.expert_parallel_size"],
        "must be 1 where rollout.name is sglang",
    ),
    ({f"{ROLLOUT}.name": "sglang", f"{ROLLOUT}.top_p": 0.9}, [f"{ROLLOUT}.top_p"], "must be 1.0 on sglang"),
    ({f"{ROLLOUT}.name": "sglang", f"{ROLLOUT}.top_k": 20}, [f"{ROLLOUT}.top_k"], "must be null on sglang"),
    (
        {f"{ROLLOUT}.max_num_batched_tokens": 255},
        [f"{ROLLOUT}.max_num_batched_tokens"],
        f"at least {ROLLOUT}.max_num_seqs = 256",
    ),
    ({"reward.function": "mine"}, ["reward.function"], "has an effect only where reward.path names a file"),
    ({f"{ACTOR}.kl_loss_coef": 0.0}, [f"{ACTOR}.kl_loss_coef"], "the reference would be kept for nothing"),
    (
        {"algorithm.use_kl_in_reward": True, "algorithm.kl_ctrl.kl_coef": 0, "algorithm.kl_ctrl.type": "adaptive"},
        ["algorithm.kl_ctrl.kl_coef"],
        "must be above 0",
    ),
    (
        {"algorithm.filter_groups.enable": True, "algorithm.filter_groups.max_num_gen_batches": 1},
        ["algorithm.filter_groups.max_num_gen_batches"],
        "must be at least 2",
    ),
    (
        {f"{ACTOR}.policy_loss": "clip_cov", f"{ACTOR}.policy_loss_settings.cov_low": 5},
        [f"{ACTOR}.policy_loss_settings.cov_low"],
        f"less than {ACTOR}.policy_loss_settings.cov_high = 5",
    ),
    (
        {f"{ACTOR}.clip_ratio": 0.3, f"{ACTOR}.clip_ratio_low": 0.2, f"{ACTOR}.clip_ratio_high": 0.28},
        [f"{ACTOR}.clip_ratio"],
        "clip_ratio_low or clip_ratio_high is null",
    ),
    ({f"{CORRECTION}.bypass": True, f"{ROLLOUT}.top_p": 0.9}, [f"{ROLLOUT}.top_p"], "of the kept tokens alone"),
    ({f"{CORRECTION}.preset": "icepop", f"{ROLLOUT}.top_k": 50}, [f"{ROLLOUT}.top_k"], "must be null"),
    ({f"{CORRECTION}.rejections": [REJECTION | {"low": 2}]}, [f"{CORRECTION}.rejections[0].low"], "its high = 2"),
    ({f"{CORRECTION}.rejections": [REJECTION | {"high": None}]}, [f"{CORRECTION}.rejections[0].high"], "nothing"),
    ({**GAE, "critic.model.path": ""}, ["critic.model.path"], "must name a Hugging Face folder"),
    ({**GAE, "critic.optim.beta": []}, ["critic.optim.beta"], "two numbers"),
    ({**GAE, f"critic.megatron.{PP}": 3}, [f"critic.megatron.{PP}"], "must divide the 8 ranks"),
    ({**JUDGE, f"reward.model.megatron.{PP}": 3}, [f"reward.model.megatron.{PP}"], "must divide the 8 ranks"),
    (
        {f"{ACTOR}.policy_loss": "gspo", f"{ACTOR}.loss_agg_mode": "token-mean"},
        [f"{ACTOR}.loss_agg_mode"],
        "makes gspo another algorithm",
    ),
    ({f"{ACTOR}.policy_loss": "gpg", f"{ACTOR}.ppo_epochs": 2}, [f"{ACTOR}.ppo_epochs"], "gpg has no ratio"),
    ({**JUDGE, "reward.model.coef": 0.0}, ["reward.model.coef"], "the reward model would be kept for nothing"),
    ({"reward.model.coef": 2.0}, ["reward.model.coef"], "only where reward.model.path names a model"),
    ({**JUDGE, "reward.num_workers": 4}, ["reward.num_workers"], "only where a function scores"),
    (
        {**JUDGE, "reward.model.use_dynamic_bsz": True, "reward.model.forward_max_token_len_per_gpu": 1535},
        ["reward.model.forward_max_token_len_per_gpu"],
        "needs at least 1536",
    ),
    ({"trainer.logger": ["consol"]}, ["trainer.logger"], "must be among console, tensorboard"),
    ({f"{ROLLOUT}.{TP}": 3}, [f"{ROLLOUT}.{TP}"], "must divide the 8 ranks"),
    (
        {f"{ACTOR}.use_dynamic_bsz": True, f"{ACTOR}.ppo_max_token_len_per_gpu": 1535},
        [f"{ACTOR}.ppo_max_token_len_per_gpu"],
        "data.max_prompt_length + data.max_response_length = 1536 needs at least 1536",
    ),
    (
        {f"{REF}.log_prob_use_dynamic_bsz": True, f"{MODELS}.model.use_remove_padding": False},
        [f"{MODELS}.model.use_remove_padding"],
        "must be true where use_dynamic_bsz is",
    ),
    ({"data.train_file_weights": [1.0, 2.0]}, ["data.train_file_weights"], "for each of the 1 data.train_files"),
    ({f"{MODELS}.hybrid_engine": False}, [f"{MODELS}.hybrid_engine"], "is said by rollout.placement"),
    (AHEAD | {f"{ROLLOUT}.placement": "colocated"}, ["trainer.mode"], "samples while the ranks train"),
    (AHEAD | {f"{CORRECTION}.preset": None}, ["trainer.mode"], "trains on rollouts of older weights"),
    (
        ASYNC | {"algorithm.adv_estimator": "remax", f"{ACTOR}.use_kl_loss": False},
        ["trainer.mode"],
        "compares with a greedy one",
    ),
    (ASYNC | {"algorithm.filter_groups.enable": True}, ["algorithm.filter_groups.enable"], "takes what is complete"),
    (SHARED | {"trainer.nnodes": 2}, ["trainer.nnodes"], "must be 1 where"),
    (SHARED | {f"{ROLLOUT}.nnodes": 2}, [f"{ROLLOUT}.nnodes"], "must be 1 where"),
    (ASYNC | SHARED, ["trainer.mode"], "rest while it trains"),
    (
        SERVED | {f"{ROLLOUT}.n_gpus_per_node": 3, f"{ROLLOUT}.{TP}": 2},
        [f"{ROLLOUT}.{TP}"],
        f"must divide the 3 devices of the engines ({ROLLOUT}.n_gpus_per_node)",
    ),
    ({"reward.name": "gsm8k", "reward.path": "r.py"}, ["reward.name"], "contradicts reward.path = 'r.py'"),
    ({"algorithm.adv_estimator": "groo"}, ["algorithm.adv_estimator"], "must be one of gae, grpo"),
    ({f"{ACTOR}.policy_loss": "ppo_clp"}, [f"{ACTOR}.policy_loss"], "must be one of ppo_clip, gspo"),
    ({**OWN, "algorithm.path": "nothing.py"}, ["algorithm.path"], "there is no such .py file"),
    ({**OWN, "algorithm.path": str(Path(__file__).parent)}, ["algorithm.path"], "there is no such .py file"),
    ({"algorithm.path": __file__}, ["algorithm.path"], "has no effect: grpo and ppo_clip are megarl's own"),
    ({f"{ROLLOUT}.n": 1}, [f"{ROLLOUT}.n"], "grpo compares the rollouts of a prompt: at least 2"),
    ({**RLOO, f"{ROLLOUT}.n": 1}, [f"{ROLLOUT}.n"], "rloo compares the rollouts of a prompt: at least 2"),
    ({f"{ACTOR}.use_kl_loss": False}, [f"{ACTOR}.use_kl_loss"], "algorithm.use_kl_in_reward"),
    ({"algorithm.kl_free": True}, ["algorithm.kl_free"], "contradicts"),
    ({"critic.enable": True}, ["critic.enable"], "grpo reads no values"),
    ({**GAE, "critic.enable": False}, ["critic.enable"], "gae needs a critic's values"),
    ({"algorithm.lam": 0.95}, ["algorithm.lam"], "has no effect on grpo; read by gae"),
    ({"algorithm.gamma": 0.9}, ["algorithm.gamma"], "has no effect on grpo; read by gae"),
    ({**RLOO, "algorithm.norm_adv_by_std_in_grpo": False}, ["algorithm.norm_adv_by_std_in_grpo"], "no effect on rloo"),
    ({"algorithm.kl_ctrl.type": "adaptive"}, ["algorithm.kl_ctrl.type"], "steers the KL in the reward, which is off"),
    (
        {"algorithm.kl_ctrl.type": "adaptive", "algorithm.use_kl_in_reward": True, "algorithm.kl_ctrl.horizon": 9},
        ["algorithm.kl_ctrl.horizon"],
        "at least a fifth of a step: 820",
    ),
    ({**GAE, "algorithm.filter_groups.enable": True}, ["algorithm.filter_groups.enable"], "filtering is for grpo"),
    (
        {"reward.overlong_buffer.enable": True, "reward.overlong_buffer.len": 513},
        ["reward.overlong_buffer.len"],
        "at most data.max_response_length = 512",
    ),
    ({f"{CORRECTION}.preset": "token_tis", f"{CORRECTION}.level": "token"}, [f"{CORRECTION}.preset"], "are set too"),
    (
        {f"{CORRECTION}.preset": "token_tis", f"{CORRECTION}.bypass": True},
        [f"{CORRECTION}.preset"],
        "weighs by the ratio to the engine, which the ratio of ppo_clip is",
    ),
    (
        {f"{CORRECTION}.level": "token", f"{CORRECTION}.bypass": True, f"{ACTOR}.policy_loss": "cispo"},
        [f"{CORRECTION}.level"],
        "which the ratio of cispo is",
    ),
    (
        {**BYPASSED_GPG, f"{CORRECTION}.normalize": True},
        [f"{CORRECTION}.normalize"],
        "the mean weight of the step, which no optimizer step of a bypass knows",
    ),
    (
        {f"{CORRECTION}.preset": "metrics_only", f"{CORRECTION}.bypass": True},
        [f"{CORRECTION}.preset"],
        "a bypass computes none before the update",
    ),
    ({f"{CORRECTION}.off_policy_mask_delta": 0.1, f"{ROLLOUT}.top_p": 0.9}, [f"{ROLLOUT}.top_p"], "of the kept tokens"),
    ({"algorithm.adv_estimator": "gdpo"}, ["algorithm.gdpo_reward_keys"], "needs the names of the components"),
    ({**GDPO, f"{ROLLOUT}.n": 1}, [f"{ROLLOUT}.n"], "gdpo compares the rollouts of a prompt: at least 2"),
    (
        {**GDPO, "algorithm.use_kl_in_reward": True, f"{ACTOR}.use_kl_loss": False},
        ["algorithm.use_kl_in_reward"],
        "is no component of the reward: gdpo reads",
    ),
    ({**GDPO, "reward.overlong_buffer.enable": True}, ["reward.overlong_buffer.enable"], "is no component"),
    ({**GDPO, **JUDGE, "reward.path": "r.py"}, ["reward.model.path"], "is no component of the reward"),
    ({**GDPO, "algorithm.gdpo_reward_weights": [1]}, ["algorithm.gdpo_reward_weights"], "for each of the 2"),
    ({**GDPO, "algorithm.gdpo_reward_weights": [1, 0]}, ["algorithm.gdpo_reward_weights"], "a number above 0"),
    ({**GDPO, "algorithm.gdpo_reward_keys": ["a", "a"]}, ["algorithm.gdpo_reward_keys"], "once, and never score: a"),
    ({**GDPO, "algorithm.gdpo_reward_keys": ["a", "score"]}, ["algorithm.gdpo_reward_keys"], "never score: score"),
    ({"algorithm.gdpo_reward_keys": ["a"]}, ["algorithm.gdpo_reward_keys"], "no effect on grpo; read by gdpo"),
    (
        {**OWN, **JUDGE, "algorithm.gdpo_reward_keys": ["a"]},
        ["algorithm.gdpo_reward_keys"],
        "names components of a function's reward, and a model scores alone",
    ),
    (
        {"algorithm.overlong_filtering": True, f"{ROLLOUT}.ignore_eos": True},
        ["algorithm.overlong_filtering"],
        "cuts every response at the limit",
    ),
    ({f"{CORRECTION}.cap": 2.0}, [f"{CORRECTION}.cap"], "acts on weights, and there are none"),
    ({f"{CORRECTION}.level": "token", f"{CORRECTION}.band": [2, 1]}, [f"{CORRECTION}.band"], "0 <= low < high"),
]  # fmt: skip

SOUND: list[Changes] = [
    {},
    {**OWN, "critic.enable": True, "algorithm.gamma": 0.9, "algorithm.filter_groups.enable": True},
    {**OWN, f"{ROLLOUT}.n": 1, "critic.enable": False},
    {"algorithm.path": __file__, f"{ACTOR}.policy_loss": "mine", f"{ACTOR}.policy_loss_settings.tau_positive": 2.0},
    RLOO,
    GAE,
    {**GAE, "critic.enable": True, "algorithm.lam": 0.95, "algorithm.gamma": 0.99, "critic.model.path": "other"},
    {"algorithm.norm_adv_by_std_in_grpo": False},
    {f"{ACTOR}.use_kl_loss": False, "algorithm.kl_free": True},
    {f"{ACTOR}.use_kl_loss": False, "algorithm.use_kl_in_reward": True, "algorithm.kl_ctrl.type": "adaptive"},
    {f"{ACTOR}.lr_scheduler.lr_warmup_steps_ratio": 0.1},
    {f"{ACTOR}.lr_scheduler.warmup_steps": None, f"{ACTOR}.lr_scheduler.lr_warmup_steps_ratio": 0.1},
    {f"{ACTOR}.optim.beta": [0, 0.999], f"{ACTOR}.optim.min_lr": 1e-6},
    {f"{ACTOR}.megatron.{TP}": 4, f"{ACTOR}.megatron.{PP}": 2, f"{REF}.megatron.{TP}": 1, f"{ROLLOUT}.{TP}": 8},
    {"trainer.nnodes": 3, f"{ACTOR}.megatron.{TP}": 3, f"{ROLLOUT}.{TP}": 6},
    {"trainer.logger": list(SINKS)},
    {"trainer.logger": []},
    {"reward.path": "r.py"},
    {"reward.name": "gsm8k"},
    JUDGE,
    {**JUDGE, "reward.model.coef": -0.5, "reward.name": "gsm8k", "reward.num_workers": 4},
    {**JUDGE, f"{ACTOR}.megatron.{TP}": 8, f"reward.model.megatron.{TP}": 1, f"reward.model.megatron.{PP}": 8},
    {"critic.enable": False},
    {"algorithm.filter_groups.enable": True},
    {"reward.overlong_buffer.enable": True, "reward.overlong_buffer.len": 512},
    {f"{CORRECTION}.preset": "token_tis"},
    {f"{CORRECTION}.bypass": True},
    {f"{CORRECTION}.bypass": True, f"{CORRECTION}.preset": "geometric"},
    {f"{CORRECTION}.bypass": True, f"{CORRECTION}.rejections": [REJECTION], f"{CORRECTION}.off_policy_mask_delta": 0},
    {**BYPASSED_GPG, f"{CORRECTION}.cap": 2},
    {**BYPASSED_GPG, "algorithm.path": __file__, f"{ACTOR}.policy_loss": "mine"},
    {f"{CORRECTION}.preset": "token_tis", f"{CORRECTION}.off_policy_mask_delta": 1e-4},
    {**GDPO, "algorithm.gdpo_reward_weights": [1, 0.5], "algorithm.norm_adv_by_std_in_grpo": False},
    {"algorithm.overlong_filtering": True, "reward.overlong_buffer.enable": True},
    {"algorithm.overlong_filtering": True, f"{ROLLOUT}.ignore_eos": True, f"{ROLLOUT}.stop_token_ids": [5]},
    {f"{CORRECTION}.level": "token", f"{CORRECTION}.band": [0.5, 2], f"{CORRECTION}.normalize": True},
    {f"{CORRECTION}.rejections": [REJECTION, REJECTION | {"low": 0.5, "high": None}]},
    {f"{CORRECTION}.preset": "metrics_only", f"{ROLLOUT}.top_p": 0.9, f"{ROLLOUT}.top_k": 50},
    {f"{ACTOR}.clip_ratio": 0.3, f"{ACTOR}.clip_ratio_high": 0.4},
    {f"{ACTOR}.clip_ratio_low": 0.2, f"{ACTOR}.clip_ratio_high": 0.28},
    {f"{ROLLOUT}.max_num_batched_tokens": 256},
    {f"{RECOMPUTE}.granularity": "selective"},
    {f"{ACTOR}.megatron.optimizer_on_host": True},
    {f"{RECOMPUTE}.granularity": "full", f"{RECOMPUTE}.method": "uniform", f"{RECOMPUTE}.num_layers": 1},
    {f"{ACTOR}.megatron.{PP}": 2, f"{ACTOR}.megatron.{VPP}": 2, f"{ACTOR}.megatron.{CP}": 2},
    {f"{ACTOR}.megatron.{EP}": 8, f"{REF}.megatron.{EP}": 1},
    {OVERRIDES: {"apply_rope_fusion": False}},
    {OVERRIDES: {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.001}},
    {f"{ACTOR}.megatron.use_precision_aware_optimizer": True, f"{ACTOR}.megatron.exp_avg_dtype": "bfloat16"},
]


def _problems(check: Callable[[], None]) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        check()
    return caught.value.problems


@pytest.mark.parametrize(("changes", "keys", "said"), BROKEN)
def test_a_broken_rule_is_one_problem_with_its_key_and_what_is_allowed(
    changes: Changes, keys: list[str], said: str
) -> None:
    problems = _problems(lambda: require(problems_without_files(ppo_config(**changes))))
    assert [p.key for p in problems] == keys
    assert said in problems[0].allowed


@pytest.mark.parametrize("changes", SOUND)
def test_a_config_that_breaks_no_rule_passes(changes: Changes) -> None:
    require(problems_without_files(ppo_config(**changes)))


def _rules_of(module: ModuleType, reads: Mapping[str, str]) -> dict[str, Callable[..., list[Problem]]]:
    """Return the rules that a module defines of what ``reads`` annotates and nothing else."""
    found = {name: rule for name, rule in vars(module).items() if isinstance(rule, FunctionType)}
    returned = [{**reads, "return": problems} for problems in ("Problems", "Iterator[Problem]")]
    return {name: rule for name, rule in found.items() if rule.__annotations__ in returned}


def test_every_rule_is_broken_by_some_config_here() -> None:
    configs = [ppo_config(**changes) for changes, _, _ in BROKEN]
    models = dict.fromkeys((f"{MODELS}.model", "critic.model", "reward.model"), model_shape())
    models_mistaken = models | {f"{MODELS}.model": model_shape().with_value_head()}
    roles = [roles_in(c, **found) for c in configs for found in (models, models_mistaken)]
    tried: list[tuple[str, Callable[..., list[Problem]], Sequence[object]]] = [
        (name, rule, read)
        for reads, read in (
            ({"c": "PPOConfig"}, configs),
            ({"roles": "Sequence[Role]"}, roles),
            ({"role": "Role"}, [role for of_run in roles for role in of_run]),
        )
        for module in (rules, algorithm_rules, effects, idle)
        for name, rule in _rules_of(module, reads).items()
    ]
    names = [name for name, _, _ in tried]
    assert len(names) > 20 and {"settings_have_an_effect", "a_model_is_named", "axes_make_sense"} <= set(names)
    assert [name for name, rule, of in tried if not any(list(rule(it)) for it in of)] == []


def test_all_broken_rules_are_reported_together() -> None:
    changes = {f"{MODELS}.model.path": None, f"{ROLLOUT}.n": 1, "trainer.logger": ["consol", "wand"]}
    problems = _problems(lambda: require(problems_without_files(ppo_config(**changes))))
    assert [p.key for p in problems] == [f"{ROLLOUT}.n", f"{MODELS}.model.path", "trainer.logger", "trainer.logger"]
    assert [p.fix for p in problems[2:]] == ["did you mean 'console'?", "did you mean 'wandb'?"]


def test_an_estimators_misspelling_gets_the_nearest_name() -> None:
    [problem] = _problems(lambda: require(problems_without_files(ppo_config(**{"algorithm.adv_estimator": "rlo"}))))
    assert problem.fix == "did you mean 'rloo'?"


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"model.path": None}, ["model.path"]),
        ({"optim.beta": [0.9, 1.5]}, ["optim.beta"]),
        ({"optim.min_lr": 1.0}, ["optim.min_lr"]),
        ({f"megatron.{TP}": 3}, [f"megatron.{TP}"]),
        ({"megatron.recompute.granularity": "full"}, ["megatron.recompute.method", "megatron.recompute.num_layers"]),
        ({"lr_scheduler.type": "constant", "optim.min_lr": 1e-7}, ["optim.min_lr"]),
        ({"trainer.logger": ["csv"]}, ["trainer.logger"]),
        ({"model.path": None, "trainer.logger": ["csv"]}, ["model.path", "trainer.logger"]),
    ],
)
def test_an_sft_config_is_held_to_its_rules(changes: Changes, keys: list[str]) -> None:
    require(problems_without_files(sft_config()))
    assert [p.key for p in _problems(lambda: require(problems_without_files(sft_config(**changes))))] == keys


SHORT: Changes = {"data.max_prompt_length": 16, "data.max_response_length": 16}


def _of_model(config: PPOConfig | SFTConfig, actors: ModelShape | None = None, **others: ModelShape) -> list[Problem]:
    """Return the problems of a config with its models. actors: a small one. others: by the section that names them."""
    models = dict.fromkeys((f"{MODELS}.model", "model"), actors or model_shape())
    roles = roles_in(config, **models, **others)
    known = [p for role in roles for p in idle.axes_have_something_to_split(role)]
    return [*model_problems(config, roles), *rules.without_followers(known, roles)]


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        # The model has 4 heads, 2 key-value heads, 3 layers, a feed-forward size of 8 and 32 positions.
        ({f"{ACTOR}.megatron.{TP}": 8, f"{REF}.megatron.{TP}": 1}, [f"{ACTOR}.megatron.{TP}"]),
        ({f"{ACTOR}.megatron.{PP}": 4, f"{REF}.megatron.{PP}": 1}, [f"{ACTOR}.megatron.{PP}"]),
        ({f"{ACTOR}.megatron.{TP}": 8}, [f"{ACTOR}.megatron.{TP}"]),  # of the reference's, which follow, not once more
        ({f"{REF}.megatron.{TP}": 8}, [f"{REF}.megatron.{TP}"]),
        ({f"{ROLLOUT}.{TP}": 8}, [f"{ROLLOUT}.{TP}"]),
        ({"data.max_prompt_length": 17}, ["data.max_prompt_length + data.max_response_length"]),
    ],
)
def test_a_model_that_its_axes_cannot_split_is_an_error(changes: Changes, keys: list[str]) -> None:
    require(_of_model(ppo_config(**SHORT)))
    config = ppo_config(**{**SHORT, **changes})
    assert [p.key for p in _problems(lambda: require(_of_model(config)))] == keys


@pytest.mark.parametrize(
    ("sizes", "tp", "said"),
    [
        ({"num_heads": 6}, 4, "must divide the model's 6 attention heads"),
        ({"ffn_size": 6}, 4, "must divide the model's 6 feed-forward size"),
        (
            {"num_heads": 12, "num_kv_heads": 6},
            4,
            "must divide the model's 6 key-value heads, or be a multiple",
        ),
        ({"num_heads": 6, "num_kv_heads": 3, "ffn_size": 6}, 2, "must divide the model's 3 key-value heads"),
    ],
)
def test_tensor_parallel_ranks_divide_heads_and_the_feed_forward_layer(
    sizes: Mapping[str, Any], tp: int, said: str
) -> None:
    config = ppo_config(**SHORT, **{f"{ROLLOUT}.{TP}": tp, "trainer.n_gpus_per_node": 12})
    [problem] = _problems(lambda: require(_of_model(config, replace(model_shape(), **sizes))))
    assert problem.key == f"{ROLLOUT}.{TP}" and said in problem.allowed


def test_more_ranks_than_kv_heads_are_fine_where_they_are_a_multiple() -> None:
    require(_of_model(ppo_config(**SHORT, **{f"{ACTOR}.megatron.{TP}": 4, f"{ROLLOUT}.{TP}": 4})))


def test_the_reference_is_not_asked_to_fit_where_no_kl_term_needs_it() -> None:
    changes = {**SHORT, f"{REF}.megatron.{TP}": 8}
    require(_of_model(ppo_config(**changes, **{f"{ACTOR}.use_kl_loss": False, "algorithm.kl_free": True})))
    assert len(_problems(lambda: require(_of_model(ppo_config(**changes))))) == 1


def test_a_critic_fits_its_own_axes_and_knows_the_actors_tokens() -> None:
    config, shape = ppo_config(**SHORT, **GAE), model_shape()
    require(_of_model(config, shape, **{"critic.model": shape}))
    more_tokens = replace(shape, vocab_size=11)
    [problem] = _problems(lambda: require(_of_model(config, more_tokens, **{"critic.model": shape})))
    assert problem.key == "critic.model.path"
    config = ppo_config(**SHORT, **GAE, **{f"critic.megatron.{PP}": 4})
    [problem] = _problems(lambda: require(_of_model(config, shape, **{"critic.model": shape})))
    assert problem.key == f"critic.megatron.{PP}"


def test_a_reward_model_fits_its_own_axes_and_reads_whole_rollouts_of_the_actors_tokens() -> None:
    judge, sound = model_shape().with_value_head(), {**SHORT, **JUDGE}

    def problem(shape: ModelShape, vocab_size: int = 10, **changes: object) -> tuple[str, str]:
        config, actors = ppo_config(**(sound | changes)), replace(model_shape(), vocab_size=vocab_size)
        [found] = _problems(lambda: require(_of_model(config, actors, **{"reward.model": shape})))
        return found.key, found.allowed

    require(_of_model(ppo_config(**sound), **{"reward.model": judge}))
    assert problem(judge, **{f"reward.model.megatron.{PP}": 4})[0] == f"reward.model.megatron.{PP}"
    for shape, vocab_size, said in (
        (judge, 11, "its vocabulary of 10 doesn't hold the actor's 11 tokens"),
        (model_shape(), 10, "is a language model, which scores nothing"),
        (replace(judge, max_positions=31), 10, "= 31 don't hold the longest rollout, 32 tokens"),
    ):
        key, allowed = problem(shape, vocab_size)
        assert key == "reward.model.path" and said in allowed


def test_an_sft_model_fits_its_axes_and_its_longest_chat() -> None:
    require(_of_model(sft_config(**{"data.max_length": 32})))
    config = sft_config(**{"data.max_length": 33, f"megatron.{TP}": 8})
    keys = [p.key for p in _problems(lambda: require(_of_model(config)))]
    assert keys == [f"megatron.{TP}", "data.max_length"]
