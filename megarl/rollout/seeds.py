"""Seeds of an engine's samples."""

from __future__ import annotations

import hashlib


def sample_seed(seed: int, index: int) -> int:
    """Return the seed of sample ``index`` of a request: distinct in a group, unrelated between requests.

    Adding the index to the request's seed itself would give neighbouring requests the same noise. The hash is added
    to, not hashed with, the index, because torch's CPU generator keeps 32 bits only, where hashes may collide.
    """
    digest = hashlib.blake2b(seed.to_bytes(16, "little", signed=True), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 2) + index
