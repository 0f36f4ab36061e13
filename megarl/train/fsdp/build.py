"""Build transformers' model of a role and shard it, so that no rank ever has it whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from megarl.config.schema import FsdpConfig, TrainedFsdpConfig
from megarl.roles import Role
from megarl.train.fsdp import attention
from megarl.train.fsdp.lora import Merged, add_adapters, fill_adapters, is_adapter, name_without_adapter
from megarl.train.fsdp.mesh import Ranks
from megarl.weights.any_model import empty_model
from megarl.weights.fsdp_map import fsdp_shards
from megarl.weights.sources import TensorSource, fill

R = TypeVar("R")

# FSDP's own call, which no setting changes.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated", category=FutureWarning)


class HiddenHead(torch.nn.Module):
    """An output layer that returns hidden states, and leaves its matrix product to the log-probs."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``hidden``."""
        return hidden


class Root(torch.nn.Module):
    """transformers' model, and what is made of its output.

    That is part of this forward, since parameters outside of the layers are gathered in here alone.
    """

    def __init__(self, model: PreTrainedModel, *, value_head: bool) -> None:
        super().__init__()
        self.model, self.value_head = model, value_head

    def forward(self, read: Callable[[Tensor], R], **inputs: Any) -> R:
        """Return what ``read`` makes of the logits of ``inputs``, or of the values."""
        if self.value_head:  # what a model does to its logits isn't done to values
            return read(self.model.lm_head(self.model.base_model(**inputs).last_hidden_state))
        return read(self.model(**inputs).logits)


def build_root(role: Role, ranks: Ranks, device: torch.device) -> Root:
    """Return this rank's part of a role's model, whose parameters are on ``device`` and hold anything. Collective.

    What is trained is in float32: the main weights, or adapters of weights in the role's dtype. Layers gather in that.
    """
    assert isinstance(role.backend, FsdpConfig)
    has_main_weights = role.is_trained and role.lora is None
    dtype = torch.float32 if has_main_weights else getattr(torch, role.dtype)
    model = _model(role, dtype)
    with torch.device("meta"):
        model.requires_grad_(has_main_weights)
        if role.lora:
            add_adapters(model, role.lora, role.shape)
    if isinstance(role.backend, TrainedFsdpConfig) and role.backend.enable_gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    root = Root(model, value_head=role.shape.value_head)
    _shard(root, role, role.backend, ranks)
    root.to_empty(device=device)
    _refill_buffers(model)
    return root


def _model(role: Role, dtype: torch.dtype) -> PreTrainedModel:
    """Return the whole model, with the role's head."""
    model = empty_model(role.model.here(), dtype, None if role.shape.own_attention else attention.NAME)
    if role.shape.value_head:
        model.set_output_embeddings(torch.nn.Linear(role.shape.hidden_size, 1, bias=False, dtype=dtype, device="meta"))
    elif role.fused_head:
        model.set_output_embeddings(HiddenHead(model.get_output_embeddings().weight))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # log-probs would differ between two passes
            module.p = 0.0
        if isinstance(module, torch.nn.Embedding):  # a padding token that was sampled has a gradient like any other
            module.padding_idx = None
    return model


def _shard(root: Root, role: Role, backend: FsdpConfig, ranks: Ranks) -> None:
    """Shard every layer by itself, and the rest together. Gradients are summed over ranks, not averaged."""
    policy = MixedPrecisionPolicy()
    if role.is_trained and role.dtype != "float32":
        policy = MixedPrecisionPolicy(param_dtype=getattr(torch, role.dtype), reduce_dtype=torch.float32)
    wrap: Any = partial(fully_shard, mesh=ranks.mesh, mp_policy=policy)
    layers = [module for module in root.modules() if type(module).__name__ in (root.model._no_split_modules or ())]
    for layer in layers:
        wrap(layer, reshard_after_forward=backend.reshard_after_forward)
    wrap(root)
    for module in sharded_modules(root):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo can't divide while it sums


def sharded_modules(root: Root) -> Iterator[FSDPModule]:
    """Yield every module whose parameters are gathered together."""
    return (module for module in root.modules() if isinstance(module, FSDPModule))


@torch.no_grad()
def _refill_buffers(model: PreTrainedModel) -> None:
    """Fill what no checkpoint has, as frequencies of rotary embeddings: a model made without memory has none."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # their values come from elsewhere
    for module in model.modules():
        buffers = list(module.buffers(recurse=False))
        if buffers:
            for buffer in buffers:
                buffer.fill_(float("nan"))
            model._init_weights(module)
            assert all(buffer.isfinite().all() for buffer in buffers), f"{type(module).__name__} has unknown buffers"


def load_weights(root: Root, role: Role, rank: int, source: TensorSource) -> None:
    """Fill this rank's part of the parameters."""
    fill(base_parts(root, role, rank), fsdp_shards(role.shape, role.layout, rank), source)
    if role.lora:
        fill_adapters(root.model, rank % role.layout.fsdp, role.layout.fsdp)


def named_parameters(root: Root, role: Role, rank: int) -> Mapping[str, Tensor]:
    """Return this rank's part of every parameter, as the name map has it: experts apart, adapters merged.

    Collective.
    """
    base = base_parts(root, role, rank)
    return Merged(base, root.model, role.lora.scale) if role.lora else base


def base_parts(
    root: Root, role: Role, rank: int, of: Callable[[Tensor], Tensor] = lambda parameter: parameter
) -> dict[str, Tensor]:
    """Return this rank's part of what there is ``of`` every parameter that isn't an adapter's, experts apart."""
    found: dict[str, Tensor] = {}
    for adapted_name, parameter in root.model.named_parameters():
        name = name_without_adapter(adapted_name)
        if is_adapter(name):
            continue
        whole = of(parameter)
        assert isinstance(whole, DTensor), f"{name} is gathered"
        local = whole.to_local().detach()
        if ".experts." in name:
            share = -(-role.shape.num_experts // role.layout.fsdp)
            first = rank % role.layout.fsdp * share
            found |= {f"{name}.{first + i}": expert for i, expert in enumerate(local)}
        else:
            found[name] = local
    return found
