"""What goes wrong without a word on FSDP: one test for each way."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megarl.parallel.layout import Layout
from megarl.plan.sizes import StaticBytes
from megarl.plan.static import static_of
from megarl.roles import Role
from megarl.train.actor import Actor
from megarl.train.attention import packing_of
from megarl.train.backend import Skipped
from megarl.train.fsdp.attention import NAME, Attending
from megarl.train.fsdp.backend import FsdpBackend
from megarl.types import Metrics, PolicyBatch, Sequences
from megarl.verify.pool import RankPool
from megarl.verify.reference import TEMPERATURE, Reference, load, make_reference
from megarl.verify.roles import TRAINING, role_on
from megarl.verify.work import PPO, backend_on_rank, score, update
from tests.dist import hf_training
from tests.dist.fsdp_inside import local, optimizer_of
from tests.dist.parity import TOLERANCE, TRAINING_TOLERANCE, Piece, ask, assert_pieces_are, pieces, summed
from tests.dist.tiny_models import save_tiny_model

THREE = Layout(3, fsdp=3)
TWO = Layout(2, fsdp=2)
ODD_VOCABULARY = 1003


@dataclass(frozen=True)
class Run:
    """What a rank says of a model that it scores with and trains. resting: bytes of storages between uses."""

    logprobs_BS: Tensor | None
    metrics: tuple[Metrics, ...]
    weights: list[Piece]
    resting: StaticBytes
    used: StaticBytes
    planned: StaticBytes
    num_gathered: int


def _run(role: Role, batch: PolicyBatch, everything: Sequences) -> Run:
    backend = backend_on_rank(role)
    assert isinstance(backend, FsdpBackend)
    actor = Actor(backend)
    metrics = update(actor, batch, PPO, 3).metrics
    with backend.updating():
        used = held_bytes(backend)
    logprobs_BS = score(actor, everything, TEMPERATURE)  # a pass without gradients is last
    num_gathered = sum(not isinstance(p, DTensor) for p in backend.model.own_parameters())
    resting = held_bytes(backend)
    with backend.resident():
        weights = pieces(backend, backend.parameters())
    return Run(logprobs_BS, metrics, weights, resting, used, static_of(role, dist.get_rank()), num_gathered)


def held_bytes(backend: FsdpBackend) -> StaticBytes:
    """Return the bytes of what a backend holds now."""
    parameters = list(backend.model.own_parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    states = optimizer_of(backend).inner.state.values() if backend.optimizer else ()
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    return StaticBytes(*(_storage_bytes(tensors) for tensors in (parameters, gradients, moments)))


def _storage_bytes(tensors: list[Any]) -> int:
    storages = {s._cdata: s.nbytes() for s in (local(tensor).untyped_storage() for tensor in tensors)}
    return sum(storages.values())


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Return a model of which three ranks hold nothing alike, and nine rows."""
    folder = tmp_path_factory.mktemp("odd")
    save_tiny_model("qwen3_moe-untied", folder, vocab_size=ODD_VOCABULARY)
    return make_reference(folder, ODD_VOCABULARY, 9)


@pytest.fixture(scope="module")
def of_three(ranks: RankPool, odd: Reference) -> list[Run]:
    """Return what three ranks say, whose parameters and optimizer state wait on the host."""
    role = role_on(
        *(THREE, odd.folder), training=TRAINING, micro_batch_size=1, param_offload=True, optimizer_offload=True
    )
    return ask(ranks, _run, role, odd.rollouts, odd.everything)


def test_three_ranks_with_uneven_shards_train_as_hugging_face_does(of_three: list[Run], odd: Reference) -> None:
    """Four experts, 1,003 tokens and a layer's norms of 16 on three ranks, of which some have no row at all."""
    expected = hf_training.train(odd.folder, odd.rollouts, PPO, TRAINING, 3)
    steps = summed([run.metrics for run in of_three], THREE)
    assert [s["loss"] for s in steps] == pytest.approx(expected.losses, rel=TRAINING_TOLERANCE, abs=1e-6)
    assert [s["grad_norm"] for s in steps] == pytest.approx(expected.grad_norms, rel=TRAINING_TOLERANCE)
    assert_pieces_are([p for run in of_three for p in run.weights], expected.weights, TRAINING_TOLERANCE)


def test_after_a_pass_without_gradients_no_parameter_is_left_gathered(of_three: list[Run]) -> None:
    assert [run.num_gathered for run in of_three] == [0, 0, 0]


def test_what_waits_on_the_host_is_gone_from_the_device_and_gradients_last_as_long_as_a_step(
    of_three: list[Run],
) -> None:
    assert [run.resting for run in of_three] == [StaticBytes(0, 0, 0)] * 3


def test_every_rank_holds_the_planned_bytes(of_three: list[Run]) -> None:
    for run in of_three:
        assert (run.used.parameters, run.used.optimizer) == (run.planned.parameters, run.planned.optimizer)
        assert run.planned.gradients == run.planned.parameters
    assert len({run.planned.optimizer for run in of_three}) > 1, "nothing is uneven"


def _ways(role: Role, batch: PolicyBatch, everything: Sequences, ways: dict[str, dict[str, Any]]) -> dict[str, Run]:
    return {name: _run(replace(role, **way), batch, everything) for name, way in ways.items()}


def test_a_fused_head_and_activations_computed_again_change_nothing(ranks: RankPool, tmp_path: Path) -> None:
    """A head that is called outside of the root's forward finds its weight sharded."""
    save_tiny_model("qwen2-tied", tmp_path)
    found = make_reference(tmp_path, 99)
    role = role_on(TWO, tmp_path, training=TRAINING)
    kept = replace(role.backend, enable_gradient_checkpointing=False, reshard_after_forward=False)
    ways: dict[str, dict[str, Any]] = {"plain": {"backend": kept}, "again": {}, "fused": {"fused_head": True}}
    answers = ask(ranks, _ways, role, found.rollouts, found.everything, ways)
    expected = hf_training.train(found.folder, found.rollouts, PPO, TRAINING, 3)
    for way in ways:
        runs = [answer[way] for answer in answers]
        steps = summed([run.metrics for run in runs], TWO)
        assert [s["loss"] for s in steps] == pytest.approx(expected.losses, rel=TRAINING_TOLERANCE, abs=1e-6)
        assert_pieces_are([p for run in runs for p in run.weights], expected.weights, TRAINING_TOLERANCE)


def _in_bf16(role: Role, batch: PolicyBatch, everything: Sequences) -> tuple[Tensor | None, set[torch.dtype], float]:
    """Return log-probs in bfloat16, dtypes of all that Adam steps and keeps, and the loss of a step."""
    backend = backend_on_rank(role)
    assert isinstance(backend, FsdpBackend)
    logprobs_BS = score(Actor(backend), everything, TEMPERATURE)
    (metrics,) = update(Actor(backend), batch, PPO).metrics
    adam = optimizer_of(backend).inner
    tensors = [p for group in adam.param_groups for p in group["params"]]
    tensors += [state[name] for state in adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return logprobs_BS, {tensor.dtype for tensor in tensors}, metrics["loss"]


def test_bfloat16_computes_in_it_and_keeps_main_weights_and_moments_in_float32(ranks: RankPool, tmp_path: Path) -> None:
    save_tiny_model("qwen3-untied", tmp_path)
    found = make_reference(tmp_path, 99)
    role = role_on(TWO, tmp_path, training=TRAINING, dtype="bfloat16")
    answers = ask(ranks, _in_bf16, role, found.rollouts, found.everything)
    logprobs_BS = torch.cat([logprobs_BS for logprobs_BS, *_ in answers if logprobs_BS is not None])
    error = float((logprobs_BS - found.rounded_logprobs_BS).abs()[found.everything.mask_BS].mean())
    assert TOLERANCE < error < 2 * found.noise.bf16
    assert all(dtypes == {torch.float32} for _, dtypes, _ in answers)


def _step_on(role: Role, batch: PolicyBatch, factor: float) -> tuple[Skipped | Metrics, bool]:
    """Take a step on a loss times a factor; return what it said, and whether every parameter is as it was."""
    backend = backend_on_rank(role)
    before = {name: part.clone() for name, part in backend.parameters().items()}
    micros = backend.pack(batch, [(0, 1)])
    with backend.updating():
        told = backend.step(micros, lambda _, output: (output.logprobs(1.0).logprobs_N.sum() * factor, {}), 2)
    return told, all(part.equal(before[name]) for name, part in backend.parameters().items())


def test_a_gradient_that_is_not_finite_or_too_large_changes_nothing(ranks: RankPool, tmp_path: Path) -> None:
    save_tiny_model("qwen2-tied", tmp_path)
    found = make_reference(tmp_path, 99)
    small = replace(TRAINING, skip_grad_norm=1e-6)
    for training, factor in ((TRAINING, math.nan), (small, 1.0)):
        role = role_on(TWO, tmp_path, training=training)
        for told, is_as_before in ask(ranks, _step_on, role, found.rollouts, factor):
            assert isinstance(told, Skipped) and is_as_before
            assert math.isnan(told.grad_norm) if math.isnan(factor) else told.grad_norm > 1e-6


def _buffers(role: Role) -> dict[str, Tensor]:
    backend = backend_on_rank(role)
    assert isinstance(backend, FsdpBackend)
    return dict(backend.model.root.model.named_buffers())


@pytest.mark.parametrize("model", ["llama-untied", "gemma3-tied"])
def test_what_no_checkpoint_has_is_as_transformers_makes_it(ranks: RankPool, tmp_path: Path, model: str) -> None:
    """A model that is made without memory has frequencies of rotary embeddings, and scales, that hold anything."""
    save_tiny_model(model, tmp_path)
    expected = dict(load(tmp_path).named_buffers())
    assert any("inv_freq" in name for name in expected)
    for found in ask(ranks, _buffers, role_on(TWO, tmp_path)):
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("given", [{}, {"attention_mask": torch.ones(1, 24)}, {"use_cache": True}], ids=str)
def test_no_mask_and_no_cache_lets_packed_sequences_see_each_other(tmp_path: Path, given: dict[str, Any]) -> None:
    """With transformers' own attention a mask of ones, or the default cache, is wrong by more than one."""
    import transformers

    save_tiny_model("qwen3-untied", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    lengths = (9, 4, 11)
    rows = [torch.randint(99, (1, length), generator=torch.Generator().manual_seed(length)) for length in lengths]
    with torch.no_grad():
        apart = torch.cat([model(row).logits[0] for row in rows])
        packed = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None], "use_cache": False} | given
        model.set_attn_implementation(NAME)
        attending = Attending(packing_of(lengths, torch.device("cpu")), None)
        together = model(torch.cat(rows, 1), attending=attending, **packed).logits[0]
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4)
