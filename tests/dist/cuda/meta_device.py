"""The cuda branches without a GPU: torch says that there is one, and what would be on it is on ``meta``.

There tensors have a shape and no values. An operation that mixes them with tensors of the host raises, as on a GPU.
What the host reads of them is made up, and counted: on a GPU it would wait for the device there.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

META = torch.device("meta")
_IS_CUDA = Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_TYPES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


class _Idle:
    """A stream or an event: there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self

    def __enter__(self) -> _Idle:
        return self

    def __exit__(self, *_: Any) -> bool:
        return False


def say_there_is_a_gpu() -> None:
    """Have torch.cuda answer for a device, in this process for good. Call before the platform is installed."""
    cuda = torch.cuda
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="H100")
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": False,
        "current_device": META,
        "device_count": 8,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "get_device_name": "H100",
        "is_current_stream_capturing": False,
        **dict.fromkeys(("_lazy_init", "_lazy_call", "set_device", "synchronize", "empty_cache", "manual_seed"), None),
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.get_rng_state = lambda *_, **__: torch.zeros(16, dtype=torch.uint8)  # type: ignore[assignment]
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        setattr(cuda.random, name, getattr(cuda, name))
    cuda.current_stream = lambda *_: _Idle()  # type: ignore[assignment]
    cuda.Stream = cuda.Event = _Idle  # type: ignore[assignment,misc]
    cuda.stream = lambda *_: contextlib.nullcontext()  # type: ignore[assignment]
    cuda.default_generators = (torch.Generator(),) * 8
    torch.nn.Module.to = torch.nn.Module.cuda = _module_to  # type: ignore[assignment,method-assign]
    torch.nn.Module.bfloat16 = lambda self: _module_to(self, torch.bfloat16)  # type: ignore[method-assign]


def _module_to(module: torch.nn.Module, *args: Any, **_: Any) -> torch.nn.Module:
    """Move a module's parameters to ``meta``, and keep what Megatron has marked on them."""
    dtypes = [arg for arg in args if isinstance(arg, torch.dtype)]
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                dtype = dtypes[0] if dtypes else parameter.dtype
                moved = torch.nn.Parameter(torch.empty_like(parameter, dtype=dtype, device=META))
                moved.__dict__.update(parameter.__dict__)
                part._parameters[name] = moved
    return module


@contextmanager
def on_meta() -> Iterator[Counter[str]]:
    """Have what would be on the GPU be on ``meta``; yield how often the host has read it, by the way."""
    reads: Counter[str] = Counter()
    with _OnMeta(reads):
        yield reads


class _OnMeta(TorchFunctionMode):
    def __init__(self, reads: Counter[str]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = _mapped(kwargs["device"])
        kwargs.pop("pin_memory", None)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        is_meta = first is not None and _is_meta(first)
        if name == "__get__" and function == _IS_CUDA and is_meta:
            return True
        if name == "cuda" and first is not None:
            return first.to(META)
        if name == "copy_" and not is_meta and _is_meta(args[1]):
            self.reads[name] += not kwargs.get("non_blocking", False)
            return first.fill_(1)  # type: ignore[union-attr]
        if name == "tensor":
            args = (self._read_within(args[0]), *args[1:])
        if name == "to":
            args = tuple(_mapped(arg) if isinstance(arg, torch.device | str) else arg for arg in args)
            is_read = is_meta and any(isinstance(arg, torch.device) and arg.type == "cpu" for arg in args)
        else:
            is_read = is_meta and name == "cpu"
        if is_read:
            self.reads[name] += 1
            return torch.ones(first.shape, dtype=first.dtype)  # type: ignore[union-attr]
        if is_meta and name in _MADE_UP:
            self.reads[name] += 1
            return _MADE_UP[name](first)
        if is_meta and name == "type" and len(args) == 1 and not kwargs:
            return _TYPES.get(first.dtype, "torch.cuda.Tensor")  # type: ignore[union-attr]
        return function(*args, **kwargs)

    def _read_within(self, values: Any) -> Any:
        """Return nested lists with made-up numbers for tensors."""
        if isinstance(values, list | tuple):
            return [self._read_within(value) for value in values]
        if isinstance(values, Tensor) and _is_meta(values):
            self.reads["tensor"] += 1
            return 1.0
        return values


_MADE_UP: dict[str, Any] = {
    "__bool__": lambda tensor: True,
    "__float__": lambda tensor: 1.0,
    "__int__": lambda tensor: 1,
    "__index__": lambda tensor: 1,
    "item": lambda tensor: 1.0 if tensor.is_floating_point() else 1,
    "tolist": lambda tensor: torch.ones(tensor.shape, dtype=tensor.dtype).tolist(),
}


def _is_meta(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return tensor.device.type == "meta"


def _mapped(device: Any) -> Any:
    if isinstance(device, int) or str(device).startswith("cuda"):
        return META
    return torch.device(device) if isinstance(device, str) else device
