"""The layout never changes the mathematics: every layout against Hugging Face's eager float32 model and torch's AdamW.

One pool call answers for a model on a layout; what several tests ask is asked once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch

from megarl.parallel.layout import Layout
from tests.dist import hf_reference
from tests.dist.parity import (
    BF16_TOLERANCE,
    JOBS,
    MICRO_BATCH_SIZES,
    OPTIMIZER,
    TELLING,
    TOLERANCE,
    TRAINING_TOLERANCE,
    Reference,
    assert_pieces_are,
    assert_trained_as,
    summed,
)
from tests.dist.parity_cases import Examined, Setup, Trained, take_turns, train
from tests.dist.ranks import RankPool
from tests.dist.tiny_models import FIVE_LAYERS, MODELS

LAYOUTS = {
    "one_rank": Layout(1),
    "tp2": Layout(2, tp=2),
    "tp2+sp": Layout(2, tp=2, sequence_parallel=True),
    "pp2": Layout(2, pp=2),
    "dp2": Layout(2),
    "tp2xpp2": Layout(4, tp=2, pp=2),
    "tp2xpp2+sp": Layout(4, tp=2, pp=2, sequence_parallel=True),
    "tp2xdp2": Layout(4, tp=2),
    "tp2xdp2+sp": Layout(4, tp=2, sequence_parallel=True),
    "tp4": Layout(4, tp=4),
    "tp4+sp": Layout(4, tp=4, sequence_parallel=True),
    "pp4": Layout(4, pp=4),
    "dp4": Layout(4),
}
USUAL = tuple(LAYOUTS)[:9]
FEWER_KV_HEADS_THAN_RANKS = [("qwen2-tied", "tp4"), ("qwen3-untied", "tp4+sp")]
UNEVEN_STAGES = [(FIVE_LAYERS, "pp2"), (FIVE_LAYERS, "pp4")]


def _pairs(models: Sequence[str], always: Sequence[tuple[str, str]] = ()) -> list[object]:
    """Return (model, layout) parameters: all layouts of telling models and one of the others, the rest marked long."""
    quick = {*product(TELLING, USUAL), *product(models, ["tp2xpp2+sp"]), *always}
    pairs = dict.fromkeys([*product(models, USUAL), *always])
    return [pytest.param(*p, id="-".join(p), marks=[] if p in quick else pytest.mark.long) for p in pairs]


EXAMINED = pytest.mark.parametrize(("model", "layout"), _pairs(MODELS, FEWER_KV_HEADS_THAN_RANKS + UNEVEN_STAGES))
PACKING = pytest.mark.parametrize("packing", ["packed", "padded"])


@PACKING
@EXAMINED
def test_logits_equal_hugging_faces(
    examined: Callable[[str, str], list[dict[str, Examined]]],
    reference: Callable[[str], Reference],
    model: str,
    layout: str,
    packing: str,
) -> None:
    scored = [examined(model, layout)[rank][packing].scored for rank in LAYOUTS[layout].output_ranks()]
    logits_BSV = torch.cat([found.logits_BSV for found in scored if found is not None])
    torch.testing.assert_close(logits_BSV, reference(model).logits_BSV, rtol=0, atol=TOLERANCE)


@PACKING
@EXAMINED
def test_log_probs_at_the_sampling_temperature_equal_hugging_faces(
    examined: Callable[[str, str], list[dict[str, Examined]]],
    reference: Callable[[str], Reference],
    model: str,
    layout: str,
    packing: str,
) -> None:
    scored = [examined(model, layout)[rank][packing].scored for rank in LAYOUTS[layout].output_ranks()]
    logprobs_BS = torch.cat([found.logprobs_BS for found in scored if found is not None])
    torch.testing.assert_close(logprobs_BS, reference(model).logprobs_BS, rtol=0, atol=TOLERANCE)


@EXAMINED
def test_only_output_ranks_report_log_probs(
    examined: Callable[[str, str], list[dict[str, Examined]]], model: str, layout: str
) -> None:
    reporting = [r for r, found in enumerate(examined(model, layout)) if found["packed"].scored is not None]
    assert tuple(reporting) == LAYOUTS[layout].output_ranks()


@PACKING
@EXAMINED
def test_the_gradient_of_every_parameter_equals_hugging_faces(
    examined: Callable[[str, str], list[dict[str, Examined]]],
    hf_training: Callable[[str, str], hf_reference.Training],
    model: str,
    layout: str,
    packing: str,
) -> None:
    pieces = [piece for found in examined(model, layout) for piece in found[packing].gradients]
    assert_pieces_are(pieces, hf_training(model, "sft").first_gradients, TOLERANCE)


@PACKING
@EXAMINED
def test_loss_and_gradient_norm_equal_hugging_faces_on_every_rank(
    examined: Callable[[str, str], list[dict[str, Examined]]],
    hf_training: Callable[[str, str], hf_reference.Training],
    model: str,
    layout: str,
    packing: str,
) -> None:
    """Megatron leaves parameters out of the norm that nothing has marked as split over tensor-parallel ranks."""
    found, expected = [rank[packing].metrics for rank in examined(model, layout)], hf_training(model, "sft")
    (step,) = summed([[metrics] for metrics in found], LAYOUTS[layout])
    assert step["loss"] == pytest.approx(expected.losses[0], rel=TRAINING_TOLERANCE)
    norms = [metrics["grad_norm"] for metrics in found]
    assert norms == pytest.approx([expected.grad_norms[0]] * len(norms), rel=TRAINING_TOLERANCE)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(("model", "layout"), _pairs(MODELS))
def test_three_optimizer_steps_equal_hugging_face_with_adamw(
    trained: Callable[[str, str], list[dict[str, Trained]]],
    hf_training: Callable[[str, str], hf_reference.Training],
    model: str,
    layout: str,
    job: str,
) -> None:
    assert_trained_as([rank[job] for rank in trained(model, layout)], hf_training(model, job), LAYOUTS[layout])


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("layout", USUAL[1:])
def test_every_metric_of_three_optimizer_steps_equals_that_of_one_rank(
    trained: Callable[[str, str], list[dict[str, Trained]]], layout: str, job: str
) -> None:
    alone = [rank[job].metrics for rank in trained(TELLING[0], "one_rank")]
    found = [rank[job].metrics for rank in trained(TELLING[0], layout)]
    for step, expected in zip(summed(found, LAYOUTS[layout]), alone[0], strict=True):
        # Some are sums in which tokens of both signs cancel.
        assert step == pytest.approx(expected, rel=TRAINING_TOLERANCE, abs=TRAINING_TOLERANCE)


@pytest.mark.parametrize("layout", ["one_rank", "dp2", "tp2xpp2+sp"])
def test_the_micro_batch_size_changes_nothing(
    ranks: RankPool,
    reference: Callable[[str], Reference],
    hf_training: Callable[[str, str], hf_reference.Training],
    layout: str,
) -> None:
    setup = Setup(reference(TELLING[1]).folder, LAYOUTS[layout])
    batch, world_size = reference(TELLING[1]).batch, LAYOUTS[layout].world_size
    answers = ranks.run(train, setup, batch, MICRO_BATCH_SIZES, world_size=world_size)
    expected = hf_training(TELLING[1], "ppo_token_mean")
    for size in MICRO_BATCH_SIZES:
        steps = summed([rank[size].metrics for rank in answers], LAYOUTS[layout])
        assert [s["loss"] for s in steps] == pytest.approx(expected.losses, rel=TRAINING_TOLERANCE, abs=1e-6)
        assert [s["grad_norm"] for s in steps] == pytest.approx(expected.grad_norms, rel=TRAINING_TOLERANCE)


@pytest.mark.parametrize("layout", ["dp2", "tp2xpp2+sp", "tp2xdp2"])
def test_bf16_training_stays_near_its_own_run_on_one_rank(
    ranks: RankPool, reference: Callable[[str], Reference], layout: str
) -> None:
    found = reference(TELLING[0])
    jobs = {name: JOBS[name] for name in ("sft", "sft_replicated_optimizer")}

    def run(layout: Layout) -> list[dict[str, Trained]]:
        setup = Setup(found.folder, layout, dtype=torch.bfloat16)
        return ranks.run(train, setup, found.batch, jobs, world_size=layout.world_size)

    (alone,), together = run(LAYOUTS["one_rank"]), run(LAYOUTS[layout])
    for job in jobs:
        steps = summed([rank[job].metrics for rank in together], LAYOUTS[layout])
        for name in ("loss", "grad_norm"):
            expected = [s[name] for s in alone[job].metrics]
            assert [s[name] for s in steps] == pytest.approx(expected, rel=BF16_TOLERANCE)
        assert {p.values.dtype for rank in together for p in rank[job].weights} == {torch.bfloat16}
        assert all(rank[job].main_dtypes == {torch.float32} for rank in (alone, *together))


def test_roles_with_layouts_of_their_own_do_not_disturb_each_other(
    ranks: RankPool, reference: Callable[[str], Reference]
) -> None:
    layouts = {"actor": "tp2xpp2", "reference": "tp4", "reward_model": "dp4"}
    folder, batch = reference(TELLING[0]).folder, reference(TELLING[0]).batch
    setups = {role: Setup(folder, LAYOUTS[layout]) for role, layout in layouts.items()}
    together = ranks.run(take_turns, setups, batch, OPTIMIZER)
    for role in setups:
        alone = ranks.run(take_turns, {role: setups[role]}, batch, OPTIMIZER)
        assert [rank[role] for rank in together] == [rank[role] for rank in alone]
