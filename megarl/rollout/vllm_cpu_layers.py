"""Layers for vLLM on CPU whose weights can be published in place.

vLLM packs the weights of linears and experts into the layout of its CPU kernels once, after loading: it empties a
linear's parameter, and leaves in an expert's a permutation of the same shape. Written in place, the first would be an
error, and the second would silently give a wrong model. Here the parameters stay as they are, to be written, and the
packed weights that vLLM's kernels compute with are copies beside them, made anew after every writing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from megarl.errors import ModelFolderError

Pack = Callable[[], None]


@contextmanager
def parameters_kept() -> Iterator[list[Pack]]:
    """Yield what packs the weights of each layer that is loaded in this context, whose parameters stay unpacked."""
    packs: list[Pack] = []
    pack_linear = utils.dispatch_cpu_unquantized_gemm
    pack_experts = cpu_moe.CPUUnquantizedExperts.process_weights_after_loading

    def keep_linear(layer: torch.nn.Module, remove_weight: bool) -> None:
        if _is_looked_up_alone(layer):
            # setattr: torch types the attributes of modules as tensors and modules alone.
            setattr(layer, "cpu_linear", linear)  # noqa: B010
        else:
            packs.append(partial(pack_linear, layer, remove_weight=False))
            packs[-1]()

    def keep_experts(experts: Any, layer: torch.nn.Module) -> None:
        if experts.moe_config.has_bias:
            raise ModelFolderError(
                "experts with biases: on CPU the rollout engine computes those without alone; use such a model, or GPUs"
            )
        packs.append(partial(_pack_experts, experts, layer, pack_experts))
        packs[-1]()

    utils.dispatch_cpu_unquantized_gemm = keep_linear
    cpu_moe.CPUUnquantizedExperts.process_weights_after_loading = keep_experts
    try:
        yield packs
    finally:
        utils.dispatch_cpu_unquantized_gemm = pack_linear
        cpu_moe.CPUUnquantizedExperts.process_weights_after_loading = pack_experts


def _is_looked_up_alone(layer: torch.nn.Module) -> bool:
    # An output layer is an embedding too. Where both are tied, it is the one of the two that is multiplied with.
    return isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)


def _pack_experts(experts: Any, layer: Any, pack: Callable[[Any, torch.nn.Module], None]) -> None:
    """Have ``experts`` compute with packed copies of the weights of ``layer``, by vLLM's own packing and kernel."""
    packed = torch.nn.Module()
    for name in ("w13_weight", "w2_weight"):
        packed.register_parameter(name, torch.nn.Parameter(getattr(layer, name).data, requires_grad=False))
    pack(experts, packed)
    compute = type(experts).apply

    def apply(*, expert_map: torch.Tensor | None, **named: Any) -> None:
        named |= {"w1": packed.w13_weight, "w2": packed.w2_weight}
        if expert_map is not None:  # which vLLM's kernel for CPU doesn't read: it takes ids for places in the stack
            place = expert_map[named["topk_ids"]]
            named["topk_weights"] = named["topk_weights"].masked_fill(place < 0, 0)
            named["topk_ids"] = place.clamp(min=0)
        compute(experts, expert_map=None, **named)

    experts.apply = apply  # over the method of the class
