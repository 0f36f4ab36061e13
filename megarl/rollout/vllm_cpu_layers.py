"""Layers for vLLM on CPU that compute with their parameters as they are.

vLLM packs the weights of linears and experts into the layout of its CPU kernels once, after loading: it empties a
linear's parameter, and leaves in an expert's a permutation of the same shape. Written in place, the first would be an
error, and the second would silently give a wrong model.

T tokens of one expert, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts import cpu_moe

from megarl.errors import ModelFolderError


@contextmanager
def plain_layers() -> Iterator[None]:
    """Leave the parameters of the models that are loaded in this context unpacked."""
    pack_linear = utils.dispatch_cpu_unquantized_gemm
    pack_experts = cpu_moe.CPUUnquantizedExperts.process_weights_after_loading
    utils.dispatch_cpu_unquantized_gemm = _keep_linear
    cpu_moe.CPUUnquantizedExperts.process_weights_after_loading = _keep_experts
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = pack_linear
        cpu_moe.CPUUnquantizedExperts.process_weights_after_loading = pack_experts


def _keep_linear(layer: torch.nn.Module, remove_weight: bool) -> None:
    # setattr: torch types the attributes of modules as tensors and modules alone.
    setattr(layer, "cpu_linear", linear)  # noqa: B010


def _keep_experts(experts: Any, layer: torch.nn.Module) -> None:
    config = experts.moe_config
    if config.activation != MoEActivation.SILU or config.has_bias:
        raise ModelFolderError(
            f"experts with activation {config.activation.value!r} and has_bias {config.has_bias}: on CPU the rollout "
            "engine computes SiLU experts without biases alone; use such a model, or GPUs"
        )
    experts.apply = apply_experts  # over the method of the class


def apply_experts(
    output: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    apply_router_weight_on_input: bool,
    **rest: object,
) -> None:
    """Write into ``output`` the weighted sum of each token's experts, down(silu(gate(x)) * up(x)).

    output, hidden_states: [tokens, hidden]. w1: gate above up, [experts, 2 x intermediate, hidden].
    w2: [experts, hidden, intermediate]. topk_weights, topk_ids: [tokens, k]. rest: scratch space and unused features.
    """
    assert not apply_router_weight_on_input, "this router's weights don't commute with the experts"
    output.zero_()
    for expert in topk_ids.unique().tolist():
        token_T, choice_T = (topk_ids == expert).nonzero(as_tuple=True)
        gate_TI, up_TI = linear(hidden_states[token_T], w1[expert]).chunk(2, -1)
        down_TH = linear(silu(gate_TI) * up_TI, w2[expert])
        output.index_add_(0, token_T, (down_TH * topk_weights[token_T, choice_T, None]).to(output.dtype))
