"""Imports what ranks need, for the server that they are forked from on CPU."""

from __future__ import annotations

from megarl.parallel.environment import apply_environment
from megarl.parallel.platform import install_platform

apply_environment()
install_platform()

import megarl.train.fsdp.backend  # noqa: E402
import megarl.train.megatron.backend  # noqa: E402, F401
