"""Files of a run, and what is said where the disk refuses one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megarl.errors import ResourceError

PARTIAL = ".partial"  # the end of the name of a file that isn't all there yet
_REFUSALS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE),
        *(errno.EROFS, errno.EACCES, errno.EPERM),
    }
)


@contextmanager
def refusals_named(path: Path) -> Iterator[None]:
    """Raise ResourceError, in one line with the path and the room, where the disk or its permissions refuse a file."""
    try:
        yield
    except OSError as error:
        was_removed = error.errno == errno.ENOENT and not path.parent.exists()
        if error.errno not in _REFUSALS and not was_removed:
            raise
        why = "its folder was removed, or this node doesn't see it" if was_removed else os.strerror(error.errno or 0)
        raise ResourceError(
            f"{path} can't be written: {why}; {_room(path)}. "
            "fix: make room, or point trainer.run_dir at a disk that can be written"
        ) from error


def write_file(path: Path, text: str) -> None:
    """Write a whole file. Raises ResourceError where the disk refuses it."""
    with refusals_named(path):
        path.write_text(text, encoding="utf-8", errors="backslashreplace")


def replace_file(path: Path, text: str) -> None:
    """Have a file hold a text, all of it or what it held before. Raises ResourceError where the disk refuses it."""
    anew = path.with_name(f"{path.name}{PARTIAL}")
    with refusals_named(path):
        with anew.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        anew.replace(path)


class LineFile:
    """A file that grows by lines. Each is on its way to the disk at once, and is there as a whole or not at all."""

    def __init__(self, path: Path) -> None:
        """Open a file to append to. A last line without an end, which a machine that died leaves, is cut off."""
        self._path = path
        with refusals_named(path):
            if path.is_file():
                with path.open("rb+") as file:
                    file.truncate(file.read().rfind(b"\n") + 1)
            self._file = path.open("ab", buffering=0)

    def append(self, lines: str) -> None:
        """Write lines, each with its end. Raises ResourceError where the disk refuses them."""
        content, start = lines.encode("utf-8", "backslashreplace"), self._file.tell()
        with refusals_named(self._path):
            try:
                while content:
                    content = content[self._file.write(content) :]
            except OSError:
                if self._path.is_file():
                    self._file.truncate(start)
                raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _room(path: Path) -> str:
    """Say how many bytes are free where a path lies."""
    folder = next((folder for folder in path.absolute().parents if folder.is_dir()), Path("/"))
    return f"the disk of {folder} has {shutil.disk_usage(folder).free:,} bytes free"
