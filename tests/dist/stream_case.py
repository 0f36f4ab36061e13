"""An engine whose weights change while it samples. Started with a folder that receives ``answers.json``.

It is in this process, with what a trainer's rank writes for it. Weights A are in the folder ``a``, B in ``b``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.dist.vllm_case import environments

PROMPTS = ((3, 1, 4, 1, 5), (9, 2, 6), (5, 3, 5, 8, 9, 7, 9))
MAX_TOKENS, SWITCH_AT = 24, 9


def main(folder: Path) -> None:
    """Start the engine, sample across a change of weights, and save what it answered."""
    os.environ.update(environments(1)[0])
    from megarl.ranks.join import join_ranks

    join_ranks()
    from safetensors.torch import load_file

    from megarl.parallel.layout import EngineLayout, Layout
    from megarl.rollout.served import Ask, Take
    from megarl.rollout.taking import WeightsTaker
    from megarl.rollout.vllm import VllmEngine, VllmSpec
    from megarl.rollout.vllm_stream import VllmStream
    from megarl.types import GenerationRequest, Sampling
    from megarl.weights.model_shape import read_model_shape
    from megarl.weights.shared import SharedWriter
    from megarl.weights.shared_plan import writer_plan

    shape, layout = read_model_shape(folder / "a"), Layout(1, fsdp=1)
    spec = VllmSpec(str(folder / "a"), "float32", max_model_len=64, max_num_seqs=16, kv_cache_bytes=32 * 2**20)
    engine = VllmEngine(spec)
    stream = VllmStream(engine, WeightsTaker(engine, shape, layout, EngineLayout(1), 0))
    writer = SharedWriter(
        writer_plan(shape, layout, EngineLayout(1), 0, 4), engine.parameters()["lm_head.weight"].dtype
    )

    def publish(name: str, version: int) -> None:
        stream.take(Take(version, (writer.write(load_file(folder / name / "model.safetensors"), version),)))

    def ask(number: int, prompts: Any, sampling: Sampling) -> None:
        for i, prompt in enumerate(prompts):
            request, indices = GenerationRequest(tuple(prompt), seed=i), tuple(range(sampling.n))
            stream.add(Ask(100 * number + i, request, sampling, indices))

    def finish() -> dict[int, list[Any]]:
        found: dict[int, list[Any]] = {}
        while stream.is_busy:
            for done in stream.step():
                r = done.rollout
                told = [done.index, r.token_ids, r.logprobs, r.policy_version, r.switches]
                found.setdefault(done.number, []).append(told)
        return {number: [rest for _, *rest in sorted(those)] for number, those in found.items()}

    greedy = Sampling(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    sampled = Sampling(n=2, temperature=0.8, max_tokens=MAX_TOKENS, ignore_eos=True)
    publish("a", 0)
    ask(0, PROMPTS, greedy)
    answers = {"a": finish()}
    ask(1, PROMPTS, greedy)
    ask(2, PROMPTS, sampled)
    for _ in range(SWITCH_AT):
        assert not stream.step()
    publish("b", 1)
    publish("b", 2)  # before a token of the one before
    answers["across"] = finish()
    ask(3, PROMPTS, sampled)
    publish("a", 3)  # before any token
    answers["before the first token"] = finish()
    # On CPU nothing is given back: the case does to the weights what a device would.
    engine._can_sleep = True
    stream.rest()
    for tensor in engine.parameters().values():
        tensor.zero_()
    ask(6, PROMPTS, greedy)
    answers["a after a rest"] = finish()
    stream.rest()
    publish("b", 4)
    answers["b from there"] = {}
    for number, those in answers["across"].items():
        for tokens, *_ in those:
            so_far = [*PROMPTS[number % 100], *tokens[:SWITCH_AT]]
            ask(5, [so_far], Sampling(temperature=0.0, max_tokens=MAX_TOKENS - SWITCH_AT, ignore_eos=True))
            [[continued, logprobs, *_]] = finish()[500]
            answers["b from there"].setdefault(number, []).append([continued, logprobs])
    (folder / "answers.json").write_text(json.dumps(answers))
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
