"""A GRPO step on a laptop against what its matrix products need, and rollouts against bare vLLM.

    python benchmarks/laptop.py [--steps 4] [--turns 3] [--write]

Two ranks of data parallelism, each with a vLLM of its own and one thread, train a fresh Qwen3 of 46 million parameters
in float32 on 16 prompts x 4 rollouts of 32 + 64 tokens, in one optimizer step a step. "Its products" are those of
activations and weights alone, at the rate of a large one, measured in as many processes at once; attention, norms,
sampling and all else are what is lost. An engine and a bare vLLM, which is asked for the same log-probs with the same
seeds, take turns in two processes; it stops where their tokens differ. Of all repetitions the fastest counts, which
other programs disturb least. --write puts the tables into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from page import write_measured

from megarl.parallel.environment import apply_environment, products_name

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Qwen3Config

    from megarl.types import GenerationRequest, Sampling

NUM_RANKS = 2
NUM_PROMPTS, N, PROMPT, RESPONSE = 16, 4, 32, 64
NUM_ROLLOUTS = NUM_PROMPTS * N
MICRO_BATCH = 16
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, FFN, VOCAB = 12, 512, 8, 4, 64, 1536, 8192
SPEC = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 64}
REWARD = "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    return len(solution_str) % 7\n"
RECIPE = f"""
defaults: [ppo_megatron_trainer, _self_]
data:
  train_files: [train.parquet]
  val_files: [train.parquet]
  train_batch_size: {NUM_PROMPTS}
  max_prompt_length: {PROMPT}
  max_response_length: {RESPONSE}
actor_rollout_ref:
  model: {{path: model, init: random, dtype: float32}}
  actor:
    optim: {{lr: 1.0e-4}}
    lr_scheduler: {{type: constant, warmup_steps: 1}}
    ppo_mini_batch_size: {NUM_ROLLOUTS}
    ppo_micro_batch_size_per_gpu: {MICRO_BATCH}
  rollout: {{temperature: 1.0, n: {N}, ignore_eos: true, max_num_seqs: 64}}
reward: {{path: reward.py}}
algorithm: {{adv_estimator: grpo, kl_free: true}}
trainer: {{n_gpus_per_node: {NUM_RANKS}, test_freq: null, val_before_train: false, run_dir: run}}
"""
PARTS = ("generate", "log_probs", "update_actor", "publish", "score")


@dataclass(frozen=True)
class Products:
    """Products of a step, in floating-point operations of all ranks. The output layer: where a token is predicted."""

    generate: float
    update_actor: float


def products() -> Products:
    """Return the products that a step needs."""
    layer = HIDDEN * (HEADS + 2 * KV_HEADS) * HEAD + HEADS * HEAD * HIDDEN + 3 * HIDDEN * FFN
    body, head = LAYERS * layer, HIDDEN * VOCAB
    # The last token of a response is sampled and not read; forward once, and twice as much backward.
    generate = (PROMPT + RESPONSE - 1) * body + RESPONSE * head
    return Products(2.0 * NUM_ROLLOUTS * generate, 6.0 * NUM_ROLLOUTS * ((PROMPT + RESPONSE) * body + RESPONSE * head))


def rate_of_rank(connection: Connection) -> None:
    """Send the operations a second of the best of some products of a micro-batch and a weight of the model."""
    apply_environment()
    import torch

    from megarl.parallel.platform import install_platform

    install_platform()
    torch.set_num_threads(1)
    x, weight = torch.randn(MICRO_BATCH * (PROMPT + RESPONSE), HIDDEN), torch.randn(2 * FFN, HIDDEN)
    connection.recv()
    rates = []
    for _ in range(200):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        rates.append(2.0 * x.numel() * len(weight) / (time.perf_counter() - start))
    connection.send(max(rates))


def measured_rate() -> float:
    """Return the operations a second of all ranks together."""
    pipes = [started(rate_of_rank) for _ in range(NUM_RANKS)]
    for pipe in pipes:
        pipe.send(None)
    return float(sum(pipe.recv() for pipe in pipes))


def started(function: Callable[..., None], *arguments: object) -> Connection:
    """Start a process that runs a function, and return the other end of the connection that it gets first."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=function, args=(there, *arguments), daemon=True).start()
    return here


def write_task(folder: Path) -> None:
    """Write the model's folder, the prompts, the reward and the recipe."""
    from megarl.data.verbs import NAMES, verbs_tokenizer
    from megarl.data.write import write_fresh_model, write_parquet

    tokenizer = verbs_tokenizer()
    write_fresh_model(folder / "model", tokenizer, _config(tokenizer))

    def message(num_words: int, first: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": " ".join(NAMES[(first + i) % len(NAMES)] for i in range(num_words))}]

    added = len(tokenizer.apply_chat_template(message(1, 0), add_generation_prompt=True, return_dict=False)) - 1
    rows = [
        {"data_source": "words", "prompt": message(PROMPT - added, i), "reward_model": {"ground_truth": str(i)}}
        for i in range(4 * NUM_PROMPTS)
    ]
    write_parquet(folder / "train.parquet", rows)
    (folder / "reward.py").write_text(REWARD)
    (folder / "laptop.yaml").write_text(RECIPE)


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the model's folder, which are drawn and written there the first time."""
    from safetensors.torch import load_file, save_file

    from megarl.weights.model_shape import read_model_shape
    from megarl.weights.name_map import hf_shapes
    from megarl.weights.sources import RandomSource

    file = folder / "model.safetensors"
    if not file.exists():
        shape = read_model_shape(folder)
        source = RandomSource(shape, 0)
        drawn = {name: source.read(name, 0, 0, size[0]) for name, size in hf_shapes(shape).items()}
        save_file(drawn, file, metadata={"format": "pt"})
    return load_file(file)


def _config(tokenizer: Any) -> Qwen3Config:
    from transformers import Qwen3Config

    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        dtype="float32",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def run_steps(folder: Path, num_steps: int) -> dict[str, float]:
    """Return the least seconds of every part of a step, and of the whole ``step``, over all but the first."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
    command += ["-m", "megarl.main_ppo", "--config-dir=.", "--config-name=laptop"]
    subprocess.run([*command, f"trainer.total_training_steps={num_steps}"], cwd=folder, check=True, stdout=sys.stderr)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"] > 1]
    return {part: min(step.get(f"time_s/{part}", 0.0) for step in steps) for part in (*PARTS, "step")}


def requests() -> tuple[list[GenerationRequest], Sampling]:
    """Return what both engines are asked: the rollouts of one rank."""
    from megarl.types import GenerationRequest, Sampling

    prompts = [tuple(3 + (7 * i + j) % 50 for j in range(PROMPT)) for i in range(NUM_PROMPTS // NUM_RANKS)]
    return [GenerationRequest(p, seed) for seed, p in enumerate(prompts)], Sampling(
        n=N, max_tokens=RESPONSE, temperature=1.0, ignore_eos=True
    )


def engine_of_megarl(connection: Connection, folder: Path) -> None:
    """Answer each call with the seconds, the CPU seconds and the tokens of the rollouts."""
    alone()
    from megarl.rollout.vllm import VllmEngine, VllmSpec

    engine = VllmEngine(VllmSpec(model_folder=str(folder), **SPEC))
    engine.load_weights(weights(folder).items())
    engine.publish_done(1)
    asked, sampling = requests()
    serve(connection, lambda: [r.token_ids for group in engine.generate(asked, sampling) for r in group])


def engine_of_vllm(connection: Connection, folder: Path) -> None:
    """Do as ``engine_of_megarl`` with vLLM as it comes."""
    alone()
    from vllm import LLM, SamplingParams

    from megarl.rollout.vllm import sample_seed

    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        logprobs_mode="processed_logprobs",
        **SPEC,
    )
    asked, sampling = requests()
    prompts = [{"prompt_token_ids": list(r.token_ids)} for r in asked for _ in range(N)]
    params = [
        SamplingParams(max_tokens=RESPONSE, ignore_eos=True, seed=sample_seed(r.seed, i), logprobs=0, detokenize=False)
        for r in asked
        for i in range(sampling.n)
    ]

    def generate() -> list[tuple[int, ...]]:
        llm.reset_prefix_cache()
        return [tuple(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]

    serve(connection, generate)


def alone() -> None:
    """Make this process the only rank of its world, with one thread."""
    apply_environment()
    import torch

    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def serve(connection: Connection, generate: Callable[[], list[tuple[int, ...]]]) -> None:
    """Generate whenever the connection says so, and send the seconds, the CPU seconds and the tokens."""
    generate()
    connection.send(None)
    while connection.recv():
        start, cpu = time.perf_counter(), _cpu_s()
        tokens = generate()
        connection.send((time.perf_counter() - start, _cpu_s() - cpu, tokens))


def _cpu_s() -> float:
    """Return the CPU seconds of this process and those that it started."""
    me = psutil.Process()
    return float(sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True))))


@dataclass(frozen=True)
class Rollouts:
    """The least seconds, by the clock and of the processor, that an engine took for the rollouts of a rank."""

    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return NUM_ROLLOUTS // NUM_RANKS * RESPONSE / self.seconds


def rollouts_by_turns(folder: Path, turns: int, makers: Sequence[Callable[..., None]]) -> list[Rollouts]:
    """Return how long engines take for the same rollouts, in their order. makers: each serves one in its process."""
    weights(folder / "model")
    engines = [started(maker, folder / "model") for maker in makers]
    for engine in engines:
        engine.recv()
    told = []
    for _ in range(turns):
        for engine in engines:
            engine.send(True)
            told.append(engine.recv())
    for engine in engines:
        engine.send(False)
    if any(tokens != told[0][2] for _, _, tokens in told):
        raise SystemExit("the engines gave different tokens")
    by_engine = (told[first :: len(makers)] for first in range(len(makers)))
    return [Rollouts(min(t[0] for t in part), min(t[1] for t in part)) for part in by_engine]


def step_table(times: dict[str, float], rate: float) -> str:
    """Return the parts of a step beside what their products need."""
    needed = {part: operations / rate for part, operations in vars(products()).items()}
    lost = times["step"] - sum(needed.values())
    lines = [
        f"{products_name()} multiplies {rate / NUM_RANKS / 1e9:.0f} GFLOP/s a core.",
        "",
        "| part | seconds | its products | share of what is lost |",
        "|---|---|---|---|",
    ]
    parts = {part: times[part] for part in PARTS}
    parts["other"] = times["step"] - sum(parts.values())
    for part, seconds in parts.items():
        products_s = needed.get(part, 0.0)
        lines.append(f"| {part} | {seconds:.2f} | {products_s:.2f} | {(seconds - products_s) / lost:.0%} |")
    ratio = times["step"] / sum(needed.values())
    return "\n".join([*lines, f"| step | {times['step']:.2f} | {sum(needed.values()):.2f} | ratio {ratio:.2f} |"])


def rollouts_table(ours: Rollouts, bare: Rollouts) -> str:
    """Return the engine's tokens a second beside those of bare vLLM."""
    lines = ["| one rank's rollouts | tokens/s | CPU seconds |", "|---|---|---|"]
    for name, rollouts in (("megarl", ours), ("vLLM", bare)):
        lines.append(f"| {name} | {rollouts.rate:.0f} | {rollouts.cpu_seconds:.2f} |")
    return "\n".join([*lines, f"| ratio | {ours.rate / bare.rate:.2f} | {bare.cpu_seconds / ours.cpu_seconds:.2f} |"])


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    flags = parser.parse_args()
    apply_environment()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder)
        rollouts = rollouts_table(*rollouts_by_turns(folder, flags.turns, (engine_of_megarl, engine_of_vllm)))
        print(rollouts, flush=True)
        step = step_table(run_steps(folder, flags.steps), measured_rate())
        print(step)
    if flags.write:
        write_measured("laptop", f"{step}\n\n{rollouts}")


if __name__ == "__main__":
    main()
