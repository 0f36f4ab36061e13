"""Answers of vLLM as anyone starts it, one fresh process a model.

Arguments: a JSON file with ``prompts`` (token ids) and ``max_tokens``, and model folders. Prints the answers of each
model as a line of JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

from megarl.parallel.environment import apply_environment


def answer(folder: str, question: dict[str, Any]) -> None:
    """Print the greedy answers of the model in ``folder``."""
    from vllm import LLM, SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=question["max_tokens"])
    prompts = [{"prompt_token_ids": prompt} for prompt in question["prompts"]]
    engine = LLM(model=folder, dtype="float32", max_model_len=64, enforce_eager=True)
    outputs = engine.generate(prompts, params, use_tqdm=False)
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]), flush=True)


def main(question: Path, folders: list[str]) -> int:
    """Answer with each model; return the number of those that failed."""
    apply_environment()  # of the process: threads and log level
    import vllm

    assert vllm.LLM, "imported once, before the processes are forked"
    failed = 0
    for folder in folders:
        process = multiprocessing.get_context("fork").Process(
            target=answer, args=(folder, json.loads(question.read_text()))
        )
        process.start()
        process.join()
        failed += process.exitcode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
