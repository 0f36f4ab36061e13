"""The critic's values and updates are those of a Hugging Face model with a linear head, on every layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megarl.algorithm.loss_specs import ValueLossSpec
from megarl.parallel.layout import Layout
from megarl.roles import Role
from megarl.train.critic import Critic
from megarl.types import Metrics, Sequences, ValueBatch
from megarl.verify.pool import RankPool
from megarl.verify.reference import random_sequences
from megarl.verify.roles import TRAINING, role_on
from megarl.verify.work import backend_on_rank, score, update
from megarl.weights.any_model import read_shape
from tests.dist.parity import ask
from tests.dist.tiny_models import FAMILIES, VOCAB_SIZE, save_tiny_model

MODEL = "qwen3-tied"  # a critic has no output layer, so there is nothing to tie
OTHER_MODELS = ("gemma3-tied", "phi3-untied", "mistral-untied")
LENGTHS = (9, 12, 12, 7, 16, 5, 9, 4)
CLIP_RANGE, STEPS = 0.3, 3
LOSS = ValueLossSpec(CLIP_RANGE, "token-mean")
LEARNING = replace(TRAINING, lr=1e-3, weight_decay=0.0)
LAYOUTS = {
    "one_rank": Layout(1),
    "tp1_pp2": Layout(2, pp=2),
    "tp2_pp1": Layout(2, tp=2),
    "tp2_pp1+sp": Layout(2, tp=2, sequence_parallel=True),
    "tp2_pp2+sp": Layout(4, tp=2, pp=2, sequence_parallel=True),
    "pp2_dp2": Layout(4, pp=2),
    "pp2_vpp2": Layout(2, pp=2, vpp=2),
    "tp2_cp2+sp": Layout(4, tp=2, cp=2, sequence_parallel=True),
    "fsdp2": Layout(2, fsdp=2),
    "fsdp4_ulysses2": Layout(4, cp=2, fsdp=4),
}
EACH_TIME = ("one_rank", "tp2_pp2+sp", "pp2_vpp2")
QUICK = (*((name, True) for name in EACH_TIME), ("one_rank", False), ("fsdp2", False))


@dataclass(frozen=True)
class Expected:
    """What Hugging Face and torch say."""

    values_BS: Tensor
    losses: list[float]
    grad_norms: list[float]


@dataclass(frozen=True)
class Judged:
    """This data-parallel rank's values on the rank that reports them, and the metrics of its optimizer steps."""

    values_BS: Tensor | None
    metrics: tuple[Metrics, ...]


def _judge(role: Role, batch: ValueBatch, steps: int) -> Judged:
    """Value the batch on a rank, then take ``steps`` optimizer steps on the whole of it."""
    critic = Critic(backend_on_rank(role))
    values_BS = score(critic, batch)
    return Judged(values_BS, update(critic, batch, LOSS, steps).metrics)


def _learn_and_export(role: Role, batch: ValueBatch, out: Path) -> Tensor | None:
    """Take an optimizer step on a rank, write the critic to ``out``, and return its values as ``_judge`` does."""
    critic = Critic(backend_on_rank(role))
    update(critic, batch, LOSS)
    critic.backend.export(out)
    return score(critic, batch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model with a value head that isn't zero."""
    path = tmp_path_factory.mktemp("critic")
    save_tiny_model(MODEL, path, num_hidden_layers=4)
    return _with_value_head(path)


def _with_value_head(path: Path) -> Path:
    """Put a value head that isn't zero among the weights of a folder; return it."""
    hidden_size = read_shape(path).hidden_size
    tensors = load_file(path / "model.safetensors")
    tensors["score.weight"] = torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(5)) * 0.2
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def batch(folder: Path) -> ValueBatch:
    """Return sequences with old values and returns around the model's own values."""
    return _batch(folder)


def _batch(folder: Path) -> ValueBatch:
    generator = torch.Generator().manual_seed(1)
    rows = random_sequences(LENGTHS, VOCAB_SIZE, generator)
    rows = replace(rows, tokens_BS=rows.tokens_BS.clamp(min=1))  # 0 may be padding, which transformers doesn't train
    noise_BS = torch.randn(rows.tokens_BS.shape, generator=generator)
    values_BS = _values(_model(folder), rows).detach() + 0.5 * noise_BS * rows.mask_BS
    return ValueBatch(**vars(rows), values_BS=values_BS, returns_BS=(values_BS + noise_BS.flip(0)) * rows.mask_BS)


@pytest.fixture(scope="module")
def expected(folder: Path, batch: ValueBatch) -> Expected:
    """Return what three steps of torch's AdamW do to the same model and loss, written out here."""
    return _expected(folder, batch)


def _expected(folder: Path, batch: ValueBatch) -> Expected:
    model = _model(folder)
    first_BS = _values(model, batch).detach()
    adam = torch.optim.AdamW(model.parameters(), lr=LEARNING.lr, betas=LEARNING.betas, eps=LEARNING.eps, weight_decay=0)
    losses, norms = [], []
    for _ in range(STEPS):
        adam.zero_grad()
        values_BS = _values(model, batch)
        low_BS, high_BS = batch.values_BS - CLIP_RANGE, batch.values_BS + CLIP_RANGE
        near_BS = values_BS.maximum(low_BS).minimum(high_BS)
        error_BS = torch.maximum((values_BS - batch.returns_BS) ** 2, (near_BS - batch.returns_BS) ** 2) / 2
        loss = (error_BS * batch.mask_BS).sum() / batch.mask_BS.sum()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), LEARNING.clip_grad)))
        adam.step()
        losses.append(float(loss.detach()))
    return Expected(first_BS, losses, norms)


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        pytest.param(
            name,
            is_packed,
            id=f"{name}-{'packed' if is_packed else 'padded'}",
            marks=() if (name, is_packed) in QUICK else pytest.mark.long,
        )
        for name in LAYOUTS
        for is_packed in (True, False)
    ],
)
def test_values_and_three_updates_equal_those_of_torch(
    ranks: RankPool, folder: Path, batch: ValueBatch, expected: Expected, name: str, packed: bool
) -> None:
    role = role_on(LAYOUTS[name], folder, "critic", training=LEARNING, packed=packed)
    _assert_judged_as(expected, ranks, role, batch)


def _assert_judged_as(expected: Expected, ranks: RankPool, role: Role, batch: ValueBatch) -> None:
    layout, answers = role.layout, ask(ranks, _judge, role, batch, STEPS)
    reports = [answers[rank] for rank in layout.output_ranks()]
    torch.testing.assert_close(_reported(layout, [a.values_BS for a in answers]), expected.values_BS, rtol=0, atol=2e-5)
    losses = [sum(report.metrics[step]["value_loss"] for report in reports) for step in range(STEPS)]
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert [m["grad_norm"] for m in reports[0].metrics] == pytest.approx(expected.grad_norms, rel=1e-5)
    assert any(report.metrics[0]["clip_fraction"] > 0 for report in reports), "no token tests the clip"


@pytest.mark.parametrize("model", ["gemma2-tied", *(pytest.param(m, marks=pytest.mark.long) for m in OTHER_MODELS)])
def test_a_critic_of_a_family_outside_the_map_learns_as_in_torch_and_is_exported(
    ranks: RankPool, tmp_path: Path, model: str
) -> None:
    from transformers import AutoModelForTokenClassification

    start, out = tmp_path / "start", tmp_path / "critic"
    save_tiny_model(model, start)
    batch = _batch(_with_value_head(start))
    role = role_on(Layout(4, fsdp=4), start, "critic", training=LEARNING)
    _assert_judged_as(_expected(start, batch), ranks, role, batch)
    exported = ask(ranks, _learn_and_export, role, batch, out)
    assert read_shape(out) == read_shape(start).with_value_head()
    again = ask(ranks, _judge, role_on(role.layout, out, "critic", training=LEARNING), batch, 0)
    values_BS = _reported(role.layout, exported)
    assert _reported(role.layout, [a.values_BS for a in again]).equal(values_BS)
    if model != "gemma3-tied":  # of which transformers has no such class
        classifier = AutoModelForTokenClassification.from_pretrained(out, dtype=torch.float32).eval()
        torch.testing.assert_close(_values_of_classifier(classifier, batch), values_BS, rtol=0, atol=2e-5)


def test_a_critic_from_a_language_model_values_every_state_at_zero(
    ranks: RankPool, tmp_path: Path, batch: ValueBatch
) -> None:
    save_tiny_model(MODEL, tmp_path)
    [answer] = ask(ranks, _judge, role_on(Layout(1), tmp_path, "critic", training=LEARNING), batch, 1)
    assert float(answer.values_BS.abs().max()) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_critic_gives_the_same_values_in_transformers_and_where_it_is_loaded_again(
    ranks: RankPool, tmp_path: Path, batch: ValueBatch, family: str
) -> None:
    from transformers import AutoModelForTokenClassification

    start, out = tmp_path / "start", tmp_path / "critic"
    save_tiny_model(f"{family}-tied", start)  # from a value head of zeros, which an optimizer step moves
    layout, training = Layout(4, tp=2, pp=2), replace(LEARNING, lr=0.1)
    exported = ask(ranks, _learn_and_export, role_on(layout, start, "critic", training=training), batch, out)
    values_BS = _reported(layout, exported)
    assert float(values_BS.abs().max()) > 0.1, "the critic learnt nothing that could be lost"

    again = [a.values_BS for a in ask(ranks, _judge, role_on(layout, out, "critic", training=training), batch, 0)]
    assert _reported(layout, again).equal(values_BS)
    model, found = AutoModelForTokenClassification.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(found.values()), found  # nothing missing, unexpected or of another shape
    assert model.config.num_labels == 1 and not model.score.bias.any()
    torch.testing.assert_close(_values_of_classifier(model.eval(), batch), values_BS, rtol=0, atol=2e-5)
    assert read_shape(out) == read_shape(start).with_value_head()


def _reported(layout: Layout, answers: list[Tensor | None]) -> Tensor:
    """Return the values of all rows, from the ranks that report them."""
    reported = [answers[rank] for rank in layout.output_ranks()]
    return torch.cat([values_BS for values_BS in reported if values_BS is not None])


@torch.no_grad()
def _values_of_classifier(model: Any, batch: Sequences) -> Tensor:
    """Return what transformers' own model gives each token's state before it, zero outside the mask."""
    rows = []
    for tokens_S, length in zip(batch.tokens_BS, batch.lengths_B.tolist(), strict=True):
        values_S = model(tokens_S[None, :length]).logits[0, :-1, 0]
        rows.append(torch.nn.functional.pad(values_S, (1, len(tokens_S) - length)))
    return torch.stack(rows) * batch.mask_BS


def _model(folder: Path) -> Any:
    """Return the trunk with a linear head called ``score``."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model.score = torch.nn.Linear(model.config.hidden_size, 1, bias=False)
    model.score.weight.data = load_file(folder / "model.safetensors")["score.weight"].clone()
    return model


def _values(model: Any, batch: Sequences) -> Tensor:
    """Return for each masked token the value of the state before it, zero elsewhere."""
    rows = []
    for tokens_S, length in zip(batch.tokens_BS, batch.lengths_B.tolist(), strict=True):
        values_S = model.score(model(tokens_S[None, :length]).last_hidden_state)[0, :-1, 0]
        rows.append(torch.nn.functional.pad(values_S, (1, len(tokens_S) - length)))
    return torch.stack(rows) * batch.mask_BS
