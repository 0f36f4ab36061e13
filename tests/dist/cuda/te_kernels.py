"""Transformer Engine's own Python on CPU: what it calls of its compiled part is written here in plain torch.

Everything else of the compiled part can be named, which its modules do while they are imported, but not called.
Shape suffixes: T packed tokens, N heads, D head size.
"""

from __future__ import annotations

import enum
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.parallel.cpu.torch_view import TorchView

CALLS: dict[str, int] = {}
"""How often each emulated kernel was called."""

_EXTENSION = "transformer_engine_torch"
# Compilers and formats that Transformer Engine imports and that nothing here calls.
_ABSENT = ("onnx", "onnxscript", "triton")
_ENUMS = {
    "FP8FwdTensors": [f"GEMM{i}_{what}" for i in (1, 2, 3) for what in ("INPUT", "WEIGHT", "OUTPUT")],
    "FP8BwdTensors": [f"{what}{i}" for i in (1, 2, 3) for what in ("GRAD_OUTPUT", "GRAD_INPUT")],
    "Float8BlockScaleTensorFormat": ["GEMM_READY", "COMPACT"],
}
_BACKENDS = ["NVTE_No_Backend", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8"]


class DType(enum.IntEnum):
    """Transformer Engine's data types, by its own numbers."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


_DTYPES = {DType.kFloat32: torch.float32, DType.kFloat16: torch.float16, DType.kBFloat16: torch.bfloat16}


class _Named:
    """Something that has a name and a number. As a decorator it leaves a function as it is."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _Named:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _Named(f"{self._name}.{name}")
        setattr(self, name, found)
        return found

    def __int__(self) -> int:
        return zlib.crc32(self._name.encode())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._name.startswith(_EXTENSION):
            raise NotImplementedError(f"{self._name} is not emulated")
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self


class _Module(ModuleType):
    __version__ = "3.0.0"

    def __getattr__(self, name: str) -> _Named:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _Named(f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found


class _Finder:
    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in _ABSENT else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def import_transformer_engine(folder: Path) -> None:
    """Import the release in ``folder``. Call before Megatron is imported."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it looks for no libraries then
    sys.path.insert(0, str(folder))
    sys.meta_path.append(_Finder())  # type: ignore[arg-type]
    extension = _Module(_EXTENSION)
    has_oldest_attention = "F16_max512_seqlen" in (
        folder / "transformer_engine/pytorch/cpp_extensions/fused_attn.py"
    ).read_text(encoding="utf-8")
    backends = [*_BACKENDS, "NVTE_F16_max512_seqlen"] if has_oldest_attention else _BACKENDS
    for name, members in {**_ENUMS, "NVTE_Fused_Attn_Backend": backends}.items():
        setattr(extension, name, enum.IntEnum(name, {member: i for i, member in enumerate(members)}))
    for kernel in _KERNELS:
        setattr(extension, kernel.__name__, _counted(kernel))
    extension.DType = DType
    backend = extension.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen  # type: ignore[attr-defined]
    extension.get_fused_attn_backend = lambda *args: (backend, "") if len(args) == 1 else backend
    extension.get_cudnn_version = lambda: 92000
    extension.get_cublasLt_version = lambda: 130000
    extension.get_num_cublas_streams = lambda: 4
    # Some modules import all names of the compiled part, so that each has to be there.
    for source in (folder / "transformer_engine/pytorch").rglob("*.py"):
        for name in re.findall(r"\btex\.([a-zA-Z]\w*)", source.read_text(encoding="utf-8")):
            getattr(extension, name)
    sys.modules[_EXTENSION] = extension
    apex = ModuleType("fused_weight_gradient_mlp_cuda")
    apex.wgrad_gemm_accum_fp32 = _counted(wgrad_gemm_accum_fp32)  # type: ignore[attr-defined]
    sys.modules[apex.__name__] = apex
    import transformer_engine.common as common

    common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch  # noqa: F401

    view = _EmulatedTorch()
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine") and vars(module).get("torch") is torch:
            vars(module)["torch"] = view


class _EmulatedTorch(TorchView):
    """torch as it is to Transformer Engine: the device is the CPU, which says that it is an H100."""

    def __init__(self) -> None:
        super().__init__()
        self.cuda.is_available = lambda: True
        self.cuda.get_device_capability = lambda *_: (9, 0)
        self.cuda.get_device_properties = lambda *_: SimpleNamespace(
            major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="H100"
        )
        self.cuda.is_current_stream_capturing = lambda: False


@contextmanager
def seen_as_cuda(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Have torch say that there is a GPU and that tensors are on it, for the duration."""
    available, is_cuda, get_capability = torch.cuda.is_available, torch.Tensor.is_cuda, torch.cuda.get_device_capability
    torch.cuda.is_available, torch.cuda.get_device_capability = lambda: True, lambda device=None: capability
    cuda = torch.Tensor.cuda
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = cuda  # type: ignore[method-assign]
        torch.cuda.is_available, torch.cuda.get_device_capability = available, get_capability
        torch.Tensor.is_cuda = is_cuda  # type: ignore[method-assign]


def _counted(kernel: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLS[kernel.__name__] = CALLS.get(kernel.__name__, 0) + 1
        with torch.no_grad():
            return kernel(*args, **kwargs)

    return call


def rmsnorm_fwd(x: Tensor, weight: Tensor, eps: float, out: Tensor | None, *rest: Any) -> tuple[Tensor, None, Tensor]:
    """Return the normalised activations, no mean, and the reciprocal root mean square of each row."""
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (x.float() * scale * weight.float()).to(x.dtype), None, scale.squeeze(-1)


def rmsnorm_bwd(grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Return the gradients of activations and weight. With y = x s w and g = grad w: s g - x s^3 mean(g x)."""
    x_, grad_, s = x.float(), grad.float().view_as(x), scale.unsqueeze(-1)
    weighted = grad_ * weight.float()
    of_x = s * weighted - x_ * s**3 * (weighted * x_).mean(-1, keepdim=True)
    return of_x.to(x.dtype), (grad_ * x_ * s).flatten(0, -2).sum(0).to(weight.dtype)


def generic_gemm(
    a: Tensor,
    transpose_a: bool,
    b: Tensor,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    dtype: DType | None,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    *rest: Any,
    **more: Any,
) -> tuple[Tensor, Tensor | None, None, None]:
    """Return b a^T, b a or b^T a, of which the first two have the leading dims of b, and the bias's gradient."""
    assert not gelu
    product = _product(a.flatten(0, -2), transpose_a, b.flatten(0, -2), transpose_b)
    bias_grad = None
    if bias is not None and grad:
        bias_grad = b.flatten(0, -2).float().sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias.float()
    target = out.dtype if out is not None else a.dtype if dtype is None else _DTYPES[DType(int(dtype))]
    result = product.to(target)
    if not transpose_b:
        result = result.view(*b.shape[:-1], result.shape[-1])
    if out is not None:
        result = out.add_(result.view_as(out)) if accumulate else out.copy_(result.view_as(out))
    return result, bias_grad, None, None


def te_general_grouped_gemm(
    a: Sequence[Tensor],
    transpose_a: bool,
    b: Sequence[Tensor],
    transpose_b: bool,
    out: Sequence[Tensor],
    dtype: Any,
    splits: Any,
    bias: Any,
    bias_dtype: Any,
    single_output: bool,
    gelu: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    *rest: Any,
) -> list[None]:
    """Write the products of as many pairs, end to end into one tensor or each into its own."""
    start = 0
    for i, (one, other) in enumerate(zip(a, b, strict=True)):
        product = _product(one, transpose_a, other, transpose_b)
        if single_output:
            out[0][start : start + len(product)].copy_(product)
            start += len(product)
        elif accumulate:
            out[i].add_(product.view_as(out[i]))
        else:
            out[i].copy_(product.view_as(out[i]))
    return [None] * len(a)


def wgrad_gemm_accum_fp32(x: Tensor, grad: Tensor, main_grad: Tensor) -> None:
    """Add a weight's gradient to what is there in float32, as Apex's kernel does for Megatron's own linear layers."""
    main_grad.add_(grad.flatten(0, -2).float().T @ x.flatten(0, -2).float())


def _product(a: Tensor, transpose_a: bool, b: Tensor, transpose_b: bool) -> Tensor:
    assert not (transpose_a and transpose_b)
    return (b.T if transpose_b else b).float() @ (a.T if transpose_a else a).float()


def fused_attn_fwd(*args: Any) -> list[Tensor]:
    """Return causal attention of queries and what the backward pass wants of it, which is nothing here."""
    bounds, (q, k, v), scale = _of_attention(args, 3)
    return [_attend(q, k, v, bounds, scale).to(q.dtype), torch.zeros(1), torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(*args: Any) -> list[Tensor | None]:
    """Return the gradients of queries, keys and values, and None for what else there may be."""
    bounds, (q, k, v, _, grad), scale = _of_attention(args, 5)
    with torch.enable_grad():
        leaves = [t.detach().float().requires_grad_() for t in (q, k, v)]
        attended = _attend(*leaves, bounds, scale)
        grads = torch.autograd.grad(attended, leaves, grad.float().view_as(attended))
    return [*(g.to(q.dtype) for g in grads), *[None] * 6]


def _of_attention(args: Sequence[Any], count: int) -> tuple[list[int], list[Tensor], float]:
    """Return the bounds of sequences, the first ``count`` tensors of heads, and the scale, wherever a release has them.

    The largest of the floats: the other is the dropout.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    bounds = next(t for t in tensors if t.dtype == torch.int32)
    heads = [t for t in tensors if t.is_floating_point() and t.dim() >= 2]
    return bounds.tolist(), heads[:count], max(arg for arg in args if isinstance(arg, float))


def _attend(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], scale: float) -> Tensor:
    """Attend within packed sequences [T, N, D], or padded ones of one length each, [S, B, N, D]."""
    if q.dim() == 4:
        q, k, v = (t.float().permute(1, 2, 0, 3) for t in (q, k, v))
        return _causal(q, k, v, scale).permute(2, 0, 1, 3)
    outs = []
    for start, stop in pairwise(bounds):
        parts = (t[start:stop].float().transpose(0, 1)[None] for t in (q, k, v))
        outs.append(_causal(*parts, scale)[0].transpose(0, 1))
    return torch.cat(outs)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def fused_rope_forward(t: Tensor, freqs: Tensor, *args: Any) -> Tensor:
    """Return packed or padded heads, rotated."""
    return _rotate(t, freqs, *args, sign=1.0)


def fused_rope_backward(grad: Tensor, freqs: Tensor, *args: Any) -> Tensor:
    """Return the gradient rotated back."""
    return _rotate(grad, freqs, *args, sign=-1.0)


def _rotate(
    t: Tensor,
    freqs: Tensor,
    starts: Any,
    form: Any,
    interleaved: bool,
    bounds: Tensor | None,
    cp: int,
    cp_rank: int,
    *,
    sign: float,
) -> Tensor:
    """Rotate in float32. Packed [T, N, D], where a context rank has two parts of every sequence; else [S, B, N, D]."""
    assert not interleaved
    if bounds is None:
        assert cp == 1
        angles = freqs[: len(t)]
    else:
        angles = []
        for length in bounds.diff().tolist():
            part = length // (2 * cp) if cp > 1 else length
            places = [cp_rank, 2 * cp - cp_rank - 1] if cp > 1 else [0]
            angles += [freqs[place * part : (place + 1) * part, 0] for place in places]
        angles = torch.cat(angles)
    x, turned = t.float(), torch.cat([-t.float()[..., t.shape[-1] // 2 :], t.float()[..., : t.shape[-1] // 2]], -1)
    return (x * angles.cos() + sign * turned * angles.sin()).to(t.dtype)


def multi_tensor_l2norm(
    chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool
) -> tuple[Tensor, Tensor]:
    """Return the norm over all tensors, and those of each."""
    norms = torch.stack([t.float().norm() for t in lists[0]])
    return norms.norm().view(1), norms


def multi_tensor_scale(chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], scale: float) -> None:
    """Write scaled tensors."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_adam(
    chunk: int,
    overflow: Tensor,
    lists: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Take a step of AdamW (arXiv:1711.05101) on gradients, parameters and both moments."""
    assert decoupled and bias_correction
    for grad, parameter, first, second in zip(*lists, strict=True):
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + eps)
        parameter.sub_(lr * (update + weight_decay * parameter))


_KERNELS = (
    *(rmsnorm_fwd, rmsnorm_bwd, generic_gemm, te_general_grouped_gemm, fused_attn_fwd, fused_attn_bwd),
    *(fused_rope_forward, fused_rope_backward, multi_tensor_l2norm, multi_tensor_scale, multi_tensor_adam),
)
