"""A disk that refuses a file is named in one line, and what it holds stays whole."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megarl.errors import ResourceError
from megarl.monitor.disk import LineFile, refusals_named, write_file

FULL = Path("/dev/full")  # the kernel's own full disk


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Have the kernel refuse this process files above some bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_with_path_and_bytes() -> None:
    with pytest.raises(ResourceError) as caught:
        write_file(FULL, "text")
    text = str(caught.value)
    assert text.startswith("/dev/full can't be written: No space left on device; the disk of /dev has ")
    assert "bytes free. fix: make room, or point trainer.run_dir at" in text and "\n" not in text


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG])
def test_what_a_disk_or_its_permissions_refuse_is_a_lack_of_the_machine(tmp_path: Path, code: int) -> None:
    with pytest.raises(ResourceError, match="can't be written"), refusals_named(tmp_path / "file"):
        raise OSError(code, "refused")


def test_a_folder_that_was_removed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="its folder was removed"):
        write_file(tmp_path / "gone" / "file", "text")


def test_other_errors_are_left_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path, "text")


def test_a_file_of_lines_has_no_part_of_a_line_that_did_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    file = LineFile(path)
    file.append("first\n")
    with no_file_above(10), pytest.raises(ResourceError, match="can't be written: File too large"):
        file.append("a second line\n")
    file.append("third\n")
    file.close()
    assert path.read_text() == "first\nthird\n"


def test_text_that_no_encoding_has_is_escaped(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "lines")
    file.append("a\ud800b\n")
    file.close()
    write_file(tmp_path / "file", "a\ud800b\n")
    assert (tmp_path / "lines").read_text() == (tmp_path / "file").read_text() == "a\\ud800b\n"
