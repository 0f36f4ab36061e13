"""Imports what ranks with an engine need, for the server that they are forked from on CPU."""

from __future__ import annotations

import megarl.rollout.vllm_cpu
import megarl.verify.preload  # noqa: F401
