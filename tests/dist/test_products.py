"""Training with oneDNN's products is training with torch's, and Hugging Face's, on every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megarl.parallel.cpu import products
from megarl.parallel.environment import ProductsName, products_name
from megarl.parallel.layout import Layout
from megarl.roles import Role
from megarl.train.actor import Actor
from megarl.types import Metrics, PolicyBatch
from megarl.verify.pool import RankPool
from megarl.verify.reference import TEMPERATURE, Reference
from megarl.verify.roles import role_on, with_section
from megarl.verify.work import backend_on_rank, score, update
from tests.dist.parity import LOOKING, PPO, REPLICATED, TOLERANCE, Piece, ask, gradients_of, pieces

MODEL = "qwen2-tied"
SIZES = {"hidden_size": 128, "intermediate_size": 256}
LAYOUTS = {"one_rank": Layout(1), "tp2+sp": Layout(2, tp=2, sequence_parallel=True), "pp2": Layout(2, pp=2)}
ROUNDING, GRADIENT_ROUNDING = 2e-6, 1e-5


@dataclass(frozen=True)
class Answer:
    """num_products: by oneDNN. logprobs_BS: None on ranks that don't report. gradients, metrics: of one step."""

    num_products: int
    logprobs_BS: Tensor | None
    metrics: Metrics
    gradients: list[Piece]


def _by_both(role: Role, batch: PolicyBatch) -> dict[ProductsName, Answer]:
    """Score ``batch`` and differentiate a loss on it, with the products of each library."""
    try:
        return {"onednn": _answer("onednn", role, batch), "torch": _answer("torch", role, batch)}
    finally:
        products.use_products(products_name())


def _answer(name: ProductsName, role: Role, batch: PolicyBatch) -> Answer:
    products.use_products(name)
    actor = Actor(backend_on_rank(role))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        logprobs_BS = score(actor, batch, TEMPERATURE)
        (metrics,) = update(actor, batch, PPO).metrics
    num_products = sum(event.name == "mkldnn::_linear_pointwise" for event in profile.events())
    return Answer(num_products, logprobs_BS, metrics, pieces(actor.backend, gradients_of(actor.backend)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_and_gradients_are_those_of_torchs_products(
    ranks: RankPool, reference: Callable[..., Reference], layout: str
) -> None:
    found = reference(MODEL, **SIZES)
    role = role_on(LAYOUTS[layout], found.folder, training=LOOKING, micro_batch_size=8)
    answers = ask(ranks, _by_both, with_section(role, **REPLICATED), found.rollouts)
    for answer in answers:
        onednn, plain = answer["onednn"], answer["torch"]
        # Two layers of four linears, or one: forward twice, and both backward.
        assert onednn.num_products >= 16
        assert plain.num_products == 0
        assert onednn.metrics == pytest.approx(plain.metrics, rel=ROUNDING, abs=ROUNDING)
        for one, other in zip(onednn.gradients, plain.gradients, strict=True):
            atol = GRADIENT_ROUNDING * float(other.values.abs().max())
            torch.testing.assert_close(one.values, other.values, rtol=0, atol=atol)
    (logprobs_BS,) = [logprobs_BS for a in answers if (logprobs_BS := a["onednn"].logprobs_BS) is not None]
    expected_BS = found.logprobs_BS * found.rollouts.mask_BS
    atol = TOLERANCE * float(expected_BS.abs().max())
    torch.testing.assert_close(logprobs_BS * found.rollouts.mask_BS, expected_BS, rtol=0, atol=atol)
