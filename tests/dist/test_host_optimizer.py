"""An optimizer on the host learns what one on the device does, and leaves nothing of Adam on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from megarl.parallel.layout import Layout
from megarl.roles import Role
from megarl.train import held_state
from megarl.train.actor import Actor
from megarl.train.megatron import host_adam, optimizer_state
from megarl.train.megatron.backend import MegatronBackend
from megarl.train.megatron.optimizer import Optimizer
from megarl.types import Metrics, Sequences
from megarl.verify.pool import RankPool
from megarl.verify.reference import random_sequences
from megarl.verify.roles import TRAINING, role_on, with_section
from megarl.verify.work import backend_on_rank, update
from tests.dist.parity import SFT, ask
from tests.dist.tiny_models import VOCAB_SIZE, save_tiny_model

LENGTHS = (9, 12, 12, 7, 16, 5, 9, 4)
LEARNING = replace(TRAINING, lr=1e-3, schedule="cosine")
PIECE_NUMEL = 1000  # of pieces on the way to the host; here a parameter has up to four times that
STATE = ("param", "exp_avg", "exp_avg_sq")
LAYOUTS = {
    "tp2_pp2+sp": ("qwen2-tied", Layout(4, tp=2, pp=2, sequence_parallel=True)),
    "dp2": ("qwen2-tied", Layout(2)),
    "moe_ep2": ("qwen3_moe-untied", Layout(2, ep=2)),
}
# The dtypes of each time; all others are long.
QUICK = {"tp2_pp2+sp": ("bfloat16",), "dp2": ("float32",), "moe_ep2": ("float32", "bfloat16")}


@dataclass(frozen=True)
class Held:
    """What a rank holds after its updates, in bytes of storages, each counted once.

    model: parameters and gradient buffers. others: everything else that can be reached from Megatron's optimizer.
    stepped_numel: elements of parameters that this rank steps. passing: what gradients and parameters pass through.
    """

    model: int
    others: int
    stepped_numel: int
    num_parameters: int
    num_optimizers: int
    passing: int


@dataclass(frozen=True)
class Learned:
    """Of each update its metrics; afterwards the weights, and (main parameter, moments) of each parameter."""

    metrics: tuple[Metrics, ...]
    weights: list[Tensor]
    state: list[tuple[Tensor, ...]]
    held: Held


def _learn(role: Role, batch: Sequences) -> list[Learned]:
    """Take three updates of a fresh actor, with the optimizer on the device and on the host."""
    return [_update(_actor(role, on_host), batch, 3) for on_host in (False, True)]


def _learn_on(role: Role, saved_on_host: bool, loaded_on_host: bool, batch: Sequences) -> list[Learned]:
    """Take an update, hand the state to another actor, and let both take two more, of which they tell."""
    actor, other = _actor(role, saved_on_host), _actor(role, loaded_on_host)
    _update(actor, batch, 1)
    _load(other, actor)
    return [_update(trained, batch, 2) for trained in (actor, other)]


def _actor(role: Role, on_host: bool) -> MegatronBackend:
    numel, host_adam.PIECE_NUMEL = host_adam.PIECE_NUMEL, PIECE_NUMEL
    try:
        return backend_on_rank(with_section(role, optimizer_on_host=on_host))
    finally:
        host_adam.PIECE_NUMEL = numel


def _update(actor: MegatronBackend, batch: Sequences, times: int) -> Learned:
    metrics = update(Actor(actor), batch, SFT, times).metrics
    weights = [parameter.detach().clone() for parameter in actor.model.module.parameters()]
    state = [tuple(found[name].detach().clone() for name in STATE) for found in _states(actor)]
    return Learned(metrics, weights, state, _held(actor))


def _optimizer(actor: MegatronBackend) -> Optimizer:
    assert actor.optimizer is not None
    return actor.optimizer


def _states(actor: MegatronBackend) -> Iterator[dict[str, Tensor]]:
    """Yield main parameter and moments of each parameter that this rank steps, as Megatron saves them."""
    for optimizer in _optimizer(actor).inner.chained_optimizers:
        for parameter in optimizer.model_param_group_index_map:
            yield optimizer._get_main_param_and_optimizer_states(parameter)


def _held(actor: MegatronBackend) -> Held:
    ddp: Any = _optimizer(actor).ddp
    buffers = [*ddp.buffers, *ddp.expert_parallel_buffers]
    model = [*ddp.parameters(), *(buffer.grad_data for buffer in buffers)]
    own = _storages(model)
    others = {name: size for name, size in _storages(_tensors(_optimizer(actor).inner)).items() if name not in own}
    optimizers = _optimizer(actor).inner.chained_optimizers
    passing = [
        tensor
        for optimizer in optimizers
        for buffer in getattr(optimizer.optimizer, "_buffers", ())
        for tensor in vars(buffer).values()
        if tensor is not None
    ]
    mains = [state["param"] for state in _states(actor)]
    return Held(
        model=sum(own.values()),
        others=sum(others.values()),
        stepped_numel=sum(main.numel() for main in mains),
        num_parameters=len(mains),
        num_optimizers=len(optimizers),
        passing=sum(_storages(passing).values()),
    )


def _storages(tensors: Any) -> dict[int, int]:
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def _tensors(root: object) -> Iterator[Tensor]:
    """Yield every tensor in attributes and containers of ``root``, and in attributes of those, as deep as it goes."""
    seen: set[int] = set()
    waiting: list[Any] = [root]
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, type | dist.ProcessGroup):
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            yield found
        if isinstance(found, dict):
            waiting += [*found.keys(), *found.values()]
        elif isinstance(found, list | tuple | set):
            waiting += found
        waiting += vars(found).values() if hasattr(found, "__dict__") and not callable(found) else ()
        if isinstance(found, Tensor) and found.is_leaf:
            waiting.append(found.grad)


@dataclass(frozen=True)
class Handed:
    """What another actor on the same rank and layout holds, as a checkpoint hands it over, without the files."""

    values: Mapping[tuple[str, int, int], Mapping[str, Tensor]]

    def fill(self, held: held_state.Held) -> None:
        for kind, tensor in held.values.items():
            tensor.copy_(self.values[held.shard.name, held.start, held.stop][kind])


def _load(actor: MegatronBackend, other: MegatronBackend) -> None:
    """Take over the state of ``other``."""
    actor.model.module.load_state_dict(other.model.module.state_dict())
    values = {(held.shard.name, held.start, held.stop): held.values for held in other.held()}
    saved: Any = Handed(values)
    optimizer_state.load(_optimizer(actor), saved, other.counts())


@pytest.fixture(scope="module")
def batch() -> Sequences:
    return random_sequences(LENGTHS, VOCAB_SIZE, torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("model", "layout", "dtype"),
    [
        pytest.param(
            *LAYOUTS[name], dtype, id=f"{name}-{dtype}", marks=() if dtype in QUICK[name] else pytest.mark.long
        )
        for name in LAYOUTS
        for dtype in ("float32", "bfloat16")
    ],
)
def test_three_updates_on_the_host_are_those_on_the_device(
    ranks: RankPool, tmp_path: Path, batch: Sequences, model: str, layout: Layout, dtype: str
) -> None:
    save_tiny_model(model, tmp_path)
    role = role_on(layout, tmp_path, dtype=dtype, training=LEARNING)
    for device, host in ask(ranks, _learn, role, batch):
        assert len(host.metrics) == 3
        _assert_close(host, device)
        # Of all that Megatron's optimizer holds, only this isn't parameters and gradients of the model.
        held, device_held = host.held, device.held
        expected = 12 * held.stepped_numel + 4 * held.num_parameters + held.passing
        assert held.passing == held.num_optimizers * 4 * PIECE_NUMEL * 4
        assert 0 <= held.others - expected <= 8 * held.num_optimizers  # a scale and a flag of each
        # Parameters in float32 are main parameters where Adam is on the device. On the host it has its own.
        main_bytes = 4 if dtype == "float32" else 0
        assert held == replace(
            device_held,
            others=device_held.others + main_bytes * held.stepped_numel + held.passing,
            passing=held.passing,
        )


@pytest.mark.parametrize(
    ("saved_on_host", "loaded_on_host"),
    [(True, True), (False, True), (True, False)],
    ids=["host_to_host", "device_to_host", "host_to_device"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_state_goes_on_wherever_it_is_loaded(
    ranks: RankPool, tmp_path: Path, batch: Sequences, dtype: str, saved_on_host: bool, loaded_on_host: bool
) -> None:
    model, layout = LAYOUTS["dp2"]
    save_tiny_model(model, tmp_path)
    role = role_on(layout, tmp_path, dtype=dtype, training=LEARNING)
    for first, second in ask(ranks, _learn_on, role, saved_on_host, loaded_on_host, batch):
        _assert_close(second, first)
        if saved_on_host == loaded_on_host:
            assert first.metrics == second.metrics
            assert first.held == second.held  # nothing that was loaded is kept beside what was there


def _assert_close(found: Learned, expected: Learned) -> None:
    # torch's fused Adam, which steps on the host, and its plain one round differently in the last bit.
    for of_found, of_expected in zip(found.metrics, expected.metrics, strict=True):
        assert of_found == pytest.approx(of_expected, rel=1e-6, abs=1e-6)
    assert_close(found.weights, expected.weights, rtol=0, atol=1e-6)
    assert_close(found.state, expected.state, rtol=0, atol=1e-6)
