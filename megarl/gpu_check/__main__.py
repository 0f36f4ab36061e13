"""Run the checks in order and write docs/gpu.md's tables: ``python -m megarl.doctor --gpu-check [--nproc N]``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megarl.config.command_line import end_quietly_with_the_reader
from megarl.config.compose import errors_reported
from megarl.doctor.accelerator import parse_gpus
from megarl.doctor.machine import read_gpus
from megarl.errors import ConfigError, Problem
from megarl.gpu_check.checks import CHECKS, Check, Machine, Result, run_checks
from megarl.gpu_check.page import measured, put
from megarl.parallel.environment import apply_environment, check_platform, platform_name

PAGE = Path("docs/gpu.md")
_CPU_RANKS = 2


def main(arguments: Sequence[str]) -> int:
    """Return the exit code: 1 where a check fails. Raises MegarlError."""
    parser = argparse.ArgumentParser(prog="python -m megarl.doctor --gpu-check", description=__doc__)
    parser.add_argument("--nproc", type=int, help="devices to use; default all, on CPU 2 processes")
    parser.add_argument("--only", help="checks whose name has this in it")
    parser.add_argument(
        "--model", type=Path, help="a Hugging Face folder whose speed is measured; default a tiny model"
    )
    parser.add_argument("--out", type=Path, help=f"a page with the two markers; default {PAGE}, stdout without it")
    asked = parser.parse_args(arguments)
    check_platform()
    chosen = [check for check in CHECKS if asked.only is None or asked.only in check.name]
    if not chosen:
        raise ConfigError([Problem("--only", asked.only, f"is in no name: {', '.join(c.name for c in CHECKS)}")])
    apply_environment()
    with tempfile.TemporaryDirectory(prefix="megarl_gpu_check_") as scratch:
        machine, devices = _machine(asked.nproc, Path(scratch), asked.model)
        results = list(_reported(machine, chosen))
    text = measured(machine, devices, results, shlex.join(["python", "-m", "megarl.doctor", "--gpu-check", *arguments]))
    page = asked.out or (PAGE if PAGE.is_file() and machine.platform == "cuda" else None)
    if page is None:
        print(text)
    else:
        put(text, page)
        print(f"wrote {page}")
    return int(any(result.level == "FAIL" for result in results))


def _reported(machine: Machine, checks: Sequence[Check]) -> list[Result]:
    results = []
    for result in run_checks(machine, checks):
        print(f"{result.level:<7} {result.check.name}: {result.text}", flush=True)
        if result.level == "FAIL":
            print(f"        it means: {result.check.means}", flush=True)
        results.append(result)
    return results


def _machine(nproc: int | None, scratch: Path, model: Path | None) -> tuple[Machine, str]:
    """Return the Machine, and its devices in words. Raises ConfigError where more are asked for than there are."""
    machine = Machine(platform_name(), nproc or _CPU_RANKS, scratch, model)
    if machine.platform == "cpu":
        return machine, f"CPU, {os.cpu_count()} cores"
    gpus = parse_gpus(read_gpus()[0])
    if nproc is not None and not 1 <= nproc <= len(gpus):
        raise ConfigError([Problem("--nproc", nproc, f"must be from 1 to {len(gpus)}, the GPUs of this machine")])
    words = f"{len(gpus)} x {gpus[0].name}, driver {gpus[0].driver}" if gpus else "GPUs that nvidia-smi doesn't list"
    return replace(machine, num_devices=nproc or len(gpus)), words


if __name__ == "__main__":
    end_quietly_with_the_reader()
    with errors_reported():
        sys.exit(main(sys.argv[1:]))
