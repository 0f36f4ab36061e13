"""What it takes to compile Transformer Engine: ``python -m megarl.doctor.toolchain``. Needs Python alone.

``make gpu`` asks before it installs anything, when headers may still come from packages, and again before it compiles.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from megarl.doctor.finding import Finding, as_text, exit_code, ok

OLDEST_DRIVER = 580
"""What the builds of requirements/gpu.txt, for CUDA 13, ask for (CUDA Toolkit release notes)."""

_CUDA = 13
_TOOLKIT = Path("/usr/local/cuda")
_SMI_S = 20.0
# Header -> the package of requirements/gpu.txt that brings it, and its folder there.
_HEADERS = {
    "nccl.h": ("nvidia-nccl-cu13", "nvidia/nccl/include"),
    "cudnn.h": ("nvidia-cudnn-cu13", "nvidia/cudnn/include"),
    "cusparse.h": ("nvidia-cusparse", "nvidia/cu13/include"),  # which a toolkit that is cut down to nvcc lacks
}


def check_nvcc(said: str | None) -> Finding:
    """Judge the compiler of the CUDA toolkit. said: by ``nvcc --version``; None where there is no nvcc.

    Transformer Engine takes the version of CUDA from it, and the toolkit's headers from the folder above it.
    """
    fix = f"install the CUDA toolkit {_CUDA} (cuda-toolkit-{_CUDA}-0), then export CUDA_HOME=/usr/local/cuda"
    if said is None:
        return Finding("FAIL", "nvcc", "none in CUDA_HOME/bin, on the PATH, or in /usr/local/cuda/bin", fix)
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        return Finding("FAIL", "nvcc", f"says no release: {said.strip()[:80]!r}", fix)
    found = f"{release[1]}.{release[2]}"
    if int(release[1]) != _CUDA:
        return Finding("FAIL", "nvcc", f"of CUDA {found}, and torch of requirements/gpu.txt is built for {_CUDA}", fix)
    return ok("nvcc", f"of CUDA {found}")


def check_driver(versions: Sequence[str] | None) -> Finding:
    """Judge the driver by the version that nvidia-smi tells of each GPU. None: there is no GPU, as in a container."""
    if not versions:
        found = "no GPU here: what is compiled can't be run on this machine"
        return Finding("warn", "driver", found, "fine where an image is built; else install the driver")
    oldest = min(versions, key=_major)
    if _major(oldest) < OLDEST_DRIVER:
        found = f"{oldest}; CUDA {_CUDA} needs {OLDEST_DRIVER} or later"
        return Finding("FAIL", "driver", found, f"update the NVIDIA driver to {OLDEST_DRIVER} or later")
    return ok("driver", oldest)


def check_header(name: str, folder: Path | None, *, before_packages: bool) -> Finding:
    """Judge a header by the folder that it was found in. before_packages: the package that has it is yet to come."""
    package, _ = _HEADERS[name]
    if folder is not None:
        return ok(name, str(folder))
    if before_packages:
        return ok(name, f"comes with {package}")
    fix = f"pip install --no-deps -r requirements/gpu.txt, which has {package}, or export CPATH=FOLDER"
    return Finding("FAIL", name, "in no folder of CPATH, the CUDA toolkit, /usr/include or the packages", fix)


def check_compiler(path: str | None) -> Finding:
    """Judge the C++ compiler. path: where it is, None where there is none."""
    if path is None:
        return Finding("FAIL", "c++", "no C++ compiler on the PATH", "install g++ (apt-get install build-essential)")
    return ok("c++", path)


def toolchain(environ: Mapping[str, str] = os.environ, *, before_packages: bool = False) -> list[Finding]:
    """Return the findings on this machine."""
    return [
        check_nvcc(_nvcc(environ)),
        *(check_header(name, header_folder(name, environ), before_packages=before_packages) for name in _HEADERS),
        check_compiler(environ.get("CXX") or shutil.which("g++") or shutil.which("c++")),
        check_driver(_drivers()),
    ]


def header_folder(
    name: str, environ: Mapping[str, str], packages: Path | None = None, system: Path = Path("/usr/include")
) -> Path | None:
    """Return the folder of a header, the packages' own first, as ``make gpu`` names them to the compiler.

    packages: where Python keeps its packages; None: this one's.
    """
    site = packages or Path(sysconfig.get_path("purelib"))
    toolkit = Path(environ.get("CUDA_HOME") or _TOOLKIT)
    named = [Path(folder) for folder in environ.get("CPATH", "").split(os.pathsep) if folder]
    folders = [site / _HEADERS[name][1], *named, toolkit / "include", system, system / "x86_64-linux-gnu"]
    return next((folder for folder in folders if (folder / name).is_file()), None)


def _nvcc(environ: Mapping[str, str]) -> str | None:
    """Return what nvcc says of itself, from where Transformer Engine looks for it: CUDA_HOME, PATH, the usual place."""
    home = environ.get("CUDA_HOME")
    found = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc") or str(_TOOLKIT / "bin" / "nvcc")
    if not os.access(found, os.X_OK):
        return None
    return subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout


def _drivers() -> list[str] | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=_SMI_S)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.split() if done.returncode == 0 else None


def _major(version: str) -> int:
    digits = version.split(".")[0]
    return int(digits) if digits.isdigit() else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings and return the exit code: 1 where anything fails, else 0."""
    parser = argparse.ArgumentParser(prog="python -m megarl.doctor.toolchain", description=__doc__)
    parser.add_argument("--before-packages", action="store_true", help="headers may still come from packages")
    findings = toolchain(before_packages=parser.parse_args(arguments).before_packages)
    print(as_text(findings))
    return exit_code(findings)


if __name__ == "__main__":
    sys.exit(main())
