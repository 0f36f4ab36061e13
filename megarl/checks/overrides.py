"""Fields of megatron's TransformerConfig that a run may not set, and those that need a package."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from megarl.config.schema import MegatronConfig
from megarl.errors import Problem
from megarl.roles import Role

_ANY_LENGTH = "its {} have one fixed size, and micro-batches have any number of tokens"
_FEWER_BITS = (
    "needs numbers of tokens that 16 divides, and micro-batches have any; and checkpoints and engines take weights of "
    "16 or 32 bits"
)
_COMBINED = "needs megatron's schedule that runs a forward and a backward pass at once, for models that say how"
_GRAPHS = _ANY_LENGTH.format("graphs")

# Why a field can't be set. None of these is refused at the value that leaves it off.
_REFUSED: dict[str, str] = {
    "tp_comm_overlap": _ANY_LENGTH.format("buffers"),
    **dict.fromkeys(("fp8", "fp8_param", "fp4", "fp4_param"), _FEWER_BITS),
    **dict.fromkeys(("moe_router_padding_for_fp8", "moe_router_padding_for_quantization"), _FEWER_BITS),
    **dict.fromkeys(("overlap_moe_expert_parallel_comm", "delay_wgrad_compute"), _COMBINED),
    "ep_overlap_early_attn_memory_release": _COMBINED,
    **dict.fromkeys(("enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl"), _GRAPHS),
    "moe_use_legacy_grouped_gemm": "lays out the weights of experts in a way that megarl's name map doesn't have",
    "fused_single_qkv_rope": "rotates the heads of padded sequences alone",
    "use_te_activation_func": "takes SwiGLU apart, which megarl's models compute in one",
    "moe_input_jitter_eps": "adds noise: the log-probs of two passes would differ",
    "moe_router_force_load_balancing": "sends tokens to experts at random, for benchmarks",
    "moe_apply_probs_on_input": "weights what goes into an expert, and the model what comes out of it",
}
_OFF = (None, False, "none", 0)

_TE, _APEX, _DEEP_EP = "transformer_engine", "fused_weight_gradient_mlp_cuda", "deep_ep"
# The module that has the kernel of a field, and what it is to a user.
_KERNELS = {
    "apply_rope_fusion": (_TE, "Transformer Engine"),
    "moe_permute_fusion": (_TE, "Transformer Engine"),
    "moe_router_fusion": (_TE, "Transformer Engine"),
    "moe_enable_deepep": (_DEEP_EP, "DeepEP"),
    "gradient_accumulation_fusion": (_APEX, "NVIDIA's Apex, built with its CUDA extensions"),
}


def overridden_fields_can_be_run(key: str, overrides: Mapping[str, Any]) -> Iterator[Problem]:
    """No field is set that crashes, or that changes what is computed. key: of the overrides."""
    for name, value in overrides.items():
        if name in _REFUSED and value not in _OFF:
            yield Problem(f"{key}.{name}", value, _REFUSED[name], "leave it out")


def fused_kernels_are_installed(
    roles: Collection[Role], is_installed: Callable[[str], object] = find_spec
) -> Iterator[Problem]:
    """Yield the fields of roles whose kernel isn't on this machine. is_installed: whether there is such a module."""
    for role in roles:
        if not isinstance(role.backend, MegatronConfig):
            continue
        for name, value in role.backend.override_transformer_config.items():
            if value not in _OFF and name in _KERNELS and not is_installed(_KERNELS[name][0]):
                path = f"{role.backend_key}.override_transformer_config.{name}"
                allowed = f"has its kernel in {_KERNELS[name][1]}, which isn't installed"
                yield Problem(path, value, allowed, "leave it out, or install that where there are GPUs")
