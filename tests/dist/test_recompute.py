"""Computing activations again saves their memory, and changes no number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megarl.batching.pack import sequences_to_batch
from megarl.config.schema import RecomputeConfig
from megarl.parallel.layout import Layout
from megarl.types import Batch
from tests.dist import parity
from tests.dist.ranks import RankPool
from tests.dist.recompute_cases import Recomputed, train_with
from tests.dist.tiny_models import FIVE_LAYERS, VOCAB_SIZE, save_tiny_model

LENGTHS = (9, 12, 12, 7, 16, 5, 9, 4)
OPTIMIZER = replace(parity.OPTIMIZER, lr=1e-3)
EVERYTHING_KEPT = "everything kept"
CHOICES = {
    EVERYTHING_KEPT: None,
    "selective": RecomputeConfig("selective", None, None),
    "uniform 1": RecomputeConfig("full", "uniform", 1),
    "block 1": RecomputeConfig("full", "block", 1),
    "block 5": RecomputeConfig("full", "block", 5),
}
# Megatron wants runs of equal length, which divide the layers of every stage.
ON_ONE_STAGE = {"uniform 5": RecomputeConfig("full", "uniform", 5)}
LAYOUTS = {
    "one_rank": Layout(1),
    "tp2+sp": Layout(2, tp=2, sequence_parallel=True),
    "dp2": Layout(2),
    "tp2_pp2+sp": Layout(4, tp=2, pp=2, sequence_parallel=True),
    "pp2_vpp2": Layout(2, pp=2, vpp=2),
    "cp2": Layout(2, cp=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recompute")
    save_tiny_model(FIVE_LAYERS, path)
    return path


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]
    return sequences_to_batch(tokens, [[i >= 2 for i in range(length)] for length in LENGTHS])


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.long)], ids=["packed", "padded"])
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("one_rank", "float32"),
        ("tp2+sp", "bfloat16"),
        ("dp2", "bfloat16"),
        ("tp2_pp2+sp", "float32"),
        ("pp2_vpp2", "float32"),
        ("cp2", "float32"),
    ],
)
def test_recomputing_changes_neither_losses_nor_weights_and_keeps_less(
    ranks: RankPool, folder: Path, batch: Batch, layout: str, dtype: str, packed: bool
) -> None:
    answers: list[dict[str, Recomputed]] = ranks.run(
        train_with,
        folder,
        LAYOUTS[layout],
        getattr(torch, dtype),
        packed,
        batch,
        OPTIMIZER,
        CHOICES | ({} if LAYOUTS[layout].pp > 1 else ON_ONE_STAGE),
        world_size=LAYOUTS[layout].world_size,
    )
    for answer in answers:
        kept = answer[EVERYTHING_KEPT]
        for name, recomputed in answer.items():
            assert recomputed.metrics == kept.metrics, name
            for one, other in zip(recomputed.weights, kept.weights, strict=True):
                assert one.values.equal(other.values), (name, one.name)
        if LAYOUTS[layout].pp == 1:
            _assert_choices_keep_less(answer)
            # Elsewhere attention keeps so little that its inputs, which take its place, weigh as much: it has no
            # scores to keep, and what it returns is kept by the projection after it anyway.
            assert dtype != "float32" or answer["selective"].saved_bytes < answer[EVERYTHING_KEPT].saved_bytes


def _assert_choices_keep_less(answer: dict[str, Recomputed]) -> None:
    saved = {name: recomputed.saved_bytes for name, recomputed in answer.items()}
    assert saved["block 5"] < saved["block 1"] < saved[EVERYTHING_KEPT]
    assert saved["uniform 5"] < saved["uniform 1"] == saved["block 5"]
    assert saved["uniform 1"] < saved[EVERYTHING_KEPT] / 3
