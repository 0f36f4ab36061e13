"""Mixtures of experts, beyond what tests/dist/test_parity.py holds of every layout: their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megarl.parallel.layout import Layout
from megarl.verify.pool import RankPool
from megarl.verify.reference import Reference, load
from megarl.verify.roles import role_on
from tests.dist.parity import TOLERANCE, ask, assert_export_is_what_was_loaded, examine
from tests.dist.tiny_models import MOE_MODELS

LAYOUTS = {
    "tp2xep2xetp1xdp2": Layout(4, tp=2, ep=2, etp=1, sequence_parallel=True),
    "tp2xep2xetp2": Layout(4, tp=2, ep=2, etp=2, sequence_parallel=True),
    "pp2xep2": Layout(4, pp=2, ep=2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MOE_MODELS)
def test_export_writes_what_was_loaded_bit_for_bit(
    ranks: RankPool, reference: Callable[..., Reference], tmp_path: Path, model: str, layout: str
) -> None:
    assert_export_is_what_was_loaded(ranks, role_on(LAYOUTS[layout], reference(model).folder), tmp_path / "exported")


def test_fused_experts_give_the_same_log_probs_as_those_apart(
    ranks: RankPool, reference: Callable[..., Reference], tmp_path: Path
) -> None:
    apart = reference("qwen3_moe-untied")
    load(apart.folder).save_pretrained(tmp_path, save_original_format=False)
    assert any(name.endswith(".experts.gate_up_proj") for name in load_file(tmp_path / "model.safetensors"))
    layout = Layout(2, tp=2, ep=2, etp=1, sequence_parallel=True)
    answers = ask(ranks, examine, role_on(layout, tmp_path), apart.rollouts)
    scored = answers[layout.output_ranks()[0]]["packed"].scored
    assert scored is not None
    torch.testing.assert_close(scored.logprobs_BS, apart.logprobs_BS, rtol=0, atol=TOLERANCE)
