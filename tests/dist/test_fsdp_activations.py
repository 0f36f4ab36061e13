"""The plan says within 2 % what a forward pass on FSDP keeps, and never less than a backward pass takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from megarl.batching.pack import MicroBatch
from megarl.parallel.layout import Layout
from megarl.plan.fsdp_activations import fsdp_pass, kept_bytes
from megarl.plan.memory import fsdp_update_items
from megarl.plan.static import static_of
from megarl.roles import Role
from megarl.train.fsdp.backend import FsdpBackend
from megarl.train.fsdp.build import sharded_modules
from megarl.train.fsdp.model import FsdpModel
from megarl.train.output import ModelOutput
from megarl.types import Sequences
from megarl.verify.pool import RankPool
from megarl.verify.roles import TRAINING, role_on
from megarl.verify.work import backend_on_rank
from megarl.weights.adapters import Lora
from tests.dist.live_bytes import LiveBytes
from tests.dist.test_activations import EXPERTS, SIZES, _batch

TOLERANCE = 0.02
# On tiny models: layers and copies of logits that are not all there at once weigh much.
MOST_BEYOND = 1.4
TWO, ULYSSES = Layout(2, fsdp=2), Layout(2, fsdp=2, cp=2)
QWEN2, QWEN3, LLAMA, MOE = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "Qwen3MoeForCausalLM")
MODEL_TYPES = {QWEN2: "qwen2", QWEN3: "qwen3", LLAMA: "llama", MOE: "qwen3_moe"}
ALL, SOME = Lora(8, 16, ("all-linear",)), Lora(8, 16, ("q_proj", "down_proj"))

# Model, layout, and what differs from a packed bfloat16 pass of an actor that keeps all activations.
CASES: dict[str, tuple[str, Layout, dict[str, Any]]] = {
    "packed": (QWEN3, TWO, {}),
    "packed, float32": (QWEN2, TWO, {"dtype": "float32"}),
    "padded": (QWEN3, TWO, {"packed": False}),
    "checkpointing": (QWEN3, TWO, {"again": True}),
    "checkpointing, float32": (LLAMA, TWO, {"again": True, "dtype": "float32"}),
    "a fused head": (QWEN3, TWO, {"fused_head": True}),
    "Ulysses": (QWEN3, ULYSSES, {}),
    "Ulysses, checkpointing": (QWEN2, ULYSSES, {"again": True}),
    "Ulysses, padded": (QWEN3, ULYSSES, {"packed": False}),
    "experts": (MOE, TWO, {}),
    "experts, float32": (MOE, TWO, {"dtype": "float32", "again": True}),
    "a critic": (QWEN3, TWO, {"name": "critic"}),
    "adapters": (QWEN3, TWO, {"lora": ALL}),
    "adapters of some modules": (QWEN3, TWO, {"lora": SOME}),
    "adapters, checkpointing": (LLAMA, TWO, {"lora": ALL, "again": True, "fused_head": True}),
    "layers stay gathered": (QWEN3, TWO, {"reshard_after_forward": False}),
}
QUICK = ("Ulysses", "experts")


def _passes(roles: list[Role], batch: Sequences) -> list[tuple[int, int, int, int]]:
    """Return of each role what a forward pass keeps and what a backward pass takes at most, each with the plan's."""
    return [_of_pass(role, batch) for role in roles]


def _of_pass(role: Role, batch: Sequences) -> tuple[int, int, int, int]:
    backend = backend_on_rank(role)
    assert isinstance(backend, FsdpBackend)
    model = backend.model
    (micro,) = backend.pack(batch, [range(len(batch))])
    _forward(model, micro).backward()  # FSDP's own buffers are there from the first pass on
    _reshard(model)
    for parameter in model.own_parameters():
        parameter.grad = None
    gathered = set(_gathered(model))
    with LiveBytes() as live:
        loss = _forward(model, micro)
        kept = live.now(without=gathered)
        loss.backward()
        del loss
        _forward(model, micro).backward()  # the second micro-batch of a step finds gradients of the first
    tokens = micro.tokens.numel() * role.layout.cp
    items = sum(item.device_bytes for item in fsdp_update_items(role, tokens, cuda=False))
    planned = items + static_of(role, dist.get_rank()).gradients
    return kept, kept_bytes(fsdp_pass(role, tokens, cuda=False)), live.peak, planned


def _forward(model: FsdpModel, micro: MicroBatch) -> Tensor:
    def told(_: MicroBatch, output: ModelOutput) -> tuple[Tensor, None]:
        scores = output.values() if model.role.shape.value_head else output.logprobs(1.0).logprobs_N
        return scores.sum(), None

    model.root.train()
    loss: Tensor = model.root(partial(model._read, told, micro), **model._inputs(micro))[0]
    return loss


def _reshard(model: FsdpModel) -> None:
    for module in sharded_modules(model.root):
        module.reshard()


def _gathered(model: FsdpModel) -> Iterator[int]:
    """Yield the addresses of the storages that gathered parameters have whenever there are any."""
    for module in sharded_modules(model.root):
        group: Any = module._get_fsdp_state()._fsdp_param_group
        for parameter in group.fsdp_params:
            yield from (tensor.untyped_storage()._cdata for tensor in parameter.all_gather_outputs)


def _role(folder: Path, architecture: str, layout: Layout, ways: dict[str, Any]) -> Role:
    folder.mkdir(exist_ok=True)
    experts = EXPERTS if architecture == MOE else {}
    config = {"architectures": [architecture], "model_type": MODEL_TYPES[architecture], **SIZES, **experts}
    (folder / "config.json").write_text(json.dumps(config))
    given = {"dtype": "bfloat16", "name": "actor", "lora": None, "again": False} | ways
    name, lora, again = given.pop("name"), given.pop("lora"), given.pop("again")
    role = role_on(layout, folder, name, training=TRAINING, enable_gradient_checkpointing=again, **given)
    return replace(role, lora=lora, model=replace(role.model, init="random"))


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param(tuple(name for name in CASES if name not in QUICK), id="all", marks=pytest.mark.long),
    ],
)
def test_a_pass_keeps_the_planned_bytes_and_takes_no_more_than_planned(
    ranks: RankPool, tmp_path: Path, names: tuple[str, ...]
) -> None:
    roles = [_role(tmp_path / str(i), *CASES[name]) for i, name in enumerate(names)]
    for answers in ranks.run(_passes, roles, _batch(), world_size=2):
        for name, (kept, planned, peak, planned_peak) in zip(names, answers, strict=True):
            assert planned == pytest.approx(kept, rel=TOLERANCE), name
            assert peak <= planned_peak <= MOST_BEYOND * peak, (name, peak, planned_peak)
