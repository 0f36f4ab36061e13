"""Pipeline stages whose model chunks take turns, beyond what tests/dist/test_parity.py holds of every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megarl.parallel.layout import Layout
from megarl.verify.pool import RankPool
from megarl.verify.reference import Reference
from megarl.verify.roles import role_on
from tests.dist import hf_training
from tests.dist.parity import SFT, TELLING, Job, ask, assert_export_is_what_was_loaded, assert_trained_as, train

EXPORTED_FROM = {
    "pp2xvpp4": Layout(2, pp=2, vpp=4),
    "tp2xpp2xvpp2+sp": Layout(4, tp=2, pp=2, vpp=2, sequence_parallel=True),
}
SIZES = {"num_hidden_layers": 8}


def test_adam_on_the_host_steps_every_chunk(
    ranks: RankPool, reference: Callable[..., Reference], hf_trained: Callable[..., hf_training.Trained]
) -> None:
    layout, found = Layout(4, pp=2, vpp=2), reference(TELLING[0], **SIZES)
    jobs = {"sft": Job(SFT, {"optimizer_on_host": True})}
    answers = ask(ranks, train, role_on(layout, found.folder), found.rollouts, jobs)
    assert_trained_as([rank["sft"] for rank in answers], hf_trained(TELLING[0], "sft", **SIZES), layout)


@pytest.mark.parametrize("layout", EXPORTED_FROM)
@pytest.mark.parametrize("model", TELLING)
def test_export_writes_what_was_loaded_bit_for_bit(
    ranks: RankPool, reference: Callable[..., Reference], tmp_path: Path, model: str, layout: str
) -> None:
    role = role_on(EXPORTED_FROM[layout], reference(model, **SIZES).folder)
    assert_export_is_what_was_loaded(ranks, role, tmp_path / "exported")
