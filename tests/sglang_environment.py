"""The environment that SGLang is in: SGLANG_PYTHON names its interpreter, or ``make sglang`` made it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SGLANG = Path(os.environ.get("SGLANG_PYTHON", Path(__file__).parents[1] / ".venv-sglang/bin/python"))
needs_sglang = pytest.mark.skipif(not SGLANG.exists(), reason=f"SGLang isn't installed: {SGLANG} (make sglang)")
