"""Adam in host memory, where main parameters and moments stay: for models whose Adam state never fits the devices.

Megatron's own class for this keeps a pinned copy of every gradient too, and one of all parameters while it is built.
Here gradients come, and new parameters go, in pieces through two small buffers: the host holds 12 bytes for each
parameter that this rank steps, and the device nothing but parameters and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, zip_longest
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor
from torch.optim.adamw import AdamW, adamw

PIECE_NUMEL = 2**22  # large enough for the bus and all cores, and a power of two, since torch pins no other size

# What torch adds to groups of what concerns only Megatron's own class, or only this one. Groups are saved.
_OPTIONS = (
    *("offload_fraction", "cpu_optimizer_cls", "gpu_optimizer_cls", "param_update_in_fp32", "fused"),
    *("pin_cpu_grads", "pin_cpu_params", "overlap_cpu_optimizer_d2h_h2d", "differentiable"),
)


class HostAdam(HybridDeviceOptimizer):
    """AdamW on float32 copies of ``params`` in host memory, for Megatron's distributed optimizer.

    Gradients are read from ``decoupled_grad``, where Megatron puts views into its gradient buffers. Megatron knows the
    class that this one extends: its names are kept, its way with memory isn't. ``state`` has Adam's own state for each
    parameter, with its main parameter as ``master_param``.
    """

    def __init__(self, params: list[dict[str, Any]], **defaults: Any) -> None:
        # Shards of float32 parameters aren't leaves, which torch accepts from nobody who doesn't say this.
        super().__init__(params, **{**defaults, "differentiable": True})
        for group in self.param_groups:
            for name in _OPTIONS:
                group.pop(name, None)
        self._hold_state([parameter for group in self.param_groups for parameter in group["params"]])

    def _init_sub_optimizers(self) -> None:
        """Do nothing: it is called before there are groups, and after every load, when all is there."""

    def _hold_state(self, parameters: list[Tensor]) -> None:
        self.param_to_fp32_param = {parameter: _host_copy(parameter) for parameter in parameters}
        self.fp32_param_to_orig_param = {main: parameter for parameter, main in self.param_to_fp32_param.items()}
        self.param_to_inner_param, self.inner_param_to_orig_param = (
            self.param_to_fp32_param,
            self.fp32_param_to_orig_param,
        )
        # It never steps: it holds the state where Megatron looks for it.
        mains = list(self.fp32_param_to_orig_param)
        self.gpu_optimizer, self.cpu_optimizers = None, [AdamW([{"params": mains}])] if mains else []
        for main in mains:
            moments = {name: torch.zeros_like(main) for name in ("exp_avg", "exp_avg_sq")}
            self._adam_state(main).update(moments, step=torch.zeros(()))
        self._sync_sub_optimizers_state_to_hdo()
        self._piece_numel = min(PIECE_NUMEL, max((len(main) for main in mains), default=0))
        pinned = any(parameter.is_cuda for parameter in parameters)
        self._buffers = [Buffer(self._piece_numel, pinned=pinned) for _ in range(2)]

    def _adam_state(self, main: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.cpu_optimizers[0].state[main]
        return state

    def _sync_sub_optimizers_state_to_hdo(self) -> None:
        # Dictionaries of their own: Megatron puts loaded tensors into them.
        self.state.clear()
        for parameter, main in self.param_to_fp32_param.items():
            self.state[parameter] = {**self._adam_state(main), "master_param": main}

    def _sync_hdo_state_to_sub_optimizers(self) -> None:
        """Copy what was loaded into the tensors that are there, and let go of it."""
        for parameter, main in self.param_to_fp32_param.items():
            own = {**self._adam_state(main), "master_param": main}
            for name, tensor in own.items():
                tensor.copy_(self.state[parameter][name])
        self._sync_sub_optimizers_state_to_hdo()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the main parameters that have gradients, and copy them to the device."""
        pieces = list(self._pieces())
        turns = list(zip(pieces, cycle(self._buffers)))
        for piece, buffer in turns[:1]:
            buffer.fetch(piece.gradient)
        for (piece, buffer), following in zip_longest(turns, turns[1:]):
            if following is not None:
                following[1].fetch(following[0].gradient)
            piece.step(buffer.fetched(len(piece.main)))
            buffer.send(piece.main, piece.parameter)
        for step in {id(piece.num_steps): piece.num_steps for piece in pieces}.values():
            step += 1
        self._sync_sub_optimizers_state_to_hdo()

    def _pieces(self) -> Iterator[Piece]:
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = getattr(parameter, "decoupled_grad", None)
                if gradient is None:
                    continue
                main = self.param_to_fp32_param[parameter]
                state = self._adam_state(main)
                tensors = (parameter.detach(), gradient, main, state["exp_avg"], state["exp_avg_sq"])
                split = [tensor.split(self._piece_numel) for tensor in tensors]
                yield from (Piece(group, state["step"], *parts) for parts in zip(*split, strict=True))


class _WholeModel(HostAdam):
    """Holds nothing: Megatron builds one over all parameters, only to hand its groups on."""

    def _hold_state(self, parameters: list[Tensor]) -> None: ...


@contextmanager
def adam_on_host() -> Iterator[None]:
    """Have ``get_megatron_optimizer`` build HostAdam where it would build its own class, for the duration."""
    whole, shard = vars(megatron_optimizer), vars(distrib_optimizer)
    name = HybridDeviceOptimizer.__name__
    whole[name], shard[name] = _WholeModel, HostAdam
    try:
        yield
    finally:
        whole[name] = shard[name] = HybridDeviceOptimizer


@dataclass(frozen=True)
class Piece:
    """Elements of a shard, all 1-dimensional: parameter and gradient on the device, the others on the host.

    group: has what AdamW is told. num_steps: that the whole parameter has taken.
    """

    group: dict[str, Any]
    num_steps: Tensor
    parameter: Tensor
    gradient: Tensor
    main: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def step(self, gradient: Tensor) -> None:
        """Take one step of AdamW; ``gradient`` is on the host."""
        adamw(
            [self.main],
            [gradient],
            [self.exp_avg],
            [self.exp_avg_sq],
            max_exp_avg_sqs=[],
            state_steps=[self.num_steps.clone()],  # it counts, once for each piece
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=self.group["betas"][0],
            beta2=self.group["betas"][1],
            lr=self.group["lr"],
            weight_decay=self.group["weight_decay"],
            eps=self.group["eps"],
        )


class Buffer:
    """Host memory for a piece on its way. Two take turns: the next gradient comes while this piece is stepped.

    All copies are in one stream. That a gradient has come says that what was sent before is there, and its memory free.
    """

    def __init__(self, numel: int, *, pinned: bool) -> None:
        self.gradient, self._parameters = (torch.empty(numel, pin_memory=pinned) for _ in range(2))
        self._came = torch.cuda.Event() if pinned else None

    def fetch(self, gradient: Tensor) -> None:
        """Start to copy a gradient from its device."""
        self.gradient[: len(gradient)].copy_(gradient, non_blocking=True)
        if self._came is not None:
            self._came.record()

    def fetched(self, numel: int) -> Tensor:
        """Return the gradient once it is there."""
        if self._came is not None:
            self._came.synchronize()
        return self.gradient[:numel]

    def send(self, main: Tensor, parameter: Tensor) -> None:
        """Start to copy a main parameter, in the type that the model has, to its device."""
        rounded = self._parameters.view(parameter.dtype)[: len(main)]
        parameter.copy_(rounded.copy_(main), non_blocking=True)


def _host_copy(parameter: Tensor) -> Tensor:
    return torch.empty(parameter.shape, dtype=torch.float32).copy_(parameter.detach().cpu())
