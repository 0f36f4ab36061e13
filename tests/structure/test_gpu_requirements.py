"""requirements/gpu.txt is complete, its packages satisfy each other, and they are what setup.py asks for."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.structure.test_files import REPOSITORY

GPU = REPOSITORY / "requirements" / "gpu.txt"
COMPILED = "transformer-engine-torch"  # tells what it needs to a torch for CUDA alone
SOURCE_ONLY = "antlr4-python3-runtime"


def lines() -> list[str]:
    """Return the pins, a line each."""
    return [line for line in GPU.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def asked(name: str, extra: str | None = None) -> list[Requirement]:
    """Return the requirements of a literal of setup.py."""
    for node in ast.parse((REPOSITORY / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            value = ast.literal_eval(node.value)
            return [Requirement(line) for line in (value if extra is None else value[extra])]
    raise AssertionError(name)


def test_every_line_pins_one_version_of_one_package() -> None:
    assert [line for line in lines() if not re.fullmatch(r"[a-z0-9-]+==[\w.]+", line)] == []
    names = [line.partition("==")[0] for line in lines()]
    assert names == sorted(set(names))


def test_the_pins_are_in_the_ranges_of_setup_py() -> None:
    pins = dict(line.split("==") for line in lines())
    requirements = [*asked("CORE"), *asked("EXTRAS", "gpu")]
    wrong = [str(r) for r in requirements if not r.specifier.contains(pins.get(canonicalize_name(r.name), "0"))]
    assert wrong == []


def test_transformer_engine_is_one_release_that_megatron_core_takes() -> None:
    (version,) = {line.partition("==")[2] for line in lines() if line.startswith("transformer-engine")}
    declared = [Requirement(line) for line in metadata.requires("megatron-core") or ()]
    (allowed,) = {str(r.specifier) for r in declared if canonicalize_name(r.name) == "transformer-engine"}
    assert SpecifierSet(allowed).contains(version)


@pytest.mark.long
def test_the_pins_are_complete_and_satisfy_each_other_on_python_3_12(tmp_path: Path) -> None:
    """uv resolves them for a machine that this one isn't: what it adds is lacking, what it can't do contradicts."""
    tool = Path(sys.executable).with_name("uv")
    wheels = [line for line in lines() if not line.startswith(COMPILED)]
    given, resolved = tmp_path / "gpu.txt", tmp_path / "resolved.txt"
    given.write_text("\n".join(wheels) + "\n", encoding="utf-8")
    done = subprocess.run(
        [
            *(str(tool), "pip", "compile", "--no-config", "--no-annotate", "--no-header", f"--output-file={resolved}"),
            *("--python-version=3.12", "--python-platform=x86_64-manylinux_2_34"),
            *("--only-binary=:all:", f"--no-binary={SOURCE_ONLY}", str(given)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert resolved.read_text(encoding="utf-8").splitlines() == wheels
