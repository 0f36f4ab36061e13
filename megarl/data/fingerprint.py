"""What a run trains on, in a line that differs where any row does."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence


def fingerprint(rows: Iterable[tuple[Sequence[int], str]]) -> str:
    """Return the number of rows and a hash of all, in order. rows: the tokens of each, and what else there is of it."""
    digest, count = hashlib.sha256(), 0
    for token_ids, rest in rows:
        for part in (array("q", token_ids).tobytes(), rest.encode("utf-8", "backslashreplace")):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        count += 1
    return f"{count:,} rows with SHA-256 {digest.hexdigest()[:16]}"
