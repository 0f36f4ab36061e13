"""Bytes that a forward pass keeps for the backward pass, tensor by tensor.

Each line below is one tensor that autograd saves, as megarl's layers run on each platform: on CPU plain torch, on CUDA
fused norms, SwiGLU and attention. Real passes are compared with this on CPU, in tests/dist.

Shape suffixes: none; sizes are in elements of one token on one rank unless a name ends in ``_bytes``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.schema import RecomputeConfig, TrainedFsdpConfig, TrainedMegatronConfig
from megarl.parallel.layout import Layout, layers_of_chunks
from megarl.roles import Role
from megarl.weights.model_shape import ModelShape

_FP32, _INT64 = 4, 8


def pass_of(role: Role, tokens: int, fused: bool) -> Pass:
    """Return the forward pass of a role over ``tokens`` tokens."""
    return Pass(role.shape, role.layout, tokens, role.dtype_bytes, fused, role.fused_head)


_EVERY_LAYER = RecomputeConfig(granularity="full", method="uniform", num_layers=1)


def recompute_of(role: Role) -> RecomputeConfig | None:
    """Return the recomputation of a role that is trained, None elsewhere."""
    match role.backend:
        case TrainedMegatronConfig():
            return role.backend.recompute
        case TrainedFsdpConfig():
            return _EVERY_LAYER if role.backend.enable_gradient_checkpointing else None
        case _:
            return None


@dataclass(frozen=True)
class Pass:
    """What runs: a model on a layout, ``tokens`` a micro-batch, in a dtype, with which kernels.

    tokens: of all sequences of a micro-batch on one data-parallel rank. fused: CUDA's kernels. fused_head: log-probs
    that compute the logits themselves.
    """

    shape: ModelShape
    layout: Layout
    tokens: int
    dtype_bytes: int
    fused: bool
    fused_head: bool = False

    @property
    def hidden(self) -> int:
        """Width of what passes between tensor-parallel regions, on this rank."""
        return self.shape.hidden_size // (self.layout.tp if self.layout.sequence_parallel else 1)

    @property
    def local_tokens(self) -> int:
        """Tokens that this rank attends from: context parallelism splits every sequence."""
        return -(-self.tokens // self.layout.cp)

    @property
    def queries(self) -> int:
        """Width of the queries."""
        return self.shape.num_heads * self.shape.head_dim // self.layout.tp

    @property
    def keys(self) -> int:
        """Width of the keys, and of the values."""
        return max(1, self.shape.num_kv_heads // self.layout.tp) * self.shape.head_dim

    @property
    def vocab(self) -> int:
        """Width of the logits."""
        return self.shape.padded_vocab(self.layout.tp) // self.layout.tp


def layer_bytes(p: Pass, layer: int, *, selective: bool = False) -> int:
    """Return the bytes that one layer keeps. selective: the attention core is computed again."""
    per_token = 2 * _norm_bytes(p, p.hidden, 1) + _attention_bytes(p, selective)
    if p.shape.has_experts(layer):
        return p.local_tokens * per_token + _experts_bytes(p)
    return p.local_tokens * (per_token + _mlp_bytes(p, p.hidden, p.shape.ffn_size // p.layout.tp))


def _norm_bytes(p: Pass, width: int, num_scales: int) -> int:
    """Return the bytes that RMSNorm keeps of a token: input and scale; unfused, all in float32, its output too."""
    if p.fused:
        return p.dtype_bytes * width + _FP32 * num_scales
    return _FP32 * (2 * width + num_scales)


def _attention_bytes(p: Pass, selective: bool) -> int:
    b, q, kv = p.dtype_bytes, p.queries, p.keys
    heads, kv_heads = q // p.shape.head_dim, kv // p.shape.head_dim
    kept = b * p.hidden  # input of the projection to queries, keys and values
    mixed = b * (q + 2 * kv)  # its output; whoever keeps a part of it keeps it whole
    rope = 4 * b * p.shape.head_dim  # sine and cosine, of queries and of keys
    keeps_mixed = p.fused or selective
    if p.shape.qk_norm:
        kept += _norm_bytes(p, q, heads)
        if p.fused or b == _FP32:  # the norm of the keys keeps its input, a part of the mixed output
            kept += _norm_bytes(p, kv, kv_heads) - b * kv
            keeps_mixed = True
        else:
            kept += _norm_bytes(p, kv, kv_heads)
    if keeps_mixed:
        kept += mixed
    kept += rope
    if p.fused:
        core = b * (q + kv) + _FP32 * heads  # rotated queries and keys; values are part of the mixed output
        return kept + b * q + core
    if selective:
        return kept + b * (q + kv) + b * q
    gathered = b * (q + 2 * kv) + b * q + _FP32 * heads + _INT64  # by sequences of one length: q, k, v, output
    return kept + gathered + b * q


def _mlp_bytes(p: Pass, hidden: int, ffn: int) -> int:
    """Return the bytes that a gated feed-forward network of ``ffn`` columns on this rank keeps of a token."""
    halves = 2 * ffn
    activation = 0 if p.fused else 2 * ffn  # silu of one half, and the other half with megatron's offset of zero
    return p.dtype_bytes * (hidden + halves + activation + ffn)


def _experts_bytes(p: Pass) -> int:
    """Return the bytes that router, dispatch, experts and combination keep, tokens being spread evenly."""
    shape, b = p.shape, p.dtype_bytes
    tokens = p.local_tokens // (p.layout.tp if p.layout.sequence_parallel else 1)
    routed = tokens * shape.experts_per_token
    gathered = routed * p.layout.expert_tp
    hidden, ffn = shape.hidden_size, shape.expert_ffn_size // p.layout.expert_tp
    chosen = shape.experts_per_token * (_INT64 + _FP32) + shape.num_experts * (1 + _FP32)
    router = tokens * (b * hidden + chosen) + routed * _INT64
    experts = gathered * (_mlp_bytes(p, hidden, ffn) + b * ffn + _FP32)  # weighted by the router before the last matrix
    shared = 0
    if shape.shared_expert_ffn_size:
        shared = p.local_tokens * _mlp_bytes(p, p.hidden, shape.shared_expert_ffn_size // p.layout.tp)
    return router + experts + shared


def chunk_bytes(p: Pass, stage: int, chunk: int, recompute: RecomputeConfig | None = None) -> int:
    """Return the bytes that model chunk ``chunk`` of pipeline stage ``stage`` keeps of one micro-batch.

    The first chunk of the first stage has the embedding, the last one of the last stage the head and the log-probs.
    Any other has sent its output to the next stage, and Megatron keeps it until the backward pass.
    """
    layers = layers_of_chunks(p.shape.num_layers, p.layout, stage)[chunk]
    if recompute is not None and recompute.granularity == "full":
        again = _computed_again(layers, recompute)
        kept = len(again) * _hidden_bytes(p) + sum(layer_bytes(p, i) for i in layers[sum(map(len, again)) :])
    else:
        selective = recompute is not None and recompute.granularity == "selective"
        kept = sum(layer_bytes(p, i, selective=selective) for i in layers)
    if stage == 0 and chunk == 0:
        kept += p.local_tokens * 2 * _INT64
    return kept + (_head_of(p, stage, chunk) or _hidden_bytes(p))


def _computed_again(layers: range, recompute: RecomputeConfig) -> list[range]:
    """Return the first of ``layers`` in the groups that are computed again from what goes into them."""
    assert recompute.num_layers is not None
    if recompute.method == "block":
        return [layers[i : i + 1] for i in range(min(recompute.num_layers, len(layers)))]
    return [layers[i : i + recompute.num_layers] for i in range(0, len(layers), recompute.num_layers)]


def _hidden_bytes(p: Pass) -> int:
    """Return the bytes of what passes from layer to layer."""
    return p.local_tokens * p.dtype_bytes * p.hidden


def _head_of(p: Pass, stage: int, chunk: int) -> int:
    """Return the bytes that a chunk keeps after its layers: 0 but in the last one of the last stage."""
    return head_bytes(p) if stage == p.layout.pp - 1 and chunk == p.layout.vpp - 1 else 0


def head_bytes(p: Pass) -> int:
    """Return the bytes that the last norm, the output layer and the log-probs keep."""
    norm, b = _norm_bytes(p, p.hidden, 1), p.dtype_bytes
    if p.shape.value_head:
        return p.local_tokens * (norm + b * p.hidden + b)
    log_probs = 2 * _INT64 + 5 * _FP32
    if p.fused_head:  # it keeps its hidden states gathered
        return p.local_tokens * (norm + b * p.shape.hidden_size + log_probs)
    return p.local_tokens * (norm + b * p.hidden + b * p.vocab + log_probs)


def recomputed_bytes(p: Pass, stage: int, chunk: int, recompute: RecomputeConfig | None) -> int:
    """Return the most bytes by which recomputation in the backward pass of a chunk exceeds those that it kept.

    It goes through the head and the layers from the end, and what it has passed is gone.
    """
    if recompute is None or recompute.granularity is None:
        return 0
    gone, most = _head_of(p, stage, chunk), 0
    if recompute.granularity == "selective":
        return max(0, p.local_tokens * (_attention_bytes(p, False) - _attention_bytes(p, True)) - gone)
    layers = layers_of_chunks(p.shape.num_layers, p.layout, stage)[chunk]
    again = _computed_again(layers, recompute)
    gone += sum(layer_bytes(p, i) for i in layers[sum(map(len, again)) :])
    shared = _hidden_bytes(p) if p.fused or p.dtype_bytes == _FP32 else 0  # the first norm keeps what was kept anyway
    for group in reversed(again):
        most = max(most, sum(layer_bytes(p, i) for i in group) - shared - gone)
        gone += _hidden_bytes(p)
    return most
