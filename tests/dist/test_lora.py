"""Low-rank adapters on FSDP against peft's own model on one rank, and what leaves the trainer."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from megarl.checkpoint.folder import CheckpointFolder
from megarl.checkpoint.manifest import files_of, hashed
from megarl.checkpoint.rank_save import RankSave, SavedPart
from megarl.checkpoint.trainer_state import TrainerState, write_trainer_state
from megarl.export import main as export
from megarl.parallel.layout import Layout
from megarl.plan.static import static_of
from megarl.roles import Role
from megarl.train.actor import Actor
from megarl.train.fsdp.backend import FsdpBackend
from megarl.train.fsdp.lora import is_adapter
from megarl.types import Metrics, PolicyBatch, Sequences
from megarl.verify.pool import RankPool
from megarl.verify.reference import TEMPERATURE, Reference, hf_logprobs_BS, load, make_reference
from megarl.verify.roles import TRAINING, role_on
from megarl.verify.work import PPO, backend_on_rank, score, update
from megarl.weights.adapters import Lora
from tests.dist import hf_training
from tests.dist.fsdp_inside import local, optimizer_of
from tests.dist.parity import TOLERANCE, TRAINING_TOLERANCE, ask, summed
from tests.dist.tiny_models import save_tiny_model

THREE = Layout(3, fsdp=3)
TWO_COPIES = Layout(4, fsdp=2)
ADAPTER = "adapter/adapter_model.safetensors"
LORA = Lora(rank=5, alpha=15, targets=("q_proj", "o_proj", "mlp.down_proj"))  # 5 rows of A on three ranks


@dataclass(frozen=True)
class Run:
    """What a rank says of adapters that it trains. held, planned: bytes of parameters and of moments."""

    logprobs_BS: Tensor | None
    metrics: tuple[Metrics, ...]
    with_gradient: set[str]
    changed: set[str]
    held: tuple[int, int]
    planned: tuple[int, int]


def _run(role: Role, batch: PolicyBatch, everything: Sequences, out: Path) -> Run:
    backend = backend_on_rank(role)
    assert isinstance(backend, FsdpBackend)
    model, adam = backend.model.root.model, optimizer_of(backend).inner
    backend.export(out / "start")
    before = {name: local(parameter).clone() for name, parameter in model.named_parameters()}
    with_gradient: set[str] = set()
    adam.register_step_pre_hook(
        lambda *_: with_gradient.update(n for n, p in model.named_parameters() if p.grad is not None)
    )
    metrics = update(Actor(backend), batch, PPO, 3).metrics
    logprobs_BS = score(Actor(backend), everything, TEMPERATURE)
    changed = {name for name, p in model.named_parameters() if not local(p).equal(before[name])}
    backend.export(out / "end")
    moments = [state[name] for state in adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
    planned = static_of(role, dist.get_rank())
    assert planned.gradients == sum(_bytes(p) for n, p in model.named_parameters() if is_adapter(n))
    held = sum(_bytes(p) for p in model.parameters()), sum(_bytes(m) for m in moments)
    return Run(logprobs_BS, metrics, with_gradient, changed, held, (planned.parameters, planned.optimizer))


def _bytes(tensor: Any) -> int:
    assert isinstance(tensor, DTensor)
    return tensor.to_local().untyped_storage().nbytes()


def _peft(base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(load(base), adapter, is_trainable=True)


def _merged(base: Path, out: Path, lora: Lora, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what has to be exported: W + scale * B A in float32, then in ``dtype``."""
    weights = {name: tensor.to(dtype).float() for name, tensor in load_file(base / "model.safetensors").items()}
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    for name, a in adapter.items():
        module, is_a, _ = name.removeprefix("base_model.model.").partition(".lora_A.")
        if is_a:
            weights[f"{module}.weight"] += lora.alpha / lora.rank * (adapter[name.replace("lora_A", "lora_B")] @ a)
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


@pytest.fixture(scope="module", params=[("qwen2-tied", THREE), ("qwen3_moe-untied", TWO_COPIES)], ids=lambda p: p[0])
def case(
    request: pytest.FixtureRequest, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Reference, list[Run], Path, Layout, Lora]:
    name, layout = request.param
    lora = replace(LORA, targets=("all-linear",)) if "moe" in name else LORA
    folder, out = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("out")
    save_tiny_model(name, folder)
    found = make_reference(folder, 99, 12)
    role = replace(role_on(layout, folder, training=TRAINING, micro_batch_size=1), lora=lora)
    return found, ask(ranks, _run, role, found.rollouts, found.everything, out), out, layout, lora


Case = tuple[Reference, list[Run], Path, Layout, Lora]


def test_adapters_train_as_those_of_peft_do(case: Case) -> None:
    found, runs, out, layout, _ = case
    model = _peft(found.folder, out / "start" / "adapter")
    expected = hf_training.train(found.folder, found.rollouts, PPO, TRAINING, 3, model)
    steps = summed([run.metrics for run in runs], layout)
    assert [s["loss"] for s in steps] == pytest.approx(expected.losses, rel=TRAINING_TOLERANCE, abs=1e-6)
    assert [s["grad_norm"] for s in steps] == pytest.approx(expected.grad_norms, rel=TRAINING_TOLERANCE)
    trained = load_file(out / "end" / "adapter" / "adapter_model.safetensors")
    for name, tensor in trained.items():
        torch.testing.assert_close(
            tensor, expected.weights[name.replace(".weight", ".default.weight")], rtol=0, atol=TRAINING_TOLERANCE
        )


def test_the_merged_model_and_the_adapter_say_what_the_trainer_says(case: Case) -> None:
    found, runs, out, _, _ = case
    told = [run.logprobs_BS for run in runs if run.logprobs_BS is not None]
    trained_BS = torch.cat(told)
    merged_BS = hf_logprobs_BS(load(out / "end"), found.everything, TEMPERATURE)
    adapted_BS = hf_logprobs_BS(_peft(found.folder, out / "end" / "adapter").eval(), found.everything, TEMPERATURE)
    for expected_BS in (merged_BS, adapted_BS):
        torch.testing.assert_close(trained_BS, expected_BS.detach(), rtol=0, atol=TOLERANCE)
    assert float((trained_BS - found.logprobs_BS).abs().max()) > 100 * TOLERANCE, "training changed nothing"


def test_a_model_is_the_base_at_the_start_and_exactly_merged_after_training(case: Case) -> None:
    found, _, out, _, lora = case
    base, start = load_file(found.folder / "model.safetensors"), load_file(out / "start" / "model.safetensors")
    assert all(tensor.equal(base[name]) for name, tensor in start.items())
    expected, end = _merged(found.folder, out / "end", lora, torch.float32), load_file(out / "end/model.safetensors")
    changed = {name for name, tensor in end.items() if not tensor.equal(base[name])}
    assert len(changed) == len(load_file(out / "end/adapter/adapter_model.safetensors")) // 2
    for name, tensor in end.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-7)


def test_gradients_and_changes_are_those_of_adapters_alone(case: Case) -> None:
    _, runs, _, _, _ = case
    for run in runs:
        assert run.with_gradient and all(map(is_adapter, run.with_gradient))
        assert all(map(is_adapter, run.changed))
    assert set.union(*(run.changed for run in runs)) == runs[0].with_gradient


def test_every_rank_holds_the_planned_bytes(case: Case) -> None:
    for run in case[1]:
        assert run.held == run.planned


def test_in_bfloat16_weights_are_merged_in_float32_and_rounded_once(ranks: RankPool, tmp_path: Path) -> None:
    base, out = tmp_path / "model", tmp_path / "out"
    save_tiny_model("qwen3-untied", base)
    found = make_reference(base, 99, 12)
    role = replace(role_on(THREE, base, training=TRAINING, dtype="bfloat16", fused_head=True), lora=LORA)
    runs = ask(ranks, _run, role, found.rollouts, found.everything, out)
    expected, end = _merged(base, out / "end", LORA, torch.bfloat16), load_file(out / "end" / "model.safetensors")
    assert all(tensor.equal(expected[name]) for name, tensor in end.items())
    assert all(run.held == run.planned for run in runs)
    written = json.loads((out / "end" / "adapter" / "adapter_config.json").read_text())
    assert (
        written["r"] == 5 and written["lora_alpha"] == 15 and sorted(written["target_modules"]) == sorted(LORA.targets)
    )


def _save(role: Role, batch: PolicyBatch, folder: Path) -> SavedPart:
    backend = backend_on_rank(role)
    update(Actor(backend), batch, PPO, 3)
    backend.export(folder)
    return RankSave(folder, {"actor": backend}, backend.device, in_background=False).result()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_adapters_alone_is_exported_as_the_trainer_exports_it(
    ranks: RankPool, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = tmp_path / "model", tmp_path / "out"
    save_tiny_model("qwen3-untied", base)
    found = make_reference(base, 99, 12)
    role = replace(role_on(THREE, base, training=TRAINING, dtype=dtype), lora=LORA)
    checkpoints = CheckpointFolder(tmp_path / "run" / "checkpoints")
    partial = checkpoints.begin(3)
    parts = ask(ranks, _save, role, found.rollouts, partial)
    trained, adapter = load_file(partial / "model.safetensors"), load_file(partial / ADAPTER)
    shutil.rmtree(partial / "adapter")
    (partial / "model.safetensors").unlink()  # as with trainer.save_contents=[state]
    settings = {"lora_rank": LORA.rank, "lora_alpha": LORA.alpha, "target_modules": list(LORA.targets)}
    config = {"actor_rollout_ref": {"model": {"path": str(base), "init": "pretrained", **settings}}}
    write_trainer_state(partial, TrainerState(3, 3, None, parts[0].updates, config))
    checkpoints.commit(partial, 3, [hashed(partial, name) for name in files_of(partial)], is_last=True)

    assert export([str(tmp_path / "run"), "--out", str(out)]) == 0
    exported = load_file(out / "model.safetensors")
    assert exported.keys() == trained.keys()
    for name, tensor in exported.items():
        rtol, atol = (0, 1e-7) if dtype == "float32" else (2**-8, 0)  # one rounding apart, at most
        torch.testing.assert_close(tensor, trained[name], rtol=rtol, atol=atol)
    assert sum(not t.equal(trained[n]) for n, t in exported.items()) <= len(adapter) // 2
    written = load_file(out / ADAPTER)
    assert written.keys() == adapter.keys() and all(tensor.equal(adapter[name]) for name, tensor in written.items())
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert not list(tmp_path.glob(".*"))

    base.rename(tmp_path / "moved")
    with pytest.raises(SystemExit):
        export([str(tmp_path / "run"), "--out", str(tmp_path / "again")])
    assert f"belong to the model {base}, which is no folder here; fix: --model=FOLDER" in capsys.readouterr().err
    assert export([str(tmp_path / "run"), "--out", str(tmp_path / "again"), "--model", str(tmp_path / "moved")]) == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(tensor.equal(exported[name]) for name, tensor in again.items())
