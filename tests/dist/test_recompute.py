"""Computing activations again saves their memory, and changes no number."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from megarl.config.schema import RecomputeConfig
from megarl.parallel.layout import Layout
from megarl.roles import Role
from megarl.train.actor import Actor
from megarl.train.megatron.backend import MegatronBackend
from megarl.types import Metrics, Sequences
from megarl.verify.pool import RankPool
from megarl.verify.reference import random_sequences
from megarl.verify.roles import TRAINING, role_on, with_section
from megarl.verify.work import backend_on_rank, update
from tests.dist.parity import SFT, Piece, ask, pieces
from tests.dist.saved_bytes import saved_activation_bytes
from tests.dist.tiny_models import FIVE_LAYERS, VOCAB_SIZE, save_tiny_model

LENGTHS = (9, 12, 12, 7, 16, 5, 9, 4)
EVERYTHING_KEPT = "everything kept"
CHOICES = {
    EVERYTHING_KEPT: RecomputeConfig(None, None, None),
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


@dataclass(frozen=True)
class Recomputed:
    """saved_bytes: of one forward pass over the whole batch on one stage; 0 where there are several stages."""

    metrics: tuple[Metrics, ...]
    weights: list[Piece]
    saved_bytes: int


def _train_with(role: Role, batch: Sequences, choices: dict[str, RecomputeConfig]) -> dict[str, Recomputed]:
    """Take three optimizer steps from the weights of the folder with each choice of what to compute again."""
    return {name: _train(with_section(role, recompute=choice), batch) for name, choice in choices.items()}


def _train(role: Role, batch: Sequences) -> Recomputed:
    backend = backend_on_rank(role)
    saved_bytes = _saved_bytes(backend, batch) if role.layout.pp == 1 else 0
    metrics = update(Actor(backend), batch, SFT, 3).metrics
    return Recomputed(metrics, pieces(backend, backend.parameters()), saved_bytes)


def _saved_bytes(backend: MegatronBackend, batch: Sequences) -> int:
    """Measure the model's own forward pass in training mode, without a loss."""
    (micro,), model = backend.pack(batch, [range(len(batch))]), backend.model
    model.set_training(True)
    with model.groups.active():
        return saved_activation_bytes(lambda: model.forward(model.module, micro), model.own_parameters())


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.long)], ids=["packed", "padded"])
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        pytest.param("one_rank", "float32", marks=pytest.mark.long),
        pytest.param("tp2+sp", "bfloat16", marks=pytest.mark.long),
        pytest.param("dp2", "bfloat16", marks=pytest.mark.long),
        pytest.param("tp2_pp2+sp", "float32", marks=pytest.mark.long),
        ("pp2_vpp2", "float32"),
        pytest.param("cp2", "float32", marks=pytest.mark.long),
    ],
)
def test_recomputing_changes_neither_losses_nor_weights_and_keeps_less(
    ranks: RankPool, folder: Path, layout: str, dtype: str, packed: bool
) -> None:
    training = replace(TRAINING, lr=1e-3)
    role = role_on(LAYOUTS[layout], folder, dtype=dtype, training=training, packed=packed)
    batch = random_sequences(LENGTHS, VOCAB_SIZE, torch.Generator().manual_seed(1))
    choices = CHOICES | ({} if role.layout.pp > 1 else ON_ONE_STAGE)
    answers = ask(ranks, _train_with, role, batch, choices)
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
