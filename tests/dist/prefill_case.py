"""One rank with a vLLM that is asked more at once than a step of it holds. Started with the argument FOLDER."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

from megarl.parallel.environment import apply_environment
from megarl.types import GenerationRequest, Sampling
from tests.dist.vllm_case import environments, publish

MAX_MODEL_LEN = 192
# Of no common beginning, so that the prefix cache has nothing to give.
PROMPTS = tuple(tuple((7 * i + j * (i + 3)) % 300 for j in range(150)) for i in range(40))
REQUESTS = [GenerationRequest(token_ids, seed) for seed, token_ids in enumerate(PROMPTS)]
SAMPLED = Sampling(temperature=0.7, max_tokens=4, ignore_eos=True)
STEP_TOKENS = {"a step of one prompt": MAX_MODEL_LEN, "vLLM's own step": 4096}
"""Tokens of a step that holds no prompt but whole ones, and of the step that vLLM chooses on CPU."""


def main(folder: Path) -> None:
    """Save what the engine answers with every budget, and to each request alone."""
    apply_environment()
    os.environ.update(environments(1)[0])
    import torch

    torch.distributed.init_process_group("gloo")
    answers = {"a step of one prompt": _answers(folder, MAX_MODEL_LEN), "vLLM's own step": _answers(folder, None)}
    answers["alone"] = _answers(folder, None, one_by_one=True)
    (folder / "answers.pickle").write_bytes(pickle.dumps(answers))
    torch.distributed.destroy_process_group()


def _answers(folder: Path, max_num_batched_tokens: int | None, one_by_one: bool = False) -> list[Any]:
    from megarl.rollout.vllm import VllmEngine, VllmSpec

    engine = VllmEngine(
        VllmSpec(
            model_folder=str(folder),
            dtype="float32",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=64,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_bytes=64 * 2**20,
        )
    )
    publish(engine, folder, 1, 0, policy_version=1)
    batches = [[request] for request in REQUESTS] if one_by_one else [REQUESTS]
    found = [group for batch in batches for group in engine.generate(batch, SAMPLED)]
    engine.shutdown()
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
