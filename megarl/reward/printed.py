"""What reward functions print, and the processes that they start."""

from __future__ import annotations

import os
from typing import BinaryIO

_READ_BYTES, _MAX_READS = 1 << 16, 64
_TAIL_CHARS = 2_000


class Printed:
    """A pipe that workers print to. The first ``limit_bytes`` are kept, what follows is read and dropped."""

    def __init__(self, limit_bytes: int) -> None:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        self.reader: BinaryIO = os.fdopen(reader, "rb", buffering=0)
        self.writer: BinaryIO = os.fdopen(writer, "wb", buffering=0)
        self._limit_bytes = self._left_bytes = limit_bytes
        self._kept = bytearray()

    def drain(self) -> None:
        """Read what is there, so that no worker waits for room."""
        for _ in range(_MAX_READS):
            found = self.reader.read(_READ_BYTES)
            if not found:
                return
            if self._left_bytes < 0:
                continue
            self._kept += found[: self._left_bytes]
            self._left_bytes -= len(found)
            if self._left_bytes < 0:
                self._kept += f"\n[more was printed: the first {self._limit_bytes:,} bytes are kept]\n".encode()

    def take(self) -> str:
        """Return what was printed since the last time."""
        self.drain()
        text = self._kept.decode("utf-8", "backslashreplace")
        self._kept.clear()
        return text

    def tail(self) -> str:
        """Return the end of what is kept, as an error shows it; empty where there is nothing."""
        self.drain()
        text = self._kept.decode("utf-8", "backslashreplace").strip()
        return f"\nit printed:\n{text[-_TAIL_CHARS:]}" if text else ""

    def close(self) -> None:
        """Close both ends."""
        self.reader.close()
        self.writer.close()
