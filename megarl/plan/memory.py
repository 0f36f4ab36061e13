"""Memory of every rank in every phase of a step: what is on its device, and what has moved to the host.

Parameters, gradients, optimizer state and engine weights are exact. What a pass keeps is counted tensor by tensor. The
rest, a few GiB, is assumed: ``assumed`` says what and why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Literal

from megarl.batching.plan import BatchPlan
from megarl.config.schema import PPOConfig
from megarl.parallel.layout import EngineLayout, layers_of_chunks
from megarl.plan.activations import Pass, chunk_bytes, pass_of, recompute_of, recomputed_bytes
from megarl.plan.devices import CPU, Device
from megarl.plan.fsdp import backward_moments, gathered_bytes
from megarl.plan.fsdp_activations import fsdp_pass
from megarl.plan.pipeline import Moment, moments
from megarl.plan.static import static_of
from megarl.roles import DTYPE_BYTES, Role, engine_layout, engines_share_devices
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import vllm_shards
from megarl.weights.reshard_plan import BUCKET_BYTES

GIB = 2**30
MIB = 2**20

RUNTIME_BYTES = 3 * GIB
CPU_RUNTIME_BYTES = 800 * MIB
SLEEPING_ENGINE_BYTES = 1 * GIB
ENGINE_WORK_BYTES = 3 * GIB
PROCESS_HOST_BYTES = 4 * GIB
LOGPROB_CHUNKS_BYTES = 4 * 64 * MIB
PUBLISH_BUCKETS_BYTES = 2 * 256 * MIB
CPU_KV_CACHE_BYTES = 1 * GIB

Awake = Literal["nothing", "weights", "all"]
"""What an engine that frees its memory has of it."""

_ASSUMED_OF_ENGINES = (
    f"{SLEEPING_ENGINE_BYTES / GIB:g} GiB that a sleeping engine keeps",
    f"{ENGINE_WORK_BYTES / GIB:g} GiB of an engine's own work beside weights and KV cache",
)


def assumed(has_engine: bool) -> tuple[str, ...]:
    """Return the plan's assumptions, in words."""
    return (
        f"{RUNTIME_BYTES / GIB:g} GiB a device for the CUDA context, NCCL and cuBLAS ({CPU_RUNTIME_BYTES / MIB:g} MiB "
        "a rank on CPU)",
        *(_ASSUMED_OF_ENGINES if has_engine else ()),
        f"{PROCESS_HOST_BYTES / GIB:g} GiB of host memory a process",
        "every micro-batch as long as the configuration allows; experts evenly loaded",
    )


@dataclass(frozen=True)
class Item:
    """Something that a rank holds in a phase, on its device or on the host."""

    name: str
    device_bytes: int = 0
    host_bytes: int = 0


@dataclass(frozen=True)
class Phase:
    """What rank ``rank`` holds in a phase: the one with most on its device.

    most_host_bytes: of any rank in this phase, which may be another one.
    """

    name: str
    rank: int
    items: tuple[Item, ...]
    most_host_bytes: int = 0

    @property
    def device_bytes(self) -> int:
        """All that is on the device."""
        return sum(item.device_bytes for item in self.items)

    @property
    def host_bytes(self) -> int:
        """All that has moved to the host, with the process itself."""
        return sum(item.host_bytes for item in self.items)


@dataclass(frozen=True)
class Engine:
    """A rank's part of the rollout engine. memory_bytes: all that it takes while awake.

    num_cached_tokens: tokens whose keys and values fit the cache of a replica.
    """

    weights_bytes: int
    cache_bytes: int
    memory_bytes: int
    bytes_per_token: int
    frees_memory: bool

    @property
    def num_cached_tokens(self) -> int:
        """Tokens whose keys and values fit the cache."""
        return max(0, self.cache_bytes) // self.bytes_per_token


@cache
def engine_weights_bytes(shape: ModelShape, engine: EngineLayout, dtype_bytes: int) -> int:
    """Return the bytes of the weights on one rank of an engine; of a family outside of the name map, of even parts."""
    numel = 0
    if not shape.is_mapped:
        return -(-sum(math.prod(size) for _, size in shape.tensors) * dtype_bytes // engine.tp)
    for shard in vllm_shards(shape, engine, 0):
        size = 1
        for rows in shard.shape:
            size *= rows
        numel += size
    return numel * dtype_bytes


def engine_of(c: PPOConfig, shape: ModelShape, device: Device) -> Engine:
    """Return a rank's part of the engine."""
    rollout, b = c.actor_rollout_ref.rollout, DTYPE_BYTES[c.actor_rollout_ref.model.dtype]
    tp = rollout.tensor_model_parallel_size
    weights = engine_weights_bytes(shape, engine_layout(c), b)
    per_token = 2 * shape.num_layers * max(1, shape.num_kv_heads // tp) * shape.head_dim * b
    if device.name == CPU:
        looked_up = 0 if shape.tied else -(-shape.vocab_size // tp) * shape.hidden_size * b
        # Its kernels compute with packed copies of all but the embedding (rollout/vllm_cpu_layers.py).
        memory = 2 * weights - looked_up + CPU_KV_CACHE_BYTES
        return Engine(weights, CPU_KV_CACHE_BYTES, memory, per_token, frees_memory=False)
    memory = int(rollout.gpu_memory_utilization * device.memory_bytes)
    cache_bytes = memory - weights - ENGINE_WORK_BYTES
    return Engine(weights, cache_bytes, memory, per_token, rollout.free_cache_engine and engines_share_devices(c))


def phases_of(
    roles: Sequence[Role],
    batches: Mapping[str, BatchPlan],
    engine: Engine | None,
    device: Device,
    ranks: Iterable[int],
    handed_bytes: int = 0,
) -> tuple[Phase, ...]:
    """Return every phase of a step as the rank with most on its device sees it.

    batches: of the trained roles. engine: None where there is none on these devices. handed_bytes: of weights that a
    rank keeps in host memory for engines in processes of their own.
    """
    worst: dict[str, Phase] = {}
    most_on_host: dict[str, int] = {}
    for rank in ranks:
        for phase in _phases_of_rank(roles, batches, engine, device, rank, handed_bytes):
            most_on_host[phase.name] = max(phase.host_bytes, most_on_host.get(phase.name, 0))
            if phase.name not in worst or phase.device_bytes > worst[phase.name].device_bytes:
                worst[phase.name] = phase
    return tuple(replace(phase, most_host_bytes=most_on_host[phase.name]) for phase in worst.values())


def _phases_of_rank(
    roles: Sequence[Role],
    batches: Mapping[str, BatchPlan],
    engine: Engine | None,
    device: Device,
    rank: int,
    handed_bytes: int,
) -> Iterator[Phase]:
    fused, trained = device.name != CPU, [role for role in roles if role.is_trained]

    # An engine in a process of its own is there, and rests, before a rank loads anything.
    beside = [replace(_runtime(device), name="engine process")] if engine and handed_bytes else []
    resting = _engine_items(engine, awake="nothing") if engine and handed_bytes else ()

    def phase(name: str, *used: Item, busy: str = "", update: bool = False, awake: Awake = "nothing") -> Phase:
        held = [i for role in roles for i in _held(role, rank, is_used=role.name == busy, is_updated=update)]
        engines = [*(_engine_items(engine, awake) if engine else ()), *_handed(handed_bytes, device)]
        items = [_runtime(device), *beside, *held, *engines, *used]
        return Phase(name, rank, tuple(item for item in items if item.device_bytes or item.host_bytes))

    yield _loading(roles, device, rank, [*beside, *resting])
    if engine:
        yield phase("generate", awake="all")
    for role in sorted(roles, key=lambda role: role.name != "reward_model"):  # rollouts are scored before all else
        yield phase(f"{role.name} scoring", *_scoring(role, rank, fused), busy=role.name)
    for role in reversed(trained):
        work = _updating(role, batches[role.name].num_accumulation_steps, rank, fused)
        yield phase(f"{role.name} update", *work, busy=role.name, update=True)
    if engine and not handed_bytes:
        buckets = Item("send and receive buckets", min(PUBLISH_BUCKETS_BYTES, 2 * engine.weights_bytes))
        tensors = Item("whole tensors", _whole_tensors_bytes(roles[0]))
        yield phase("publish", buckets, tensors, busy=roles[0].name, awake="weights")
    elif handed_bytes:
        yield phase("publish", busy=roles[0].name)


def engine_phase(engine: Engine, device: Device, rank: int) -> Phase:
    """Return what ``rank``, of an engine in processes of its own, holds all the time."""
    items = (_runtime(device), *_engine_items(engine, awake="all"))
    return Phase("engine", rank, items, sum(item.host_bytes for item in items))


def _handed(num_bytes: int, device: Device) -> Iterator[Item]:
    """Yield the weights that engines in processes of their own read, in host memory, which is the device on CPU."""
    is_cpu = device.name == CPU
    yield Item("weights for engines", num_bytes if is_cpu else 0, 0 if is_cpu else num_bytes)


def _whole_tensors_bytes(actor: Role) -> int:
    """Return the bytes of whole tensors that a rank has at a time where the engine takes its part of them itself."""
    sizes = [math.prod(size) * actor.dtype_bytes for _, size in actor.shape.tensors]
    return max(min(BUCKET_BYTES, sum(sizes)), *sizes) if sizes else 0


def _loading(roles: Sequence[Role], device: Device, rank: int, there: Sequence[Item]) -> Phase:
    """Return the moment of the start when most is there: roles are built one after the other, the engine after them.

    there: of an engine in a process of its own, which is there before.
    """
    moments = []
    for i, role in enumerate(roles):
        before = [item for earlier in roles[:i] for item in _built(earlier, rank, is_used=False)]
        items = (_runtime(device), *there, *before, *_built(role, rank, is_used=True))
        moments.append(Phase("load", rank, tuple(item for item in items if item.device_bytes or item.host_bytes)))
    return max(moments, key=lambda moment: moment.device_bytes)


def _built(role: Role, rank: int, *, is_used: bool) -> Iterator[Item]:
    """Yield what a rank holds of a model before its first use. is_used: while it is built."""
    held = _held(role, rank, is_used=is_used, is_updated=is_used)
    # FSDP has neither gradients nor optimizer state before the first update.
    return (item for item in held if not role.layout.is_fsdp or item.name == _item_name(role, "parameters"))


def _item_name(role: Role, part: str) -> str:
    return f"{role.name} {part}"


def _runtime(device: Device) -> Item:
    if device.name == CPU:
        return Item("python, torch, megatron, vllm", CPU_RUNTIME_BYTES)
    return Item("CUDA context, NCCL", RUNTIME_BYTES, PROCESS_HOST_BYTES)


def _engine_items(engine: Engine, awake: Awake) -> Iterator[Item]:
    """Yield what an engine holds. The cache comes back only once the actor whose weights were published has left."""
    if awake != "nothing" or not engine.frees_memory:
        yield Item("engine weights", engine.weights_bytes)
    if awake == "all" or not engine.frees_memory:
        yield Item("engine KV cache and work", max(0, engine.memory_bytes - engine.weights_bytes))
    else:
        yield Item("sleeping engine", SLEEPING_ENGINE_BYTES)


def _held(role: Role, rank: int, *, is_used: bool, is_updated: bool) -> Iterator[Item]:
    """Yield what a rank holds of a model, on the device or on the host. is_updated: where it is used, in an update."""
    static, stay = static_of(role, rank), role.residency
    parts: tuple[tuple[str, int, bool, bool, bool], ...] = (
        ("parameters", static.parameters, stay.param_offload, is_used, True),
        ("gradients", static.gradients, stay.grad_offload, is_used and is_updated, False),
        ("optimizer state", static.optimizer, stay.optimizer_offload, is_used and is_updated, True),
    )
    if stay.optimizer_on_host:
        parts = parts[:2]
        yield Item(_item_name(role, "optimizer state"), 0, static.optimizer)
    for name, size, leaves, is_needed, keeps_values in parts:
        if is_needed or not leaves:
            # What was on the host once keeps its pinned copy there.
            yield Item(_item_name(role, name), size, size if leaves and keeps_values else 0)
        else:
            yield Item(_item_name(role, name), 0, size if keeps_values else 0)


def _scoring(role: Role, rank: int, fused: bool) -> Iterator[Item]:
    """Yield what a pass without gradients needs at its widest place."""
    p, stage = pass_of(role, role.scoring.most_tokens, fused), role.layout.coordinates(rank).pp
    layers = chain.from_iterable(layers_of_chunks(role.shape.num_layers, role.layout, stage))
    if role.layout.is_fsdp:
        yield Item("gathered parameters", gathered_bytes(role, is_updated=False))
    yield Item("one layer at work", _layer_work_bytes(p, layers))
    if stage == role.layout.pp - 1 and not role.shape.value_head:
        yield Item("logits", _logits_bytes(p))


def _updating(role: Role, num_micro_batches: int, rank: int, fused: bool) -> Iterator[Item]:
    """Yield what a stage needs at the fullest moment of its forward and backward passes."""
    assert role.update is not None
    if role.layout.is_fsdp:
        yield from fsdp_update_items(role, role.update.most_tokens, cuda=fused)
        return
    p, stage = pass_of(role, role.update.most_tokens, fused), role.layout.coordinates(rank).pp
    recompute = recompute_of(role)
    chunks = range(role.layout.vpp)
    kept = [chunk_bytes(p, stage, chunk, recompute) for chunk in chunks]
    again = [recomputed_bytes(p, stage, chunk, recompute) for chunk in chunks]
    work = [_backward_work_bytes(p, stage, chunk) for chunk in chunks]

    def held_bytes(moment: Moment) -> int:
        return moment.bytes_of(kept) + again[moment.chunk] + work[moment.chunk]

    fullest = max(moments(role.layout, stage, num_micro_batches), key=held_bytes)
    yield Item(f"activations of {_count_of(fullest)}", fullest.bytes_of(kept))
    yield Item("one layer computed again", again[fullest.chunk])
    yield Item("backward pass at work", work[fullest.chunk])


def fsdp_update_items(role: Role, tokens: int, *, cuda: bool) -> Iterator[Item]:
    """Yield what a rank needs beside what it holds at the fullest moment of a backward pass over ``tokens`` on FSDP."""
    p = pass_of(role, tokens, cuda)
    layer_work = _layer_work_bytes(p, range(role.shape.num_layers))
    head_work = 0 if role.shape.value_head else _logits_bytes(p)
    found = backward_moments(role, fsdp_pass(role, tokens, cuda), layer_work=layer_work, head_work=head_work)
    fullest = max(found, key=lambda moment: moment.total)
    yield Item("gathered parameters", fullest.gathered)
    yield Item("gradients until they are reduced", fullest.gradients)
    yield Item("activations of 1 micro-batch", fullest.kept)
    yield Item("one layer computed again", fullest.again)
    yield Item("backward pass at work", fullest.work)


def _count_of(moment: Moment) -> str:
    """Return the number of micro-batches that a stage keeps, in words, or of forward passes of its chunks."""
    count = sum(moment.num_held)
    kind = "micro-batch" if len(moment.num_held) == 1 else "chunk pass"
    return f"{count} {kind}{'es' if count != 1 else ''}"


def _backward_work_bytes(p: Pass, stage: int, chunk: int) -> int:
    """Return the bytes of a chunk's backward pass at its widest place, a layer or the logits, beside the kept ones."""
    layer = _layer_work_bytes(p, layers_of_chunks(p.shape.num_layers, p.layout, stage)[chunk])
    if stage == p.layout.pp - 1 and chunk == p.layout.vpp - 1 and not p.shape.value_head:
        return max(layer, _logits_bytes(p) + _head_gradient_bytes(p))
    return layer


def _logits_bytes(p: Pass) -> int:
    """Return the bytes of a micro-batch's logits, or of their gradient, with what their log-probs need at a time."""
    numel = p.local_tokens * p.vocab
    work = min(LOGPROB_CHUNKS_BYTES, 4 * 4 * numel)
    if p.fused_head:  # no logits, but the hidden states of the tokens that count
        return work + p.local_tokens * p.shape.hidden_size * p.dtype_bytes
    return work + numel * p.dtype_bytes


def _head_gradient_bytes(p: Pass) -> int:
    """Return the bytes of a fused head's gradients beside its blocks: weight, and hidden states in float32."""
    if not p.fused_head:
        return 0
    return p.shape.hidden_size * (p.vocab * p.dtype_bytes + p.local_tokens * 4)


def _layer_work_bytes(p: Pass, layers: Iterable[int]) -> int:
    """Return the unkept bytes of any of ``layers`` at its widest place: residual, gathered input, projections."""
    shape, layout = p.shape, p.layout
    have_experts = {shape.has_experts(layer) for layer in layers}
    feed_forward = 4 * shape.ffn_size // layout.tp if False in have_experts else 0
    if True in have_experts:
        tokens_share = layout.expert_tp / (layout.tp if layout.sequence_parallel else 1)
        columns = 2 * shape.hidden_size + 4 * shape.expert_ffn_size // layout.expert_tp
        feed_forward = max(feed_forward, int(shape.experts_per_token * tokens_share * columns))
    attention = 3 * (p.queries + 2 * p.keys)
    return p.local_tokens * p.dtype_bytes * (2 * p.hidden + shape.hidden_size + max(feed_forward, attention))
