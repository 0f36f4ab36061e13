"""Jobs of ranks that hold a Megatron model and a vLLM replica, and publish the one to the other.

Started with the folders of models. In each, ``layouts.json`` holds the fields of the trainer's Layout and those of the
EngineLayout; all ranks share one replica. Every rank writes ``rank<r>.json``: the engine's greedy answers to PROMPTS.
The jobs run at the same time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from megarl.parallel.environment import apply_environment
from megarl.types import GenerationRequest, Sampling
from tests.dist.vllm_case import environments

PROMPTS = ((3, 1, 4, 1, 5), (9, 2, 6), (5, 3, 5, 8, 9, 7, 9), (32, 38, 46))
GREEDY = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
MAX_MODEL_LEN = 32


def main(folders: list[Path]) -> int:
    """Run all ranks of all jobs. Return the number of those that failed."""
    apply_environment()
    ranks = []
    for folder in folders:
        layout, split = json.loads((folder / "layouts.json").read_text())
        for environment in environments(layout["world_size"]):
            ranks.append(
                multiprocessing.get_context("fork").Process(target=run_rank, args=(folder, layout, split, environment))
            )
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return sum(rank.exitcode != 0 for rank in ranks)


def run_rank(folder: Path, layout: dict[str, Any], split: dict[str, Any], environment: dict[str, str]) -> None:
    """Build both sides, publish, generate, and save the answers."""
    os.environ.update(environment)
    from megarl.ranks.join import join_ranks

    join_ranks()
    import torch

    from megarl.parallel.layout import EngineLayout, Layout
    from megarl.ranks.publish import publisher_of
    from megarl.rollout.vllm import VllmEngine, VllmSpec
    from megarl.verify.roles import role_on
    from megarl.verify.work import backend_on_rank

    backend = backend_on_rank(role_on(Layout(**layout), folder))
    engine = VllmEngine(
        VllmSpec(
            model_folder=str(folder),
            dtype="float32",
            tensor_parallel_size=split["tp"],
            expert_parallel_size=split["ep"],
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=len(PROMPTS),
            kv_cache_bytes=32 * 2**20,
        )
    )
    publisher_of(backend, engine, EngineLayout(**split)).publish(1)
    rollouts = engine.generate([GenerationRequest(prompt, 0) for prompt in PROMPTS], GREEDY)
    answers = [list(rollout.token_ids) for (rollout,) in rollouts]
    (folder / f"rank{environment['RANK']}.json").write_text(json.dumps(answers))
    engine.shutdown()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main([Path(folder) for folder in sys.argv[1:]]))
