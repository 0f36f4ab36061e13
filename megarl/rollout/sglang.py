"""An SGLang that samples while it is asked for more, in a process and an environment of its own.

SGLang starts its tensor-parallel ranks itself: this process is the one that they all hear, and it hands them whole
tensors, of which each takes its part. Checked with SGLang 0.5.23.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megarl.errors import PublishError
from megarl.parallel.environment import platform_name
from megarl.parallel.layout import EngineLayout
from megarl.rollout.engine import UNPUBLISHED, check_published, check_room
from megarl.rollout.engine_memory import PARTS, EngineMemory
from megarl.rollout.seeds import sample_seed
from megarl.rollout.served import Ask, Done, Take, samplings
from megarl.types import Rollout, Sampling

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine
    from torch.distributed import Store  # type: ignore[attr-defined] # torch doesn't list it

    from megarl.rollout.taking import WholeTensors

_POLL_S = 0.05
_IDLE_S = 60.0  # for a step that SGLang has begun ahead
# Not SGLang's own word for that. It sorts the tokens of a batch in which any request has a top_k, as a greedy one does,
# and gives each place in that order its noise: a sample would depend on whether a greedy one is sampled beside it.
_KEEP_ALL = (1 << 30) - 1
_CPU_CACHED_TOKENS = 65_536  # at most; on CUDA mem_fraction_static says how much


@dataclass(frozen=True)
class SglangSpec:
    """How to start an engine. Fields have the meaning of VllmSpec's; python: the interpreter that has SGLang."""

    python: str
    model_folder: str
    dtype: str
    tensor_parallel_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int | None
    gpu_memory_utilization: float
    enforce_eager: bool
    seed: int
    free_cache_engine: bool = False

    @property
    def layout(self) -> EngineLayout:
        """How the model is split over the ranks of the engine."""
        return EngineLayout(self.tensor_parallel_size)


class SglangStream:
    """A StreamingEngine of SGLang. weights: what every publication brings. store: that its ranks meet at.

    Log-probs are log_softmax(logits / temperature) of the sampled tokens, and log_softmax(logits) where sampling is
    greedy. SGLang doesn't renormalise them after top_p and top_k, so that training samples without either.
    """

    def __init__(self, spec: SglangSpec, weights: WholeTensors, store: Store) -> None:
        from sglang.srt.entrypoints.engine import Engine

        self.spec, self.weights, self._store = spec, weights, store
        self.policy_version = UNPUBLISHED
        self._engine = Engine(**_arguments(spec))
        self._memory = EngineMemory(_Sleeper(self._engine))
        self._taken: Take | None = None
        self._unfinished: dict[asyncio.Task[dict[str, Any]], tuple[int, int]] = {}

    def add(self, ask: Ask) -> None:
        """Sample the rollouts of a prompt from now on.

        Raises DataError for a prompt that leaves no room to answer, PublishError before the first publication.
        """
        check_published(self.policy_version)
        self._wake()
        prompt = list(ask.request.token_ids)
        check_room(len(prompt), ask.sampling.max_tokens, self.spec.max_model_len)
        of_each = samplings(ask.sampling)
        for index in ask.indices:
            params = sampling_params(of_each[index], sample_seed(ask.request.seed, index))
            answer = self._engine.async_generate(input_ids=prompt, sampling_params=params, return_logprob=True)
            self._unfinished[self._engine.loop.create_task(answer)] = (ask.number, index)

    @property
    def is_busy(self) -> bool:
        """Whether rollouts are unfinished."""
        return bool(self._unfinished)

    def step(self) -> list[Done]:
        """Return the rollouts that have ended, after a short while where none has."""
        waiting = asyncio.wait(self._unfinished, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED)
        ended, _ = self._engine.loop.run_until_complete(waiting)
        return [
            Done(*self._unfinished.pop(task), rollout_of(task.result()))
            for task in sorted(ended, key=self._unfinished.__getitem__)
        ]

    def take(self, order: Take) -> None:
        """Change the weights, and forget all that was computed with others. Unfinished rollouts go on with these."""
        self.weights.check(order)
        self._memory.take_weights()
        if self.is_busy:
            self._run(self._pause())
        # SGLang changes nothing outside of these two, and says so in its answer alone.
        self._engine.begin_weight_update()
        for tensors in self.weights.buckets(order):
            _require(self._engine.update_weights_from_tensor(list(tensors.items()), flush_cache=False))
        _require(self._engine.flush_cache())
        self._engine.end_weight_update()
        self.weights.check(order)
        self._run(self._go_on(order.policy_version))
        self.policy_version, self._taken = order.policy_version, order
        self._memory.has_lost_weights = False

    def rest(self) -> None:
        """Give up weights and KV cache, if the spec says so. The weights are taken once more where they are asked for.

        Only CUDA has memory to give back; on CPU the same is asked of SGLang, and changes nothing.
        """
        if self.spec.free_cache_engine:
            self._memory.give_back()

    def _wake(self) -> None:
        """Have all memory, with the weights that were taken last: the trainer's memory still has them."""
        if self._memory.has_lost_weights:
            assert self._taken is not None
            self.take(self._taken)
        self._memory.take_all()

    async def _pause(self) -> None:
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        await self._engine.tokenizer_manager.pause_generation(PauseGenerationReqInput(mode="retract"))

    async def _go_on(self, policy_version: int) -> None:
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput, UpdateWeightVersionReqInput

        stamp = UpdateWeightVersionReqInput(new_version=str(policy_version), abort_all_requests=False)
        await self._engine.tokenizer_manager.update_weight_version(stamp)
        if self.is_busy:
            await self._engine.tokenizer_manager.continue_generation(ContinueGenerationReqInput())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self._engine.loop.run_until_complete(work)


@dataclass(frozen=True)
class _Sleeper:
    """SGLang, as EngineMemory puts it to sleep and wakes it."""

    engine: Engine

    def sleep(self, level: int) -> None:
        """Unmap all parts, of which it keeps no copy, once it has ended what it does: that it takes for granted."""
        flushed = self.engine.tokenizer_manager.flush_cache(timeout_s=_IDLE_S)
        _require(self.engine.loop.run_until_complete(flushed))
        self.engine.release_memory_occupation(list(PARTS))

    def wake_up(self, tags: list[str]) -> None:
        """Map some parts again."""
        self.engine.resume_memory_occupation(tags)


def sampling_params(sampling: Sampling, seed: int) -> dict[str, Any]:
    """Return SGLang's parameters of one rollout."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": _KEEP_ALL if sampling.top_k is None else sampling.top_k,
        "max_new_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "sampling_seed": seed,
    }


def rollout_of(answer: Mapping[str, Any]) -> Rollout:
    """Return the Rollout of an answer of SGLang's. Raises PublishError for one that it broke off."""
    told = answer["meta_info"]
    finish_reason = told["finish_reason"]["type"]
    if finish_reason not in ("stop", "length"):
        raise PublishError(f"SGLang broke a rollout off: {told['finish_reason']}")
    logprobs = tuple(float(logprob) for logprob, _token, _text in told["output_token_logprobs"])
    first, *others = ((span["start"], int(span["version"])) for span in told["weight_versions"])
    return Rollout(tuple(answer["output_ids"]), logprobs, finish_reason, first[1], tuple(others))


def sglang_environment(tensor_parallel_size: int) -> dict[str, str]:
    """Return the variables of an SGLang's processes: its ranks meet at the store of MASTER_ADDR and MASTER_PORT."""
    # By torch's protocol for who has a store, or the first rank would open one on every interface of the node.
    meeting = {
        "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": "env://",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    if platform_name() != "cpu":
        return meeting
    cores = sorted(os.sched_getaffinity(0))
    bound = [str(cores[rank % len(cores)]) for rank in range(tensor_parallel_size)]
    return meeting | {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_CPU_OMP_THREADS_BIND": "|".join(bound)}


def _arguments(spec: SglangSpec) -> dict[str, Any]:
    return {
        "model_path": spec.model_folder,
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "load_format": "dummy",
        "dtype": spec.dtype,
        "tp_size": spec.tensor_parallel_size,
        "context_length": spec.max_model_len,
        "max_running_requests": spec.max_num_seqs,
        "chunked_prefill_size": spec.max_num_batched_tokens,
        "random_seed": spec.seed,
        "enable_deterministic_inference": True,  # without it seeds of requests are ignored
        "disable_cuda_graph": spec.enforce_eager,
        "log_level": "error",
        "sleep_on_idle": True,  # or its ranks would ask for work all the time, on cores that others need
        **_platform_arguments(spec),
    }


def _platform_arguments(spec: SglangSpec) -> dict[str, Any]:
    if platform_name() == "cpu":
        return {
            "device": "cpu",
            "attention_backend": "torch_native",
            "sampling_backend": "pytorch",
            "disable_cuda_graph": True,
            "disable_overlap_schedule": True,
            "mem_fraction_static": 0.3,
            "max_total_tokens": min(_CPU_CACHED_TOKENS, spec.max_num_seqs * spec.max_model_len),
        }
    return {"mem_fraction_static": spec.gpu_memory_utilization, "enable_memory_saver": spec.free_cache_engine}


def _require(answer: tuple[bool, str] | Any) -> None:
    """Raise PublishError where SGLang says that it has done nothing."""
    is_done, why = answer if isinstance(answer, tuple) else (answer.success, getattr(answer, "message", ""))
    if not is_done:
        raise PublishError(f"SGLang refused weights: {why}")
