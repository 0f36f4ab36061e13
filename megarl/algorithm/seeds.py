"""Seeds that follow from the run's own and from what they are for."""

from __future__ import annotations

import hashlib


def seed_of(run_seed: int, *parts: object) -> int:
    """Return a seed that follows from the run's and ``parts`` alone."""
    digest = hashlib.sha256(":".join(map(str, (run_seed, *parts))).encode()).digest()
    return int.from_bytes(digest[:6], "little")
