"""The main module of SGLang's own environment: an engine's process, and what SGLang starts from it.

SGLang's processes import the main module again, so that all of them are accommodated before they import SGLang.
"""

from __future__ import annotations

import sys

from megarl.parallel.environment import apply_environment, platform_name
from megarl.ranks.engine_process import main
from megarl.rollout.sglang_imports import accommodate

accommodate(on_cpu=platform_name() == "cpu")

if __name__ == "__main__":
    apply_environment()
    main(int(sys.argv[2]), int(sys.argv[1]))
