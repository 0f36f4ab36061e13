"""A checkpoint is read as it was saved, or an error names the file that isn't."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megarl.checkpoint.manifest import files_of, hashed, read_manifest, verify, write_manifest
from megarl.checkpoint.tensor_file import write_tensors
from megarl.errors import CheckpointError

NAMES = ("config.json", "state/actor-00000.safetensors", "state/actor-00001.safetensors")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a folder with a manifest."""
    (tmp_path / "config.json").write_text("{}\n")
    tensors = [{"weight/a[0:2]": torch.arange(2.0)}, {"weight/a[2:4]": torch.arange(2.0, 4.0)}]
    records = [write_tensors(tmp_path, name, own) for name, own in zip(NAMES[1:], tensors, strict=True)]
    write_manifest(tmp_path, 7, [hashed(tmp_path, "config.json"), *records])
    return tmp_path


def test_what_was_saved_is_as_it_was_saved(saved: Path) -> None:
    manifest = read_manifest(saved)
    verify(saved, manifest)
    assert manifest.step == 7 and tuple(file.name for file in manifest.files) == NAMES


def test_a_tensor_file_is_hashed_as_it_is_written_and_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5)[:, 1:3],
        "b": torch.arange(3, dtype=torch.uint8),
        "c": torch.randn(2).to(torch.bfloat16),
        "none": torch.empty(0, 4),
    }
    record = write_tensors(tmp_path, "state/x.safetensors", tensors)
    assert record == hashed(tmp_path, "state/x.safetensors")
    read = load_file(tmp_path / record.name)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def _flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped byte": (lambda path: _flipped(path, -1), "{name} has changed"),
    "a flipped first byte": (lambda path: _flipped(path, 0), "{name} has changed"),
    "an empty file": (lambda path: path.write_bytes(b""), "{name} has 0 bytes of"),
    "half a file": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "{name} has"),
    "a missing byte": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "{name} has"),
    "a missing file": (lambda path: path.unlink(), "{name} is missing"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_file_is_named(saved: Path, name: str, harm: str) -> None:
    do, said = HARMS[harm]
    do(saved / name)
    with pytest.raises(CheckpointError) as error:
        verify(saved, read_manifest(saved))
    assert said.format(name=name) in str(error.value)


def test_files_that_were_swapped_or_added_are_named(saved: Path) -> None:
    one, other = (saved / name for name in NAMES[1:])
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second), other.write_bytes(first)
    (saved / "state" / "more.pt").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"state/more\.pt is not in the manifest"):
        verify(saved, read_manifest(saved))
    (saved / "state" / "more.pt").unlink()
    with pytest.raises(CheckpointError, match=r"actor-00000\S* has changed; \S*actor-00001\S* has changed"):
        verify(saved, read_manifest(saved))


def test_a_link_in_a_checkpoint_is_refused(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "config.json"
    elsewhere.write_text("{}\n")
    (saved / "config.json").unlink()
    (saved / "config.json").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=r"config\.json is a link"):
        files_of(saved)


def sealed(**fields: object) -> str:
    """Return a manifest with its own hash, as whoever wrote it could have made it."""
    content = {"format": 2, "step": 7, "files": [], **fields}
    own = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, indent=1) + "\n"


def record(name: object) -> dict[str, object]:
    """Return the record of a file of one byte."""
    return {"name": name, "num_bytes": 1, "sha256": "0"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "truncated or not JSON"),
        ('{"format": 2, "step": 7', "truncated or not JSON"),
        ("[" * 100_000, "truncated or not JSON"),
        ("[]", "has format None"),
        ('{"format": 9}', "has format 9, this version reads 2"),
        ('{"format": 2, "step": 7, "files": []}', "has changed since it was saved"),
        (sealed().replace("7", "8", 1), "has changed since it was saved"),
        (sealed(step=-1), "step = -1"),
        (sealed(files={}), "files must be"),
        (sealed(files=[7]), "no file of this folder"),
        (sealed(files=[record("a"), record("a")]), "lists a file twice"),
        *((sealed(files=[record(name)]), "no file of this folder") for name in ("../a", "/a", "a/../../b", "", ".", 3)),
        *((sealed(files=[record(name)]), "no file of this folder") for name in ("./a", "a//b", "a/./b", "a/", "//a")),
    ],
)
def test_a_broken_manifest_is_named(saved: Path, text: str, said: str) -> None:
    (saved / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json") as error:
        read_manifest(saved)
    assert said in str(error.value)


def test_a_folder_without_a_manifest_was_never_saved_to_its_end(saved: Path) -> None:
    (saved / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint that was saved to its end"):
        read_manifest(saved)
