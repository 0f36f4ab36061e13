from __future__ import annotations

import pytest

from megarl.checks.passes import (
    actor_scoring,
    actor_update,
    critic_scoring,
    critic_update,
    passes_of,
    rank_tokens,
    ref_scoring,
    reward_scoring,
)
from megarl.checks.rules import ppo_problems
from megarl.checks.run import actor_batch, check_ppo
from megarl.plan.changes import changed, single_changes
from megarl.plan.devices import DEVICES
from megarl.plan.of_run import planned
from tests.unit.composed_configs import composed_values, ppo_config

ACTOR, REF = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
DATA = {"data.max_prompt_length": 100, "data.max_response_length": 200}
BY_TOKENS = {**DATA, f"{ACTOR}.use_dynamic_bsz": True, f"{ACTOR}.ppo_max_token_len_per_gpu": 1000}


def _bounds(**changes: object) -> list[tuple[int, int | None]]:
    """Return size and budget of the actor's update and scoring, the reference's scoring, the critic's two passes."""
    c = ppo_config(**changes)
    passes = (actor_update(c), actor_scoring(c), ref_scoring(c), critic_update(c), critic_scoring(c))
    return [(p.micro_batch_size, p.max_tokens) for p in passes]


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
        size = reward_scoring(ppo_config(**changes))
        return size.micro_batch_size, size.max_tokens

    own = {f"{ACTOR}.log_prob_micro_batch_size_per_gpu": 8}
    assert (bounds(), bounds(**own), bounds(**BY_TOKENS)) == ((16, None), (8, None), (3, 1000))
    assert bounds(**own, **{"reward.model.micro_batch_size_per_gpu": 2}) == (2, None)
    assert bounds(**BY_TOKENS, **{"reward.model.forward_max_token_len_per_gpu": 600}) == (2, 600)
    counted = {"reward.model.use_dynamic_bsz": False, "reward.model.micro_batch_size_per_gpu": 4}
    assert bounds(**BY_TOKENS, **counted) == (4, None)


def test_a_run_has_the_passes_of_its_roles() -> None:
    assert len(passes_of(ppo_config(**{f"{ACTOR}.use_kl_loss": False}))) == 2
    assert len(passes_of(ppo_config(**{"reward.model.path": "judge"}))) == 4


def test_the_longest_micro_batch_is_that_of_the_budget_or_of_the_longest_rollouts() -> None:
    assert {p.most_tokens for p in passes_of(ppo_config(**BY_TOKENS))} == {1000}
    assert {p.most_tokens for p in passes_of(ppo_config(**DATA))} == {16 * 300}


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 8])
@pytest.mark.parametrize("sequence", [300, 301, 307])
def test_the_least_budget_holds_the_longest_rollout_and_one_less_does_not(cp: int, tp: int, sequence: int) -> None:
    changes = {
        f"{ACTOR}.megatron.context_parallel_size": cp,
        f"{ACTOR}.megatron.tensor_model_parallel_size": tp,
        "data.max_prompt_length": sequence - 200,
    }
    size = actor_update(ppo_config(**(BY_TOKENS | changes)))
    assert rank_tokens(size.least_value, size.megatron) >= size.longest_tokens >= sequence
    assert rank_tokens(size.least_value - 1, size.megatron) < size.longest_tokens


def test_a_budget_below_the_longest_rollout_is_reported_once_with_what_would_do() -> None:
    c = ppo_config(**{**BY_TOKENS, f"{ACTOR}.ppo_max_token_len_per_gpu": 299})
    (problem,) = ppo_problems(c)
    assert problem.key == f"{ACTOR}.ppo_max_token_len_per_gpu"
    assert problem.fix == f"{problem.key}=300"


def test_a_mini_batch_filled_by_tokens_need_not_divide_by_ranks() -> None:
    changes = {"data.train_batch_size": 5, f"{ACTOR}.ppo_mini_batch_size": 10, "actor_rollout_ref.rollout.n": 4}
    plan = actor_batch(ppo_config(**BY_TOKENS, **changes))
    assert (plan.num_mini_batches, plan.dp_size, plan.max_tokens) == (2, 8, 1000)


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
    judge = next(role for role in plan.roles if role.name == "reward model")
    assert (judge.shape.value_head, judge.trained, judge.fused_head, judge.layout.pp) == (True, False, False, 2)
    assert judge.layout.tp == plan.roles[0].layout.tp
    assert "reward model" in [phase.name for phase in plan.phases]
    wider = changed(checked.config, {f"{ACTOR}.megatron.tensor_model_parallel_size": 8})
    assert wider.reward.model.megatron.tensor_model_parallel_size == 8


def test_where_tokens_are_counted_a_smaller_budget_is_what_may_save_memory() -> None:
    changes = {f"{ACTOR}.use_dynamic_bsz": True, f"{ACTOR}.ppo_micro_batch_size_per_gpu": 16}
    values = composed_values("ppo_megatron_trainer", "experiment=qwen2.5_7b_8", **changes)
    checked = check_ppo(values, files_may_be_missing=True)
    plan = planned(checked, DEVICES["H100"])
    budget = f"{ACTOR}.ppo_max_token_len_per_gpu"
    sizes = [change.values[budget] for change in single_changes(checked.config, plan) if budget in change.values]
    assert sizes == [8192, 4096, 2048, 1024]
    assert {role.update_tokens for role in plan.roles if role.trained} == {16384}
    assert {role.score_tokens for role in plan.roles} == {16384}
    halved = changed(checked.config, {budget: 8192})
    assert halved.critic.ppo_max_token_len_per_gpu == 8192
