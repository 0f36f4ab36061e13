"""The files of the checkpoint that the tests of this folder harm, and its manifest as one writes it who knows how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
STATE = tuple(f"state/{role}-0000{rank}.safetensors" for role in ("actor", "critic", "random") for rank in range(2))
FILES = ("manifest.json", "trainer_state.json", *MODEL, *(f"critic/{name}" for name in MODEL), *STATE)


def record_of(path: Path, name: str) -> dict[str, object]:
    """Return the record of a file as the manifest has it."""
    content = path.read_bytes()
    return {"name": name, "num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def records_of(checkpoint: Path) -> list[dict[str, object]]:
    """Return the records of all files that are there, as they are now."""
    names = [path.relative_to(checkpoint).as_posix() for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    return [record_of(checkpoint / name, name) for name in names if name != "manifest.json"]


def rewrite_manifest(checkpoint: Path, records: Sequence[dict[str, object]]) -> None:
    """Write a manifest of these records that is whole in itself."""
    path = checkpoint / "manifest.json"
    fields: dict[str, Any] = json.loads(path.read_text())
    del fields["sha256"]
    fields["files"] = list(records)
    own = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    path.write_text(json.dumps({**fields, "sha256": own}, indent=1) + "\n")
