from __future__ import annotations

import math

import torch

from megarl.algorithm.recipe import Update
from megarl.controller.demonstrations import DemonstrationLoss, DemonstrationRecipe, DemonstrationSampler
from megarl.controller.role_on_ranks import RoleOnRanks
from megarl.data.order import Order
from megarl.data.sft import SFTExample
from megarl.monitor.timing import Stopwatch
from megarl.parallel.layout import Layout
from tests.unit.small_roles import role_on
from tests.unit.stand_ins import PlainRanks

CHATS = (
    SFTExample((1, 2, 3), (False, True, True)),
    SFTExample((4, 5), (False, True)),
    SFTExample((6, 7, 8, 9), (False, False, False, True)),
)


def _actor(logprob: float) -> RoleOnRanks:
    """Return an actor that gives every token the same log-prob."""
    ranks = PlainRanks(1, lambda rank, verb, work: torch.where(work.sequences.mask_BS, logprob, 0.0))
    return RoleOnRanks(role_on(Layout(1)), ranks, 0, Stopwatch())


def test_a_step_has_the_chats_of_its_place_in_the_order() -> None:
    sampler = DemonstrationSampler(CHATS, Order(3, 1, False, 0))
    taken = [sampler.take(step).batch for step in (1, 2, 3, 4)]
    assert [batch.tokens_BS.tolist() for batch in taken] == [[[1, 2, 3]], [[4, 5]], [[6, 7, 8, 9]], [[1, 2, 3]]]
    assert taken[0].mask_BS.tolist() == [[False, True, True]]
    assert sampler.sampled_rows() == ()


def test_validation_is_the_mean_loss_of_a_token_over_all_chats() -> None:
    evaluation = DemonstrationLoss(CHATS, _actor(-0.5), DemonstrationRecipe())(4)
    assert (evaluation.step, evaluation.value, evaluation.metrics) == (4, 0.5, {"loss/val": 0.5})


def test_without_validation_chats_the_evaluation_is_the_last_step_s_own_loss() -> None:
    recipe = DemonstrationRecipe()
    sampler = DemonstrationSampler(CHATS, Order(3, 3, False, 0))
    samples = sampler.take(1)
    assert math.isnan(DemonstrationLoss((), _actor(0.0), recipe)(0).value)
    batch = recipe.train_batch(samples, None, None, None, 1)
    assert batch.policy is samples.batch and batch.values is None
    assert recipe.metrics(samples, batch, Update({"actor/loss": 0.25})) == {"loss/train": 0.25}
    evaluation = DemonstrationLoss((), _actor(0.0), recipe)(1)
    assert evaluation.value == 0.25 and not evaluation.metrics
