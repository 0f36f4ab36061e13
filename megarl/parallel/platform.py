"""The one place that knows cpu from cuda.

On CUDA nothing is patched. On CPU, ``megarl.parallel.cpu`` makes the unmodified ``megatron.core`` run over gloo.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megarl.errors import ResourceError
from megarl.parallel.cpu.import_hook import accommodate_megatron
from megarl.parallel.cpu.products import use_products
from megarl.parallel.environment import OVERRIDE, PlatformName, platform_environment, platform_name, products_name


@dataclass(frozen=True)
class Platform:
    """What differs between running on CPU and on CUDA, and nothing else."""

    name: PlatformName

    @property
    def backend(self) -> str:
        """Return the backend of ``torch.distributed``: ``gloo`` or ``nccl``."""
        return "nccl" if self.name == "cuda" else "gloo"

    def device(self, local_rank: int) -> torch.device:
        """Return the device of the rank that is ``local_rank``-th on its host."""
        return torch.device("cuda", local_rank) if self.name == "cuda" else torch.device("cpu")

    def set_device(self, local_rank: int) -> None:
        """Make ``device(local_rank)`` the current one. Call before the first collective."""
        if self.name == "cuda":
            torch.cuda.set_device(local_rank)

    def synchronize(self) -> None:
        """Wait until the device has done its work. Only for timing: on CPU work is done when the call returns."""
        if self.name == "cuda":
            torch.cuda.synchronize()

    def agree_on_products(self) -> None:
        """Have all ranks multiply as the first one does, whatever processor theirs has. Collective; nothing on CUDA."""
        if self.name == "cpu":
            products = [products_name()]
            dist.broadcast_object_list(products)
            use_products(products[0])

    def environment(self) -> dict[str, str]:
        """Return the variables that processes of this platform need before they import torch or vLLM."""
        return platform_environment()


def install_platform(without: Collection[str] = ()) -> Platform:
    """Prepare this process for ``megatron.core``. Call before its first import; calling again changes nothing.

    without: names of accommodations to leave out, for the tests that prove each is needed.

    Raises ResourceError if CUDA was asked for or found, but torch can't use it, and RuntimeError if
    ``megatron.core`` was imported first.
    """
    name = platform_name()
    if name == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            f"the platform is cuda, but torch {torch.__version__} sees no usable GPU. Fix: install the [gpu] extra "
            f"and a matching driver, or run on CPU with {OVERRIDE}=cpu"
        )
    if name == "cpu":
        accommodate_megatron(without)
        use_products(products_name())
    return Platform(name)
