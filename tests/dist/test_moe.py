"""Mixtures of experts: every way to split experts against Hugging Face's eager float32 model and torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megarl.parallel.layout import Layout
from tests.dist import hf_reference
from tests.dist.parity_cases import Examined, Setup, Trained, examine, train
from tests.dist.ranks import RankPool
from tests.dist.test_parity import (
    JOBS,
    LOOKING,
    TEMPERATURE,
    TOLERANCE,
    TRAINING_TOLERANCE,
    Reference,
    assert_pieces_are,
    make_reference,
    summed,
)
from tests.dist.tiny_models import MOE_MODELS, save_tiny_model

LAYOUTS = {
    "one_rank": Layout(1),
    "pp2": Layout(2, pp=2),
    "dp2": Layout(2),
    "tp2+sp": Layout(2, tp=2, sequence_parallel=True),
    "ep2": Layout(2, ep=2),
    "tp2xep2xetp1": Layout(2, tp=2, ep=2, etp=1, sequence_parallel=True),
    "tp2xep2xetp2": Layout(4, tp=2, ep=2, etp=2, sequence_parallel=True),
    "tp2xep2xetp1xdp2": Layout(4, tp=2, ep=2, etp=1, sequence_parallel=True),
    "ep2xetp2xdp4": Layout(4, ep=2, etp=2),
    "tp2xetp4xdp2": Layout(4, tp=2, etp=4, sequence_parallel=True),
    "tp2xetp1xdp2": Layout(4, tp=2, etp=1, sequence_parallel=True),
    "ep2xdp4": Layout(4, ep=2),
    "ep4": Layout(4, ep=4),
    "pp2xep2": Layout(4, pp=2, ep=2),
    "tp2xpp2xep2xetp1": Layout(4, tp=2, pp=2, ep=2, etp=1, sequence_parallel=True),
}
EXPORTED_FROM = ("tp2xep2xetp1xdp2", "tp2xep2xetp2", "pp2xep2")
TELLING = "qwen3_moe-untied"
TRAINING = {name: JOBS[name] for name in ("sft_replicated_optimizer", "ppo_token_mean", "ppo_sequence_sum_padded")}
PAIRS = [
    pytest.param(model, layout, id=f"{model}-{layout}", marks=[] if is_quick else pytest.mark.long)
    for model in MOE_MODELS
    for layout in LAYOUTS
    for is_quick in [layout in (("tp2xep2xetp1xdp2", "pp2xep2", "ep2") if model == TELLING else ("tp2xep2xetp2",))]
]
EVERY_PAIR = pytest.mark.parametrize(("model", "layout"), PAIRS)
PACKING = pytest.mark.parametrize("packing", ["packed", "padded"])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Return the maker of references by model."""
    folder = tmp_path_factory.mktemp("models")

    @cache
    def make(model: str) -> Reference:
        save_tiny_model(model, folder / model)
        return make_reference(folder / model)

    return make


@pytest.fixture(scope="module")
def hf_training(reference: Callable[[str], Reference]) -> Callable[[str, str], hf_reference.Training]:
    """Return the runner of training jobs with Hugging Face and torch, by model and job."""

    @cache
    def run(model: str, job: str) -> hf_reference.Training:
        found, asked = reference(model), JOBS[job]
        return hf_reference.train(found.folder, found.batch, asked.loss, asked.optimizer, asked.steps)

    return run


@pytest.fixture(scope="module")
def examined(ranks: RankPool, reference: Callable[[str], Reference]) -> Callable[[str, str], list[dict[str, Examined]]]:
    """Return the examiner by model and layout: its answers by rank and packing."""

    @cache
    def run(model: str, layout: str) -> list[dict[str, Examined]]:
        setup = Setup(reference(model).folder, LAYOUTS[layout])
        batch, world_size = reference(model).batch, LAYOUTS[layout].world_size
        return ranks.run(examine, setup, batch, LOOKING, TEMPERATURE, world_size=world_size)

    return run


@pytest.fixture(scope="module")
def trained(ranks: RankPool, reference: Callable[[str], Reference]) -> Callable[[str, str], list[dict[str, Trained]]]:
    """Return the runner of the TRAINING jobs by model and layout: its answers by rank and job."""

    @cache
    def run(model: str, layout: str) -> list[dict[str, Trained]]:
        setup = Setup(reference(model).folder, LAYOUTS[layout])
        return ranks.run(train, setup, reference(model).batch, TRAINING, world_size=LAYOUTS[layout].world_size)

    return run


@PACKING
@EVERY_PAIR
def test_logits_and_log_probs_equal_hugging_faces(
    examined: Callable[[str, str], list[dict[str, Examined]]],
    reference: Callable[[str], Reference],
    model: str,
    layout: str,
    packing: str,
) -> None:
    answers = [examined(model, layout)[rank][packing].scored for rank in LAYOUTS[layout].output_ranks()]
    scored = [answer for answer in answers if answer is not None]
    logits_BSV, logprobs_BS = (torch.cat([getattr(s, name) for s in scored]) for name in ("logits_BSV", "logprobs_BS"))
    torch.testing.assert_close(logits_BSV, reference(model).logits_BSV, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(logprobs_BS, reference(model).logprobs_BS, rtol=0, atol=TOLERANCE)


@PACKING
@EVERY_PAIR
def test_the_gradient_of_every_parameter_and_their_norm_equal_hugging_faces(
    examined: Callable[[str, str], list[dict[str, Examined]]],
    hf_training: Callable[[str, str], hf_reference.Training],
    model: str,
    layout: str,
    packing: str,
) -> None:
    """Experts see the tokens of all ranks, and their gradients are summed over fewer of them than others' are."""
    answers, expected = [found[packing] for found in examined(model, layout)], hf_training(model, "sft")
    assert_pieces_are([piece for found in answers for piece in found.gradients], expected.first_gradients, TOLERANCE)
    norms = [found.metrics["grad_norm"] for found in answers]
    assert norms == pytest.approx([expected.grad_norms[0]] * len(norms), rel=TRAINING_TOLERANCE)


@pytest.mark.parametrize("job", TRAINING)
@EVERY_PAIR
def test_three_optimizer_steps_equal_hugging_face_with_adamw(
    trained: Callable[[str, str], list[dict[str, Trained]]],
    hf_training: Callable[[str, str], hf_reference.Training],
    model: str,
    layout: str,
    job: str,
) -> None:
    found, expected = [rank[job] for rank in trained(model, layout)], hf_training(model, job)
    steps = summed([rank.metrics for rank in found], LAYOUTS[layout])
    assert [s["loss"] for s in steps] == pytest.approx(expected.losses, rel=TRAINING_TOLERANCE, abs=1e-6)
    assert [s["grad_norm"] for s in steps] == pytest.approx(expected.grad_norms, rel=TRAINING_TOLERANCE)
    assert_pieces_are([piece for rank in found for piece in rank.weights], expected.weights, TRAINING_TOLERANCE)


def _export(setup: Setup, out: Path) -> None:
    """Load a model, and write it as a Hugging Face folder."""
    setup.model().export(out, setup.folder)


@pytest.mark.parametrize("layout", EXPORTED_FROM)
@pytest.mark.parametrize("model", MOE_MODELS)
def test_export_writes_what_was_loaded_bit_for_bit(
    ranks: RankPool, reference: Callable[[str], Reference], tmp_path: Path, model: str, layout: str
) -> None:
    folder, out = reference(model).folder, tmp_path / "exported"
    ranks.run(_export, Setup(folder, LAYOUTS[layout]), out)
    loaded, exported = (load_file(f / "model.safetensors") for f in (folder, out))
    assert exported.keys() == loaded.keys()
    assert [name for name in loaded if not exported[name].equal(loaded[name])] == []
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}


def test_fused_experts_give_the_same_log_probs_as_those_apart(
    ranks: RankPool, reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    apart = reference(TELLING)
    hf_reference.load(apart.folder).save_pretrained(tmp_path, save_original_format=False)
    assert any(name.endswith(".experts.gate_up_proj") for name in load_file(tmp_path / "model.safetensors"))
    layout = LAYOUTS["tp2xep2xetp1"]
    answers = ranks.run(examine, Setup(tmp_path, layout), apart.batch, LOOKING, TEMPERATURE, world_size=2)
    scored = answers[layout.output_ranks()[0]]["packed"].scored
    assert scored is not None
    torch.testing.assert_close(scored.logprobs_BS, apart.logprobs_BS, rtol=0, atol=TOLERANCE)
