"""A tensor-parallel vLLM in the trainer's own ranks.

vLLM is imported when an engine is built, not before: the import takes ten seconds or more, and only workers need it.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megarl.errors import PublishError
from megarl.parallel.environment import apply_environment, platform_name
from megarl.parallel.importing import heavy_imports
from megarl.parallel.layout import EngineLayout
from megarl.rollout.engine import UNPUBLISHED, check_room
from megarl.rollout.engine_memory import EngineMemory
from megarl.rollout.seeds import sample_seed
from megarl.rollout.served import samplings
from megarl.rollout.vllm_queue import without_queue
from megarl.types import GenerationRequest, Rollout, Sampling

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import LLM, LLMEngine, RequestOutput, SamplingParams


# Variables of vLLM that choose another all-reduce than NCCL's.
_OTHER_ALL_REDUCES = (
    "VLLM_ALLREDUCE_USE_SYMM_MEM",
    "VLLM_ALLREDUCE_USE_FLASHINFER",
    "VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC",
    "VLLM_USE_NCCL_SYMM_MEM",
)


@dataclass(frozen=True)
class VllmSpec:
    """How to build one rank of an engine.

    model_folder: a Hugging Face folder, read for its config alone. dtype: ``float32`` or ``bfloat16``.
    expert_parallel_size: 1, or as many ranks as there are: each then has some of a layer's experts whole.
    max_model_len: tokens of prompt and response together. max_num_batched_tokens: None leaves it to vLLM; at least
    max_model_len on CPU, where no prefill is cut.
    gpu_memory_utilization: share of the device's memory that weights, activations and KV cache may take.
    kv_cache_bytes: size of this rank's KV cache instead; None on CPU is VLLM_CPU_KVCACHE_SPACE.
    free_cache_engine: whether ``sleep`` frees memory. reproducible: whether each sample has a seed of its own.
    """

    model_folder: str
    dtype: str = "bfloat16"
    tensor_parallel_size: int = 1
    max_model_len: int = 1536
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.6
    enforce_eager: bool = False
    seed: int = 0
    disable_log_stats: bool = False
    free_cache_engine: bool = True
    reproducible: bool = True
    kv_cache_bytes: int | None = None
    expert_parallel_size: int = 1

    @property
    def layout(self) -> EngineLayout:
        """How the model is split over the ranks of the engine."""
        return EngineLayout(self.tensor_parallel_size, self.expert_parallel_size)


class VllmEngine:
    """One rank of a vLLM replica, as ``RolloutEngine`` describes it.

    ``torch.distributed`` is initialised, and RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, before
    it is built; all ranks of the world build theirs together. Weights start random: they always come by publishing.

    On CPU sleeping and waking have no effect (vLLM can't free host memory), nor has ``enforce_eager``: nothing is
    compiled there.
    """

    def __init__(self, spec: VllmSpec) -> None:
        self._spec = spec
        self._policy_version = UNPUBLISHED
        self._llm = _start(spec)
        self._memory = EngineMemory(self._llm)
        self._can_sleep = spec.free_cache_engine and platform_name() == "cuda"
        self._model: Any
        [self._model] = self._llm.apply_model(lambda model: model)
        self._parameters = {name: parameter.data for name, parameter in self._model.named_parameters()}

    @property
    def policy_version(self) -> int:
        """Number of the last publication, or ``UNPUBLISHED``."""
        return self._policy_version

    @property
    def stepped(self) -> LLMEngine:
        """vLLM's own engine, for who adds requests and takes its steps one by one, on all ranks alike."""
        return self._llm.llm_engine

    @property
    def has_lost_weights(self) -> bool:
        """Whether ``sleep`` gave up the weights, and none have been published since."""
        return self._memory.has_lost_weights

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[tuple[Rollout, ...]]:
        """Return ``sampling.n`` rollouts for each request, and a greedy one if asked, in the order of ``requests``.

        Log-probs are those of the distribution that was sampled from: log_softmax(logits / temperature), and after
        top_k and top_p the kept tokens renormalised, so that dropped ones count for nothing. Greedy sampling
        (temperature 0) ignores both and reports log_softmax(logits), as if the temperature were 1.

        A response ends at ``stop_token_ids``, and unless ``ignore_eos`` at the end-of-sequence tokens that the model's
        folder names.
        """
        if self._policy_version == UNPUBLISHED:
            raise PublishError("generate was called before weights were published: the engine's weights are random")
        if self.has_lost_weights:
            raise PublishError("generate was called after sleep, which gives up the weights, and before a publication")
        self.check_lengths(requests, sampling)
        if not requests:
            return []
        # One vLLM request a sample: vLLM's own n refuses groups of greedy samples.
        samples = samplings(sampling)
        prompts = [{"prompt_token_ids": list(r.token_ids)} for r in requests for _ in samples]
        seeds = [sample_seed(r.seed, i) for r in requests for i in range(len(samples))]
        is_seeded = self._spec.reproducible
        params = [
            sampling_params(s, seed if is_seeded else None)
            for s, seed in zip(itertools.cycle(samples), seeds, strict=False)
        ]
        with nullcontext() if is_seeded else common_noise(seeds):
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        rollouts = [rollout_of(output, self._policy_version) for output in outputs]
        return [tuple(rollouts[i : i + len(samples)]) for i in range(0, len(rollouts), len(samples))]

    def parameters(self) -> dict[str, Tensor]:
        """Return this rank's weight shards by vLLM's parameter names, to be written in place; tied ones once."""
        return dict(self._parameters)

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> frozenset[str]:
        """Have vLLM's loader of the model take its part of whole tensors; return the parameters that have theirs."""
        return frozenset(self._model.load_weights(tensors) or ())

    def publish_done(self, policy_version: int) -> None:
        """Forget the KV cache of older weights and stamp ``policy_version`` on every later rollout.

        On CPU, pack the weights for its kernels, which compute with packed copies.
        """
        if platform_name() == "cpu":
            self._llm.collective_rpc("pack_weights")
        if not self._llm.reset_prefix_cache():
            raise PublishError("vLLM kept its prefix cache, so requests are still running while weights change")
        self._policy_version, self._memory.has_lost_weights = policy_version, False

    def sleep(self) -> None:
        """Free the memory of weights and KV cache, on CUDA with ``free_cache_engine``. The weights' values are gone."""
        if self._can_sleep:
            self._memory.give_back()

    def wake_weights(self) -> None:
        """Have memory for the weights again, at the addresses they had."""
        self._memory.take_weights()

    def wake_up(self) -> None:
        """Have memory for weights and KV cache again."""
        self._memory.take_all()

    def shutdown(self) -> None:
        """Release the model, the KV cache and vLLM's own groups."""
        from vllm.distributed import destroy_model_parallel

        self._parameters.clear()
        self._model = None
        # Not engine_core.shutdown(): it ends the default process group as well, which belongs to the trainer.
        self._llm.llm_engine.model_executor.shutdown()
        destroy_model_parallel()

    def check_lengths(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> None:
        """Raise DataError for a prompt that leaves no room to answer."""
        longest = max((len(r.token_ids) for r in requests), default=0)
        check_room(longest, sampling.max_tokens, self._spec.max_model_len)


@contextmanager
def common_noise(seeds: Sequence[int]) -> Iterator[None]:
    """Have all ranks of a replica draw the same noise, by the seeds of its samples, and the trainer's generators rest.

    vLLM draws from torch's default generators, or the seeds that it draws from from NumPy's: each rank of a replica
    samples for itself, and the trainer leaves those of each rank in another state.
    """
    import numpy
    import torch

    digest = hashlib.blake2b(b"".join(seed.to_bytes(8, "little") for seed in seeds), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1
    devices = [torch.cuda.current_device()] if platform_name() == "cuda" else []
    before = numpy.random.get_state()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            numpy.random.set_state(before)


def _start(spec: VllmSpec) -> LLM:
    _set_environment(spec)
    with heavy_imports():
        from vllm import LLM

    with without_queue():
        return LLM(
            model=spec.model_folder,
            skip_tokenizer_init=True,
            trust_remote_code=False,
            load_format="dummy",
            dtype=spec.dtype,
            tensor_parallel_size=spec.tensor_parallel_size,
            enable_expert_parallel=spec.expert_parallel_size > 1,
            distributed_executor_backend="external_launcher",
            max_model_len=spec.max_model_len,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            gpu_memory_utilization=spec.gpu_memory_utilization,
            kv_cache_memory_bytes=spec.kv_cache_bytes,
            seed=spec.seed,
            disable_log_stats=spec.disable_log_stats,
            logprobs_mode="processed_logprobs",
            # Each rank schedules for itself, by what is to be done and no clock, also ahead. None: vLLM's choice.
            async_scheduling=False if spec.reproducible else None,
            **_platform_arguments(spec),
        )


def _platform_arguments(spec: VllmSpec) -> dict[str, Any]:
    if platform_name() == "cpu":
        return {
            "worker_cls": "megarl.rollout.vllm_cpu.CpuWorker",
            "enforce_eager": True,
            # A seeded request whose prefill is cut dies there: "CPU Generator does not use offset". Without cutting, a
            # step must hold max_model_len tokens; unless told how many, vLLM raises its own choice to that.
            "enable_chunked_prefill": False,
        }
    return {
        "enable_sleep_mode": spec.free_cache_engine,
        "enforce_eager": spec.enforce_eager,
        # Others swap or shuffle the experts' weights after loading, where publishing in place would be silently wrong.
        "moe_backend": "triton",
        # NCCL adds in one order, and every rank of a replica gets the same sums, from which it samples for itself.
        # vLLM's own all-reduce would also ask for its peers' devices, of which a process on Ray sees none.
        "disable_custom_all_reduce": True,
        "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
    }


def _set_environment(spec: VllmSpec) -> None:
    apply_environment()
    if spec.reproducible:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # seeds are promised for the first runner's sampler
    if platform_name() == "cuda":
        os.environ |= dict.fromkeys(_OTHER_ALL_REDUCES, "0")
    if spec.kv_cache_bytes is not None:
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # or vLLM would prefer it


def sampling_params(sampling: Sampling, seed: int | None) -> SamplingParams:
    """Return vLLM's parameters of one rollout, which is told of when it has ended. seed: None for the engine's own."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0 if sampling.top_k is None else sampling.top_k,
        max_tokens=sampling.max_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        seed=seed,
        logprobs=0,  # of the sampled token alone
        detokenize=False,
    )
    params.output_kind = RequestOutputKind.FINAL_ONLY  # as vLLM's own generate does
    return params


def rollout_of(output: RequestOutput, policy_version: int) -> Rollout:
    """Return the rollout that vLLM has ended."""
    [completion] = output.outputs
    assert completion.logprobs is not None and completion.finish_reason in ("stop", "length"), completion
    token_ids = tuple(completion.token_ids)
    logprobs = tuple(step[token].logprob for token, step in zip(token_ids, completion.logprobs, strict=True))
    return Rollout(token_ids, logprobs, completion.finish_reason, policy_version)
