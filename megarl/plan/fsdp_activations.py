"""Bytes that a forward pass of transformers' model on FSDP keeps for the backward pass, tensor by tensor.

transformers' layers are plain torch on every device: RMSNorm computes in float32 and keeps that copy of its input. Only
attention differs: packed sequences go through torch's fused kernel on CUDA in half precision, else by blocks of one
length. With adapters a frozen weight keeps nothing of what it is multiplied by. Real passes are compared with this on
CPU, in tests/dist.

Sizes are in elements of one token on one rank unless a name ends in ``_bytes``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.schema import TrainedFsdpConfig
from megarl.plan.sizes import FP32_BYTES
from megarl.roles import Role
from megarl.weights.adapters import Lora, adapted_modules
from megarl.weights.model_shape import ModelShape

_INT64_BYTES = 8
_QKV, _MLP_IN = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@dataclass(frozen=True)
class FsdpPass:
    """What runs: a model, ``tokens`` a micro-batch on one data-parallel rank, of which a rank computes one in ``cp``.

    varlen: packed sequences attend in torch's fused kernel. again: layers are computed again in the backward pass.
    """

    shape: ModelShape
    tokens: int
    cp: int
    dtype_bytes: int
    packed: bool
    varlen: bool
    fused_head: bool
    again: bool
    lora: Lora | None

    @property
    def local_tokens(self) -> int:
        """Tokens of this rank: Ulysses splits the whole line."""
        return -(-self.tokens // self.cp)

    @property
    def queries(self) -> int:
        """Width of the queries."""
        return self.shape.num_heads * self.shape.head_dim

    @property
    def keys(self) -> int:
        """Width of the keys, and of the values."""
        return self.shape.num_kv_heads * self.shape.head_dim


def fsdp_pass(role: Role, tokens: int, cuda: bool) -> FsdpPass:
    """Return the pass of a role over ``tokens`` tokens."""
    backend = role.backend
    return FsdpPass(
        role.shape,
        tokens,
        role.layout.cp,
        role.dtype_bytes,
        role.packed,
        varlen=cuda and role.packed and role.dtype_bytes < FP32_BYTES,
        fused_head=role.fused_head,
        again=isinstance(backend, TrainedFsdpConfig) and backend.enable_gradient_checkpointing,
        lora=role.lora,
    )


def kept_bytes(p: FsdpPass) -> int:
    """Return the bytes that the whole pass keeps."""
    layers = range(p.shape.num_layers)
    if p.again:
        kept = len(layers) * input_bytes(p)
    else:
        kept = sum(fsdp_layer_bytes(p, layer) for layer in layers)
        # A frozen embedding has no gradient to wait for, and neither has the first norm.
        kept -= p.local_tokens * _norm_bytes(p, p.shape.hidden_size, 1) if p.lora else 0
    rotations = 2 * p.dtype_bytes * p.shape.head_dim
    places = _INT64_BYTES * (1 + 3 * p.cp * (p.packed and not p.varlen))
    return kept + p.local_tokens * (rotations + places) + fsdp_head_bytes(p)


def input_bytes(p: FsdpPass) -> int:
    """Return the bytes of what passes from layer to layer."""
    return p.local_tokens * p.dtype_bytes * p.shape.hidden_size


def computed_again_bytes(p: FsdpPass) -> int:
    """Return the most bytes that a layer adds while it is computed again."""
    if not p.again:
        return 0
    shared = input_bytes(p) if p.dtype_bytes == FP32_BYTES else 0  # its first norm keeps what was kept anyway
    return max(fsdp_layer_bytes(p, layer) for layer in range(p.shape.num_layers)) - shared


def fsdp_layer_bytes(p: FsdpPass, layer: int) -> int:
    """Return the bytes that one layer keeps."""
    shape, b = p.shape, p.dtype_bytes
    adapted = _adapted(p, layer)
    per_token = 2 * _norm_bytes(p, shape.hidden_size, 1) + _attention_bytes(p, adapted)
    if p.lora and adapted:
        per_token += b * p.lora.rank * len(adapted)
    if not shape.has_experts(layer):
        per_token += _mlp_bytes(p, adapted, "mlp.", shape.ffn_size)
    else:
        per_token += _experts_bytes(p)
        if shape.shared_expert_ffn_size:  # weighed by a gate of one column
            per_token += _mlp_bytes(p, adapted, "mlp.shared_expert.", shape.shared_expert_ffn_size)
            per_token += b * (shape.hidden_size + 1)
    return p.local_tokens * per_token


def _adapted(p: FsdpPass, layer: int) -> frozenset[str] | None:
    """Return the modules of a layer that have adapters, by name in the layer; None where all weights are trained."""
    if p.lora is None:
        return None
    start = f"model.layers.{layer}."
    names = adapted_modules(p.shape, p.lora.targets)
    return frozenset(name.removeprefix(start) for name in names if name.startswith(start))


def _is_kept(adapted: frozenset[str] | None, *modules: str) -> bool:
    """Return whether linear modules keep their common input: for the gradient of one of them, or of its adapter."""
    return adapted is None or any(module in adapted for module in modules)


def _norm_bytes(p: FsdpPass, width: int, num_scales: int) -> int:
    """Return the bytes of a token that RMSNorm keeps: its input and scale in float32, and what its weight is times."""
    return FP32_BYTES * (width + num_scales) + (0 if p.lora else p.dtype_bytes * width)


def _attention_bytes(p: FsdpPass, adapted: frozenset[str] | None) -> int:
    b, q, kv = p.dtype_bytes, p.queries, p.keys
    heads, kv_heads = p.shape.num_heads, p.shape.num_kv_heads
    kept = b * p.shape.hidden_size * _is_kept(adapted, *(f"self_attn.{name}" for name in _QKV))
    if p.shape.qk_norm:
        kept += _norm_bytes(p, q, heads) + _norm_bytes(p, kv, kv_heads)
    shared = max(kv_heads, p.cp) * p.shape.head_dim if p.cp > 1 else kv  # a key-value head for every rank at least
    core = b * (q + 2 * shared) + b * q + FP32_BYTES * heads
    # The kernel's own output goes on to the last matrix where nothing comes between.
    goes_on = p.cp == 1 and not (p.packed and not p.varlen)
    return kept + core + b * q * (_is_kept(adapted, "self_attn.o_proj") and not goes_on)


def _mlp_bytes(p: FsdpPass, adapted: frozenset[str] | None, block: str, ffn: int) -> int:
    """Return the bytes of a token that a gated feed-forward network of ``ffn`` columns keeps."""
    inputs = p.shape.hidden_size * _is_kept(adapted, *(block + name for name in _MLP_IN))
    return p.dtype_bytes * (inputs + 3 * ffn + ffn * _is_kept(adapted, f"{block}down_proj"))


def _experts_bytes(p: FsdpPass) -> int:
    """Return the bytes of a token that router and experts keep: one product over all, sorted by expert."""
    shape, b, chosen = p.shape, p.dtype_bytes, p.shape.experts_per_token
    router = FP32_BYTES * (shape.num_experts + chosen + 1) + chosen * (4 * _INT64_BYTES + b)
    columns = shape.hidden_size + 2 * shape.expert_ffn_size + shape.hidden_size
    columns += shape.expert_ffn_size * (1 if p.lora else 2)
    inputs = 0 if p.lora else b * shape.hidden_size  # of the router
    return router + inputs + b * chosen * (columns - (shape.hidden_size if p.lora else 0))


def fsdp_head_bytes(p: FsdpPass) -> int:
    """Return the bytes that the last norm, the output layer and the log-probs keep, each token being predicted."""
    shape, b = p.shape, p.dtype_bytes
    kept = _norm_bytes(p, shape.hidden_size, 1)
    if shape.value_head:
        return p.local_tokens * (kept + b * (shape.hidden_size + 1))
    kept += 3 * _INT64_BYTES + 5 * FP32_BYTES
    if p.fused_head:
        return p.local_tokens * (kept + b * shape.hidden_size)
    return p.local_tokens * (kept + b * (shape.vocab_size + (0 if p.lora else shape.hidden_size)))
