"""The list of a checkpoint's files with their hashes: written last, read first, and checked before any byte is used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from megarl.errors import CheckpointError

FILE_NAME = "manifest.json"
_FORMAT = 2
_OWN_HASH = "sha256"  # of all other fields, so that a manifest that was harmed is named, and not the files in it
_HASHED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """A file of a checkpoint. name: its path in the folder, with slashes."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All files of the checkpoint after ``step`` but the manifest itself."""

    step: int
    files: tuple[FileRecord, ...]


def hashed(folder: Path, name: str) -> FileRecord:
    """Return the FileRecord of a file that is there, and have it on the disk itself."""
    digest, num_bytes = hashlib.sha256(), 0
    with (folder / name).open("rb") as file:
        while chunk := file.read(_HASHED_AT_ONCE):
            digest.update(chunk)
            num_bytes += len(chunk)
        os.fsync(file.fileno())
    return FileRecord(name, num_bytes, digest.hexdigest())


def files_of(folder: Path) -> list[str]:
    """Return the names of all files of a folder but the manifest, in order, as a list of str.

    Raises CheckpointError for anything that is neither a file nor a folder: a link may lead anywhere.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path} is a link or a special file; a checkpoint has files and folders alone")
        if path.is_file():
            found.append(path.relative_to(folder).as_posix())
    return [name for name in found if name != FILE_NAME]


def write_manifest(folder: Path, step: int, files: Iterable[FileRecord]) -> None:
    """Write the manifest, the last file of a checkpoint: with it, and not before, the checkpoint is whole."""
    listed = sorted(files, key=_name)
    content: dict[str, object] = {"format": _FORMAT, "step": step, "files": [asdict(file) for file in listed]}
    for below in sorted({(folder / file.name).parent for file in listed}):
        synced(below)
    with (folder / FILE_NAME).open("x") as file:
        file.write(_text(content))
        file.flush()
        os.fsync(file.fileno())
    synced(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest. Raises CheckpointError where it is missing, changed or of another format."""
    path = folder / FILE_NAME
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{folder} has no {FILE_NAME}: it is no checkpoint that was saved to its end")
    try:
        text = path.read_bytes().decode()
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or not JSON ({error}); take another checkpoint") from error
    found = fields.get("format") if isinstance(fields, dict) else None
    if found != _FORMAT:
        raise CheckpointError(f"{path} has format {found!r}, this version reads {_FORMAT}; take another checkpoint")
    fields.pop(_OWN_HASH, None)
    if text != _text(fields):
        raise CheckpointError(f"{path} has changed since it was saved; take another checkpoint")
    step, files = fields.get("step"), fields.get("files")
    if type(step) is not int or step < 0 or not isinstance(files, list):
        raise CheckpointError(f"{path}: step = {step!r} and files must be a count and a list; take another checkpoint")
    records = tuple(_record(path, file) for file in files)
    if len({record.name for record in records}) < len(records):
        raise CheckpointError(f"{path} lists a file twice; take another checkpoint")
    return Manifest(step, records)


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare names, sizes and hashes with the manifest's. Raises CheckpointError that names every file that differs.

    Reads every byte, several files at once.
    """
    there, listed = set(files_of(folder)), {file.name: file for file in manifest.files}
    problems = [f"{name} is missing" for name in sorted(listed.keys() - there)]
    problems += [f"{name} is not in the manifest" for name in sorted(there - listed.keys())]
    sizes = {name: (folder / name).stat().st_size for name in sorted(there & listed.keys())}
    problems += [
        f"{name} has {size:,} bytes of {listed[name].num_bytes:,}"
        for name, size in sizes.items()
        if size != listed[name].num_bytes
    ]
    if not problems:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            found = pool.map(lambda name: hashed(folder, name), sizes)
            problems = [f"{file.name} has changed" for file in found if file != listed[file.name]]
    if problems:
        raise CheckpointError(f"{folder} isn't as it was saved: {'; '.join(problems)}; take another checkpoint")


def synced(folder: Path) -> None:
    """Have the names of a folder's files on the disk itself."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _text(fields: Mapping[str, object]) -> str:
    """Return a manifest to the byte, with its own hash."""
    own = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    return json.dumps({**fields, _OWN_HASH: own}, indent=1) + "\n"


def _record(manifest: Path, fields: object) -> FileRecord:
    if isinstance(fields, Mapping):
        name, num_bytes, sha256 = (fields.get(key) for key in ("name", "num_bytes", "sha256"))
        if isinstance(name, str) and type(num_bytes) is int and isinstance(sha256, str) and _is_inside(name):
            return FileRecord(name, num_bytes, sha256)
    raise CheckpointError(f"{manifest} lists {fields!r}, which is no file of this folder; take another checkpoint")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return str(path) == name and bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _name(file: FileRecord) -> str:
    return file.name
