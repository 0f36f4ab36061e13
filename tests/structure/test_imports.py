"""Imports point down only, and each heavy dependency has one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# From the bottom up. A module may import the layers below its own, and within its own package.
LAYERS = (
    {"types", "errors", "catalog"},
    {"config"},
    {"parallel"},
    {"weights"},
    {"algorithm"},
    {"batching"},
    {"data", "reward", "monitor"},
    {"roles"},
    {"checks"},
    {"plan"},
    {"train"},
    {"rollout"},
    {"checkpoint"},
    {"ranks"},
    {"launchers"},
    {"nodes"},
    {"controller", "doctor", "from_verl"},
    {"verify"},
    {"gpu_check"},
    {"main_ppo", "main_sft", "checkpoints", "export", "trace", "engine_host", "__main__"},
)
LEVEL = {package: level for level, layer in enumerate(LAYERS) for package in layer}

DOORS = {
    "megatron": {"train", "parallel"},
    "vllm": {"rollout"},
    "ray": {"launchers"},
    "tensorboard": {"monitor"},
    "wandb": {"monitor"},
}
CLOSED = {"reward": {"torch"}}


def imported_modules(source: str, module: str) -> Iterator[str]:
    """Yield the dotted name of everything a source imports, wherever in it, also for type checkers or by a string.

    module: dotted name of the source itself, with ``.__init__`` for a package, to resolve relative imports.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                parent = module.split(".")[:-level] if level else []
                prefix = ".".join([*parent, *([base] if base else [])])
                yield from (f"{prefix}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(value=str(target)), *_]
            ):
                if name in {"import_module", "__import__"}:
                    yield target


def violations(source: str, module: str) -> list[str]:
    """Return a sentence for each import of a megarl module that the layers or the doors forbid."""
    # A package's __main__ is a program: it stands on top of everything, like main_ppo.
    package = "main_ppo" if module.endswith(".__main__") else module.split(".")[1]
    return [
        f"{module} imports {target}: {why}"
        for target in sorted(set(imported_modules(source, module)))
        if (why := _why_forbidden(package, target))
    ]


def _why_forbidden(package: str, target: str) -> str:
    """Return why a package may not import a module, empty where it may."""
    root, *rest = target.split(".")
    if root in DOORS and package not in DOORS[root]:
        return f"{root} is for {', '.join(sorted(DOORS[root]))} only"
    if root in CLOSED.get(package, set()):
        return f"{package} works without {root}"
    if root != "megarl" or not rest or rest[0] not in LEVEL or rest[0] == package:
        return ""
    difference = LEVEL[rest[0]] - LEVEL[package]
    if difference == 0:
        return f"{rest[0]} and {package} are of the same layer"
    return f"{rest[0]} is above {package}" if difference > 0 else ""


def megarl_modules() -> dict[str, Path]:
    """Return the path of every module of megarl by its dotted name."""
    files = sorted((REPOSITORY / "megarl").rglob("*.py"))
    return {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in files}


def load_in_a_fresh_process(modules: Iterable[str]) -> set[str]:
    """Import modules in a new interpreter and return the names of all that it then holds."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_imports_point_down_and_through_the_doors() -> None:
    found = [
        line
        for module, path in megarl_modules().items()
        if module != "megarl.__init__"
        for line in violations(path.read_text(encoding="utf-8"), module)
    ]
    assert not found, "\n" + "\n".join(found)


def test_fsdp_is_named_by_its_own_backend_alone() -> None:
    named = {
        module
        for module, path in megarl_modules().items()
        if any(t.startswith("torch.distributed.fsdp") for t in imported_modules(path.read_text("utf-8"), module))
    }
    assert {module.rpartition(".")[0] for module in named} == {"megarl.train.fsdp"}


def test_every_part_of_megarl_has_a_layer() -> None:
    parts = {name.split(".")[1] for name in megarl_modules()} - {"__init__"}
    assert parts <= set(LEVEL), f"give a layer to {', '.join(sorted(parts - set(LEVEL)))}"


def test_the_root_package_imports_nothing() -> None:
    source = (REPOSITORY / "megarl" / "__init__.py").read_text(encoding="utf-8")
    assert not list(imported_modules(source, "megarl.__init__"))


def test_a_config_is_read_and_a_batch_planned_without_torch_or_ray() -> None:
    loaded = load_in_a_fresh_process(["megarl.config", "megarl.batching.plan"])
    assert not loaded & {"torch", "ray"}
    assert "megarl.batching.plan" in loaded


def test_rewards_load_without_torch_even_through_what_they_import() -> None:
    names = [name.removesuffix(".__init__") for name in megarl_modules() if name.startswith("megarl.reward.")]
    loaded = load_in_a_fresh_process(names)
    assert not loaded & {"torch", "ray"}


@pytest.mark.parametrize(
    ("module", "source", "why"),
    [
        ("megarl.batching.plan", "import megarl.controller.loop", "controller is above batching"),
        ("megarl.checks.rules", "from megarl import plan", "plan is above checks"),
        ("megarl.data.order", "from megarl.reward.pool import RewardPool", "same layer"),
        ("megarl.types", "from megarl.errors import ConfigError", "same layer"),
        ("megarl.train.build", "from ..controller import loop", "controller is above train"),
        ("megarl.data.__init__", "from ..train import actor", "train is above data"),
        ("megarl.main_sft", "from megarl.main_ppo import main", "same layer"),
        ("megarl.data.rows", "if TYPE_CHECKING:\n    from megarl.train.actor import Actor", "train is above data"),
        ("megarl.rollout.vllm", "def start():\n    from megatron.core import parallel_state", "megatron is for"),
        ("megarl.train.actor", "import vllm.distributed as d", "vllm is for rollout only"),
        ("megarl.rollout.engine", "from ray import remote", "ray is for launchers only"),
        ("megarl.controller.loop", "import wandb", "wandb is for monitor only"),
        ("megarl.controller.loop", "import importlib\nimportlib.import_module('tensorboard.summary')", "monitor only"),
        ("megarl.reward.math", "import torch.nn", "reward works without torch"),
    ],
)
def test_the_checker_catches_a_violation(module: str, source: str, why: str) -> None:
    assert [why in line for line in violations(source, module)] == [True]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megarl.main_ppo", "from megarl.controller.loop import fit\nfrom megarl.types import Batch"),
        ("megarl.train.actor", "from megarl.train.megatron.optimizer import build\nfrom . import guard\nimport torch"),
        ("megarl.train.actor", "from megatron.core import parallel_state"),
        ("megarl.monitor.sinks", "import wandb\nfrom megarl import __version__"),
        ("megarl.data.rows", "'import ray'  # from megarl.controller import loop"),
    ],
)
def test_the_checker_lets_pass_what_is_allowed(module: str, source: str) -> None:
    assert violations(source, module) == []
