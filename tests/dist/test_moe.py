"""Mixtures of experts: every way to split experts against Hugging Face's eager float32 model and torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megarl.parallel.layout import Layout
from tests.dist import hf_reference
from tests.dist.parity import (
    JOBS,
    LOOKING,
    TEMPERATURE,
    TOLERANCE,
    Reference,
    assert_first_step_is,
    assert_scored_as,
    assert_trained_as,
)
from tests.dist.parity_cases import Examined, Setup, Trained, examine, export
from tests.dist.ranks import RankPool
from tests.dist.tiny_models import MOE_MODELS

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
def test_the_gradient_of_every_parameter_and_their_norm_equal_hugging_faces(
    examined: Callable[[str, str], list[dict[str, Examined]]],
    hf_training: Callable[[str, str], hf_reference.Training],
    model: str,
    layout: str,
    packing: str,
) -> None:
    """Experts see the tokens of all ranks, and their gradients are summed over fewer of them than others' are."""
    answers = [found[packing] for found in examined(model, layout)]
    assert_first_step_is(answers, hf_training(model, "sft"), LAYOUTS[layout])


@pytest.mark.parametrize("job", TRAINING)
@EVERY_PAIR
def test_three_optimizer_steps_equal_hugging_face_with_adamw(
    trained: Callable[[str, str], list[dict[str, Trained]]],
    hf_training: Callable[[str, str], hf_reference.Training],
    model: str,
    layout: str,
    job: str,
) -> None:
    assert_trained_as([rank[job] for rank in trained(model, layout)], hf_training(model, job), LAYOUTS[layout])


@pytest.mark.parametrize("layout", EXPORTED_FROM)
@pytest.mark.parametrize("model", MOE_MODELS)
def test_export_writes_what_was_loaded_bit_for_bit(
    ranks: RankPool, reference: Callable[[str], Reference], tmp_path: Path, model: str, layout: str
) -> None:
    folder, out = reference(model).folder, tmp_path / "exported"
    ranks.run(export, Setup(folder, LAYOUTS[layout]), out)
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
