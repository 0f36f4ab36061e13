"""Nothing of megarl unpickles a file: pickles travel between the processes of one run, and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
# What is told between ranks, and between `megarl verify` or the check of GPUs and their ranks.
BETWEEN_PROCESSES = {
    *("launchers/parcels.py", "launchers/torchrun_group.py", "verify/pool.py", "verify/rank.py"),
    *("verify/board.py", "verify/seat.py", "verify/torchrun_pool.py"),
    "gpu_check/ranks.py",  # in a folder that no other user may enter
}


def unpickling(source: str) -> Iterator[str]:
    """Yield what in a source unpickles, or may: imports of such packages, and torch's and numpy's loads."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.split(".")[0] in PACKAGES)
            case ast.ImportFrom(module=str(module)):
                yield from [module] if module.split(".")[0] in PACKAGES else []
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                yield "torch.load"
            case ast.keyword(arg="allow_pickle" | "trust_remote_code", value=ast.Constant(value=value)) if value:
                yield "allow_pickle or trust_remote_code"


def test_pickles_travel_between_processes_alone() -> None:
    package = REPOSITORY / "megarl"
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if any(unpickling(path.read_text()))}
    assert found == BETWEEN_PROCESSES


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_unpickles(source: str) -> None:
    assert any(unpickling(source))
