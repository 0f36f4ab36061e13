from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from megarl.algorithm.aggregate import mini_batch_totals
from megarl.algorithm.recipe import Recipe, TrainBatch, Update
from megarl.algorithm.rollout_correction import CorrectionSettings, Rejection, presets
from megarl.algorithm.samples import Rewards, Samples
from megarl.batching.pack import rollouts_to_batch
from megarl.types import PolicyBatch, Prompt, RewardResult, Rollout, Sequences
from tests.unit.composed_configs import ppo_config

ACTOR, CORRECTION = "actor_rollout_ref.actor", "algorithm.rollout_correction"
GAE = {"algorithm.adv_estimator": "gae", "critic.warmup_steps": 2}


@dataclass
class Actor:
    """An actor that gives log-probs and tells what it was asked for. later: rows of all mini-batches but the first."""

    logprobs_BS: Tensor
    later: list[int]
    asked: list[list[int] | None] = field(default_factory=list)

    def logprobs(self, sequences: Sequences, rows: Sequence[int] | None = None) -> Tensor:
        self.asked.append(None if rows is None else list(rows))
        return self.logprobs_BS if rows is None else self.only(rows)

    def later_rows(self, sequences: Sequences, step: int) -> list[int]:
        return self.later

    def only(self, rows: Sequence[int]) -> Tensor:
        """Return the log-probs of some rows, zero in others."""
        kept_BS = torch.zeros_like(self.logprobs_BS)
        kept_BS[list(rows)] = self.logprobs_BS[list(rows)]
        return kept_BS

    def update(self) -> Update:
        """Return what an update tells whose first mini-batch is on policy."""
        return Update({}, self.only([row for row in range(len(self.logprobs_BS)) if row not in self.later]))


def _samples(cut: Sequence[int] = ()) -> Samples:
    """Return 2 prompts with 2 rollouts each, of different lengths and rewards. cut: lengths that end at the limit."""
    prompts = [Prompt(f"0:{i}", ids, "", "source", "", {}, "") for i, ids in enumerate([(5, 6), (7, 8, 9)])]
    groups = [
        tuple(
            Rollout(
                tuple(range(3, 3 + n)),
                tuple(-0.1 * k - 0.2 for k in range(n)),
                "length" if n in cut else "stop",
                4,
            )
            for n in lengths
        )
        for lengths in ((3, 1), (2, 4))
    ]
    scores = (1.0, 0.0, 0.5, 2.0)
    results = tuple(RewardResult(score, "ok", components=(score, -score)) for score in scores)
    rewards = Rewards(results, torch.zeros(4), component_names=("right", "short"))
    return Samples(tuple(prompts), tuple(groups), rewards, rollouts_to_batch([p.token_ids for p in prompts], groups))


def _actor_of(samples: Samples, later: list[int]) -> Actor:
    """Return an actor whose log-probs differ from the engine's by another number at every token."""
    engine_BS, mask_BS = samples.batch.rollout_logprobs_BS, samples.batch.mask_BS
    return Actor(torch.where(mask_BS, engine_BS + 0.01 * samples.batch.tokens_BS, 0.0), later)


def _trained(recipe: Recipe, samples: Samples, actor: Actor, step: int = 1) -> TrainBatch:
    ref_BS = torch.where(samples.batch.mask_BS, -1.0, 0.0)
    return recipe.train_batch(samples, recipe.old_logprobs(samples, actor, step), ref_BS, None, step)


@pytest.mark.parametrize(
    "changes",
    [
        {f"{ACTOR}.separate_old_log_probs": True},
        {f"{ACTOR}.ppo_epochs": 2},
        {f"{CORRECTION}.bypass": True, f"{CORRECTION}.preset": "geometric"},
        {"algorithm.use_kl_in_reward": True},
        {f"{CORRECTION}.level": "token"},
        {f"{CORRECTION}.preset": "sequence_tis"},
        {f"{CORRECTION}.rejections": [{"criterion": "token", "low": 0, "high": 2}]},
        {f"{CORRECTION}.bypass": True},
        {f"{ACTOR}.policy_loss": "clip_cov"},
        {f"{ACTOR}.policy_loss": "kl_cov"},
    ],
)
def test_old_log_probs_are_computed_apart_where_something_needs_them_before_the_update(
    changes: dict[str, object],
) -> None:
    assert not Recipe(ppo_config(**changes)).reuses_update


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"algorithm.adv_estimator": "gae"},
        {f"{ACTOR}.shuffle": True},
        {f"{ACTOR}.entropy_coeff": 0.1},
        {f"{ACTOR}.policy_loss": "gspo"},
        {f"{ACTOR}.ppo_mini_batch_size": 64},
        {f"{CORRECTION}.preset": "metrics_only"},  # it changes nothing that is trained on
        {f"{CORRECTION}.off_policy_mask_delta": 0.1},  # it reads the update's own log-probs
        {"algorithm.overlong_filtering": True},
    ],
)
def test_an_update_whose_first_mini_batch_is_on_policy_gives_its_own_old_log_probs(changes: dict[str, object]) -> None:
    assert Recipe(ppo_config(**changes)).reuses_update


def test_old_log_probs_are_asked_for_of_the_rows_alone_that_the_update_does_not_give() -> None:
    samples, recipe = _samples(), Recipe(ppo_config())
    actor = _actor_of(samples, later=[1, 3])
    old_BS = recipe.old_logprobs(samples, actor, step=1)
    assert actor.asked == [[1, 3]]
    assert old_BS is not None and old_BS.equal(actor.only([1, 3]))
    one_mini_batch = _actor_of(samples, later=[])
    assert recipe.old_logprobs(samples, one_mini_batch, step=1) is None
    assert one_mini_batch.asked == []


def test_old_log_probs_of_all_rows_come_from_a_pass_of_their_own_where_the_update_gives_none() -> None:
    samples = _samples()
    actor = _actor_of(samples, later=[1, 3])
    old_BS = Recipe(ppo_config(**{f"{ACTOR}.ppo_epochs": 2})).old_logprobs(samples, actor, step=1)
    assert actor.asked == [None]
    assert old_BS is not None and old_BS.equal(actor.logprobs_BS)


def test_while_the_critic_warms_up_there_is_no_update_to_take_old_log_probs_from() -> None:
    samples, recipe = _samples(), Recipe(ppo_config(**GAE))
    actor = _actor_of(samples, later=[1, 3])
    for step in (1, 2, 3):
        recipe.old_logprobs(samples, actor, step)
    assert actor.asked == [None, None, [1, 3]]


def test_a_critic_warms_up_only_where_the_estimator_reads_its_values() -> None:
    assert Recipe(ppo_config(**GAE)).critic_warmup_steps == 2
    assert Recipe(ppo_config(**{"critic.warmup_steps": 2})).critic_warmup_steps == 0


def test_bypassed_correction_takes_the_engines_log_probs_and_asks_the_actor_for_none() -> None:
    samples = _samples()
    actor = _actor_of(samples, later=[1, 3])
    old_BS = Recipe(ppo_config(**{f"{CORRECTION}.bypass": True})).old_logprobs(samples, actor, step=1)
    assert old_BS is samples.batch.rollout_logprobs_BS and actor.asked == []


def _metrics(later: list[int], **changes: object) -> tuple[dict[str, float], TrainBatch]:
    """Return the metrics of a step and what it trained on."""
    samples, recipe = _samples(), Recipe(ppo_config(**changes))
    actor = _actor_of(samples, later)
    batch = _trained(recipe, samples, actor)
    update = actor.update() if recipe.reuses_update else Update({})
    return recipe.metrics(samples, batch, update), batch


@pytest.mark.parametrize("later", [[1, 3], []])
def test_metrics_of_a_step_on_policy_are_those_of_one_with_a_pass_of_its_own(later: list[int]) -> None:
    on_policy, batch = _metrics(later)
    apart, other = _metrics(later, **{f"{ACTOR}.separate_old_log_probs": True})
    assert on_policy == apart
    assert isinstance(batch.policy, PolicyBatch) and isinstance(other.policy, PolicyBatch)
    assert (batch.policy.first_is_on_policy, other.policy.first_is_on_policy) == (True, False)
    assert batch.policy.advantages_BS.equal(other.policy.advantages_BS)
    assert batch.policy.mask_BS.equal(other.policy.mask_BS)


def test_metrics_say_how_far_the_engine_is_from_the_trainer() -> None:
    samples, (metrics, _) = _samples(), _metrics([1, 3])
    differences_N = 0.01 * samples.batch.tokens_BS[samples.batch.mask_BS]
    assert metrics["rollout_train/logprob_diff_max"] == pytest.approx(float(differences_N.max()))
    assert metrics["rollout_train/logprob_diff_mean"] == pytest.approx(float(differences_N.mean()))
    assert metrics["rollout_train/kl"] == pytest.approx(-float(differences_N.mean()))


def test_metrics_tell_of_lengths_rewards_and_groups() -> None:
    metrics, _ = _metrics([])
    lengths = ("response/mean_tokens", "response/max_tokens", "response/total_tokens")
    assert [metrics[name] for name in lengths] == [2.5, 4.0, 10.0]
    assert (metrics["reward/mean"], metrics["rollout/policy_version"]) == (0.875, 4.0)
    assert metrics["group/share_without_spread"] == 0.0
    assert metrics["response/share_cut"] == 0.0


def test_kl_in_the_reward_is_taken_from_it_and_steers_its_coefficient_for_the_next_step() -> None:
    kl = {"algorithm.use_kl_in_reward": True, "algorithm.kl_ctrl.type": "adaptive", "algorithm.kl_ctrl.kl_coef": 0.5}
    samples, recipe = _samples(), Recipe(ppo_config(**kl, **{"algorithm.adv_estimator": "reinforce_plus_plus"}))
    actor, controller = _actor_of(samples, later=[]), recipe.kl_controller
    first, second = (_trained(recipe, samples, actor, step).metrics for step in (1, 2))
    assert first["reward/kl"] == second["reward/kl"] > 0
    assert first["reward/kl_coef"] == 0.5
    assert second["reward/kl_coef"] == controller.after(first["reward/kl"], num_rollouts=4).coef > 0.5


def test_rejected_tokens_leave_the_mask_of_what_is_trained_on_and_weights_come_with_it() -> None:
    rejecting = {f"{CORRECTION}.rejections": [{"criterion": "token", "low": 0, "high": 1.04}]}
    _, batch = _metrics([], **rejecting, **{f"{CORRECTION}.level": "token"})
    samples = _samples()
    is_near_BS = samples.batch.mask_BS & ((0.01 * samples.batch.tokens_BS).exp() <= 1.04)
    assert batch.policy.mask_BS.equal(is_near_BS) and not is_near_BS.equal(samples.batch.mask_BS)
    assert isinstance(batch.policy, PolicyBatch) and batch.policy.policy_weights_BS is not None
    assert (batch.policy.policy_weights_BS > 0).equal(is_near_BS)


def test_a_critic_learns_the_returns_of_the_estimator() -> None:
    samples, recipe = _samples(), Recipe(ppo_config(**{"algorithm.adv_estimator": "gae"}))
    actor, values_BS = _actor_of(samples, later=[1, 3]), torch.where(samples.batch.mask_BS, 0.25, 0.0)
    old_BS = recipe.old_logprobs(samples, actor, 1)
    batch = recipe.train_batch(samples, old_BS, None, values_BS, 1)
    assert batch.values is not None and batch.values.values_BS is values_BS
    # gamma = lam = 1: what follows a token is the reward at the end.
    assert batch.values.returns_BS.equal(torch.where(samples.batch.mask_BS, samples.rewards.scores_B[:, None], 0.0))
    metrics = recipe.metrics(samples, batch, actor.update())
    assert metrics["critic/values_mean"] == pytest.approx(0.25)
    assert "critic/explained_variance" in metrics


def test_losses_have_the_settings_of_the_config() -> None:
    changes = {
        f"{ACTOR}.clip_ratio": 0.3,
        f"{ACTOR}.clip_ratio_high": 0.4,
        f"{ACTOR}.kl_loss_coef": 0.02,
        f"{ACTOR}.entropy_coeff": 0.01,
        "actor_rollout_ref.rollout.temperature": 0.7,
        "critic.cliprange_value": 0.25,
        "data.max_response_length": 77,
    }
    recipe = Recipe(ppo_config(**changes))
    policy, value = recipe.policy_loss, recipe.value_loss
    assert (policy.settings.clip_low, policy.settings.clip_high) == (0.3, 0.4)
    assert (policy.kl_coef, policy.entropy_coef, policy.temperature, policy.max_tokens) == (0.02, 0.01, 0.7, 77)
    assert (value.clip_range, value.max_tokens) == (0.25, 77)
    assert Recipe(ppo_config(**{f"{ACTOR}.use_kl_loss": False})).policy_loss.kl_coef is None


def test_correction_is_that_of_a_preset_or_of_the_keys() -> None:
    assert Recipe(ppo_config(**{f"{CORRECTION}.preset": "icepop"})).correction == presets.get("icepop")
    plain = Recipe(ppo_config(**{f"{CORRECTION}.level": "token"})).correction
    assert (plain.level, plain.band, plain.rejections) == ("token", (0.0, float("inf")), ())


@pytest.mark.parametrize(
    "changes", [{}, {f"{ACTOR}.separate_old_log_probs": True}, {"algorithm.adv_estimator": "reinforce_plus_plus"}]
)
def test_responses_cut_at_the_limit_leave_the_loss_and_their_rewards_stay_in_the_baseline(
    changes: dict[str, object],
) -> None:
    samples, filtering = _samples(cut=[1, 4]), {"algorithm.overlong_filtering": True}
    without, recipe = Recipe(ppo_config(**changes)), Recipe(ppo_config(**changes, **filtering))
    actor = _actor_of(samples, later=[])
    kept, left = _trained(without, samples, actor), _trained(recipe, samples, actor)
    assert left.policy.mask_BS.sum(-1).tolist() == [3, 0, 2, 0]
    assert kept.policy.mask_BS.equal(samples.batch.mask_BS)
    # What is still trained on has the advantages that it has without filtering: rewards 0 and 2 were cut, and count.
    assert isinstance(left.policy, PolicyBatch) and isinstance(kept.policy, PolicyBatch)
    assert left.policy.advantages_BS.equal(kept.policy.advantages_BS)
    # A mini-batch is divided by its two rollouts and five tokens that are left.
    assert mini_batch_totals(left.policy.mask_BS.sum(-1)) == (5, 2)
    metrics = recipe.metrics(samples, left, actor.update() if recipe.reuses_update else Update({}))
    assert (metrics["response/share_cut"], metrics["response/mean_tokens"]) == (0.5, 2.5)
    assert metrics["reward/mean"] == 0.875


def test_the_engine_is_compared_on_the_responses_that_are_trained_on() -> None:
    """The update tells no log-probs of the others; as zeros they would look far from the engine's."""
    samples, recipe = _samples(cut=[4]), Recipe(ppo_config(**{"algorithm.overlong_filtering": True}))
    actor = _actor_of(samples, later=[])
    batch = _trained(recipe, samples, actor)
    told_BS = torch.where(batch.policy.mask_BS, actor.logprobs_BS, 0.0)
    metrics = recipe.metrics(samples, batch, Update({}, told_BS))
    differences_N = 0.01 * samples.batch.tokens_BS[batch.policy.mask_BS]
    assert metrics["rollout_train/logprob_diff_max"] == pytest.approx(float(differences_N.max()))
    assert metrics["rollout_train/kl"] == pytest.approx(-float(differences_N.mean()))


def test_a_critic_learns_from_no_response_that_was_cut() -> None:
    changes = {"algorithm.adv_estimator": "gae", "algorithm.overlong_filtering": True}
    samples, recipe = _samples(cut=[4]), Recipe(ppo_config(**changes))
    values_BS = torch.where(samples.batch.mask_BS, 0.25, 0.0)
    batch = recipe.train_batch(samples, None, None, values_BS, 1)
    assert batch.values is not None and batch.values.mask_BS.sum(-1).tolist() == [3, 1, 2, 0]


def test_an_estimator_that_reads_components_is_given_them_with_their_weights() -> None:
    weighted = {
        "algorithm.adv_estimator": "gdpo",
        "algorithm.gdpo_reward_keys": ["right", "short"],
        "algorithm.gdpo_reward_weights": [1.0, 0.25],
    }
    samples, recipe = _samples(), Recipe(ppo_config(**weighted))
    policy = _trained(recipe, samples, _actor_of(samples, later=[])).policy
    assert isinstance(policy, PolicyBatch)
    # In each group of two the parts are +-0.5^0.5 of opposite signs: 0.75 of that is left, and then divided by the std
    # of the four rollouts, whose squares are equal: (4 / 3)^0.5 of it.
    expected = (3 / 4) ** 0.5
    firsts_B = policy.advantages_BS[torch.arange(4), policy.mask_BS.int().argmax(-1)]
    assert firsts_B.tolist() == pytest.approx([expected, -expected, -expected, expected], rel=1e-4)


def test_what_a_bypass_corrects_is_left_to_the_update_and_the_rest_is_not() -> None:
    rejecting = {f"{CORRECTION}.rejections": [{"criterion": "token", "low": 0, "high": 1.04}]}
    delta = {f"{CORRECTION}.off_policy_mask_delta": 0.1}
    rejection = (Rejection("token", 0.0, 1.04),)

    before = Recipe(ppo_config(**rejecting, **delta))
    assert before.correction == CorrectionSettings(rejections=rejection)
    assert before.policy_loss.correction == CorrectionSettings(off_policy_delta=0.1)

    bypassed = Recipe(ppo_config(**rejecting, **delta, **{f"{CORRECTION}.bypass": True}))
    assert bypassed.correction == CorrectionSettings()
    assert bypassed.policy_loss.correction == CorrectionSettings(rejections=rejection, off_policy_delta=0.1)

    for nothing in ({}, {f"{CORRECTION}.bypass": True}, rejecting):
        assert Recipe(ppo_config(**nothing)).policy_loss.correction is None


@pytest.mark.parametrize(
    "changes",
    [{f"{CORRECTION}.off_policy_mask_delta": 0.1}, {f"{CORRECTION}.bypass": True, f"{CORRECTION}.preset": "k3"}],
)
def test_an_update_that_compares_with_the_engine_is_given_its_log_probs(changes: dict[str, object]) -> None:
    samples = _samples()
    for each, engine_BS in ((changes, samples.batch.rollout_logprobs_BS), ({}, None)):
        policy = _trained(Recipe(ppo_config(**each)), samples, _actor_of(samples, later=[])).policy
        assert isinstance(policy, PolicyBatch) and policy.rollout_logprobs_BS is engine_BS
        assert policy.mask_BS.equal(samples.batch.mask_BS), "the update rejects, and its mean counts all tokens"
