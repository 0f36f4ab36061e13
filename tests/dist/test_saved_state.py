"""Weights, moments and counts, saved on one layout and taken up on another: equal to the bit, as are later steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.checkpoint.manifest import files_of
from megarl.checkpoint.rank_save import RankSave, SavedPart
from megarl.checkpoint.role_files import SavedRole
from megarl.checkpoint.tensor_file import write_tensors
from megarl.errors import CheckpointError
from megarl.parallel.layout import Layout
from megarl.ranks.spec import RankSpec
from megarl.ranks.work import SaveWork
from megarl.ranks.worker import Worker
from megarl.roles import Role
from megarl.train import export as exports
from megarl.train.actor import Actor
from megarl.train.backend import Backend
from megarl.train.backends import backend_of
from megarl.train.held_state import UpdateCounts
from megarl.types import Metrics, PolicyBatch
from megarl.verify.pool import RankPool
from megarl.verify.reference import Reference
from megarl.verify.roles import TRAINING, role_on, with_section
from megarl.verify.work import backend_on_rank, update
from megarl.weights.name_map import hf_shapes
from megarl.weights.rectangles import Rectangle, pieces_of
from tests.dist.parity import REPLICATED, SFT, ask, summed

STEPS = 2
LAYOUTS = {
    "one_rank": Layout(1),
    "dp2": Layout(2),
    "tp2xpp2+sp": Layout(4, tp=2, pp=2, sequence_parallel=True),
    "cp2xdp2": Layout(4, cp=2),
    "tp4": Layout(4, tp=4),
    "fsdp2": Layout(2, fsdp=2),
    "fsdp4": Layout(4, fsdp=4),
    "fsdp2x2": Layout(4, fsdp=2),
    "ep2xtp2": Layout(4, tp=2, ep=2, sequence_parallel=True),
    "ep4xetp1": Layout(4, tp=2, ep=4, etp=1, sequence_parallel=True),
}
Rectangles = dict[str, Tensor]


def state_of(backend: Backend) -> Rectangles:
    """Return copies of what this rank's optimizer steps, by kind and rectangle."""
    with backend.updating():
        return {
            f"{kind}/{piece.rectangle}": piece.view(values).detach().clone()
            for held in backend.held()
            for kind, values in held.values.items()
            for piece in pieces_of(held.shard, held.start, held.stop)
        }


def save(role: Role, batch: PolicyBatch, folder: Path, in_background: bool) -> tuple[Rectangles, SavedPart, Metrics]:
    """Train, save, and train a step more: return the state that was saved, the files, and the step's metrics."""
    backend = backend_on_rank(role)
    update(Actor(backend), batch, SFT, STEPS)
    state = state_of(backend)
    saving = RankSave(folder, {"actor": backend}, backend.device, in_background=in_background)
    (metrics,) = update(Actor(backend), batch, SFT).metrics
    return state, saving.result(), metrics


def load(
    role: Role, batch: PolicyBatch, folder: Path, counts: UpdateCounts
) -> tuple[Rectangles, UpdateCounts, Metrics]:
    """Take up the state and train a step: return the state, its counts, and the step's metrics."""
    saved = SavedRole(folder, "actor")
    backend = backend_of(role, saved, torch.device("cpu"))
    backend.load(saved, counts)
    state, found = state_of(backend), backend.counts()
    (metrics,) = update(Actor(backend), batch, SFT).metrics
    return state, found, metrics


def go_back(role: Role, batch: PolicyBatch, folder: Path) -> tuple[bool, UpdateCounts, list[Metrics]]:
    """Save, train on, and take up again what was saved.

    Return whether the state is that of the save, its counts, and the metrics of the step after the save, both times.
    """
    backend = backend_on_rank(role)
    actor = Actor(backend)
    update(actor, batch, SFT, STEPS)
    state, counts = state_of(backend), backend.counts()
    RankSave(folder, {"actor": backend}, backend.device, in_background=False)
    dist.barrier()  # what one rank reads others have written
    after = [update(actor, batch, SFT, STEPS).metrics[0]]
    backend.load(SavedRole(folder, "actor"), counts)
    found = state_of(backend)
    is_as_saved = found.keys() == state.keys() and all(found[name].equal(state[name]) for name in state)
    counts = backend.counts()
    return is_as_saved, counts, [*after, *update(actor, batch, SFT).metrics]


def gathered(role: Role, ranks: list[Rectangles]) -> Rectangles:
    """Return whole tensors, by kind and name; every element has to be there, and the same wherever it is."""
    whole: Rectangles = {}
    for rank in ranks:
        for name, values in rank.items():
            kind, _, text = name.partition("/")
            tensor, _, spans = text.rstrip("]").partition("[")
            index = tuple(slice(*map(int, span.split(":"))) for span in spans.split(","))
            there = whole.setdefault(f"{kind}/{tensor}", torch.full(hf_shapes(role.shape)[tensor], torch.nan))[index]
            assert (there.isnan() | (there == values)).all(), name
            there.copy_(values)
    assert len(whole) == 3 * len(hf_shapes(role.shape))
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


DENSE = [
    ("tp2xpp2+sp", "cp2xdp2"),
    ("cp2xdp2", "tp4"),
    ("dp2", "one_rank"),
    ("one_rank", "tp2xpp2+sp"),
    ("fsdp2", "tp2xpp2+sp"),
    ("tp2xpp2+sp", "fsdp4"),
    ("fsdp4", "fsdp2x2"),
]
EXPERTS = [
    ("ep2xtp2", "dp2"),
    ("dp2", "ep4xetp1"),
    ("ep4xetp1", "ep2xtp2"),
    ("ep2xtp2", "fsdp2"),
    ("fsdp4", "ep2xtp2"),
]
OPTIMIZERS = "distributed", "replicated"
_number = count()


def _role(layout: Layout, folder: Path, optimizer: str) -> Role:
    """Return an actor whose optimizer on Megatron is ``distributed`` or ``replicated``; FSDP has one kind."""
    role = role_on(layout, folder, training=TRAINING)
    return role if layout.is_fsdp or optimizer == "distributed" else with_section(role, **REPLICATED)


# A quarter of the pairs of layouts, each with one pair of optimizers, by turns; all others are long.
MOVES = [
    pytest.param(
        optimizers,
        model,
        *pair,
        id="-".join(["->".join(optimizers), model, *pair]),
        marks=pytest.mark.long if at or turn % 4 else (),
    )
    for model, pairs in (("qwen2-tied", DENSE), ("qwen3_moe-untied", EXPERTS))
    for turn, pair in enumerate(pairs)
    for at, optimizers in enumerate((OPTIMIZERS, OPTIMIZERS[::-1])[:: -1 if turn % 2 else 1])
]


@pytest.mark.parametrize(("optimizers", "model", "saved_on", "loaded_on"), MOVES)
def test_a_state_moves_between_layouts_and_optimizers_to_the_bit(
    ranks: RankPool,
    reference: Callable[..., Reference],
    tmp_path: Path,
    model: str,
    saved_on: str,
    loaded_on: str,
    optimizers: tuple[str, str],
) -> None:
    found = reference(model)
    before, after = (
        _role(LAYOUTS[name], found.folder, optimizer)
        for name, optimizer in zip((saved_on, loaded_on), optimizers, strict=True)
    )
    saved = ask(ranks, save, before, found.rollouts, tmp_path, next(_number) % 2 == 0)
    updates = {part.updates["actor"] for _, part, _ in saved}
    assert updates == {UpdateCounts(STEPS, STEPS)}
    loaded = ask(ranks, load, after, found.rollouts, tmp_path, *updates)
    assert {counts for _, counts, _ in loaded} == updates

    expected, state = gathered(before, [rank for rank, _, _ in saved]), gathered(after, [rank for rank, _, _ in loaded])
    assert [name for name in expected if not state[name].equal(expected[name])] == []
    (one,) = summed([[metrics] for _, _, metrics in saved], before.layout)
    (other,) = summed([[metrics] for _, _, metrics in loaded], after.layout)
    assert (other["loss"], other["grad_norm"]) == pytest.approx((one["loss"], one["grad_norm"]), rel=1e-6)
    assert other["lr"] == one["lr"]


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [("dp2", "replicated"), ("tp2xpp2+sp", "distributed"), ("fsdp2", "")],
)
def test_ranks_that_have_gone_on_take_up_what_they_saved_and_step_as_they_did(
    ranks: RankPool, reference: Callable[..., Reference], tmp_path: Path, layout: str, optimizer: str
) -> None:
    found = reference("qwen2-tied")
    role = _role(LAYOUTS[layout], found.folder, optimizer)
    for is_as_saved, counts, (first, again) in ask(ranks, go_back, role, found.rollouts, tmp_path):
        assert is_as_saved and counts == UpdateCounts(STEPS, STEPS)
        assert again == first


def test_every_element_is_written_by_one_rank_and_ranks_share_the_writing(
    ranks: RankPool, reference: Callable[..., Reference], tmp_path: Path
) -> None:
    found = reference("qwen3-untied")
    role = with_section(role_on(LAYOUTS["cp2xdp2"], found.folder, training=TRAINING), **REPLICATED)
    saved = ask(ranks, save, role, found.rollouts, tmp_path, False)
    num_elements = sum(torch.Size(shape).numel() for shape in hf_shapes(role.shape).values())
    content = [file.num_bytes for _, part, _ in saved for file in part.files if file.name.startswith("state/actor")]
    assert len(content) == 4 and sum(content) >= 3 * 4 * num_elements
    assert sum(content) < 3 * 4 * num_elements * 1.1, "something is written twice"
    assert min(content) > 0.1 * sum(content), content


def test_a_checkpoint_that_lacks_something_says_what(
    ranks: RankPool, reference: Callable[..., Reference], tmp_path: Path
) -> None:
    found = reference("qwen2-tied")
    role = role_on(LAYOUTS["dp2"], found.folder, training=TRAINING)
    ask(ranks, save, role, found.rollouts, tmp_path, False)
    with pytest.raises(CheckpointError, match="has no state of the critic"):
        SavedRole(tmp_path, "critic")
    (tmp_path / "state" / "actor-00001.safetensors").unlink()
    lacking = SavedRole(tmp_path, "actor")
    read = partial(lacking.read, "model.embed_tokens.weight", 0, 0)
    with pytest.raises(CheckpointError, match=r"lacks .*model\.embed_tokens\.weight\S* of the actor"):
        read(hf_shapes(role.shape)["model.embed_tokens.weight"][0])


def test_a_part_is_read_from_as_many_files_as_have_it(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(6, 4)
    for rank, (rows, columns) in enumerate((((0, 4), (0, 3)), ((0, 4), (3, 4)), ((4, 6), (0, 4)), ((2, 6), (0, 4)))):
        rectangle = Rectangle("w", (rows, columns))
        part = whole[slice(*rows), slice(*columns)]
        write_tensors(tmp_path, f"state/actor-{rank:05d}.safetensors", {f"weight/{rectangle}": part})
    saved = SavedRole(tmp_path, "actor")
    assert torch.equal(saved.read("w", 0, 0, 6), whole)
    assert torch.equal(saved.read("w", 1, 2, 4), whole[:, 2:4])
    assert torch.equal(saved.read("w", 0, 3, 5), whole[3:5])


def test_nothing_of_what_follows_reaches_a_save_in_the_background(
    ranks: RankPool, reference: Callable[..., Reference], tmp_path: Path
) -> None:
    found = reference("qwen2-tied")
    role = role_on(LAYOUTS["dp2"], found.folder, training=TRAINING)
    (tmp_path / "background").mkdir(), (tmp_path / "foreground").mkdir()
    parts = [
        [part.files for _, part, _ in ask(ranks, save, role, found.rollouts, tmp_path / name, name == "background")]
        for name in ("background", "foreground")
    ]
    actors = [[f for files in of for f in files if "actor" in f.name] for of in parts]
    assert actors[0] == actors[1] and len(actors[0]) == role.layout.world_size


def _save_without_weights(role: Role, folder: Path) -> tuple[str, ...]:
    """Save the state alone, where rank 0 copies the tokenizer late; return the files of this rank's part."""
    copy = exports.copy_template
    exports.copy_template = lambda *arguments: (time.sleep(0.5), copy(*arguments))  # type: ignore[assignment]
    try:
        worker = Worker(RankSpec((role,), seed=0, hang_timeout_s=60.0), torch.device("cpu"))
        worker.save(SaveWork(str(folder), models=False, state=True, in_background=False))
        part = worker.saved(True)
    finally:
        exports.copy_template = copy
    assert part is not None and part.failure is None
    return tuple(file.name for file in part.files)


def test_every_file_of_a_save_is_in_the_part_of_one_rank_however_late_it_came(
    ranks: RankPool, reference: Callable[..., Reference], tmp_path: Path
) -> None:
    role = role_on(LAYOUTS["dp2"], reference("qwen2-tied").folder, training=TRAINING)
    parts = ask(ranks, _save_without_weights, role, tmp_path)
    names = [name for part in parts for name in part]
    assert sorted(names) == files_of(tmp_path) and "config.json" in names
