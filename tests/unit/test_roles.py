from __future__ import annotations

from dataclasses import replace

import pytest

from megarl.algorithm.seeds import seed_of
from megarl.batching.plan import plan_update
from megarl.batching.size import Batching, rollouts_a_pass, tokens_a_pass
from megarl.checks.run import check_ppo
from megarl.config.schema import FsdpConfig, PPOConfig, TrainedMegatronConfig
from megarl.errors import ConfigError
from megarl.parallel.layout import Layout
from megarl.plan.changes import changed, single_changes
from megarl.plan.devices import DEVICES
from megarl.plan.of_run import planned
from megarl.roles import (
    ModelFacts,
    Residency,
    Role,
    batch_plan,
    num_ranks,
    pass_keys,
    role_named,
    roles_of,
    with_total_steps,
)
from megarl.verify.roles import fsdp_section
from tests.unit.composed_configs import (
    composed_values,
    ppo_config,
    problems_without_files,
    roles_in,
    sft_config,
)
from tests.unit.model_shapes import model_shape
from tests.unit.small_roles import TRAINING, role_on

ACTOR, REF, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.ref", "actor_rollout_ref.rollout"
DATA = {"data.max_prompt_length": 100, "data.max_response_length": 200}
BY_TOKENS = {**DATA, f"{ACTOR}.use_dynamic_bsz": True, f"{ACTOR}.ppo_max_token_len_per_gpu": 1000}
GAE = {"algorithm.adv_estimator": "gae"}
JUDGE = {"reward.model.path": "judge"}


def _passes(c: PPOConfig) -> list[Batching]:
    """Return update and scoring of every role, in order."""
    return [size for role in roles_in(c) for size in (role.update, role.scoring) if size is not None]


def _bounds(**changes: object) -> list[tuple[int, int | None]]:
    """Return size and budget of the actor's update and scoring, the reference's scoring, the critic's two passes."""
    return [(p.micro_batch_size, p.max_tokens) for p in _passes(ppo_config(**GAE, **changes))]


def test_a_run_has_the_roles_that_something_needs_the_actor_first() -> None:
    def names(**changes: object) -> list[str]:
        return [role.name for role in roles_in(ppo_config(**changes))]

    assert names(**{f"{ACTOR}.use_kl_loss": False}) == ["actor"]
    assert names() == ["actor", "ref"]
    assert names(**{f"{ACTOR}.use_kl_loss": False, "algorithm.use_kl_in_reward": True}) == ["actor", "ref"]
    assert names(**GAE) == ["actor", "ref", "critic"]
    assert names(**GAE, **JUDGE) == ["actor", "ref", "critic", "reward_model"]
    assert names(**{"algorithm.path": "mine.py", "algorithm.adv_estimator": "mine", "critic.enable": True})[-1] == (
        "critic"
    )


def test_every_role_has_the_section_of_its_keys_and_of_its_axes() -> None:
    roles = roles_in(ppo_config(**GAE, **JUDGE))
    assert {role.name: (role.at("x"), role.backend_key, role.model.key) for role in roles} == {
        "actor": (f"{ACTOR}.x", f"{ACTOR}.megatron", "actor_rollout_ref.model"),
        "ref": (f"{REF}.x", f"{REF}.megatron", "actor_rollout_ref.model"),
        "critic": ("critic.x", "critic.megatron", "critic.model"),
        "reward_model": ("reward.model.x", "reward.model.megatron", "reward.model"),
    }
    assert [role.is_trained for role in roles] == [True, False, True, False]
    assert [role.update is not None for role in roles] == [True, False, True, False]


def test_the_keys_that_decide_a_pass_are_named_by_it() -> None:
    changes = {
        f"{ACTOR}.log_prob_micro_batch_size_per_gpu": 8,
        "critic.use_dynamic_bsz": True,
        "reward.model.micro_batch_size_per_gpu": 2,
    }
    roles = roles_in(ppo_config(**GAE, **JUDGE, **changes))
    assert {role.name: (role.update.key if role.update else None, role.scoring.key) for role in roles} == {
        "actor": (f"{ACTOR}.ppo_micro_batch_size_per_gpu", f"{ACTOR}.log_prob_micro_batch_size_per_gpu"),
        "ref": (None, f"{ACTOR}.log_prob_micro_batch_size_per_gpu"),
        "critic": ("critic.ppo_max_token_len_per_gpu", "critic.ppo_max_token_len_per_gpu"),
        "reward_model": (None, "reward.model.micro_batch_size_per_gpu"),
    }


def test_the_keys_of_passes_are_also_those_of_a_reference_and_reward_model_that_are_off() -> None:
    own = {f"{REF}.log_prob_micro_batch_size_per_gpu": 4, "reward.model.micro_batch_size_per_gpu": 2}
    assert pass_keys(ppo_config(**{f"{ACTOR}.use_kl_loss": False}, **own)) == {
        f"{ACTOR}.ppo_micro_batch_size_per_gpu",
        *own,
    }


@pytest.mark.parametrize(
    ("section", "changes"),
    [(ACTOR, {}), (REF, {}), ("critic", GAE)],
)
def test_a_role_without_the_section_of_a_backend_is_one_error_with_its_key(
    section: str, changes: dict[str, object]
) -> None:
    config = ppo_config(**changes)
    holder = changed(config, {f"{section}.megatron": None})
    with pytest.raises(ConfigError) as caught:
        roles_in(holder)
    [problem] = caught.value.problems
    assert (problem.key, problem.allowed) == (f"{section}.megatron", "is missing")


def test_a_reward_model_without_a_section_is_laid_out_as_the_actor() -> None:
    config = ppo_config(**JUDGE, **{f"{ACTOR}.megatron.tensor_model_parallel_size": 4})
    actor, *_, judge = roles_in(changed(config, {"reward.model.megatron": None}))
    assert (judge.name, judge.layout) == ("reward_model", actor.layout)
    assert not isinstance(judge.backend, TrainedMegatronConfig)


def test_a_section_that_no_role_needs_may_be_missing() -> None:
    config = ppo_config(**{f"{ACTOR}.use_kl_loss": False})
    for section in (REF, "critic", "reward.model"):
        config = changed(config, {f"{section}.megatron": None})
    assert [role.name for role in roles_in(config)] == ["actor"]


def test_a_role_on_fsdp_has_a_rank_for_every_part_of_the_batch_and_the_key_of_its_section() -> None:
    section = fsdp_section(Layout(8, fsdp=8))
    sections = {
        f"{ACTOR}.megatron": None,
        f"{ACTOR}.fsdp_config": replace(section, param_offload=True, optimizer_offload=True),
        f"{REF}.megatron": None,
        f"{REF}.fsdp_config": FsdpConfig(4, 2, reshard_after_forward=True, param_offload=True),
    }
    actor, ref = roles_in(changed(ppo_config(), sections))
    assert (actor.layout.dp, actor.layout.is_fsdp, actor.backend_key) == (8, True, f"{ACTOR}.fsdp_config")
    assert (ref.layout.dp, ref.layout.cp, ref.layout.fsdp, ref.backend_key) == (4, 2, 4, f"{REF}.fsdp_config")
    assert actor.residency == Residency(param_offload=True, grad_offload=True, optimizer_offload=True)
    assert ref.residency == Residency(param_offload=True)


def test_where_tensors_wait_is_as_every_role_s_own_section_says() -> None:
    changes = {
        f"{ACTOR}.megatron.grad_offload": True,
        f"{ACTOR}.megatron.optimizer_on_host": True,
        f"{REF}.megatron.param_offload": True,
        "critic.megatron.param_offload": False,
        "critic.megatron.optimizer_offload": True,
        "critic.megatron.grad_offload": False,
        "critic.megatron.optimizer_on_host": False,
        "reward.model.megatron.param_offload": True,
    }
    roles = roles_in(ppo_config(**GAE, **JUDGE, **changes))
    assert {role.name: role.residency for role in roles} == {
        "actor": Residency(grad_offload=True, optimizer_on_host=True),
        "ref": Residency(param_offload=True),
        "critic": Residency(optimizer_offload=True),
        "reward_model": Residency(param_offload=True),
    }


def test_what_an_optimizer_does_is_as_its_own_section_says() -> None:
    changes = {
        f"{ACTOR}.ppo_epochs": 2,
        f"{ACTOR}.optim.lr": 1e-5,
        "critic.optim.lr": 2e-5,
        "critic.ppo_mini_batch_size": 128,
        "critic.lr_scheduler.warmup_steps": 7,
    }
    trained = {role.name: role.training for role in roles_in(ppo_config(**GAE, **changes))}
    actor, critic = trained["actor"], trained["critic"]
    assert trained["ref"] is None and actor is not None and critic is not None
    assert (actor.lr, actor.epochs, actor.warmup_steps, actor.total_steps) == (1e-5, 2, 100, 0)
    assert (critic.lr, critic.mini_batch_size, critic.warmup_steps) == (2e-5, 128, 7)


def test_a_model_is_looked_up_for_every_section_that_names_one_and_may_stay_unknown() -> None:
    asked: list[ModelFacts] = []

    def find(facts: ModelFacts) -> ModelFacts:
        asked.append(facts)
        return facts

    roles = roles_of(ppo_config(**GAE, **JUDGE, **{"critic.model.path": "values"}), find)
    assert {(facts.key, facts.path) for facts in asked} == {
        ("actor_rollout_ref.model", "model"),
        ("critic.model", "values"),
        ("reward.model", "judge"),
    }
    assert all(role.model.known_shape is None for role in roles)
    with pytest.raises(AssertionError):
        _ = roles[0].shape


def test_a_critic_has_a_value_head_and_so_has_a_reward_model_of_which_only_the_language_model_is_known() -> None:
    c, shapes = ppo_config(**GAE, **JUDGE), dict.fromkeys(("actor_rollout_ref.model", "critic.model"), model_shape())
    without_files = roles_of(c, lambda facts: replace(facts, known_shape=model_shape()))
    assert [role.shape.value_head for role in without_files] == [False, False, True, True]
    found = roles_in(c, **shapes, **{"reward.model": model_shape()})
    assert not found[-1].shape.value_head  # its own config.json says so, which is for a rule to report


def test_sft_has_one_role_whose_keys_stand_at_the_top() -> None:
    config = sft_config(**{"data.train_batch_size": 32, "data.micro_batch_size_per_gpu": 2, "data.max_length": 100})
    [actor] = roles_in(config)
    assert (actor.name, actor.at("optim.lr"), actor.backend_key) == ("actor", "optim.lr", "megatron")
    assert actor.update == actor.scoring == rollouts_a_pass("data.micro_batch_size_per_gpu", 2, 100, Layout(8))
    assert actor.training is not None
    assert (actor.training.mini_batch_size, actor.training.epochs, actor.training.shuffle) == (32, 1, False)
    assert batch_plan(config, actor).num_optimizer_steps == 1
    assert num_ranks(config) == 8


def test_a_schedule_knows_all_optimizer_steps_of_its_run_and_the_actor_has_none_while_the_critic_warms_up() -> None:
    changes = {
        "data.train_batch_size": 128,
        f"{ACTOR}.ppo_mini_batch_size": 256,
        f"{ACTOR}.ppo_epochs": 3,
        "critic.ppo_mini_batch_size": 128,
        "critic.ppo_epochs": 1,
        "critic.warmup_steps": 2,
    }

    def totals(**more: object) -> dict[str, int | None]:
        config = ppo_config(**changes, **more)
        roles = with_total_steps(config, roles_in(config), 10)
        return {role.name: role.training.total_steps if role.training else None for role in roles}

    # A step has 128 prompts x 4 = 512 rollouts: 2 mini-batches of the actor's, 4 of the critic's.
    assert totals(**GAE) == {"actor": 8 * 2 * 3, "ref": None, "critic": 10 * 4}
    assert totals() == {"actor": 10 * 2 * 3, "ref": None}  # without a critic nothing warms up


def test_every_step_of_sft_is_an_optimizer_step() -> None:
    config = sft_config()
    [actor] = with_total_steps(config, roles_in(config), 10)
    assert actor.training is not None and actor.training.total_steps == 10


def test_a_role_is_found_by_its_name() -> None:
    roles = roles_in(ppo_config())
    assert role_named(roles, "ref") is roles[1]
    assert role_named(roles, "critic") is None


def test_rollouts_are_counted_unless_asked_otherwise() -> None:
    assert _bounds() == [(16, None)] * 5
    assert _bounds(**{f"{ACTOR}.log_prob_micro_batch_size_per_gpu": 8}) == [
        (16, None),
        (8, None),
        (8, None),
        (16, None),
        (8, None),
    ]


def test_one_key_makes_every_pass_count_tokens() -> None:
    assert _bounds(**BY_TOKENS) == [(3, 1000)] * 5


def test_scoring_may_have_a_budget_of_its_own_and_the_reference_another() -> None:
    own = {f"{ACTOR}.log_prob_max_token_len_per_gpu": 2000, f"{REF}.log_prob_max_token_len_per_gpu": 3000}
    assert [tokens for _, tokens in _bounds(**BY_TOKENS, **own)] == [1000, 2000, 3000, 1000, 2000]


def test_scoring_alone_may_count_tokens_or_rollouts() -> None:
    scoring = {**DATA, f"{ACTOR}.log_prob_use_dynamic_bsz": True, f"{ACTOR}.log_prob_max_token_len_per_gpu": 600}
    assert [tokens for _, tokens in _bounds(**scoring)] == [None, 600, 600, None, None]
    counted = {**BY_TOKENS, f"{REF}.log_prob_use_dynamic_bsz": False}
    assert [tokens for _, tokens in _bounds(**counted)] == [1000, 1000, None, 1000, 1000]


def test_a_reward_model_scores_as_the_actor_does_unless_told() -> None:
    def bounds(**changes: object) -> tuple[int, int | None]:
        size = roles_in(ppo_config(**JUDGE, **changes))[-1].scoring
        return size.micro_batch_size, size.max_tokens

    own = {f"{ACTOR}.log_prob_micro_batch_size_per_gpu": 8}
    assert (bounds(), bounds(**own), bounds(**BY_TOKENS)) == ((16, None), (8, None), (3, 1000))
    assert bounds(**own, **{"reward.model.micro_batch_size_per_gpu": 2}) == (2, None)
    assert bounds(**BY_TOKENS, **{"reward.model.forward_max_token_len_per_gpu": 600}) == (2, 600)
    counted = {"reward.model.use_dynamic_bsz": False, "reward.model.micro_batch_size_per_gpu": 4}
    assert bounds(**BY_TOKENS, **counted) == (4, None)


def test_a_run_has_the_passes_of_its_roles() -> None:
    assert len(_passes(ppo_config(**{f"{ACTOR}.use_kl_loss": False}))) == 2
    assert len(_passes(ppo_config(**JUDGE))) == 4


def test_the_longest_sequence_of_a_pass_is_a_prompt_and_a_response_of_the_longest_kind() -> None:
    assert {p.most_tokens for p in _passes(ppo_config(**BY_TOKENS))} == {1000}
    assert {p.most_tokens for p in _passes(ppo_config(**DATA))} == {16 * 300}


def test_a_budget_below_the_longest_rollout_is_reported_once_with_what_would_do() -> None:
    c = ppo_config(**{**BY_TOKENS, f"{ACTOR}.ppo_max_token_len_per_gpu": 299})
    (problem,) = problems_without_files(c)
    assert problem.key == f"{ACTOR}.ppo_max_token_len_per_gpu"
    assert problem.fix == f"{problem.key}=300"


def test_a_mini_batch_filled_by_tokens_need_not_divide_by_ranks() -> None:
    changes = {"data.train_batch_size": 5, f"{ACTOR}.ppo_mini_batch_size": 10, f"{ROLLOUT}.n": 4}
    config = ppo_config(**BY_TOKENS, **changes)
    plan = batch_plan(config, roles_in(config)[0])
    assert (plan.num_mini_batches, plan.dp_size, plan.max_tokens) == (2, 8, 1000)


def _actor(layout: Layout, budget: int | None = None, *, mini_batch_size: int = 4, epochs: int = 1) -> Role:
    """Return an actor with micro-batches of 2 rollouts, or of ``budget`` tokens."""
    size = rollouts_a_pass("count", 2, 64, layout) if budget is None else tokens_a_pass("budget", budget, 64, layout)
    training = replace(TRAINING, mini_batch_size=mini_batch_size, epochs=epochs)
    return replace(role_on(layout), scoring=size, update=size, training=training)


@pytest.mark.parametrize("budget", [None, 64])
@pytest.mark.parametrize("dp", [1, 3, 4])
def test_a_pass_without_training_takes_every_row_once_in_as_many_micro_batches_on_every_rank(
    dp: int, budget: int | None
) -> None:
    lengths = [10, 60, 20, 30, 20, 50, 40, 10, 10]
    parts = _actor(Layout(dp), budget).scoring_parts(lengths)
    assert len(parts) == dp and len({len(micros) for micros in parts}) == 1
    assert sorted(row for micros in parts for micro in micros for row in micro) == list(range(9))
    for micro in (micro for micros in parts for micro in micros):
        assert len(micro) <= 2 if budget is None else sum(lengths[row] for row in micro) <= 64


def test_a_pass_that_counts_rollouts_keeps_their_order() -> None:
    assert _actor(Layout(2)).scoring_parts([10] * 7) == (((0, 1), (2, 3)), ((4, 5), (6,)))


def test_optimizer_steps_are_those_of_the_training_in_the_order_of_the_seed() -> None:
    actor, seed = _actor(Layout(2), epochs=2), seed_of(1, "actor", 3)
    assert actor.optimizer_steps([10] * 8, seed) == plan_update(8, 4, 2, 2, 2, seed)
    assert actor.optimizer_steps([10] * 8, None) == plan_update(8, 4, 2, 2, 2, None)
    assert [mini.rows for mini in actor.optimizer_steps([10] * 8, None)] == [(0, 1, 2, 3), (4, 5, 6, 7)] * 2


def test_the_rows_of_an_optimizer_step_are_the_same_whether_rollouts_or_tokens_are_counted() -> None:
    lengths = [10, 60, 20, 30, 20, 50, 40, 10]
    counted, budgeted = (_actor(Layout(2), budget).optimizer_steps(lengths, 5) for budget in (None, 64))
    assert [sorted(mini.rows) for mini in counted] == [sorted(mini.rows) for mini in budgeted]
    micros = [micro for mini in budgeted for rank in mini.micro_batches_by_rank for micro in rank]
    assert max(sum(lengths[row] for row in micro) for micro in micros) <= 64


def test_a_budget_rounds_what_pipelines_and_context_ranks_want_rounded() -> None:
    def multiples(layout: Layout) -> tuple[int, int]:
        role = _actor(layout, 256)
        budget = role.budget(role.scoring)
        assert budget is not None
        return budget.multiple, budget.sequence_multiple

    assert multiples(Layout(4)) == multiples(Layout(4, pp=2)) == (1, 1)
    assert multiples(Layout(4, pp=2, vpp=2)) == (2, 1)
    assert multiples(Layout(4, cp=2)) == (1, 4)


def test_rollouts_cost_in_a_budget_what_a_pass_over_them_multiplies() -> None:
    role = _actor(Layout(1), 256)
    budget, shape = role.budget(role.scoring), model_shape()
    assert budget is not None
    queries = shape.num_layers * shape.num_heads * shape.head_dim
    assert budget.cost(10) == 10 * shape.active_parameters + 100 * queries


def test_fused_kernels_are_of_actor_and_reference_since_a_critic_has_no_logits() -> None:
    changes = {"actor_rollout_ref.model.use_fused_kernels": True, "algorithm.adv_estimator": "gae"}
    values = composed_values("ppo_megatron_trainer", "experiment=qwen2.5_7b_8", **changes)
    roles = planned(check_ppo(values, files_may_be_missing=True), DEVICES["H100"]).roles
    assert {role.name: role.fused_head for role in roles} == {"actor": True, "ref": True, "critic": False}


def test_a_plan_has_the_reward_model_that_would_be_made_from_a_model_whose_sizes_are_known() -> None:
    changes = {
        "reward.model.path": "Qwen/Qwen2.5-7B-Instruct",
        "reward.model.megatron.pipeline_model_parallel_size": 2,
        "actor_rollout_ref.model.use_fused_kernels": True,
    }
    values = composed_values("ppo_megatron_trainer", "experiment=qwen2.5_7b_8", **changes)
    checked = check_ppo(values, files_may_be_missing=True)
    plan = planned(checked, DEVICES["H100"])
    judge = role_named(plan.roles, "reward_model")
    assert judge is not None
    assert (judge.shape.value_head, judge.is_trained, judge.fused_head, judge.layout.pp) == (True, False, False, 2)
    assert judge.layout.tp == plan.roles[0].layout.tp
    assert "reward_model scoring" in [phase.name for phase in plan.phases]
    wider = changed(checked.config, {f"{ACTOR}.megatron.tensor_model_parallel_size": 8})
    assert wider.reward.model.megatron is not None
    assert wider.reward.model.megatron.tensor_model_parallel_size == 8


def test_where_tokens_are_counted_a_smaller_budget_is_what_may_save_memory() -> None:
    changes = {f"{ACTOR}.use_dynamic_bsz": True, f"{ACTOR}.ppo_micro_batch_size_per_gpu": 16}
    values = composed_values("ppo_megatron_trainer", "experiment=qwen2.5_7b_8", **changes)
    checked = check_ppo(values, files_may_be_missing=True)
    plan = planned(checked, DEVICES["H100"])
    budget = f"{ACTOR}.ppo_max_token_len_per_gpu"
    sizes = [change.values[budget] for change in single_changes(checked.config, plan) if budget in change.values]
    assert sizes == [8192, 4096, 2048, 1024]
    assert {role.update.most_tokens for role in plan.roles if role.update} == {16384}
    assert {role.scoring.most_tokens for role in plan.roles} == {16384}
    halved = changed(checked.config, {budget: 8192})
    assert halved.critic.ppo_max_token_len_per_gpu == 8192
