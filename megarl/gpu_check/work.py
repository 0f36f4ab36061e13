"""What the ranks of the checks do.

Shape suffixes: B rollouts, S sequence.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.parallel.environment import platform_name
from megarl.parallel.layout import EngineLayout, Layout
from megarl.ranks.publish import publisher_of
from megarl.rollout.vllm import VllmEngine, VllmSpec
from megarl.train.actor import Actor
from megarl.train.reference import Reference
from megarl.types import GenerationRequest, PolicyBatch, Sampling, Sequences
from megarl.verify.reference import TEMPERATURE
from megarl.verify.roles import TRAINING, role_on
from megarl.verify.work import GREEDY, PPO, backend_on_rank, prompts, score, update

_MAX_MODEL_LEN = 64
_KV_CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Speeds:
    """Tokens a second of all ranks together, and seconds of a publication."""

    update: float
    rollout: float
    publish_s: float


@dataclass(frozen=True)
class Slept:
    """Free bytes of the device while the engine is awake, asleep, and awake with its weights alone; what it held.

    alike: whether it answers after sleep and another publication as it did before.
    """

    awake: int
    asleep: int
    with_weights: int
    weights_bytes: int
    cache_bytes: int
    alike: bool


def logprobs(folder: Path, everything: Sequences) -> Tensor | None:
    """Return the log-probs [B, S] of a model on one device in float32."""
    return score(Reference(backend_on_rank(role_on(Layout(dist.get_world_size()), folder))), everything, TEMPERATURE)


def gradient_norm(folder: Path, layout: Layout, batch: PolicyBatch) -> float:
    """Return the norm of the first update's gradient."""
    actor = Actor(backend_on_rank(role_on(layout, folder, training=TRAINING)))
    (metrics,) = update(actor, batch, PPO).metrics
    return float(metrics["grad_norm"])


def answers(folder: Path, layout: Layout, engine_tp: int) -> list[list[int]]:
    """Return the greedy answers of an engine that was published to."""
    backend = backend_on_rank(role_on(layout, folder))
    engine = _engine(folder, engine_tp, dtype="float32")
    publisher_of(backend, engine, EngineLayout(engine_tp)).publish(1)
    return _answers(engine, backend.role.shape.vocab_size)


def slept(folder: Path) -> Slept:
    """Let an engine sleep and wake, and read the device's memory each time."""
    backend = backend_on_rank(role_on(Layout(1), folder))
    engine = _engine(folder, 1, dtype="float32", free_cache_engine=True)
    publisher = publisher_of(backend, engine, EngineLayout(1))
    publisher.publish(1)
    before, awake = _answers(engine, backend.role.shape.vocab_size), _free_bytes()
    weights_bytes = sum(parameter.nbytes for parameter in engine.parameters().values())
    engine.sleep()
    asleep = _free_bytes()
    engine.wake_weights()
    with_weights = _free_bytes()
    publisher.publish(2)
    engine.wake_up()
    alike = _answers(engine, backend.role.shape.vocab_size) == before
    return Slept(awake, asleep, with_weights, weights_bytes, _KV_CACHE_BYTES, alike)


@dataclass(frozen=True)
class Way:
    """How to compute. section: what differs from the defaults of Megatron's section. num_ranks: data-parallel ones."""

    fused_head: bool = False
    reproducible: bool = False
    enforce_eager: bool = False
    section: Mapping[str, Any] = field(default_factory=dict)
    num_ranks: int = 1


def speeds(folder: Path, batch: PolicyBatch, way: Way) -> Speeds:
    """Return what an update, a generation and a publication take, medians of three after one to warm up."""
    dtype = "bfloat16" if platform_name() == "cuda" else "float32"
    layout = Layout(way.num_ranks)
    role = role_on(layout, folder, dtype=dtype, training=TRAINING, fused_head=way.fused_head, **way.section)
    actor = Actor(backend_on_rank(role))
    update_s = _median_s(lambda: update(actor, batch, PPO))
    engine = _engine(folder, 1, dtype=dtype, reproducible=way.reproducible, enforce_eager=way.enforce_eager)
    publisher = publisher_of(actor.backend, engine, EngineLayout(1))
    publish_s = _median_s(lambda: publisher.publish(1))
    sampling = Sampling(n=8, temperature=1.0, max_tokens=32, ignore_eos=True)
    asked = [GenerationRequest(prompt, i) for i, prompt in enumerate(prompts(role.shape.vocab_size))]
    generate_s = _median_s(lambda: engine.generate(asked, sampling))
    num_generated = dist.get_world_size() * len(asked) * sampling.n * sampling.max_tokens
    return Speeds(int(batch.lengths_B.sum()) / update_s, num_generated / generate_s, publish_s)


def _engine(
    folder: Path,
    tp: int,
    *,
    dtype: str,
    free_cache_engine: bool = False,
    reproducible: bool = True,
    enforce_eager: bool = True,
) -> VllmEngine:
    spec = VllmSpec(str(folder), dtype, tp, _MAX_MODEL_LEN, max_num_seqs=32, enforce_eager=enforce_eager)
    return VllmEngine(
        replace(
            spec,
            kv_cache_bytes=_KV_CACHE_BYTES,
            free_cache_engine=free_cache_engine,
            reproducible=reproducible,
            disable_log_stats=True,
        )
    )


def _answers(engine: VllmEngine, vocab_size: int) -> list[list[int]]:
    asked = [GenerationRequest(prompt, 0) for prompt in prompts(vocab_size)]
    return [list(rollout.token_ids) for (rollout,) in engine.generate(asked, GREEDY)]


def _median_s(action: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        _finish()
        start = time.perf_counter()
        action()
        _finish()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _finish() -> None:
    if platform_name() == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def _free_bytes() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return int(free)
