"""Families outside of the name map on FSDP: trained as Hugging Face does, saved, and answered for by their engine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megarl.checkpoint.rank_save import RankSave
from megarl.checkpoint.role_files import SavedRole
from megarl.parallel.layout import EngineLayout, Layout
from megarl.plan.sizes import StaticBytes
from megarl.plan.static import static_of
from megarl.roles import Role
from megarl.train.actor import Actor
from megarl.train.fsdp.backend import FsdpBackend
from megarl.types import Metrics, PolicyBatch, Sequences
from megarl.verify.pool import RankPool
from megarl.verify.reference import TEMPERATURE, Reference, hf_logprobs_BS, load, make_reference
from megarl.verify.roles import TRAINING, role_on
from megarl.verify.work import PPO, backend_on_rank, score, update
from megarl.weights.adapters import Lora
from tests.dist import hf_training
from tests.dist.parity import TOLERANCE, TRAINING_TOLERANCE, Piece, ask, assert_pieces_are, pieces, summed
from tests.dist.publish_case import GREEDY, PROMPTS
from tests.dist.ranks import run_case
from tests.dist.test_fsdp import held_bytes
from tests.dist.tiny_models import save_tiny_model

THREE, TWO = Layout(3, fsdp=3), Layout(2, fsdp=2)
ULYSSES = Layout(2, fsdp=2, cp=2)
OWN_ATTENTION = "bloom-tied"
long = pytest.mark.long
FAMILIES = [
    "gemma2-tied",
    *(pytest.param(name, marks=long) for name in ("gemma3-tied", "phi3-untied", "mistral-untied", "gpt2-tied")),
    pytest.param(OWN_ATTENTION, marks=long),
]


@dataclass(frozen=True)
class Run:
    """What a rank says of a model that it scores with, trains, saves and goes on with."""

    before_BS: Tensor | None
    metrics: tuple[Metrics, ...]
    weights: list[Piece]
    resumed: list[Piece]
    held: StaticBytes
    planned: StaticBytes


def _run(role: Role, batch: PolicyBatch, everything: Sequences, out: Path) -> Run:
    backend = backend_on_rank(role)
    assert isinstance(backend, FsdpBackend)
    actor = Actor(backend)
    before_BS = score(actor, everything, TEMPERATURE)
    metrics = update(actor, batch, PPO, 3).metrics
    weights, held = pieces(backend, backend.parameters()), held_bytes(backend)
    backend.export(out / "exported")
    if dist.get_rank() == 0:
        (out / "saved/state").mkdir(parents=True)
    dist.barrier()
    counts = RankSave(out / "saved", {"actor": backend}, backend.device, in_background=False).updates["actor"]
    dist.barrier()
    resumed = backend_on_rank(role)
    resumed.load(SavedRole(out / "saved", "actor"), counts)
    return Run(
        before_BS, metrics, weights, pieces(resumed, resumed.parameters()), held, static_of(role, dist.get_rank())
    )


Case = tuple[Reference, list[Run], Path]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder, out = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("out")
    save_tiny_model(request.param, folder)
    found = make_reference(folder, 99, 12)
    packed = request.param != OWN_ATTENTION
    role = role_on(THREE, folder, training=TRAINING, micro_batch_size=2, packed=packed)
    assert role.shape.own_attention is not packed
    return found, ask(ranks, _run, role, found.rollouts, found.everything, out), out


def test_log_probs_are_hugging_faces(case: Case) -> None:
    found, runs, _ = case
    told = torch.cat([run.before_BS for run in runs if run.before_BS is not None])
    torch.testing.assert_close(told, found.logprobs_BS, rtol=0, atol=TOLERANCE)


def test_three_ranks_train_as_hugging_face_does(case: Case) -> None:
    found, runs, _ = case
    expected = hf_training.train(found.folder, found.rollouts, PPO, TRAINING, 3)
    steps = summed([run.metrics for run in runs], THREE)
    assert [s["loss"] for s in steps] == pytest.approx(expected.losses, rel=TRAINING_TOLERANCE, abs=1e-6)
    assert [s["grad_norm"] for s in steps] == pytest.approx(expected.grad_norms, rel=TRAINING_TOLERANCE)
    assert_pieces_are([p for run in runs for p in run.weights], expected.weights, TRAINING_TOLERANCE)


def test_what_is_saved_and_exported_is_what_was_trained(case: Case) -> None:
    _, runs, out = case
    exported = load_file(out / "exported/model.safetensors")
    assert_pieces_are([p for run in runs for p in run.weights], exported, 0)
    assert_pieces_are([p for run in runs for p in run.resumed], exported, 0)
    assert load(out / "exported").config.model_type == load_config(out / "exported")["model_type"]


def load_config(folder: Path) -> dict[str, str]:
    """Return the fields of a folder's config.json."""
    fields: dict[str, str] = json.loads((folder / "config.json").read_text())
    return fields


def test_every_rank_holds_the_planned_bytes(case: Case) -> None:
    for run in case[1]:
        assert (run.held.parameters, run.held.optimizer) == (run.planned.parameters, run.planned.optimizer)


def _scored(role: Role, everything: Sequences) -> Tensor | None:
    return score(Actor(backend_on_rank(role)), everything, TEMPERATURE)


@pytest.mark.parametrize(("layout", "packed"), [(ULYSSES, True), (ULYSSES, False), (TWO, False)], ids=str)
def test_windows_and_capped_scores_are_the_same_over_ulysses_and_padded(
    ranks: RankPool, tmp_path: Path, layout: Layout, packed: bool
) -> None:
    save_tiny_model("gemma2-tied", tmp_path)
    found = make_reference(tmp_path, 99, 12)
    told = ask(ranks, _scored, role_on(layout, tmp_path, packed=packed), found.everything)
    logprobs_BS = torch.cat([logprobs_BS for logprobs_BS in told if logprobs_BS is not None])
    torch.testing.assert_close(logprobs_BS, found.logprobs_BS, rtol=0, atol=TOLERANCE)


def _trained_with_adapters(role: Role, batch: PolicyBatch, everything: Sequences, out: Path) -> Tensor | None:
    backend = backend_on_rank(role)
    update(Actor(backend), batch, PPO, 3)
    backend.export(out)
    return score(Actor(backend), everything, TEMPERATURE)


def test_adapters_are_merged_into_what_is_exported(ranks: RankPool, tmp_path: Path) -> None:
    save_tiny_model("phi3-untied", tmp_path / "model")
    found = make_reference(tmp_path / "model", 99, 12)
    lora = Lora(4, 8, ("all-linear",))
    role = replace(role_on(TWO, tmp_path / "model", training=TRAINING), lora=lora)
    told = ask(ranks, _trained_with_adapters, role, found.rollouts, found.everything, tmp_path / "out")
    logprobs_BS = torch.cat([logprobs_BS for logprobs_BS in told if logprobs_BS is not None])
    merged_BS = hf_logprobs_BS(load(tmp_path / "out"), found.everything, TEMPERATURE)
    torch.testing.assert_close(logprobs_BS, merged_BS, rtol=0, atol=TOLERANCE)
    assert float((logprobs_BS - found.logprobs_BS).abs().max()) > 100 * TOLERANCE, "training changed nothing"


@long
def test_greedy_answers_of_published_weights_are_hugging_faces(tmp_path: Path) -> None:
    """Two ranks each, which share one engine: it takes its part of the whole tensors."""
    names = ("gemma3-tied", "phi3-untied")
    folders = {name: tmp_path / name for name in names}
    for name, folder in folders.items():
        save_tiny_model(name, folder)
        (folder / "layouts.json").write_text(json.dumps([asdict(TWO), asdict(EngineLayout(2))]))
    run_case("tests.dist.publish_case", *folders.values())
    for folder in folders.values():
        expected = hf_training.greedy_answers(folder, PROMPTS, GREEDY.max_tokens)
        assert [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)] == [expected] * 2
