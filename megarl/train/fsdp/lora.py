"""Low-rank adapters through peft: they alone are trained, and what leaves the trainer is the merged model.

A and B are sharded along their rows as W is, so that a rank merges its own rows with its own rows of B and all of A.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from megarl.roles import Role
from megarl.weights.adapters import ALL_LINEAR, A, B, Lora, adapted_modules
from megarl.weights.fsdp_map import rows_of
from megarl.weights.hf_export import raise_everywhere, refusal_of
from megarl.weights.model_shape import ModelShape
from megarl.weights.shard import Segment, Shard

_BASE = ".base_layer"


def add_adapters(model: PreTrainedModel, lora: Lora, shape: ModelShape) -> None:
    """Freeze ``model`` and give its modules adapters, in float32, which hold anything."""
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=_ends(lora, shape)), model)
    found = set()
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.requires_grad_(True).data = parameter.data.float()
            found.add(name.removesuffix(f".{A}").removesuffix(f".{B}"))
    assert found == set(adapted_modules(shape, lora.targets)), "peft has adapters elsewhere than planned"


def _ends(lora: Lora, shape: ModelShape) -> list[str]:
    """Return the targets by name: what peft calls all-linear differs between families."""
    if ALL_LINEAR not in lora.targets:
        return list(lora.targets)
    return sorted({name.rpartition(".")[2] for name in adapted_modules(shape, lora.targets)})


def is_adapter(name: str) -> bool:
    """Return True for the name of an A or B."""
    return name.endswith((f".{A}", f".{B}"))


def name_without_adapter(name: str) -> str:
    """Return the name of a parameter in a model without adapters."""
    return name.replace(f"{_BASE}.", ".")


@torch.no_grad()
def fill_adapters(model: PreTrainedModel, part: int, num_parts: int) -> None:
    """Start A as peft does, uniformly, and B at zero.

    Each A has a generator of its own, seeded by its name, so that adapters are the same on every layout.
    """
    for name, parameter in adapters(model):
        rows = rows_of(len(parameter), part, num_parts)
        if name.endswith(A):
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
            drawn = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(seed))
            whole = (2 * drawn - 1) / math.sqrt(parameter.shape[1])
            parameter.to_local().copy_(whole[rows.start : rows.stop])
        else:
            parameter.to_local().zero_()


def adapters(model: PreTrainedModel) -> Iterator[tuple[str, DTensor]]:
    """Yield every A and B with its name."""
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            assert isinstance(parameter, DTensor), f"{name} is gathered"
            yield name, parameter


def adapter_parts(
    model: PreTrainedModel, part: int, num_parts: int, of: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Shard, Tensor]]:
    """Yield this rank's rows of what there is ``of`` every A and B, with its shard, of a tensor of its own name."""
    for name, parameter in adapters(model):
        rows = rows_of(len(parameter), part, num_parts)
        whole = of(parameter)
        assert isinstance(whole, DTensor)
        if rows:
            shape = (len(rows), *parameter.shape[1:])
            yield Shard(name, shape, 0, (Segment(name, rows.start, rows.stop),)), whole.to_local().detach()


class Merged(Mapping[str, Tensor]):
    """This rank's rows of the merged weights, W + scale * B A in float32 and then in W's dtype. Collective to make.

    A weight is merged when it is asked for, and only the last one is kept.
    """

    def __init__(self, base: Mapping[str, Tensor], model: PreTrainedModel, scale: float) -> None:
        self._base, self._scale = base, scale
        self._a: dict[str, Tensor] = {}
        self._b: dict[str, Tensor] = {}
        for name, parameter in adapters(model):
            if name.endswith(A):
                self._a[name.removesuffix(A) + "weight"] = parameter.full_tensor().detach()
            else:
                self._b[name.removesuffix(B) + "weight"] = parameter.to_local().detach()
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._a:
            return self._base[name]
        if self._last[0] != name:
            weight = self._base[name].detach()
            merged = weight.float() + self._scale * (self._b[name] @ self._a[name])
            self._last = (name, merged.to(weight.dtype))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def export_adapters(model: PreTrainedModel, role: Role, out: Path) -> None:
    """Write the adapters alone as peft reads them. Collective.

    The base model is named as the run's config names it. Raises ResourceError on every rank where the disk refuses it.
    """
    assert role.lora is not None
    whole = {name: p.full_tensor().detach().cpu() for name, p in adapters(model)}
    refusal, write = "", partial(write_adapters, whole, role.lora, role.shape, role.model.path, out)
    if dist.get_rank() == 0:
        refusal = refusal_of(out, write)
    raise_everywhere(refusal)


def write_adapters(whole: Mapping[str, Tensor], lora: Lora, shape: ModelShape, base: str | None, out: Path) -> None:
    """Write ``out`` as peft reads it: every A and B by its name in memory, and which model they belong to."""
    from peft import LoraConfig

    out.mkdir()
    named = {f"base_model.model.{_exported(name)}": tensor for name, tensor in whole.items()}
    save_file(named, out / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=_ends(lora, shape),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(str(out))


def _exported(name: str) -> str:
    """Return the name of an A or B in peft's files: without that of the adapter."""
    return name.replace(".default.", ".")
