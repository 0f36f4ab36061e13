"""What vLLM's attention serves, so that a model that it can't is refused before anything starts.

From vLLM 0.30.0: CPUAttentionBackend.get_supported_head_sizes in vllm/v1/attention/backends/cpu_attn.py; on CUDA
supports_head_size of FLASH_ATTN (flash_attn.py) and TRITON_ATTN (triton_attn.py), which the selector tries in turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from megarl.parallel.environment import PlatformName

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
_FLASH_MULTIPLE, _TRITON_LEAST = 8, 32
VLLM_HEAD_SIZES: Mapping[PlatformName, str] = MappingProxyType(
    {
        "cpu": ", ".join(map(str, CPU_HEAD_SIZES)),
        "cuda": f"multiples of {_FLASH_MULTIPLE}, and all from {_TRITON_LEAST}",
    }
)


def vllm_serves(head_dim: int, platform: PlatformName) -> bool:
    """Return True for a size of heads that vLLM has attention for."""
    if platform == "cpu":
        return head_dim in CPU_HEAD_SIZES
    return head_dim % _FLASH_MULTIPLE == 0 or head_dim >= _TRITON_LEAST
