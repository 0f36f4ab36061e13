"""``torch`` as Megatron sees it on CPU: where it says "cuda", the tensor is made on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import torch

from megarl.parallel.cpu.cuda_view import CudaView

_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint", "randn"),
    *("randperm", "tensor", "tril_indices", "triu_indices", "zeros"),
    *("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like"),
)


class TorchView(ModuleType):
    """Remap the device in tensor factories and in ``torch.cuda``; everything else is the real torch."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = CudaView()
        self.autocast = _autocast
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)  # pinned memory is for copies to a GPU, and needs one
        return factory(*args, **kwargs)

    return make


def _autocast(device_type: str, **kwargs: Any) -> torch.autocast:
    return torch.autocast("cpu" if device_type == "cuda" else device_type, **kwargs)
