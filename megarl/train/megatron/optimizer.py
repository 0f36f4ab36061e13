"""Megatron's data-parallel wrapper, optimizer and learning-rate schedule around a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from megarl.batching.pack import MicroBatch
from megarl.config.schema import TrainedMegatronConfig
from megarl.roles import Role, Training
from megarl.train.backend import Loss, Skipped
from megarl.train.megatron.host_adam import adam_on_host
from megarl.train.megatron.model import MegatronModel
from megarl.train.megatron.router import RoutedSequences, routers, routing_metrics
from megarl.train.offload import Offload
from megarl.train.schedule import learning_rate
from megarl.train.updating import summed
from megarl.types import Metrics


class _NotTaken(Exception):
    """Stops Megatron's step before it clips and steps: it isn't taken for such a gradient norm."""

    def __init__(self, grad_norm: float) -> None:
        super().__init__(grad_norm)
        self.grad_norm = grad_norm


class Optimizer:
    """Wraps ``model`` for data-parallel training and steps it. All methods are collective over all ranks."""

    def __init__(self, model: MegatronModel, role: Role) -> None:
        assert isinstance(role.backend, TrainedMegatronConfig) and role.training is not None
        self.model = model
        stay, config = role.residency, role.backend
        self._gradients = Offload(self._gradient_tensors, enabled=stay.grad_offload, keep_values=False)
        self._state = Offload(self._state_tensors, enabled=stay.optimizer_offload)
        self._gathers_late, self._num_users = config.overlap_param_gather, 0
        with self.resident(), model.groups.active():
            self.chunks = model.chunks = _wrap(model, config)
            with adam_on_host() if stay.optimizer_on_host else nullcontext():
                self.inner = get_megatron_optimizer(_optimizer_config(model, role.training, config), self.chunks)
        self.training, self.num_updates = role.training, 0
        self._grad_norm, self.inner.get_grad_norm = self.inner.get_grad_norm, self._grad_norm_of_a_step

    @property
    def ddp(self) -> DistributedDataParallel:
        """The wrapper of the whole stage, where it is in one piece."""
        (ddp,) = self.chunks
        return ddp

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Have parameters, gradients and optimizer state on the device for the duration; gradients are undefined.

        Uses may overlap. After the last of them, parameters are whole for whoever reads them.
        """
        with self.model.resident(), self._gradients.resident(), self._state.resident():
            self._num_users += 1
            try:
                yield
            finally:
                self._num_users -= 1
            if self._num_users == 0 and self._gathers_late:
                for chunk in self.chunks:
                    chunk.start_param_sync(force_sync=True)

    def _gradient_tensors(self) -> Iterator[Tensor]:
        """Yield views into every gradient buffer."""
        for parameter in self.model.own_parameters():
            yield parameter.main_grad  # type: ignore[attr-defined]

    def _state_tensors(self) -> Iterator[Tensor]:
        """Yield main parameters and moments, but no main parameter that is a view of the model's own."""
        weights = {parameter.untyped_storage()._cdata for parameter in self.model.own_parameters()}
        found = [parameter for group in self.inner.param_groups for parameter in group["params"]]
        for optimizer in self.inner.chained_optimizers:
            for state in optimizer.state.values():
                found += [value for value in state.values() if isinstance(value, Tensor) and value.dim()]
        yield from (tensor for tensor in found if tensor.untyped_storage()._cdata not in weights)

    def step(self, micros: Sequence[MicroBatch], loss: Loss, num_sequences: int) -> Metrics | Skipped:
        """Take one optimizer step on the sum of ``loss`` over micro-batches and data-parallel ranks.

        num_sequences: of the whole mini-batch. Return the sum of what ``loss`` told over this rank's micro-batches,
        with grad_norm (before clipping), lr and, where there are experts, how tokens were routed; Skipped where the
        gradient isn't finite or too large.
        """
        self.model.set_training(True)
        mini_batch = RoutedSequences(num_sequences, max((len(micro.row_R) for micro in micros), default=0))
        for router in routers(self.chunks):
            router.start(mini_batch)
        with self.resident():
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.inner.zero_grad()
            metrics = summed(self.model.run(micros, loss, forward_only=False))
            lr = self._set_learning_rate()
            try:
                with self.model.groups.active():
                    _, grad_norm, _ = self.inner.step()
            except _NotTaken as stopped:
                return Skipped(stopped.grad_norm)
        shape = self.model.shape
        routing = routing_metrics(self.chunks, shape, self.model.device) if shape.num_experts else {}
        return metrics | {"grad_norm": float(grad_norm), "lr": lr} | routing

    def _set_learning_rate(self) -> float:
        """Give every group of parameters the learning rate of this update and its weight decay; return the rate."""
        self.num_updates += 1
        lr = learning_rate(self.training, self.num_updates)
        for group in self.inner.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.training.weight_decay * group.get("wd_mult", 1.0)
        return lr

    def _grad_norm_of_a_step(self) -> float:
        """Stand in for Megatron's get_grad_norm, which its step calls before it changes anything."""
        grad_norm = float(self._grad_norm())
        if not self.training.takes(grad_norm):
            raise _NotTaken(grad_norm)
        return grad_norm


def _wrap(model: MegatronModel, backend: TrainedMegatronConfig) -> list[DistributedDataParallel]:
    """Wrap each chunk in Megatron's DDP; gradients are kept and reduced in float32, and summed, not averaged."""
    config: Any = model.chunks[0].config  # which all share
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=backend.use_distributed_optimizer,
        overlap_grad_reduce=backend.overlap_grad_reduce,
        overlap_param_gather=backend.overlap_param_gather,
        bucket_size=backend.ddp_bucket_size,
    )
    # Only the first chunk's gradients come last, where nothing is left to compute meanwhile.
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(model.chunks)
    ]
    config.no_sync_func = [ddp.no_sync for ddp in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    # Losses are normalised by the whole mini-batch already, so nothing is left to divide by.
    config.finalize_model_grads_func = lambda chunks, *_, **__: finalize_model_grads(chunks, None)
    return wrapped


def _optimizer_config(model: MegatronModel, training: Training, backend: TrainedMegatronConfig) -> OptimizerConfig:
    config = OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.betas[0],
        adam_beta2=training.betas[1],
        adam_eps=training.eps,
        clip_grad=training.clip_grad,
        bf16=model.dtype == torch.bfloat16,
        params_dtype=model.dtype,
        use_distributed_optimizer=backend.use_distributed_optimizer,
        overlap_param_gather=backend.overlap_param_gather,
        optimizer_cpu_offload=backend.optimizer_on_host,
        **_precision_fields(backend),
    )
    if backend.use_precision_aware_optimizer:
        return config
    # Adam then holds main parameters itself, and finds gradients where they are. Megatron derives it from
    # use_precision_aware_optimizer, but fails where there is no Transformer Engine whose version it could ask for.
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = backend.optimizer_on_host
    return config


def _precision_fields(backend: TrainedMegatronConfig) -> dict[str, Any]:
    """Return the fields of Transformer Engine's Adam.

    The distributed optimizer takes it then for a bfloat16 model; it keeps only the bits of a main parameter that the
    model's doesn't have.
    """
    if not backend.use_precision_aware_optimizer:
        return {}
    return {
        "use_precision_aware_optimizer": True,
        "store_param_remainders": True,
        "exp_avg_dtype": getattr(torch, backend.exp_avg_dtype),
        "exp_avg_sq_dtype": getattr(torch, backend.exp_avg_sq_dtype),
    }
