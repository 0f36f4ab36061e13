"""The actor's update against a bare megatron-core loop written by hand: same layout, model, batch and optimizer.

    python benchmarks/update.py [--layouts tp1 tp2_pp2] [--size small] [--repetitions 9] [--write]

starts the ranks of each layout, which take turns with both loops, and prints medians and their ratio. --write puts the
table into docs/performance.md. The bare loop gets micro-batches that are packed and on the device, and computes the
loss alone; megarl packs, computes the entropy and reports metrics besides. Same code on CUDA, one GPU a rank.

Shape suffixes: N predicted tokens that count.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.batching.plan import micro_batches
from megarl.weights.model_shape import ModelShape, Rope

if TYPE_CHECKING:
    from torch import Tensor

    from megarl.batching.pack import MicroBatch
    from megarl.parallel.layout import Layout
    from megarl.parallel.platform import Platform
    from megarl.roles import Training
    from megarl.train.megatron.backend import MegatronBackend
    from megarl.types import PolicyBatch

REPOSITORY = Path(__file__).resolve().parents[1]
LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2), "tp2_pp2": (2, 2)}
RESULT = "RESULT "
LR = 1e-5
CLIP = 0.2


@dataclass(frozen=True)
class Size:
    """A model, and a mini-batch of ``rollouts`` with up to ``length`` tokens, the first quarter of each a prompt."""

    shape: ModelShape
    rollouts: int
    length: int
    micro_batch_size: int


def qwen3(layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int, vocab: int) -> ModelShape:
    """Return a shape of the family Qwen3."""
    return ModelShape(
        family="Qwen3ForCausalLM",
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=ffn,
        vocab_size=vocab,
        max_positions=32768,
        norm_eps=1e-6,
        rope=Rope(1e6),
        tied=False,
        qkv_bias=False,
        qk_norm=True,
    )


# Vocabularies that need no padding on any of LAYOUTS: Megatron's own loss would count padding as tokens.
SIZES = {
    "small": Size(qwen3(8, 384, 6, 2, 64, 1024, 8192), rollouts=8, length=160, micro_batch_size=2),
    "1.7b": Size(qwen3(28, 2048, 16, 8, 128, 6144, 151552), rollouts=64, length=2048, micro_batch_size=4),
    "4b": Size(qwen3(36, 2560, 32, 8, 128, 9728, 151552), rollouts=64, length=2048, micro_batch_size=4),
}


def make_batch(size: Size) -> PolicyBatch:
    """Return random rollouts of different lengths, whose old log-probs are about those of a fresh model."""
    import torch

    from megarl.batching.pack import sequences_to_batch
    from megarl.types import PolicyBatch

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(size.length * 2 // 3, size.length + 1, (size.rollouts,), generator=generator).tolist()
    tokens = [torch.randint(size.shape.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    batch = sequences_to_batch(tokens, [[i >= size.length // 4 for i in range(n)] for n in lengths])
    noise_BS, advantages_BS = (torch.randn(batch.tokens_BS.shape, generator=generator) for _ in range(2))
    level = -float(torch.tensor(size.shape.vocab_size).log())
    return PolicyBatch(
        **vars(batch),
        old_logprobs_BS=(level + 0.1 * noise_BS) * batch.mask_BS,
        advantages_BS=advantages_BS * batch.mask_BS,
    )


@dataclass(frozen=True)
class BareMicro:
    """A packed micro-batch with all that the loss needs, on the device."""

    tokens: Tensor
    positions: Tensor
    packing: Any
    predict_N: Tensor
    targets_N: Tensor
    old_N: Tensor
    advantages_N: Tensor


class BareLoop:
    """What one would write with megatron-core alone."""

    def __init__(
        self, backend: MegatronBackend, training: Training, batch: PolicyBatch, micros: list[MicroBatch]
    ) -> None:
        import torch
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from megarl.train.megatron.attention import describe_packing

        device, model = backend.device, backend.model
        self.groups = model.groups
        assert batch.old_logprobs_BS is not None
        self.total_tokens = int(batch.mask_BS.sum())
        self.micros = [
            BareMicro(
                micro.tokens.to(device),
                micro.positions.to(device),
                describe_packing(list(micro.lengths), device),
                micro.predict_N.to(device),
                micro.targets_N.to(device),
                micro.column(batch.old_logprobs_BS).to(device),
                micro.column(batch.advantages_BS).to(device),
            )
            for micro in micros
        ]
        with self.groups.active():
            config: Any = model.module.config
            ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
            self.ddp = DistributedDataParallel(config, ddp_config, model.module)
            config.no_sync_func = self.ddp.no_sync
            config.finalize_model_grads_func = lambda chunks, *_, **__: finalize_model_grads(chunks, None)
            self.optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=training.lr,
                    weight_decay=training.weight_decay,
                    adam_beta1=training.betas[0],
                    adam_beta2=training.betas[1],
                    adam_eps=training.eps,
                    clip_grad=training.clip_grad,
                    bf16=model.dtype == torch.bfloat16,
                    params_dtype=model.dtype,
                    use_distributed_optimizer=True,
                ),
                [self.ddp],
            )
        self.ddp.train()

    def update(self) -> tuple[float, float]:
        """Take an optimizer step; return the loss on the last stage, and the gradient norm."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        with self.groups.active():
            self.ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
            losses = get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=iter(self.micros),
                model=self.ddp,
                num_microbatches=len(self.micros),
                seq_length=self.micros[0].tokens.shape[1],
                micro_batch_size=1,
                forward_only=False,
            )
            _, grad_norm, _ = self.optimizer.step()
        return float(sum(losses)), float(grad_norm)

    def _forward_step(self, data: Iterator[BareMicro], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        micro = next(data)
        output = model(micro.tokens, micro.positions, None, packed_seq_params=micro.packing)
        return output, partial(self._loss, micro)

    def _loss(self, micro: BareMicro, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        import torch
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        logprobs_N = -vocab_parallel_cross_entropy(logits.flatten(0, -2)[micro.predict_N].float(), micro.targets_N)
        ratio_N = (logprobs_N - micro.old_N).exp()
        clipped_N = ratio_N.clamp(1 - CLIP, 1 + CLIP)
        loss = -torch.minimum(ratio_N * micro.advantages_N, clipped_N * micro.advantages_N).sum() / self.total_tokens
        # Megatron scales the loss in place.
        return loss, torch.tensor(0, dtype=torch.int, device=loss.device), loss.detach().clone()


def measure(size: Size, tp: int, pp: int, repetitions: int, *, bare: bool = True) -> dict[str, Any]:
    """Let both loops take turns on this rank; return seconds of each repetition, and what was measured on what.

    The rank is still in its world afterwards. Raises SystemExit where the loops disagree on loss or gradient norm: they
    wouldn't do the same work.
    """
    from megarl.ranks.join import join_ranks

    platform = join_ranks()
    import torch
    import torch.distributed as dist

    from megarl.algorithm.loss_specs import PolicyLossSpec
    from megarl.algorithm.policy_loss import PolicyLossSettings
    from megarl.parallel.layout import Layout
    from megarl.train.actor import Actor
    from megarl.verify.roles import TRAINING, role_on
    from megarl.verify.work import backend_on_rank, update

    layout: Layout = Layout(dist.get_world_size(), tp=tp, pp=pp, sequence_parallel=tp > 1)
    dtype = "bfloat16" if platform.name == "cuda" else "float32"
    training = replace(TRAINING, lr=LR, min_lr=LR, weight_decay=0.01, eps=1e-8)
    role = role_on(layout, size.shape, dtype=dtype, training=training, micro_batch_size=size.micro_batch_size)
    batch = make_batch(size)
    loss = PolicyLossSpec(PolicyLossSettings(CLIP, CLIP, None), "token-mean", None, "low_var_kl", 1.0)
    actor = Actor(backend_on_rank(role))

    def ours() -> tuple[float, float]:
        (metrics,) = update(actor, batch, loss).metrics
        return metrics.get("loss", 0.0), metrics["grad_norm"]

    loops: dict[str, Callable[[], tuple[float, float]]] = {"megarl": ours}
    if bare:
        backend = backend_on_rank(replace(role, training=None))
        micros = backend.pack(batch, micro_batches(range(len(batch)), size.micro_batch_size))
        loops["bare"] = BareLoop(backend, training, batch, micros).update
    times, cpu_times, told = take_turns(loops, repetitions, platform)
    for mine, theirs in zip(told["megarl"], told.get("bare", told["megarl"]), strict=True):
        if any(abs(a - b) > 1e-2 * abs(b) + 1e-4 for a, b in zip(mine, theirs, strict=True)):
            raise SystemExit(f"loss and gradient norm are {mine} in megarl and {theirs} in the bare loop")
    tokens = int(batch.lengths_B.sum())
    peak = torch.cuda.max_memory_allocated() if platform.name == "cuda" else 0
    seconds = {"times_s": times, "cpu_times_s": cpu_times}
    return {"tokens": tokens, "device": str(actor.backend.device), "dtype": dtype, "peak_bytes": peak, **seconds}


def take_turns(
    loops: dict[str, Callable[[], tuple[float, float]]], repetitions: int, platform: Platform
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[tuple[float, float]]]]:
    """Run the loops by turns, who is first changing; two repetitions warm up.

    Return seconds, CPU seconds of all ranks together, and what the loops told.
    """
    import torch
    import torch.distributed as dist

    times: dict[str, list[float]] = {name: [] for name in loops}
    cpu_times: dict[str, list[float]] = {name: [] for name in loops}
    told: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for repetition in range(repetitions + 2):
        names = sorted(loops, reverse=repetition % 2 == 1)
        for name in names:
            platform.synchronize()
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            told[name].append(loops[name]())
            platform.synchronize()
            cpu = torch.tensor(time.process_time() - cpu_start, device=platform.device(int(os.environ["LOCAL_RANK"])))
            dist.all_reduce(cpu)
            if repetition > 1:
                times[name].append(time.perf_counter() - start)
                cpu_times[name].append(float(cpu))
    return times, cpu_times, told


def run_layout(name: str, size: str, repetitions: int) -> dict[str, Any]:
    """Start the ranks of a layout and return what rank 0 measured."""
    tp, pp = LAYOUTS[name]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tp * pp}"]
    command += [__file__, "--rank-of", name, "--size", size, "--repetitions", str(repetitions)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(RESULT))
    result: dict[str, Any] = json.loads(line.removeprefix(RESULT))
    return result


def paired(result: dict[str, Any], kind: str) -> str:
    """Return the median ratio of neighbours in time, which share whatever else the machine does."""
    times = result[kind]
    return f"{statistics.median(b / m for b, m in zip(times['bare'], times['megarl'], strict=True)):.3f}"


def by_cpu(result: dict[str, Any]) -> str:
    """Return the ratio of CPU seconds, which other programs hardly change. On a GPU they say nothing."""
    return paired(result, "cpu_times_s") if result["device"] == "cpu" else "-"


def table(results: dict[str, dict[str, Any]], size: str) -> str:
    """Return the part of docs/performance.md that is measured."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core"))
    first = next(iter(results.values()))
    lines = [
        f"`python benchmarks/update.py --layouts {' '.join(results)} --size {size}` with {versions}, Python "
        f"{sys.version.split()[0]}, {first['device']}, {first['dtype']}, medians of "
        f"{len(first['times_s']['bare'])}:",
        "",
        "| layout | tokens an update | bare loop, tokens/s | megarl, tokens/s | ratio | of neighbours | by CPU time |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        bare, ours = (statistics.median(result["times_s"][loop]) for loop in ("bare", "megarl"))
        speeds = f"{result['tokens'] / bare:,.0f} | {result['tokens'] / ours:,.0f} | {bare / ours:.3f}"
        lines.append(f"| {name} | {result['tokens']:,} | {speeds} | {paired(result, 'times_s')} | {by_cpu(result)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=["tp1", "tp2_pp2"], choices=LAYOUTS)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    parser.add_argument("--rank-of", choices=LAYOUTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        result = measure(SIZES[options.size], *LAYOUTS[options.rank_of], options.repetitions)
        if os.environ["RANK"] == "0":
            print(RESULT + json.dumps(result), flush=True)
        from megarl.parallel.world import leave_world

        leave_world()
        return
    results = {}
    for name in options.layouts:
        results[name] = run_layout(name, options.size, options.repetitions)
        print(name, json.dumps({kind: results[name][kind] for kind in ("times_s", "cpu_times_s")}), flush=True)
    text = table(results, options.size)
    print(text)
    if options.write:
        page = REPOSITORY / "docs/performance.md"
        begin, end = "<!-- measured update: begin -->", "<!-- measured update: end -->"
        before, rest = page.read_text().split(begin)
        _, after = rest.split(end)
        page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


if __name__ == "__main__":
    main()
