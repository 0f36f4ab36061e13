"""Megatron's data-parallel wrapper, optimizer and learning-rate schedule around a model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megarl.errors import WorkerError
from megarl.train.megatron.host_adam import adam_on_host
from megarl.train.megatron.model import Loss, Model
from megarl.train.megatron.router import Sequences, routers, routing_metrics
from megarl.train.offload import Offload
from megarl.train.work import Metrics, OptimizerStep
from megarl.types import Batch


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW with decoupled weight decay (none on norms and biases, as Megatron has it), clipping and a schedule.

    clip_grad: largest global L2 norm of the gradient. schedule: ``cosine``, ``constant`` or ``linear``, after
    ``warmup_steps`` of linear warm-up, down to ``min_lr`` at ``total_steps``. Steps are optimizer steps.
    grad_offload: free the gradient buffers between updates. optimizer_offload: keep main parameters and moments in host
    memory between updates. optimizer_on_host: keep them there always, and step there; needs the distributed optimizer.
    moment_dtypes: of Transformer Engine's Adam, which the distributed optimizer takes then for a bfloat16 model; it
    keeps only the bits of a main parameter that the model's doesn't have. None: all state in float32.
    """

    lr: float
    min_lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    clip_grad: float
    schedule: str
    warmup_steps: int
    total_steps: int
    use_distributed_optimizer: bool
    grad_offload: bool = False
    optimizer_offload: bool = False
    optimizer_on_host: bool = False
    moment_dtypes: tuple[torch.dtype, torch.dtype] | None = None


class Optimizer:
    """Wraps ``model`` for data-parallel training and steps it. All methods are collective over all ranks."""

    def __init__(self, model: Model, spec: OptimizerSpec) -> None:
        self.model = model
        self._gradients = Offload(self._gradient_tensors, enabled=spec.grad_offload, keep_values=False)
        self._state = Offload(self._state_tensors, enabled=spec.optimizer_offload)
        with self.resident(), model.groups.active():
            self.chunks = model.chunks = _wrap(model, spec)
            with adam_on_host() if spec.optimizer_on_host else nullcontext():
                self.inner = get_megatron_optimizer(_optimizer_config(model, spec), self.chunks)
            self.scheduler = _scheduler(self.inner, spec)

    @property
    def ddp(self) -> DistributedDataParallel:
        """The wrapper of the whole stage, where it is in one piece."""
        (ddp,) = self.chunks
        return ddp

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Have parameters, gradients and optimizer state on the device for the duration; gradients are undefined."""
        with self.model.resident(), self._gradients.resident(), self._state.resident():
            yield

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

    def train(self, batch: Batch, step: OptimizerStep, loss: Loss[dict[str, Tensor]]) -> Metrics:
        """Take one optimizer step on the sum of ``loss`` over micro-batches and data-parallel ranks.

        Return the sum of what ``loss`` told over this rank's micro-batches, with grad_norm (before clipping), lr and,
        where there are experts, how tokens were routed.
        Raises WorkerError where the gradient isn't finite: the weights in memory are lost then, saved ones aren't.
        """
        self.model.set_training(True)
        sequences = Sequences(step.total_rollouts, max(map(len, step.micro_batches), default=0))
        for router in routers(self.chunks):
            router.start(sequences)
        with self.resident():
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.inner.zero_grad()
            metrics = summed(self.model.run(batch, step.micro_batches, loss, forward_only=False))
            # Before the step, so that the first one is 1/warmup of the way up instead of a step of size zero.
            self.scheduler.step(1)
            lr = float(self.inner.param_groups[0]["lr"])
            with self.model.groups.active():
                _, grad_norm, _ = self.inner.step()
        if not math.isfinite(grad_norm):
            raise WorkerError(
                f"the gradient norm is {grad_norm}: the update destroyed the weights in memory. Lower optim.lr, raise "
                "lr_scheduler.warmup_steps, or look for non-finite rewards and log-probs in metrics.jsonl"
            )
        shape, device = self.model.spec.shape, self.model.spec.device
        routing = routing_metrics(self.chunks, shape, device) if shape.num_experts else {}
        return metrics | {"grad_norm": float(grad_norm), "lr": lr} | routing


def detached(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies without a graph: Megatron scales the loss tensor in place."""
    return {name: value.detach().clone() for name, value in metrics.items()}


def summed(results: Sequence[dict[str, Tensor]]) -> Metrics:
    """Add up what the micro-batches told; empty on ranks that aren't on the last stage."""
    sums: dict[str, float] = defaultdict(float)
    for result in results:
        for name, value in result.items():
            sums[name] += float(value)
    return dict(sums)


def _wrap(model: Model, spec: OptimizerSpec) -> list[DistributedDataParallel]:
    """Wrap each chunk in Megatron's DDP; gradients are kept and reduced in float32, and summed, not averaged."""
    config: Any = model.chunks[0].config  # which all share
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=spec.use_distributed_optimizer
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


def _optimizer_config(model: Model, spec: OptimizerSpec) -> OptimizerConfig:
    config = OptimizerConfig(
        optimizer="adam",
        lr=spec.lr,
        min_lr=spec.min_lr,
        weight_decay=spec.weight_decay,
        adam_beta1=spec.betas[0],
        adam_beta2=spec.betas[1],
        adam_eps=spec.eps,
        clip_grad=spec.clip_grad,
        bf16=model.spec.dtype == torch.bfloat16,
        params_dtype=model.spec.dtype,
        use_distributed_optimizer=spec.use_distributed_optimizer,
        optimizer_cpu_offload=spec.optimizer_on_host,
        **_precision_fields(spec),
    )
    if spec.moment_dtypes is not None:
        return config
    # Adam then holds main parameters itself, and finds gradients where they are. Megatron derives it from
    # use_precision_aware_optimizer, but fails where there is no Transformer Engine whose version it could ask for.
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = spec.optimizer_on_host
    return config


def _precision_fields(spec: OptimizerSpec) -> dict[str, Any]:
    if spec.moment_dtypes is None:
        return {}
    exp_avg, exp_avg_sq = spec.moment_dtypes
    return {
        "use_precision_aware_optimizer": True,
        "store_param_remainders": True,
        "exp_avg_dtype": exp_avg,
        "exp_avg_sq_dtype": exp_avg_sq,
    }


def _scheduler(optimizer: object, spec: OptimizerSpec) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=spec.lr,
        min_lr=spec.min_lr,
        lr_warmup_steps=spec.warmup_steps,
        lr_decay_steps=spec.total_steps,
        lr_decay_style=spec.schedule,
        start_wd=spec.weight_decay,
        end_wd=spec.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
