"""What the tests of the optimizer on the host run on every rank: a model that learns, and all that Megatron holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megarl.algorithm.aggregate import mini_batch_totals
from megarl.train.actor import Actor
from megarl.train.megatron import host_adam
from megarl.train.megatron.optimizer import OptimizerSpec
from megarl.train.work import Metrics, OptimizerStep
from megarl.types import Batch
from tests.dist.parity_cases import Setup

PIECE_NUMEL = 1000  # in the tests a parameter has up to four times that
STATE = ("param", "exp_avg", "exp_avg_sq")


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

    metrics: list[Metrics]
    weights: list[Tensor]
    state: list[tuple[Tensor, ...]]
    held: Held


def learn(setup: Setup, optimizers: list[OptimizerSpec], batch: Batch) -> list[Learned]:
    """Take three updates of a fresh actor with each of the optimizers."""
    actors = (_actor(setup, optimizer) for optimizer in optimizers)
    return [_learned(actor, _update(actor, setup, batch, 3)) for actor in actors]


def learn_on(setup: Setup, saved: OptimizerSpec, loaded: OptimizerSpec, batch: Batch) -> list[Learned]:
    """Take an update, hand the state to another actor, and let both take two more, of which they tell.

    saved, loaded: the optimizers of the two.
    """
    actor, other = _actor(setup, saved), _actor(setup, loaded)
    _update(actor, setup, batch, 1)
    _load(other, actor)
    return [_learned(trained, _update(trained, setup, batch, 2)) for trained in (actor, other)]


def _actor(setup: Setup, optimizer: OptimizerSpec) -> Actor:
    numel, host_adam.PIECE_NUMEL = host_adam.PIECE_NUMEL, PIECE_NUMEL
    try:
        return setup.actor(optimizer)
    finally:
        host_adam.PIECE_NUMEL = numel


def _update(actor: Actor, setup: Setup, batch: Batch, times: int) -> list[Metrics]:
    rows, micros = setup.share(batch)
    step = OptimizerStep(micros, *mini_batch_totals(batch.mask_BS.sum(-1)))
    return actor.update_sft(rows, [step] * times)


def _learned(actor: Actor, metrics: list[Metrics]) -> Learned:
    weights = [parameter.detach().clone() for parameter in actor.module.parameters()]
    state = [tuple(found[name].detach().clone() for name in STATE) for found in _states(actor)]
    return Learned(metrics, weights, state, _held(actor))


def _states(actor: Actor) -> Iterator[dict[str, Tensor]]:
    """Yield main parameter and moments of each parameter that this rank steps, as Megatron saves them."""
    for optimizer in actor.optimizer.inner.chained_optimizers:
        for parameter in optimizer.model_param_group_index_map:
            yield optimizer._get_main_param_and_optimizer_states(parameter)


def _held(actor: Actor) -> Held:
    ddp: Any = actor.optimizer.ddp
    buffers = [*ddp.buffers, *ddp.expert_parallel_buffers]
    model = [*ddp.parameters(), *(buffer.grad_data for buffer in buffers)]
    own = _storages(model)
    others = {name: size for name, size in _storages(_tensors(actor.optimizer.inner)).items() if name not in own}
    optimizers = actor.optimizer.inner.chained_optimizers
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


def _load(actor: Actor, other: Actor) -> None:
    """Take over the state of ``other`` as a checkpoint hands it over, without the files."""
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    actor.module.load_state_dict(other.module.state_dict())
    _saved(actor, metadata, is_loading=True)
    state = _saved(other, metadata)
    state["param_state"] = {
        number: {key: sharded.data.clone() for key, sharded in tensors.items()}
        for number, tensors in state["param_state"].items()
    }
    with actor.groups.active():
        actor.optimizer.inner.load_state_dict(state)
    actor.optimizer.scheduler.load_state_dict(other.optimizer.scheduler.state_dict())


def _saved(actor: Actor, metadata: dict[str, str], is_loading: bool = False) -> Any:
    with actor.groups.active():
        model = actor.module.sharded_state_dict(metadata=metadata)
        return actor.optimizer.inner.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
