"""How tests start processes of their own: forked from a server that has imported what ranks need."""

from __future__ import annotations

import multiprocessing

# A rank starts at once, and inherits neither the state nor the threads of pytest.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["megarl.verify.preload", "tests.dist.parity"])

# What a process imports, and what of the platform comes before it, is its own affair.
FRESH = multiprocessing.get_context("spawn")
