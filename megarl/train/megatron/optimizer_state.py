"""The state of Megatron's optimizers: which elements of which parameter this rank steps, with weights and moments.

The distributed optimizer splits parameters over data-parallel ranks by elements; the others hold them whole. Torch's
Adam counts its steps for every parameter, Transformer Engine's and Apex's for a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megarl.train.held_state import MOMENTS, WEIGHT, Held, SavedState, UpdateCounts
from megarl.train.megatron.build import named_parameters
from megarl.train.megatron.host_adam import HostAdam
from megarl.train.megatron.optimizer import Optimizer
from megarl.weights.name_map import megatron_shards
from megarl.weights.shard import Shard

_MAIN = "param"  # as Megatron names a main parameter beside its moments


@dataclass(frozen=True)
class _Stepped:
    """Elements [start, stop) of a parameter that an optimizer of this rank steps."""

    optimizer: Any
    parameter: torch.nn.Parameter
    shard: Shard
    start: int
    stop: int

    @property
    def is_distributed(self) -> bool:
        """Whether Megatron's distributed optimizer holds it."""
        return isinstance(self.optimizer, DistributedOptimizer)

    @property
    def main(self) -> Tensor:
        """The main parameter, which is the parameter itself where the model is in float32."""
        main: Tensor = getattr(self.parameter, "main_param", self.parameter)
        return main

    def tensors(self) -> dict[str, Tensor]:
        """Return main parameter and moments, by Megatron's names."""
        if self.is_distributed:
            found: dict[str, Tensor] = self.optimizer._get_main_param_and_optimizer_states(self.parameter)
            return found
        return {_MAIN: self.main, **self.optimizer.optimizer.state[self.main]}

    def key(self) -> Tensor:
        """Return the tensor that Adam keeps the state of."""
        if not self.is_distributed:
            return self.main
        group, order = self.optimizer.model_param_group_index_map[self.parameter]
        stepped: Tensor = self.optimizer.optimizer.param_groups[group]["params"][order]
        return stepped


def held(optimizer: Optimizer) -> Iterator[Held]:
    """Yield the Held parts that this rank's optimizers step. Values are views of theirs wherever Adam keeps float32."""
    for stepped in _stepped(optimizer):
        tensors = stepped.tensors()
        values = {WEIGHT: tensors[_MAIN], **{kind: tensors[kind] for kind in MOMENTS if kind in tensors}}
        flat = {kind: tensor.detach().reshape(-1) for kind, tensor in values.items()}
        yield Held(stepped.shard, stepped.start, stepped.stop, flat)


def counts(optimizer: Optimizer) -> UpdateCounts:
    """Return the UpdateCounts of the role."""
    steps = [0]
    for inner in optimizer.inner.chained_optimizers:
        steps += [int(group["step"]) for group in inner.param_groups if "step" in group]
        steps += [int(state["step"]) for state in inner.optimizer.state.values() if "step" in state]
    return UpdateCounts(optimizer.num_updates, max(steps))


def load(optimizer: Optimizer, saved: SavedState, updates: UpdateCounts) -> None:
    """Take what was saved, and the counts, over into this rank's optimizers."""
    optimizer.num_updates = updates.scheduled
    kinds = (WEIGHT, *MOMENTS) if updates.adam else (WEIGHT,)
    for stepped in _stepped(optimizer):
        numel, device = stepped.stop - stepped.start, stepped.parameter.device
        values = {kind: torch.empty(numel, dtype=torch.float32, device=device) for kind in kinds}
        saved.fill(Held(stepped.shard, stepped.start, stepped.stop, values))
        _take(stepped, values, updates.adam)
    for inner in optimizer.inner.chained_optimizers:
        if isinstance(inner.optimizer, HostAdam):
            inner.optimizer._sync_hdo_state_to_sub_optimizers()
        for group in inner.param_groups:
            if "step" in group:
                group["step"] = updates.adam


@torch.no_grad()
def _take(stepped: _Stepped, values: dict[str, Tensor], adam_steps: int) -> None:
    adam, key = stepped.optimizer.optimizer, stepped.key()
    moments = {kind: values[kind].view(key.shape) for kind in MOMENTS if adam_steps}
    if isinstance(adam, HostAdam):
        adam.state[key] |= {"master_param": values[WEIGHT], **moments, "step": torch.tensor(float(adam_steps))}
    elif stepped.is_distributed and stepped.optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        stepped.optimizer._set_main_param_and_optimizer_states(stepped.parameter, {_MAIN: values[WEIGHT], **moments})
    else:
        key.detach().view(-1).copy_(values[WEIGHT])
        adam.state[key] |= moments
        if adam_steps and "step" not in adam.param_groups[0]:
            adam.state[key]["step"] = torch.tensor(float(adam_steps))  # one for each: Adam counts in place


def _stepped(optimizer: Optimizer) -> Iterator[_Stepped]:
    """Yield the parts of parameters that this rank's optimizers step, in the order of the name map."""
    model = optimizer.model
    named = named_parameters(model.chunks, model.shape, model.layout, model.rank)
    inners = optimizer.inner.chained_optimizers
    owner = {parameter: inner for inner in inners for parameter in _parameters_of(inner, named.values())}
    for shard in megatron_shards(model.shape, model.layout, model.rank):
        parameter = named[shard.name]
        inner = owner.get(parameter)
        if inner is None:
            continue  # of the distributed optimizer all elements of it are another rank's
        start, stop = 0, parameter.numel()
        if isinstance(inner, DistributedOptimizer):
            own = inner._get_model_param_range_map(parameter)["param"]
            start, stop = own.start, own.end
        yield _Stepped(inner, parameter, shard, start, stop)


def _parameters_of(inner: Any, parameters: Iterable[torch.nn.Parameter]) -> Iterable[torch.nn.Parameter]:
    """Return the parameters that an optimizer steps, or a part of which."""
    if isinstance(inner, DistributedOptimizer):
        found: Iterable[torch.nn.Parameter] = inner.model_param_group_index_map
        return found
    mains = {main for group in inner.param_groups for main in group["params"]}
    return [parameter for parameter in parameters if getattr(parameter, "main_param", parameter) in mains]
