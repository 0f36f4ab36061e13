"""How tests start processes of their own: forked from a server that has imported torch and nothing else."""

from __future__ import annotations

import multiprocessing

# A rank starts in the time that its other imports take, and inherits neither the state nor the threads of pytest.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch"])
