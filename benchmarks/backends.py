"""Megatron and FSDP side by side on the same ranks, and FSDP against a loop written by hand on ``fully_shard``.

    OMP_NUM_THREADS=1 python benchmarks/backends.py [--ranks 2] [--size small] [--repetitions 5] [--write]

starts the ranks, which take turns with ``Actor.update`` on both backends and with the bare loop: same model, batch and
optimizer; then with a publication from each backend into the shards of an engine. The bare loop is given micro-batches
that are packed and on the device, and computes the loss alone. --write puts the table into docs/performance.md.

Shape suffixes: N predicted tokens that count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from page import write_measured
from update import CLIP, LR, RESULT, SIZES, Size, make_batch, take_turns

from megarl.batching.plan import micro_batches, split_rows

if TYPE_CHECKING:
    import torch

    from megarl.roles import Role
    from megarl.train.backend import Backend
    from megarl.types import PolicyBatch

ENGINE_TP = 2


def write_config(size: Size, folder: Path) -> None:
    """Write the config.json of a size."""
    from transformers import Qwen3Config

    shape = size.shape
    Qwen3Config(
        architectures=[shape.family],
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope.theta},
        tie_word_embeddings=shape.tied,
    ).save_pretrained(folder)


class BareLoop:
    """What one would write with transformers and ``fully_shard`` alone. backend: gives it micro-batches and weights."""

    def __init__(self, backend: Backend, role: Role, batch: PolicyBatch, micro_batch_size: int) -> None:
        import torch
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from transformers import AutoConfig, AutoModelForCausalLM

        from megarl.ranks.worker import weights_of
        from megarl.train.attention import packing_of
        from megarl.train.fsdp.attention import NAME, Attending
        from megarl.weights.name_map import hf_shapes

        device, training = backend.device, role.training
        assert training is not None and batch.old_logprobs_BS is not None
        config = AutoConfig.from_pretrained(role.model.here())
        self.model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=NAME)
        self.model.to(device)
        source, parameters = weights_of(role, 0), dict(self.model.named_parameters())
        with torch.no_grad():
            for name, sizes in hf_shapes(role.shape).items():
                parameters[name].copy_(source.read(name, 0, 0, sizes[0]))
        policy = MixedPrecisionPolicy()
        if role.dtype == "bfloat16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        for layer in self.model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(self.model, mp_policy=policy)
        self.clip_grad, self.num_ranks = training.clip_grad, role.layout.world_size
        self.adam = torch.optim.AdamW(
            self.model.parameters(),
            lr=LR,
            betas=(training.betas[0], training.betas[1]),
            eps=training.eps,
            weight_decay=training.weight_decay,
            fused=device.type == "cuda",
        )
        rows = batch.rows(split_rows(len(batch), role.layout.dp)[torch.distributed.get_rank()])
        self.micros = [
            (
                {
                    "input_ids": micro.tokens.to(device),
                    "position_ids": micro.positions.to(device),
                    "use_cache": False,
                    "logits_to_keep": micro.predict_N.to(device),
                    "attending": Attending(packing_of(micro.lengths, device), None),
                },
                micro.targets_N.to(device),
                micro.column(rows.old_logprobs_BS).to(device),
                micro.column(rows.advantages_BS).to(device),
            )
            for micro in backend.pack(rows, micro_batches(range(len(rows)), micro_batch_size))
        ]
        self.total_tokens = int(batch.mask_BS.sum())

    def update(self) -> tuple[float, float]:
        """Take an optimizer step; return this rank's share of the loss, and the gradient norm."""
        import torch
        import torch.nn.functional as F

        total = 0.0
        for inputs, targets_N, old_N, advantages_N in self.micros:
            logprobs_N = -F.cross_entropy(self.model(**inputs).logits[0].float(), targets_N, reduction="none")
            ratio_N = (logprobs_N - old_N).exp()
            clipped_N = ratio_N.clamp(1 - CLIP, 1 + CLIP)
            loss = -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N).sum() / self.total_tokens
            (loss * self.num_ranks).backward()  # FSDP averages over ranks
            total += float(loss.detach())
        norm: Any = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.adam.step()
        self.adam.zero_grad()
        return total, float(norm.full_tensor())


def measure(size: Size, folder: Path, repetitions: int) -> dict[str, Any]:
    """Let everything take turns on this rank; return seconds by what took them."""
    from megarl.ranks.join import join_ranks

    platform = join_ranks()
    import torch.distributed as dist

    from megarl.algorithm.loss_specs import PolicyLossSpec
    from megarl.algorithm.policy_loss import PolicyLossSettings
    from megarl.parallel.layout import Layout
    from megarl.train.actor import Actor
    from megarl.verify.roles import TRAINING, role_on
    from megarl.verify.work import backend_on_rank, update

    ranks = dist.get_world_size()
    dtype = "bfloat16" if platform.name == "cuda" else "float32"
    training = replace(TRAINING, lr=LR, min_lr=LR, weight_decay=0.01, eps=1e-8)
    everything = {"granularity": "full", "method": "uniform", "num_layers": 1}
    roles = {}
    for name, layout in (("megatron", Layout(ranks)), ("fsdp", Layout(ranks, fsdp=ranks))):
        role = role_on(layout, folder, dtype=dtype, training=training, micro_batch_size=size.micro_batch_size)
        if name == "megatron":  # activations are computed again on both
            recompute: Any = replace(role.backend.recompute, **everything)  # type: ignore[union-attr]
            role = replace(role, backend=replace(role.backend, recompute=recompute))
        roles[name] = replace(role, model=replace(role.model, init="random"))
    batch = make_batch(size)
    loss = PolicyLossSpec(PolicyLossSettings(CLIP, CLIP, None), "token-mean", None, "low_var_kl", 1.0)
    actors = {name: Actor(backend_on_rank(role)) for name, role in roles.items()}

    def ours(name: str) -> Callable[[], tuple[float, float]]:
        def step() -> tuple[float, float]:
            (metrics,) = update(actors[name], batch, loss).metrics
            return metrics["loss"], metrics["grad_norm"]

        return step

    bare = BareLoop(actors["fsdp"].backend, roles["fsdp"], batch, size.micro_batch_size)
    loops = {"megatron": ours("megatron"), "fsdp": ours("fsdp"), "bare": bare.update}
    times, cpu_times, told = take_turns(loops, repetitions, platform)
    norms = {name: [norm for _, norm in of_loop] for name, of_loop in told.items()}
    if any(abs(a - b) > 1e-2 * b for name in norms for a, b in zip(norms[name], norms["bare"], strict=True)):
        raise SystemExit(f"the gradient norms differ: {norms}")
    publications = {name: publication(actor.backend) for name, actor in actors.items()}
    publish_times, publish_cpu_times, _ = take_turns(publications, repetitions, platform)
    return {
        "tokens": int(batch.lengths_B.sum()),
        "device": str(actors["fsdp"].backend.device),
        "dtype": dtype,
        "update_s": times,
        "update_cpu_s": cpu_times,
        "publish_s": publish_times,
        "publish_cpu_s": publish_cpu_times,
    }


def publication(backend: Backend) -> Callable[[], tuple[float, float]]:
    """Return what moves a backend's weights into the shards of an engine on the same ranks."""
    import torch
    import torch.distributed as dist

    from megarl.parallel.layout import EngineLayout
    from megarl.weights.cells import cells_of
    from megarl.weights.name_map import vllm_peers, vllm_shards
    from megarl.weights.reshard import Resharder, node_size
    from megarl.weights.reshard_plan import plan_reshard

    shape, rank, ranks = backend.role.shape, dist.get_rank(), dist.get_world_size()
    tp = min(ENGINE_TP, ranks)
    dtype: torch.dtype = getattr(torch, backend.role.dtype)
    engine = EngineLayout(tp)
    targets = {
        s.name: torch.zeros(s.shape, dtype=dtype, device=backend.device) for s in vllm_shards(shape, engine, rank % tp)
    }
    sources = cells_of(backend.peers(), node_size(backend.device))
    resharder = Resharder(plan_reshard(sources, vllm_peers(shape, engine, range(ranks)), rank), dtype=dtype)

    def publish() -> tuple[float, float]:
        with backend.resident():
            resharder.run(backend.parameters(), targets, backend.device)
        return 0.0, 0.0

    return publish


def table(result: dict[str, Any], ranks: int, size: str) -> str:
    """Return the part of docs/performance.md that is measured."""

    def row(what: str, name: str, against: str) -> str:
        seconds, cpu = (result[f"{what}_{kind}"] for kind in ("s", "cpu_s"))
        median = statistics.median(seconds[name])
        ratio, of_cpu = (
            f"{statistics.median(b / m for b, m in zip(t[against], t[name], strict=True)):.3f}" for t in (seconds, cpu)
        )
        return f"| {what} | {name} | {median:.3f} s | {against} | {ratio} | {of_cpu} |"

    lines = [
        f"`python benchmarks/backends.py --ranks {ranks} --size {size}`, {result['device']}, {result['dtype']}, "
        f"{result['tokens']:,} tokens an update, medians of {len(result['update_s']['fsdp'])}:",
        "",
        "| what | on | time | against | ratio | by CPU time |",
        "|---|---|---|---|---|---|",
        row("update", "fsdp", "bare"),
        row("update", "fsdp", "megatron"),
        row("publish", "fsdp", "megatron"),
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in:
        result = measure(SIZES[options.size], options.rank_in, options.repetitions)
        if os.environ["RANK"] == "0":
            print(RESULT + json.dumps(result), flush=True)
        from megarl.parallel.world import leave_world

        leave_world()
        return
    with tempfile.TemporaryDirectory() as folder:
        write_config(SIZES[options.size], Path(folder))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        command += [__file__, "--rank-in", folder, "--size", options.size, "--repetitions", str(options.repetitions)]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(RESULT))
    text = table(json.loads(line.removeprefix(RESULT)), options.ranks, options.size)
    print(text)
    if options.write:
        write_measured("backends", text)


if __name__ == "__main__":
    main()
