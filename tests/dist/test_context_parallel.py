"""Sequences that context-parallel ranks share: every layout against Hugging Face's eager float32 model and AdamW."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, pairwise

import pytest
import torch

from megarl.algorithm.policy_loss import PolicyLossSettings
from megarl.parallel.layout import Layout
from megarl.train.megatron.attention import describe_packing
from megarl.train.work import PolicyLossSpec
from tests.dist import hf_reference
from tests.dist.parity import (
    JOBS,
    OPTIMIZER,
    TELLING,
    TEMPERATURE,
    TRAINING_TOLERANCE,
    Reference,
    assert_first_step_is,
    assert_scored_as,
    assert_trained_as,
    summed,
)
from tests.dist.parity_cases import Examined, Job, Setup, Trained, train
from tests.dist.ranks import RankPool
from tests.dist.tiny_models import MOE_MODELS

DENSE_LAYOUTS = {
    "cp2": Layout(2, cp=2),
    "cp4": Layout(4, cp=4),
    "tp2xcp2": Layout(4, tp=2, cp=2),
    "tp2xcp2+sp": Layout(4, tp=2, cp=2, sequence_parallel=True),
    "cp2xpp2": Layout(4, cp=2, pp=2),
    "cp2xdp2": Layout(4, cp=2),
}
EXPERT_LAYOUTS = {
    "cp2": Layout(2, cp=2),
    "cp2xep2": Layout(2, cp=2, ep=2),
    "cp2xdp2xep2": Layout(4, cp=2, ep=2),
    "tp2xcp2xep2+sp": Layout(4, tp=2, cp=2, ep=2, sequence_parallel=True),
    "tp2xcp2xep4xetp1+sp": Layout(4, tp=2, cp=2, ep=4, etp=1, sequence_parallel=True),
}
LAYOUTS = DENSE_LAYOUTS | EXPERT_LAYOUTS
MODELS = (*TELLING, "llama-tied")
QUICK = ("tp2xcp2+sp", "cp2xpp2", "cp2xdp2xep2")
PAIRS = [
    pytest.param(model, layout, id=f"{model}-{layout}", marks=[] if is_quick else pytest.mark.long)
    for models, layouts in ((MODELS, DENSE_LAYOUTS), (MOE_MODELS, EXPERT_LAYOUTS))
    for model in models
    for layout in layouts
    for is_quick in [model in (TELLING[1], MOE_MODELS[0]) and layout in QUICK]
]
EVERY_PAIR = pytest.mark.parametrize(("model", "layout"), PAIRS)
PACKING = pytest.mark.parametrize("packing", ["packed", "padded"])
# Losses in which what a token counts depends on all tokens of its sequence, wherever they are.
SEQUENCE_LOSSES = {
    "gspo": Job(
        PolicyLossSpec(
            PolicyLossSettings(clip_low=0.05, clip_high=0.05, clip_c=3.0),
            loss_agg_mode="seq-mean-token-mean",
            kl_coef=None,
            kl_type="low_var_kl",
            temperature=TEMPERATURE,
            name="gspo",
            entropy_coef=0.01,
        ),
        OPTIMIZER,
    )
}


@PACKING
@EVERY_PAIR
def test_logits_and_log_probs_equal_hugging_faces(
    examined: Callable[[str, str], list[dict[str, Examined]]],
    reference: Callable[[str], Reference],
    model: str,
    layout: str,
    packing: str,
) -> None:
    answers = [found[packing].scored for found in examined(model, layout)]
    assert_scored_as(answers, reference(model), LAYOUTS[layout])


@PACKING
@EVERY_PAIR
def test_loss_gradients_and_their_norm_equal_hugging_faces(
    examined: Callable[[str, str], list[dict[str, Examined]]],
    hf_training: Callable[[str, str], hf_reference.Training],
    model: str,
    layout: str,
    packing: str,
) -> None:
    """A loss that Megatron's schedule multiplies by the context ranks, or that is a mean of theirs, is off by twice."""
    answers = [found[packing] for found in examined(model, layout)]
    assert_first_step_is(answers, hf_training(model, "sft"), LAYOUTS[layout])


@pytest.mark.parametrize("job", JOBS)
@EVERY_PAIR
def test_three_optimizer_steps_equal_hugging_face_with_adamw(
    trained: Callable[[str, str], list[dict[str, Trained]]],
    hf_training: Callable[[str, str], hf_reference.Training],
    model: str,
    layout: str,
    job: str,
) -> None:
    assert_trained_as([rank[job] for rank in trained(model, layout)], hf_training(model, job), LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["cp2", "cp4", "cp2xdp2"])
def test_a_loss_of_whole_sequences_sees_them_whole(
    ranks: RankPool, reference: Callable[[str], Reference], layout: str
) -> None:
    """Every metric of three steps is that of one rank, each counted once."""
    found = reference(TELLING[0])

    def run(layout: Layout) -> list[dict[str, float]]:
        setup = Setup(found.folder, layout)
        answers = ranks.run(train, setup, found.batch, SEQUENCE_LOSSES, world_size=layout.world_size)
        return summed([rank["gspo"].metrics for rank in answers], layout)

    alone = run(Layout(1))
    assert alone[1]["clip_fraction"] > 0, "no sequence tests the clip"
    for step, expected in zip(run(LAYOUTS[layout]), alone, strict=True):
        assert step == pytest.approx(expected, rel=TRAINING_TOLERANCE, abs=TRAINING_TOLERANCE)


@pytest.mark.parametrize(("cp", "cp_rank"), [(1, 0), (2, 0), (2, 1), (4, 2)])
def test_the_variable_length_kernel_is_told_of_the_same_queries_and_keys_as_sdpa(cp: int, cp_rank: int) -> None:
    packing = describe_packing([16, 8, 24, 8], torch.device("cpu"), cp, cp_rank)
    assert packing.stretches is not None
    queries_at, keys_at = (list(pairwise(bounds.tolist())) for bounds in packing.stretches.bounds)
    key_T = packing.stretches.key_T.tolist()
    told = [(list(range(*q)), key_T[slice(*k)]) for q, k in zip(queries_at, keys_at, strict=True)]
    blocks = [zip(block.query_BL.tolist(), block.key_BK.tolist(), strict=True) for block in packing.blocks]
    assert sorted(told) == sorted(chain.from_iterable(blocks))
    assert packing.stretches.longest == (max(len(q) for q, _ in told), max(len(k) for _, k in told))


def test_bf16_training_stays_near_that_on_one_rank(ranks: RankPool, reference: Callable[[str], Reference]) -> None:
    found, jobs = reference(TELLING[0]), {"sft": JOBS["sft"]}

    def run(layout: Layout) -> list[dict[str, float]]:
        setup = Setup(found.folder, layout, dtype=torch.bfloat16)
        answers = ranks.run(train, setup, found.batch, jobs, world_size=layout.world_size)
        return summed([rank["sft"].metrics for rank in answers], layout)

    for step, expected in zip(run(LAYOUTS["tp2xcp2+sp"]), run(Layout(1)), strict=True):
        assert [step[name] for name in ("loss", "grad_norm")] == pytest.approx(
            [expected[name] for name in ("loss", "grad_norm")], rel=2e-2
        )
