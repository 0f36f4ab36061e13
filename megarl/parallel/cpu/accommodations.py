"""What Megatron, and torch under it, need on CPU beyond a remapped device. A function each, with the reason.

Each takes a Megatron module that has just been imported and adjusts it in place. Each has a guard test that fails
when Megatron no longer needs it, and when it no longer helps: tests/dist/test_platform_guards.py.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Collection
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
from torch.distributed import ProcessGroup, distributed_c10d

from megarl.parallel.cpu.torch_view import TorchView

_TORCH_VIEW = TorchView()


def torch_view(module: ModuleType) -> None:
    """Let the module see ``torch_view`` as torch: Megatron writes device="cuda" and torch.cuda in some 150 places."""
    if getattr(module, "torch", None) is torch:
        vars(module)["torch"] = _TORCH_VIEW


def rng_states(random: Any) -> None:
    """Set RNG states at once: Megatron does it through ``_lazy_call``, which waits for CUDA to start: here forever."""

    def call(function: Callable[[], None], **kwargs: object) -> None:
        function()

    random._lazy_call = call
    # fork() warns when the CPU's generator moves inside it. Here that is the device's generator and has to move.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def no_jit(jit: Any) -> None:
    """Leave fused functions eager: torch.compile would run a C++ compiler in every rank, for tiny elementwise ops."""
    jit.disable_jit_fuser()


def uneven_gather(mappings: Any) -> None:
    """Gather unequal shards padded to the largest: gloo's all_gather takes equal ones only (MoE with expert-TP)."""
    gather = mappings._gather_along_first_dim

    def padded_gather(
        input_: torch.Tensor,
        group: ProcessGroup,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)  # type: ignore[no-any-return]
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
        padded[: len(input_)] = input_
        shards = gather(padded, group).chunk(len(sizes)) if any(sizes) else [padded] * len(sizes)
        return torch.cat([shard[:size] for shard, size in zip(shards, sizes, strict=True)])

    mappings._gather_along_first_dim = padded_gather


def moe_split_sizes(moe_utils: Any) -> None:
    """Make split sizes numpy arrays, as all_to_all_single needs: Megatron converts them only coming from a GPU."""
    move = moe_utils.maybe_move_tensor_to_cpu

    def move_and_convert(tensor: torch.Tensor, as_numpy: bool = False, record_stream: bool = False) -> object:
        moved = move(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and isinstance(moved, torch.Tensor) else moved

    moe_utils.maybe_move_tensor_to_cpu = move_and_convert


def tensor_cuda() -> None:
    """Make ``Tensor.cuda()`` the identity for Megatron, which calls it on tensors that are already on its device."""
    cuda = torch.Tensor.cuda

    def cuda_or_same(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_by_megatron() else cuda(self, *args, **kwargs)

    torch.Tensor.cuda = cuda_or_same  # type: ignore[assignment]


def tensor_type() -> None:
    """Answer 'torch.cuda.FloatTensor' to Megatron: its optimizers compare ``Tensor.type()`` with such strings."""
    type_ = torch.Tensor.type

    def type_for_megatron(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_(self, *args, **kwargs)
        if isinstance(answer, str) and _called_by_megatron():
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_for_megatron  # type: ignore[assignment]


def one_gloo_device() -> None:
    """Let all groups of a process share one event loop: else each of some fifty has a thread that polls every 10 ms."""
    gloo: Any = distributed_c10d.ProcessGroupGloo
    devices: list[Any] = []

    class SharedDeviceGloo(gloo):
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            if not devices:
                devices.append(gloo.create_default_device())
            options = gloo._Options()
            options._devices, options._timeout, options._threads = devices, timeout, 1
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = SharedDeviceGloo  # type: ignore[misc]


def quiet_warnings() -> None:
    """Silence what Megatron warns of in every run on CPU and nobody can act on."""
    # CPU has no Apex and no Transformer Engine to install.
    warnings.filterwarnings("ignore", r"(Transformer Engine and )?Apex (is|are) not installed. Falling back")
    # Megatron imports its own old names, calls torch's, and looks at the gradient of a view.
    warnings.filterwarnings("ignore", "The 'megatron.core.transformer.custom_layers.transformer_engine'")
    warnings.filterwarnings("ignore", "The following imports from `dynamic_context.py` will be removed")
    warnings.filterwarnings("ignore", "`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated")
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", module=r"megatron\.core\.")


def _called_by_megatron() -> bool:
    # Frame 0 is this function, 1 the replaced method, 2 its caller.
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("megatron.core")


_EVERY_MODULE = (torch_view,)
_ONE_MODULE: dict[str, tuple[Callable[[Any], None], ...]] = {
    "megatron.core.jit": (no_jit,),
    "megatron.core.tensor_parallel.mappings": (uneven_gather,),
    "megatron.core.tensor_parallel.random": (rng_states,),
    "megatron.core.transformer.moe.moe_utils": (moe_split_sizes,),
}
_TORCH = (tensor_cuda, tensor_type, one_gloo_device)
_BEFORE_IMPORT = (quiet_warnings,)

NAMES = frozenset(f.__name__ for fs in (_BEFORE_IMPORT, _EVERY_MODULE, _TORCH, *_ONE_MODULE.values()) for f in fs)


def accommodate_torch(without: Collection[str]) -> None:
    """Apply what concerns torch itself, once a process."""
    for apply in _TORCH:
        if apply.__name__ not in without:
            apply()


def accommodate_import(without: Collection[str]) -> None:
    """Apply what has to be there while a Megatron module is imported. Repeated, since pytest resets the filters."""
    for apply in _BEFORE_IMPORT:
        if apply.__name__ not in without:
            apply()


def accommodate_module(module: ModuleType, without: Collection[str]) -> None:
    """Apply what concerns this Megatron module, right after its import."""
    for apply in (*_EVERY_MODULE, *_ONE_MODULE.get(module.__name__, ())):
        if apply.__name__ not in without:
            apply(module)
