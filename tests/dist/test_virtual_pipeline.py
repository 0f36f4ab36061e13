"""Pipeline stages whose model chunks take turns: every layout against Hugging Face's eager float32 model and AdamW."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megarl.parallel.layout import Layout
from tests.dist import hf_reference
from tests.dist.parity import (
    JOBS,
    MICRO_BATCH_SIZES,
    TELLING,
    TRAINING_TOLERANCE,
    Reference,
    assert_first_step_is,
    assert_pieces_are,
    assert_scored_as,
    assert_trained_as,
    summed,
)
from tests.dist.parity_cases import Examined, Setup, Trained, export, train
from tests.dist.ranks import RankPool

DENSE_LAYOUTS = {
    "pp2xvpp2": Layout(2, pp=2, vpp=2),
    "pp2xvpp4": Layout(2, pp=2, vpp=4),
    "pp4xvpp2": Layout(4, pp=4, vpp=2),
    "tp2xpp2xvpp2": Layout(4, tp=2, pp=2, vpp=2),
    "tp2xpp2xvpp2+sp": Layout(4, tp=2, pp=2, vpp=2, sequence_parallel=True),
    "pp2xvpp2xdp2": Layout(4, pp=2, vpp=2),
    "cp2xpp2xvpp2": Layout(4, cp=2, pp=2, vpp=2),
}
EXPERT_LAYOUTS = {
    "pp2xvpp2xep2": Layout(4, pp=2, vpp=2, ep=2),
    "tp2xpp2xvpp2xep2xetp1+sp": Layout(4, tp=2, pp=2, vpp=2, ep=2, etp=1, sequence_parallel=True),
}
LAYOUTS = DENSE_LAYOUTS | EXPERT_LAYOUTS
MOE_MODEL = "qwen2_moe-tied"  # a dense layer, then layers of experts
MODEL_SIZES = {"num_hidden_layers": 8}
QUICK = [*product(TELLING[1:], ["pp2xvpp2", "tp2xpp2xvpp2+sp", "cp2xpp2xvpp2"]), (MOE_MODEL, "pp2xvpp2xep2")]
PAIRS = pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(*pair, id="-".join(pair), marks=() if pair in QUICK else pytest.mark.long)
        for pair in [*product(TELLING, DENSE_LAYOUTS), *product([MOE_MODEL], EXPERT_LAYOUTS)]
    ],
)
PACKING = pytest.mark.parametrize("packing", ["packed", "padded"])


@PACKING
@PAIRS
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
@PAIRS
def test_loss_gradients_and_their_norm_equal_hugging_faces(
    examined: Callable[[str, str], list[dict[str, Examined]]],
    hf_training: Callable[[str, str], hf_reference.Training],
    model: str,
    layout: str,
    packing: str,
) -> None:
    """Messages between two stages that pair wrongly leave the logits right, and make the gradients garbage."""
    answers = [found[packing] for found in examined(model, layout)]
    assert_first_step_is(answers, hf_training(model, "sft"), LAYOUTS[layout])


@pytest.mark.parametrize("job", JOBS)
@PAIRS
def test_three_optimizer_steps_equal_hugging_face_with_adamw(
    trained: Callable[[str, str], list[dict[str, Trained]]],
    hf_training: Callable[[str, str], hf_reference.Training],
    model: str,
    layout: str,
    job: str,
) -> None:
    assert_trained_as([rank[job] for rank in trained(model, layout)], hf_training(model, job), LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["pp2xvpp2", "pp4xvpp2"])
def test_any_number_of_micro_batches_will_do(
    ranks: RankPool,
    reference: Callable[[str], Reference],
    hf_training: Callable[[str, str], hf_reference.Training],
    layout: str,
) -> None:
    """Megatron's interleaved schedule takes multiples of the stages only: here there are 8, 3 and 1 micro-batches."""
    found = reference(TELLING[1])
    setup, world_size = Setup(found.folder, LAYOUTS[layout]), LAYOUTS[layout].world_size
    answers = ranks.run(train, setup, found.batch, MICRO_BATCH_SIZES, world_size=world_size)
    expected = hf_training(TELLING[1], "ppo_token_mean")
    for size in MICRO_BATCH_SIZES:
        steps = summed([rank[size].metrics for rank in answers], LAYOUTS[layout])
        assert [s["loss"] for s in steps] == pytest.approx(expected.losses, rel=TRAINING_TOLERANCE, abs=1e-6)
        assert [s["grad_norm"] for s in steps] == pytest.approx(expected.grad_norms, rel=TRAINING_TOLERANCE)


def test_adam_on_the_host_steps_every_chunk(
    ranks: RankPool, reference: Callable[[str], Reference], hf_training: Callable[[str, str], hf_reference.Training]
) -> None:
    layout, found, expected = LAYOUTS["pp2xvpp2xdp2"], reference(TELLING[0]), hf_training(TELLING[0], "sft")
    jobs = {"sft": replace(JOBS["sft"], optimizer=replace(JOBS["sft"].optimizer, optimizer_on_host=True))}
    answers = ranks.run(train, Setup(found.folder, layout), found.batch, jobs, world_size=layout.world_size)
    steps = summed([rank["sft"].metrics for rank in answers], layout)
    assert [s["loss"] for s in steps] == pytest.approx(expected.losses, rel=TRAINING_TOLERANCE)
    assert [s["grad_norm"] for s in steps] == pytest.approx(expected.grad_norms, rel=TRAINING_TOLERANCE)
    weights = [piece for rank in answers for piece in rank["sft"].weights]
    assert_pieces_are(weights, expected.weights, TRAINING_TOLERANCE)


def test_bf16_training_stays_near_that_on_one_rank(ranks: RankPool, reference: Callable[[str], Reference]) -> None:
    found, jobs = reference(TELLING[0]), {"sft": JOBS["sft"]}

    def run(layout: Layout) -> list[dict[str, float]]:
        setup = Setup(found.folder, layout, dtype=torch.bfloat16)
        answers = ranks.run(train, setup, found.batch, jobs, world_size=layout.world_size)
        return summed([rank["sft"].metrics for rank in answers], layout)

    for step, expected in zip(run(LAYOUTS["tp2xpp2xvpp2+sp"]), run(Layout(1)), strict=True):
        assert [step[name] for name in ("loss", "grad_norm")] == pytest.approx(
            [expected[name] for name in ("loss", "grad_norm")], rel=2e-2
        )


@pytest.mark.parametrize("layout", ["pp2xvpp4", "tp2xpp2xvpp2+sp"])
@pytest.mark.parametrize("model", TELLING)
def test_export_writes_what_was_loaded_bit_for_bit(
    ranks: RankPool, reference: Callable[[str], Reference], tmp_path: Path, model: str, layout: str
) -> None:
    folder, out = reference(model).folder, tmp_path / "exported"
    ranks.run(export, Setup(folder, LAYOUTS[layout]), out, world_size=LAYOUTS[layout].world_size)
    loaded, exported = (load_file(f / "model.safetensors") for f in (folder, out))
    assert exported.keys() == loaded.keys()
    assert [name for name in loaded if not exported[name].equal(loaded[name])] == []
