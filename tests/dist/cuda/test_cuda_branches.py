"""What runs on CUDA, without a GPU: tensors have no values, and the ranks of any world come one after the other."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from megarl.parallel.layout import Layout
from megarl.roles import Role
from megarl.verify.reference import Reference
from megarl.verify.roles import TRAINING, role_on
from tests.dist.cuda import meta_cases
from tests.dist.cuda.meta_cases import Step

REPOSITORY = Path(__file__).parents[3]
MODEL = "qwen3-untied"


@dataclass(frozen=True)
class Case:
    """An update on some ranks of a layout. copies: of the eight rollouts, so that every rank has some."""

    layout: Layout
    ranks: tuple[int, ...]
    copies: int = 1
    dtype: str = "bfloat16"
    sizes: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


ONE = Layout(1)
TP2 = Layout(2, tp=2, sequence_parallel=True)
CASES = {
    "float32": Case(ONE, (0,), dtype="float32"),
    "four layers": Case(ONE, (0,), sizes={"num_hidden_layers": 4}),
    "two layers": Case(ONE, (0,)),
    "padded": Case(TP2, (0, 1), settings={"packed": False}),
    "fused head": Case(TP2, (0, 1), settings={"fused_head": True}),
    "replicated optimizer": Case(Layout(4, tp=2), (0, 1, 2, 3), settings={"use_distributed_optimizer": False}),
    "adam on the host": Case(Layout(2), (0, 1), settings={"optimizer_on_host": True}),
    "buckets that overlap": Case(
        Layout(4, tp=2, sequence_parallel=True),
        (0, 1, 2, 3),
        settings={"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 500},
    ),
    "tp2xcp2xdp2": Case(Layout(8, tp=2, cp=2, sequence_parallel=True), (0, 1, 2, 4, 5)),
    "1,024 ranks": Case(Layout(1024, tp=2, cp=2, sequence_parallel=True), (0, 1, 2, 4, 1023), copies=32),
}


@pytest.fixture(scope="module")
def took(
    reference: Callable[..., Reference], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, dict[int, Step]]:
    """Return what every rank of every case did, from a process whose platform is cuda."""
    asked = {}
    for name, case in CASES.items():
        found = reference(MODEL, **case.sizes)
        role: Role = role_on(case.layout, found.folder, dtype=case.dtype, training=TRAINING, **case.settings)
        rows = tuple(range(len(found.rollouts))) * case.copies
        asked[name] = partial(meta_cases.steps, role, found.rollouts.rows(rows), case.ranks)
    folder = tmp_path_factory.mktemp("meta")
    (folder / "calls.pickle").write_bytes(pickle.dumps(asked))
    command = [sys.executable, "-m", "tests.dist.cuda.meta_process", str(folder)]
    done = subprocess.run(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout
    answers: Mapping[str, dict[int, Step]] = pickle.loads((folder / "answers.pickle").read_bytes())
    return answers


@pytest.mark.parametrize("name", CASES)
def test_an_update_mixes_no_tensors_of_host_and_device(took: Mapping[str, dict[int, Step]], name: str) -> None:
    assert took[name].keys() == set(CASES[name].ranks)
    assert all({"loss", "grad_norm", "lr"} <= step.metrics for step in took[name].values())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case.ranks) > 1])
def test_ranks_of_a_group_ask_each_other_for_the_same_in_the_same_order(
    took: Mapping[str, dict[int, Step]], name: str
) -> None:
    shared = 0
    for one, other in combinations(took[name], 2):
        mine, theirs = (
            [call for call in took[name][rank].collectives if {one, other} <= set(call.ranks)] for rank in (one, other)
        )
        assert mine == theirs, f"ranks {one} and {other}"
        shared += len(mine)
    assert shared > 0


def test_the_host_does_not_wait_for_a_layer(took: Mapping[str, dict[int, Step]]) -> None:
    two, four = (dict(took[name][0].reads) for name in ("two layers", "four layers"))
    # Megatron's own norm of the gradient, without Apex and Transformer Engine, reads that of every parameter.
    two.pop("tensor")
    four.pop("tensor")
    assert two == four
    assert two.keys() <= {"__float__", "item"}, "beside metrics and the norm nothing is read"
