"""Jobs of ranks that host vLLM replicas beside Megatron's groups, and save what they answer.

Started with the arguments TENSOR_PARALLEL_SIZE and FOLDER=NUM_RANKS for each job. A folder holds two models of the same
shape, ``a`` and ``b``, and receives ``rank<r>.pickle``. The jobs run at the same time, and know nothing of each other.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from megarl.errors import DataError, PublishError
from megarl.parallel.environment import apply_environment
from megarl.rollout.shared_memory import job_name
from megarl.types import GenerationRequest, Rollout, Sampling

PROMPTS = ((3, 1, 4, 1, 5), (9, 2, 6), (5, 3, 5, 8, 9, 7, 9), (32, 38, 46), (2, 6, 43, 38), tuple(range(7, 157)))
"""More than the engine takes at once, and one that fills a block of the prefix cache, which holds 128 tokens."""

REQUESTS = [GenerationRequest(token_ids, seed) for seed, token_ids in enumerate(PROMPTS)]
GREEDY = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
SAMPLED = Sampling(n=3, temperature=0.7, max_tokens=8, ignore_eos=True)
TRUNCATED = Sampling(temperature=0.7, top_k=5, top_p=0.8, max_tokens=8, ignore_eos=True)
MAX_NUM_SEQS = 4
MAX_MODEL_LEN = 192


def main(tensor_parallel_size: int, jobs: dict[Path, int]) -> int:
    """Run all ranks of all jobs. Return the number of those that failed."""
    apply_environment()
    ranks = [
        multiprocessing.get_context("fork").Process(target=run_rank, args=(folder, tensor_parallel_size, environment))
        for folder, num_ranks in jobs.items()
        for environment in environments(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return sum(rank.exitcode != 0 for rank in ranks)


def environments(num_ranks: int) -> list[dict[str, str]]:
    """Return what torchrun sets for each rank of a job."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    return [job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def run_rank(folder: Path, tensor_parallel_size: int, environment: dict[str, str]) -> None:
    """Join the world as the trainer does, host an engine, and save its answers."""
    import torch
    from megatron.core import parallel_state

    os.environ.update(environment)
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel_size)
    rank = torch.distributed.get_rank()
    results = answers(folder, tensor_parallel_size, rank)
    total = torch.ones(1)
    torch.distributed.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    results["sum over Megatron's tensor axis afterwards"] = total.item()
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(results))
    torch.distributed.destroy_process_group()


def answers(folder: Path, tensor_parallel_size: int, rank: int) -> dict[str, Any]:
    """Return what the engine answers with the weights of ``a``, then with those of ``b``."""
    from megarl.rollout.vllm import VllmEngine, VllmSpec

    engine = VllmEngine(
        VllmSpec(
            model_folder=str(folder / "a"),
            dtype="float32",
            tensor_parallel_size=tensor_parallel_size,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            kv_cache_bytes=32 * 2**20,
        )
    )
    replica, tp_rank = divmod(rank, tensor_parallel_size)
    results: dict[str, Any] = {"job": job_name(), "unpublished": engine.policy_version}
    results["layers not packed"] = engine._llm.apply_model(layers_not_packed)[0]
    results["before publishing"] = error_of(engine, REQUESTS)
    publish(engine, folder / "a", tensor_parallel_size, tp_rank, policy_version=1)
    results["too long"] = error_of(engine, [GenerationRequest(tuple(range(MAX_MODEL_LEN)), 0)])
    results["greedy a"] = engine.generate(REQUESTS, GREEDY)
    results["sampled"] = sampled(engine, replica)
    results["truncated"] = engine.generate(REQUESTS, TRUNCATED)
    results["stopped"] = engine.generate(REQUESTS, stop_at(results["greedy a"]))
    results["only the first replica has requests"] = engine.generate(REQUESTS if replica == 0 else [], GREEDY)
    results["not reproducible"] = with_common_noise(engine, rank)
    engine.sleep()
    engine.wake_weights()
    engine.wake_up()
    publish(engine, folder / "b", tensor_parallel_size, tp_rank, policy_version=2)
    results["greedy b"] = engine.generate(REQUESTS, GREEDY)
    engine.shutdown()
    return results


def with_common_noise(engine: Any, rank: int) -> list[list[tuple[Rollout, ...]]]:
    """Return the samples of two calls without seeds of their own, on ranks whose generators differ."""
    import torch

    spec, engine._spec = engine._spec, replace(engine._spec, reproducible=False)
    torch.manual_seed(rank)
    before = torch.random.get_rng_state()
    found = [engine.generate(REQUESTS, SAMPLED) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    engine._spec = spec
    return found


def layers_not_packed(model: Any) -> list[str]:
    """Return the names of the layers that multiply with their parameter as it is."""
    from torch.nn.functional import linear

    return [name for name, layer in model.named_modules() if getattr(layer, "cpu_linear", None) is linear]


def error_of(engine: Any, requests: list[GenerationRequest]) -> str:
    """Return the text of the error that ``generate`` raises."""
    try:
        return f"no error, but {engine.generate(requests, GREEDY)}"
    except (DataError, PublishError) as error:
        return f"{type(error).__name__}: {error}"


def sampled(engine: Any, replica: int) -> list[tuple[Rollout, ...]]:
    """Return the samples of all requests: of one batch on the first replica, else of each alone, last one first."""
    if replica == 0:
        return list(engine.generate(REQUESTS, SAMPLED))
    return [engine.generate([request], SAMPLED)[0] for request in reversed(REQUESTS)][::-1]


def stop_at(greedy: list[tuple[Rollout, ...]]) -> Sampling:
    """Return greedy sampling that stops at the third token of the first prompt's answer."""
    return Sampling(temperature=0.0, max_tokens=8, ignore_eos=True, stop_token_ids=(greedy[0][0].token_ids[2],))


def publish(engine: Any, folder: Path, tp: int, tp_rank: int, policy_version: int) -> None:
    """Write the shards of a saved model into the engine's parameters."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config, state = AutoConfig.from_pretrained(folder), load_file(folder / "model.safetensors")
    for name, parameter in engine.parameters().items():
        parameter.copy_(shard(name, state, config.num_key_value_heads, tp, tp_rank))
    engine.publish_done(policy_version)


def shard(name: str, state: dict[str, Any], num_kv_heads: int, tp: int, tp_rank: int) -> Any:
    """Return what vLLM's parameter ``name`` holds on a rank, cut from Hugging Face's tensors."""
    import torch

    def part(source: str, dim: int = 0, parts: int = tp, index: int = tp_rank) -> torch.Tensor:
        return state[source].chunk(parts, dim)[index]

    if "qkv_proj" in name:
        kv_parts = min(tp, num_kv_heads)  # beyond that, consecutive ranks share a head
        key, value = (part(name.replace("qkv", x), 0, kv_parts, tp_rank * kv_parts // tp) for x in "kv")
        return torch.cat([part(name.replace("qkv", "q")), key, value])
    if "gate_up_proj" in name:
        return torch.cat([part(name.replace("gate_up", x)) for x in ("gate", "up")])
    if "routed_experts" in name:
        prefix, _, weight = name.partition("routed_experts.")
        experts = range(sum(source.startswith(prefix) for source in state) // 3)
        if weight == "w2_weight":
            return torch.stack([part(f"{prefix}{e}.down_proj.weight", dim=1) for e in experts])
        return torch.stack([torch.cat([part(f"{prefix}{e}.{x}_proj.weight") for x in ("gate", "up")]) for e in experts])
    if "o_proj" in name or "down_proj" in name:
        return part(name, dim=1)
    if "embed_tokens" in name or "lm_head" in name:
        vocabulary = state[name]
        padding = -len(vocabulary) % 64
        return torch.nn.functional.pad(vocabulary, (0, 0, 0, padding)).chunk(tp)[tp_rank]
    return state[name]


if __name__ == "__main__":
    sizes = (argument.rsplit("=", 1) for argument in sys.argv[2:])
    sys.exit(main(int(sys.argv[1]), {Path(folder): int(num_ranks) for folder, num_ranks in sizes}))
