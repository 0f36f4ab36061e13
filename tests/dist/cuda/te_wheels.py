"""Transformer Engine's Python, from its wheels on PyPI, which have no compiled part.

Each is in a folder of its own and never installed: Megatron would find it, and fail where it has no compiled part.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

# The first and the last release that megarl is made for, by the SHA-256 of the wheel.
WHEELS = {
    "2.11.0": "7ee1eae8fa6b0cb471c6066aa3555304fda8537174e5019929dc0c8655071df3",
    "2.20.2": "7dcfad943a1a55b2612db9a0e43697fe98c70f4c42ec391ba3a0f872f6ce2094",
}
LAST = "2.20.2"
_FOLDER = Path(__file__).parents[3] / ".venv" / "transformer-engine"


def te_source(release: str) -> Path:
    """Return the folder to import a release from; download it once. Skips the test where pip can't fetch it."""
    folder = _FOLDER / release
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as parent:
        download = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", parent]
        command = [sys.executable, "-m", "pip", *download, f"transformer-engine=={release}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"pip can't fetch transformer-engine {release}: {done.stderr.strip()[-200:]}")
        (wheel,) = Path(parent).glob("*.whl")
        assert hashlib.sha256(wheel.read_bytes()).hexdigest() == WHEELS[release], f"{wheel.name} isn't the known one"
        unpacked = Path(parent, "unpacked")
        zipfile.ZipFile(wheel).extractall(unpacked)
        unpacked.rename(folder)
    return folder
