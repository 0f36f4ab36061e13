"""``python -m megarl.plan`` that says at its end what of the heavy packages it loaded."""

from __future__ import annotations

import atexit
import runpy
import sys

HEAVY = {"torch", "ray", "megatron", "vllm", "transformers"}

if __name__ == "__main__":
    atexit.register(lambda: print("loaded:", *sorted(HEAVY & set(sys.modules)), file=sys.stderr))
    runpy.run_module("megarl.plan", run_name="__main__", alter_sys=True)
