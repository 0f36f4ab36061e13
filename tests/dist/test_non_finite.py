"""NaN and infinity in loss, gradient, log-probs or rewards change no bit of what an optimizer steps."""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from megarl.algorithm.loss_specs import PolicyLossSpec
from megarl.algorithm.policy_loss import PolicyLossSettings
from megarl.algorithm.rollout_correction import CorrectionSettings
from megarl.batching.pack import MicroBatch
from megarl.parallel.layout import Layout
from megarl.roles import Role
from megarl.train import actor as actors
from megarl.train.actor import Actor
from megarl.train.backend import Backend, Output
from megarl.train.held_state import UpdateCounts
from megarl.train.work import SKIPPED
from megarl.types import Metrics, PolicyBatch
from megarl.verify.pool import RankPool
from megarl.verify.reference import TEMPERATURE, make_reference
from megarl.verify.roles import TRAINING, role_on
from megarl.verify.work import backend_on_rank, update
from tests.dist.parity import ask
from tests.dist.tiny_models import save_tiny_model

VALUES = (math.nan, math.inf, -math.inf)
COLUMNS = {
    "advantage": "advantages_BS",
    "old log-prob": "old_logprobs_BS",
    "reference log-prob": "ref_logprobs_BS",
    "engine log-prob": "rollout_logprobs_BS",
}
PLACES = (*COLUMNS, "loss", "gradient")
LAYOUTS = {"dp2": Layout(2), "tp2": Layout(2, tp=2), "pp2": Layout(2, pp=2), "fsdp2": Layout(2, fsdp=2)}
"""Where something isn't finite on one rank alone, the other one has to hear of it."""


@dataclass(frozen=True)
class Tried:
    """What a rank said of an update, and the hashes of all that its optimizer holds, before and after it."""

    metrics: Metrics
    before: str
    after: str
    counts: tuple[UpdateCounts, UpdateCounts]


def held(backend: Backend) -> str:
    """Return the hash of this rank's parameters, main weights and moments."""
    digest = hashlib.sha256()
    with backend.updating():
        parts = [*backend.parameters().values(), *(v for h in backend.held() for v in h.values.values())]
        for values in parts:
            digest.update(values.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def harmed(batch: PolicyBatch, name: str, value: float) -> PolicyBatch:
    """Return the batch with one number of a column replaced: of the first token of the first rollout that counts."""
    column: Tensor = getattr(batch, COLUMNS[name]).clone()
    column[0, int(batch.mask_BS[0].nonzero()[0])] = value
    return replace(batch, **{COLUMNS[name]: column})


def try_all(role: Role, batch: PolicyBatch) -> dict[str, Tried]:
    """Take an update for every place and value, between usual ones."""
    backend = backend_on_rank(role)
    actor = Actor(backend)
    update(actor, batch, LOSS)
    found = {"usual": tried(actor, batch)}
    policy_loss = actors._policy_loss
    for name, value in itertools.product(PLACES, VALUES):
        if name in COLUMNS:
            found[f"{name} {value}"] = tried(actor, harmed(batch, name, value))
            continue

        def broken(*arguments: object, name: str = name, value: float = value) -> object:
            loss = policy_loss(*arguments)  # type: ignore[arg-type]

            def multiplied(micro: MicroBatch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
                total, told = loss(micro, output)
                if 0 not in micro.row_R.tolist():
                    return total, told
                if name == "gradient":
                    total.register_hook(lambda gradient: gradient * value)
                    return total, told
                return total * value, told

            return multiplied

        actors._policy_loss = broken  # type: ignore[assignment]
        found[f"{name} {value}"] = tried(actor, batch)
        actors._policy_loss = policy_loss
    return found | {"usual again": tried(actor, batch)}


def tried(actor: Actor, batch: PolicyBatch) -> Tried:
    """Take an update."""
    backend = actor.backend
    counts, before = backend.counts(), held(backend)
    (metrics,) = update(actor, batch, LOSS).metrics
    return Tried(metrics, before, held(backend), (counts, backend.counts()))


LOSS = PolicyLossSpec(
    PolicyLossSettings(clip_low=0.2, clip_high=0.25, clip_c=3.0),
    loss_agg_mode="token-mean",
    kl_coef=0.1,
    kl_type="low_var_kl",
    temperature=TEMPERATURE,
    correction=CorrectionSettings(),
)


@pytest.mark.parametrize(
    "layout", ["dp2", "fsdp2", *(pytest.param(name, marks=pytest.mark.long) for name in ("tp2", "pp2"))]
)
def test_what_is_not_finite_changes_no_bit_of_parameters_and_moments(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, layout: str
) -> None:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model("qwen3-untied", folder)
    found = make_reference(folder, 99)
    batch = replace(found.rollouts, rollout_logprobs_BS=found.rollouts.old_logprobs_BS)
    role = role_on(LAYOUTS[layout], folder, training=TRAINING)
    for by_case in ask(ranks, try_all, role, batch):
        assert len(by_case) == len(PLACES) * len(VALUES) + 2
        for case, one in by_case.items():
            scheduled, adam = (after - before for before, after in zip(*map(_numbers, one.counts), strict=True))
            if case.startswith("usual"):
                assert one.after != one.before and SKIPPED not in one.metrics and (scheduled, adam) == (1, 1), case
            else:
                assert one.after == one.before and one.metrics[SKIPPED] == 1 and (scheduled, adam) == (1, 0), case
                assert not math.isfinite(one.metrics["grad_norm"]), case


def _numbers(counts: UpdateCounts) -> tuple[int, int]:
    return counts.scheduled, counts.adam
