"""Imports of whole libraries, which make millions of objects that all stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Have Python's collector rest meanwhile, and never look at what is there by then again.

    It would go through all objects every time they have grown by a quarter: a sixth of what torch, Megatron and vLLM
    take to import. Frozen, they also cost the collections of a whole run nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
