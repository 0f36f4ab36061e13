"""The platform, before any test module imports Megatron."""

from __future__ import annotations

from megarl.parallel.environment import apply_environment
from megarl.parallel.platform import install_platform

apply_environment()
install_platform()
