"""What waits in host memory is gone from the device, and comes back bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megarl.algorithm.loss_specs import ValueLossSpec
from megarl.config.build import build_config
from megarl.config.schema import SFTConfig
from megarl.parallel.layout import Layout
from megarl.ranks.spec import RankSpec
from megarl.ranks.work import SaveWork
from megarl.ranks.worker import KINDS, Worker
from megarl.roles import ModelFacts, Role, Training, roles_of, with_total_steps
from megarl.train.megatron.backend import MegatronBackend
from megarl.types import Metrics, PolicyBatch, ValueBatch
from megarl.verify.pool import RankPool
from megarl.verify.reference import random_sequences
from megarl.verify.roles import TRAINING, role_on
from megarl.verify.work import PPO, backend_on_rank, score, share, update
from megarl.weights.model_shape import read_model_shape
from tests.dist.parity import SFT, Piece, pieces
from tests.dist.tiny_models import VOCAB_SIZE, save_tiny_model
from tests.unit.composed_configs import composed_values

LENGTHS = (9, 12, 12, 7, 16, 5, 9, 4)
LEARNING = replace(TRAINING, lr=1e-3)
POLICY_LOSS, VALUE_LOSS = replace(PPO, temperature=1.0), ValueLossSpec(0.3, "token-mean")
TP2_PP2, DP2 = Layout(4, tp=2, pp=2, sequence_parallel=True), Layout(2)
PP2_VPP2 = Layout(2, pp=2, vpp=2)
EVERYTHING = ("param_offload", "grad_offload", "optimizer_offload")
NUM_ROUNDS = 3


@dataclass(frozen=True)
class Held:
    """Bytes of the storages that a role holds on its device, each storage once."""

    parameters: int
    gradients: int
    optimizer: int


NOTHING = Held(0, 0, 0)


@dataclass(frozen=True)
class Round:
    """What roles said on the ranks that report results, and the metrics of the steps of actor and critic."""

    scores: dict[str, Tensor | None]
    metrics: dict[str, tuple[Metrics, ...]]


@dataclass(frozen=True)
class Lived:
    """rounds: of a run. weights: of the actor afterwards. resting, used: what each role held between and in uses."""

    rounds: list[Round]
    weights: list[Piece]
    resting: dict[str, list[Held]]
    used: dict[str, Held]


def _live(roles: tuple[Role, ...], batch: PolicyBatch, values: ValueBatch) -> Lived:
    """Live through the rounds of a run on a rank."""
    backends = {role.name: backend_on_rank(role) for role in roles}
    models = {name: KINDS[name](backend) for name, backend in backends.items()}
    resting = {name: [_held(backend)] for name, backend in backends.items()}
    rounds = []
    for _ in range(NUM_ROUNDS):
        rounds.append(_round(models, batch, values))
        for name, backend in backends.items():
            resting[name].append(_held(backend))
    used = {}
    for name, backend in backends.items():
        with backend.updating() if backend.role.is_trained else backend.resident():
            used[name] = _held(backend)
    actor = backends["actor"]
    with actor.resident():
        return Lived(rounds, pieces(actor, actor.parameters()), resting, used)


def _round(models: dict[str, Any], batch: PolicyBatch, values: ValueBatch) -> Round:
    scores = {name: score(model, batch) for name, model in models.items()}
    # Two steps: the one after the first finds the state that it left.
    asked = {"actor": (batch, POLICY_LOSS), "critic": (values, VALUE_LOSS)}
    return Round(scores, {name: update(models[name], *of_role, 2).metrics for name, of_role in asked.items()})


def _held(backend: MegatronBackend) -> Held:
    """Measure what a role holds, looking for it where Megatron keeps it."""
    optimizer: Any = backend.optimizer
    weights: list[Tensor] = list(backend.model.own_parameters())
    if optimizer is None:
        return Held(_num_bytes(weights, ()), 0, 0)
    buffers = [buffer for ddp in optimizer.chunks for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]
    weights += [bucket.param_data for buffer in buffers for bucket in buffer.buckets if bucket.param_data is not None]
    gradients = [bucket.grad_data for buffer in buffers for bucket in buffer.buckets]
    state = [parameter for group in optimizer.inner.param_groups for parameter in group["params"]]
    for inner in optimizer.inner.chained_optimizers:
        state += [t for values in inner.optimizer.state.values() for t in (values["exp_avg"], values["exp_avg_sq"])]
    return Held(_num_bytes(weights, ()), _num_bytes(gradients, ()), _num_bytes(state, weights))


def _num_bytes(tensors: Iterable[Tensor], without: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().size() for tensor in tensors}
    for tensor in without:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(storages.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offload")
    save_tiny_model("qwen2-tied", path, num_hidden_layers=4)  # an embedding on two stages, and biases
    return path


@pytest.fixture(scope="module")
def batches() -> tuple[PolicyBatch, ValueBatch]:
    generator = torch.Generator().manual_seed(1)
    rows = random_sequences(LENGTHS, VOCAB_SIZE, generator)
    noise = [torch.randn(rows.tokens_BS.shape, generator=generator) * rows.mask_BS for _ in range(5)]
    old_BS, ref_BS = -noise[0].abs(), -noise[1].abs()
    policy = PolicyBatch(**vars(rows), advantages_BS=noise[2], old_logprobs_BS=old_BS, ref_logprobs_BS=ref_BS)
    return policy, ValueBatch(**vars(rows), values_BS=noise[3], returns_BS=noise[4])


LAYOUTS = {"tp2_pp2+sp": TP2_PP2, "dp2": DP2, "pp2_vpp2": PP2_VPP2}
OPTIMIZERS = {"distributed_optimizer": True, "replicated_optimizer": False}
# Each optimizer and each dtype once; all others are long.
QUICK = {("dp2", "bfloat16", "distributed_optimizer")}


@pytest.mark.parametrize(
    ("layout", "dtype", "distributed"),
    [
        pytest.param(
            LAYOUTS[case[0]],
            case[1],
            OPTIMIZERS[case[2]],
            id="-".join(case),
            marks=() if case in QUICK else pytest.mark.long,
        )
        for case in product(LAYOUTS, ("float32", "bfloat16"), OPTIMIZERS)
    ],
)
def test_roles_that_leave_their_device_between_uses_say_and_learn_the_same_to_the_bit(
    ranks: RankPool,
    folder: Path,
    batches: tuple[PolicyBatch, ValueBatch],
    layout: Layout,
    dtype: str,
    distributed: bool,
) -> None:
    def role(name: str, training: Training | None, offload: bool) -> Role:
        section = dict.fromkeys(EVERYTHING, offload) | {"use_distributed_optimizer": distributed}
        return role_on(layout, folder, name, dtype=dtype, training=training, **section)

    kept_on_ranks, offloaded_on_ranks = (
        ranks.run(
            _live,
            (role("actor", LEARNING, offload), role("ref", None, offload), role("critic", LEARNING, offload)),
            *batches,
            world_size=layout.world_size,
        )
        for offload in (False, True)
    )
    for kept, offloaded in zip(kept_on_ranks, offloaded_on_ranks, strict=True):
        _assert_same(kept, offloaded)
        for name, resting in offloaded.resting.items():
            assert set(resting) == {NOTHING}, name
            assert offloaded.used[name] == kept.used[name] == kept.resting[name][-1], name
            assert kept.used[name].parameters > 0, name
        assert all(min(kept.used[r].gradients, kept.used[r].optimizer) > 0 for r in ("actor", "critic"))


def _assert_same(one: Lived, other: Lived) -> None:
    for kept, offloaded in zip(one.rounds, other.rounds, strict=True):
        assert kept.metrics == offloaded.metrics
        for name, expected in kept.scores.items():
            found = offloaded.scores[name]
            assert found is expected is None or found.equal(expected), name
    for expected, found in zip(one.weights, other.weights, strict=True):
        assert found.values.equal(expected.values), found.name


def _work(roles: dict[str, Role], out: Path, batch: PolicyBatch) -> dict[str, list[Metrics]]:
    """Let a Worker of each role take three optimizer steps, with an evaluation after each, and save."""
    told: dict[str, list[Metrics]] = {}
    for name, role in roles.items():
        worker = Worker(RankSpec((role,), seed=0, hang_timeout_s=60.0), torch.device("cpu"))
        actor: Any = worker.roles["actor"]
        told[name] = [_step(actor, batch) for _ in range(3)]
        worker.save(SaveWork(str(out / name), models=True, state=False, in_background=False))
        assert (_held(actor.backend) == NOTHING) == (name == "offloaded")
        assert _keeps_logits(actor.backend, batch) == (name != "fused")
        worker.shutdown(None)
    return told


def _keeps_logits(backend: MegatronBackend, batch: PolicyBatch) -> bool:
    """Return whether the last stage's output is as wide as this rank's vocabulary, not as the hidden states."""
    rows, micros = share(backend.role, batch)
    widths = backend.forward(backend.pack(rows, micros), lambda _, output: output.tensor.shape[-1])
    return backend.role.shape.hidden_size not in widths if widths else not backend.role.fused_head


def _step(actor: Any, batch: PolicyBatch) -> Metrics:
    (metrics,), logprobs_BS = update(actor, batch, SFT).metrics, score(actor, batch)
    return metrics if logprobs_BS is None else metrics | {"evaluation": float(logprobs_BS.sum())}


@pytest.mark.long
def test_a_worker_trains_evaluates_and_saves_the_same_whether_or_not_it_offloads_or_fuses_its_head(
    ranks: RankPool, folder: Path, batches: tuple[PolicyBatch, ValueBatch], tmp_path: Path
) -> None:
    changes: dict[str, object] = {
        "model.path": str(folder),
        "trainer.n_gpus_per_node": 4,
        "megatron.tensor_model_parallel_size": 2,
        "megatron.pipeline_model_parallel_size": 2,
        "data.micro_batch_size_per_gpu": 2,
        "optim.lr": 1e-3,
        "lr_scheduler.warmup_steps": 0,
    }
    offload = {f"megatron.{key}": True for key in EVERYTHING}
    fused = {"model.use_fused_kernels": True}

    def role(**own: object) -> Role:
        def find(facts: ModelFacts) -> ModelFacts:
            return replace(facts, known_shape=read_model_shape(folder), folder=str(folder))

        config = build_config(SFTConfig, composed_values("sft_trainer", **changes, **own))
        (actor,) = with_total_steps(config, roles_of(config, find), 10)
        return actor

    roles = {name: role(**own) for name, own in {"kept": {}, "offloaded": offload, "fused": fused}.items()}
    answers = ranks.run(_work, roles, tmp_path, batches[0])
    for answer in answers:
        assert answer["offloaded"] == answer["kept"]
        for metrics, expected in zip(answer["fused"], answer["kept"], strict=True):
            assert metrics == pytest.approx(expected, rel=2e-2)
    kept, offloaded, start = (
        load_file(path / "model.safetensors") for path in (tmp_path / "kept", tmp_path / "offloaded", folder)
    )
    assert [name for name, tensor in kept.items() if not tensor.equal(offloaded[name])] == []
    assert any(not tensor.equal(start[name].bfloat16()) for name, tensor in kept.items())
