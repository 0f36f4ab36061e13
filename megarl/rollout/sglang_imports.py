"""What is amended of SGLang as it is imported, above all to run from its wheels without CUDA, and why. For 0.5.23.

Its kernels come as CUDA builds alone. Without them every operator of a text model goes to plain torch, but for the
names that are imported beside it. Import this module first in every process of SGLang's, then call ``accommodate``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

_KERNELS = "sgl_kernel"
# torchvision's wheel is a CUDA build whose operators can't load beside a CPU torch; its import then fails at describing
# them. SGLang reads constants and transforms for images from it.
_TORCHVISION_DESCRIBES = "torchvision._meta_registrations"
_TORCHVISION_OPERATORS = (
    *("roi_align", "_roi_align_backward", "ps_roi_align", "_ps_roi_align_backward", "roi_pool", "_roi_pool_backward"),
    *("ps_roi_pool", "_ps_roi_pool_backward", "nms", "qnms", "qroi_align", "deform_conv2d", "_deform_conv2d_backward"),
)


class _Absent:
    """A name of a kernel that isn't there: may be stored and compared, not called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> _Absent:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return _Absent(f"{self._name}.{attribute}")

    def __call__(self, *arguments: object, **named: object) -> object:
        raise NotImplementedError(f"{self._name} has no build for CPU")


class _AbsentKernels(Loader):
    """Makes a module of kernels that all are absent."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Have an empty module made."""

    def exec_module(self, module: ModuleType) -> None:
        """Give it every name that it is asked for."""

        def absent(name: str) -> _Absent:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Absent(f"{module.__name__}.{name}")

        module.__getattr__ = absent  # type: ignore[method-assign]


class _Accommodations(MetaPathFinder):
    """Finds absent kernels, and amends modules of SGLang's as they are imported."""

    libraries: ClassVar[list[Any]] = []  # operators are there as long as their library

    def __init__(self, *, on_cpu: bool) -> None:
        self._on_cpu = on_cpu
        self._amended = _EVERYWHERE | (_ON_CPU if on_cpu else {})

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module that is to be another, None of all others."""
        if self._on_cpu and fullname.partition(".")[0] == _KERNELS:
            return ModuleSpec(fullname, _AbsentKernels(), is_package=True)
        if self._on_cpu and fullname == _TORCHVISION_DESCRIBES and not self.libraries:
            self.libraries.append(_torchvision_operators())
        amend = self._amended.get(fullname)
        spec = PathFinder.find_spec(fullname, path, target) if amend else None
        if amend is None or spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_amend(module: ModuleType) -> None:
            run(module)
            amend(module)

        spec.loader.exec_module = run_and_amend  # type: ignore[method-assign]
        return spec


def accommodate(*, on_cpu: bool) -> None:
    """Install the accommodations in this process, once."""
    if not any(isinstance(finder, _Accommodations) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Accommodations(on_cpu=on_cpu))


def _keep_with_the_engine(module: ModuleType) -> None:
    """What ranks tell of their load is in a file of the engine's temporary folder, and goes with that.

    In /dev/shm it would stay where an engine is killed while it starts.
    """
    module.shm_path_for = lambda name: str(Path(tempfile.gettempdir(), f"sglang_loads_{Path(name).name}"))  # type: ignore[attr-defined]


def _torchvision_operators() -> Any:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in _TORCHVISION_OPERATORS:
        library.define(f"{name}(Tensor x) -> Tensor")
    return library


def _allow_seeds(module: ModuleType) -> None:
    """Seeds of requests count under deterministic inference alone, which refuses this attention by its name."""
    module.DETERMINISTIC_ATTENTION_BACKEND_CHOICES.append("torch_native")


def _leave_products(module: ModuleType) -> None:
    """Deterministic inference would put Triton's products in the place of torch's."""
    module.enable_batch_invariant_mode = lambda *_, **__: None  # type: ignore[attr-defined]


def _pin_nothing(module: ModuleType) -> None:
    """A buffer in host memory would be pinned for CUDA."""
    module._cuda_host_register = lambda *_, **__: None  # type: ignore[attr-defined]


def _hash_seeds(module: ModuleType) -> None:
    """Give the sampler its hash of seed, position and token, which is a kernel elsewhere: any good one does."""
    import torch

    library = torch.library.Library(_KERNELS, "FRAGMENT")
    library.define("murmur_hash32_cpu(Tensor seed, Tensor position, Tensor column) -> Tensor")
    library.impl("murmur_hash32_cpu", _hash32, "CPU")
    _Accommodations.libraries.append(library)


def _hash32(seed: Any, position: Any, column: Any) -> Any:
    """Return 32 random bits a row and column, int64. Of splitmix64 (Steele et al., 2014)."""
    import torch

    row = _mixed(_mixed(seed.to(torch.int64)) + position.to(torch.int64))
    return (_mixed(row[:, None] + column.to(torch.int64)[None] * -0x61C8864680B583EB) >> 32) & 0xFFFFFFFF


def _mixed(x: Any) -> Any:
    """Return the finaliser of splitmix64 of int64s, which wrap around."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


_EVERYWHERE: dict[str, Callable[[ModuleType], None]] = {"sglang.srt.managers.load_snapshot": _keep_with_the_engine}
_ON_CPU: dict[str, Callable[[ModuleType], None]] = {
    "sglang.srt.arg_groups.choices": _allow_seeds,
    "sglang.srt.layers.sampler": _hash_seeds,
    "sglang.srt.batch_invariant_ops": _leave_products,
    "sglang.srt.batch_invariant_ops.batch_invariant_ops": _leave_products,
    "sglang.srt.mem_cache.pool_host.common": _pin_nothing,
}
