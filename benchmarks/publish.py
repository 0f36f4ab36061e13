"""A publish of random weights between ranks: its time against plain copies of the same bytes, its traffic, its memory.

    OMP_NUM_THREADS=1 python benchmarks/publish.py [--cases dense] [--bucket-mib 256] [--repetitions 5] [--write]

starts four ranks for each case, which hold a trainer's shards of a model in bfloat16 and fill those of an engine, with
the plan and the execution of a real publish; what arrives is checked element by element. In the case ``served`` two
ranks write the trainer's shards to the memory from which two others, of an engine in processes of its own, read them.
--write puts the tables into docs/performance.md. On CUDA one GPU a rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from page import write_measured

from megarl.parallel.layout import EngineLayout, Layout
from megarl.weights.model_facts.shipped import shipped_config
from megarl.weights.model_shape import ModelShape, parse_model_shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megarl.parallel.platform import Platform
    from megarl.weights.shard import Shard

RESULT, SERVED = "RESULT ", "served"
NUM_RANKS = 4


@dataclass(frozen=True)
class Case:
    """A model, the trainer's layout and the TP of its engines, all on the same ranks."""

    model: str
    shape: ModelShape
    layout: Layout
    engine_tp: int


@dataclass(frozen=True)
class Measured:
    """Medians in seconds, of the slowest rank; bytes of rank 0, extra memory of the rank with most.

    copy_s: of as many bytes as the engine's shard has, within each rank's memory. wire_s: of an all-to-all of the bytes
    that travel, in as many exchanges, from buffers to buffers.
    """

    model_bytes: int
    shard_bytes: int
    received_bytes: int
    num_exchanges: int
    publish_s: float
    copy_s: float
    wire_s: float
    planning_s: float
    extra_bytes: int


@dataclass(frozen=True)
class Handed:
    """Medians in seconds, of the slowest rank, of a publication to engines in processes of their own.

    publish_s: from the first byte that is written to the last that is read. copy_s: of as many bytes as the engine's
    shard has, within the memory of each of its ranks, all at once.
    """

    model_bytes: int
    publish_s: float
    write_s: float
    copy_s: float


def _shipped(name: str) -> ModelShape:
    config = shipped_config(name)
    assert config is not None
    return parse_model_shape(config, name)


def cases() -> dict[str, Case]:
    """Return what can be measured, by name."""
    experts = replace(_shipped("Qwen/Qwen3-30B-A3B"), num_layers=2, num_experts=32, vocab_size=32768)
    return {
        "dense": Case("Qwen3-0.6B", _shipped("Qwen/Qwen3-0.6B"), Layout(NUM_RANKS, tp=2, pp=2), 2),
        "dense_to_tp4": Case("Qwen3-0.6B", _shipped("Qwen/Qwen3-0.6B"), Layout(NUM_RANKS, pp=4), 4),
        "experts": Case(
            "2 layers of Qwen3-30B-A3B, 32 experts", experts, Layout(NUM_RANKS, tp=2, pp=2, ep=2, etp=1), 2
        ),
    }


def served_case() -> Case:
    """Return what is handed to engines in processes of their own: about 500 MB, from ranks 0 and 1 to 2 and 3."""
    shape = replace(_shipped("Qwen/Qwen3-0.6B"), num_layers=6)
    return Case("6 layers of Qwen3-0.6B", shape, Layout(NUM_RANKS // 2, tp=2), NUM_RANKS // 2)


class Counted:
    """Tensors whose elements follow from their name and place, so that what arrived can be checked anywhere."""

    def __init__(self, shape: ModelShape) -> None:
        from megarl.weights.name_map import hf_shapes

        self.sizes = hf_shapes(shape)

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) along ``dim`` of tensor ``name``, of numbers that bfloat16 has."""
        import torch

        total = torch.tensor(zlib.crc32(name.encode()) % 1000)
        for at, size in enumerate(self.sizes[name]):
            index = torch.arange(start, stop) if at == dim else torch.arange(size)
            total = total[..., None] + (7, 13)[at] * index
        return (total % 251).bfloat16()


def measure(case: Case, bucket_bytes: int, repetitions: int) -> Measured:
    """Publish on this rank, and return what was measured of all."""
    from megarl.ranks.join import join_ranks

    platform = join_ranks()
    import torch
    import torch.distributed as dist

    from megarl.weights.cells import cells_of
    from megarl.weights.name_map import hf_shapes, megatron_peers, megatron_shards, vllm_peers, vllm_shards
    from megarl.weights.reshard import Resharder, node_size
    from megarl.weights.reshard_plan import plan_reshard
    from megarl.weights.sources import fill

    rank, device, dtype = dist.get_rank(), platform.device(int(os.environ["LOCAL_RANK"])), torch.bfloat16
    held = megatron_shards(case.shape, case.layout, rank)
    needed = vllm_shards(case.shape, EngineLayout(case.engine_tp), rank % case.engine_tp)
    sources, targets = ({s.name: torch.empty(s.shape, dtype=dtype, device=device) for s in e} for e in (held, needed))
    for target in targets.values():
        target.zero_()  # memory counts from here on
    fill(sources, held, Counted(case.shape))
    started_s = time.process_time()
    cells = cells_of(megatron_peers(case.shape, case.layout), node_size(device))
    plan = plan_reshard(cells, vllm_peers(case.shape, EngineLayout(case.engine_tp), range(NUM_RANKS)), rank)
    planning_s = time.process_time() - started_s
    resharder = Resharder(plan, dtype=dtype, bucket_bytes=bucket_bytes)

    def timed(run: Callable[[], None]) -> float:
        return statistics.median(_seconds(run, platform, device) for _ in range(repetitions))

    def publish() -> None:
        resharder.run(sources, targets, device)

    extra_bytes = _extra_bytes(publish, device)
    _check(case.shape, needed, targets)
    publish_s = timed(publish)
    shard_numel = sum(t.numel() for t in targets.values())
    received, sent = (
        {rank: stream.numel for rank, stream in streams.items()} for streams in (plan.receives, plan.sends)
    )
    sources, targets = {}, {}
    one, other = (torch.ones(shard_numel, dtype=dtype, device=device) for _ in range(2))

    def copy() -> None:
        one.copy_(other)

    return Measured(
        model_bytes=dtype.itemsize * sum(torch.Size(size).numel() for size in hf_shapes(case.shape).values()),
        shard_bytes=dtype.itemsize * shard_numel,
        received_bytes=dtype.itemsize * sum(received.values()),
        num_exchanges=resharder.num_exchanges,
        publish_s=publish_s,
        copy_s=timed(copy),
        wire_s=timed(lambda: _exchange(one, other, received, sent, resharder.num_exchanges)),
        planning_s=_most(planning_s, device),
        extra_bytes=round(_most(extra_bytes, device)),
    )


def measure_served(repetitions: int) -> Handed:
    """Write or read on this rank, and return what was measured of all."""
    from megarl.ranks.join import join_ranks

    platform = join_ranks()
    import torch
    import torch.distributed as dist

    from megarl.weights.name_map import hf_shapes, megatron_shards, vllm_shards
    from megarl.weights.shared import Segment, SharedReader, SharedWriter
    from megarl.weights.shared_plan import reader_plan, writer_plan
    from megarl.weights.sources import fill

    case, rank, dtype, device = served_case(), dist.get_rank(), torch.bfloat16, torch.device("cpu")
    num_writers, itemsize = case.layout.world_size, dtype.itemsize
    is_writer, tp_rank = rank < num_writers, rank - num_writers
    engine = EngineLayout(2)
    shards = megatron_shards(case.shape, case.layout, rank) if is_writer else vllm_shards(case.shape, engine, tp_rank)
    held = {shard.name: torch.zeros(shard.shape, dtype=dtype) for shard in shards}
    segments: list[Segment | None] = [None] * NUM_RANKS
    if is_writer:
        fill(held, shards, Counted(case.shape))
        writer = SharedWriter(writer_plan(case.shape, case.layout, engine, rank, itemsize), dtype)
        dist.all_gather_object(segments, writer.write(held, 0))
    else:
        reader = SharedReader(reader_plan(case.shape, case.layout, engine, tp_rank, itemsize), dtype)
        dist.all_gather_object(segments, None)
    written = [segment for segment in segments if segment is not None]

    def write() -> None:
        if is_writer:
            writer.write(held, 0)

    def publish() -> None:
        write()
        dist.barrier()
        if not is_writer:
            reader.read(written, 0, held)

    publish()
    if not is_writer:
        _check(case.shape, shards, held)
    shard_numel = 0 if is_writer else sum(t.numel() for t in held.values())
    one, other = (torch.ones(shard_numel, dtype=dtype) for _ in range(2))
    runs = (publish, write, lambda: one.copy_(other))
    turns = [[_seconds(run, platform, device) for run in runs] for _ in range(repetitions)]
    numel = sum(torch.Size(size).numel() for size in hf_shapes(case.shape).values())
    return Handed(itemsize * numel, *(statistics.median(times) for times in zip(*turns, strict=True)))


def _seconds(run: Callable[[], object], platform: Platform, device: torch.device) -> float:
    """Return the seconds of the slowest rank, all of which begin together."""
    import torch.distributed as dist

    platform.synchronize()
    dist.barrier()
    began_s = time.perf_counter()
    run()
    platform.synchronize()
    return _most(time.perf_counter() - began_s, device)


def _most(value: float, device: torch.device) -> float:
    """Return the most that any rank has."""
    import torch
    import torch.distributed as dist

    found = torch.tensor(value, device=device, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def _check(shape: ModelShape, shards: tuple[Shard, ...], found: Mapping[str, Tensor]) -> None:
    """Stop where a parameter isn't what the model's tensors say."""
    import torch

    from megarl.weights.sources import fill

    for shard in shards:
        expected = {shard.name: torch.zeros(shard.shape, dtype=torch.bfloat16)}
        fill(expected, [shard], Counted(shape))
        if not found[shard.name].cpu().equal(expected[shard.name]):
            raise SystemExit(f"{shard.name} arrived wrong")


def _exchange(
    into: Tensor, out: Tensor, received: Mapping[int, int], sent: Mapping[int, int], num_exchanges: int
) -> None:
    """Exchange as many elements, and nothing else."""
    import torch.distributed as dist

    for index in range(num_exchanges):
        into_sizes, out_sizes = (
            [
                n.get(r, 0) * (index + 1) // num_exchanges - n.get(r, 0) * index // num_exchanges
                for r in range(NUM_RANKS)
            ]
            for n in (received, sent)
        )
        dist.all_to_all_single(into[: sum(into_sizes)], out[: sum(out_sizes)], into_sizes, out_sizes)


def _extra_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Return the most memory that ``run`` has at a time besides what there is before."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM, the highest of VmRSS, anew
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def run_case(name: str, bucket_mib: int, repetitions: int) -> dict[str, Any]:
    """Start the ranks of a case and return what rank 0 says, by field."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
    command += [__file__, "--rank-of", name, "--bucket-mib", str(bucket_mib), "--repetitions", str(repetitions)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(RESULT))
    found: dict[str, Any] = json.loads(line.removeprefix(RESULT))
    return found


def table(results: Mapping[str, Measured], bucket_mib: int, repetitions: int) -> str:
    """Return the part of docs/performance.md that is measured."""
    lines = [
        f"Four ranks on {os.cpu_count()} cores over gloo, bfloat16, buckets of {bucket_mib} MiB, medians of "
        f"{repetitions}:",
        "",
        "| model | trainer -> engine | MB in all, a shard | received / shard | exchanges | publish | exchange alone | "
        "copy alone | extra memory | planning |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, m in results.items():
        case = cases()[name]
        axes = {"TP": case.layout.tp, "PP": case.layout.pp, "EP": case.layout.ep}
        trainer = " ".join(f"{axis}{size}" for axis, size in axes.items() if size > 1)
        sizes = f"{m.model_bytes / 1e6:,.0f}, {m.shard_bytes / 1e6:,.0f}"
        lines.append(
            f"| {case.model} | {trainer} -> TP{case.engine_tp} | {sizes} "
            f"| {m.received_bytes / m.shard_bytes:.2f} | {m.num_exchanges} | {m.publish_s:.2f} s | {m.wire_s:.2f} s "
            f"| {m.copy_s:.2f} s | {m.extra_bytes / 1e6:,.0f} MB | {m.planning_s * 1e3:.0f} ms |"
        )
    return "\n".join(lines)


def served_table(handed: Handed, repetitions: int) -> str:
    """Return the part of docs/performance.md that is measured of engines in processes of their own."""
    lines = [
        f"Two ranks of a trainer and two of an engine on {os.cpu_count()} cores, bfloat16, medians of {repetitions}:",
        "",
        "| model | trainer -> engine | MB | publish | of which writing | copy alone | publish / copy |",
        "|---|---|---|---|---|---|---|",
        f"| {served_case().model} | TP2 -> TP2 | {handed.model_bytes / 1e6:,.0f} | {handed.publish_s:.2f} s "
        f"| {handed.write_s:.2f} s | {handed.copy_s:.2f} s | {handed.publish_s / handed.copy_s:.1f} |",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*cases(), SERVED]
    parser.add_argument("--cases", nargs="+", default=names, choices=names)
    parser.add_argument("--bucket-mib", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    parser.add_argument("--rank-of", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        measured = (
            measure_served(options.repetitions)
            if options.rank_of == SERVED
            else measure(cases()[options.rank_of], options.bucket_mib << 20, options.repetitions)
        )
        if os.environ["RANK"] == "0":
            print(RESULT + json.dumps(asdict(measured)), flush=True)
        from megarl.parallel.world import leave_world

        leave_world()
        return
    results = {name: run_case(name, options.bucket_mib, options.repetitions) for name in options.cases}
    handed, texts = results.pop(SERVED, None), {}
    if results:
        measured_of = {name: Measured(**result) for name, result in results.items()}
        texts["publish"] = table(measured_of, options.bucket_mib, options.repetitions)
    if handed is not None:
        texts["publish to servers"] = served_table(Handed(**handed), options.repetitions)
    for name, text in texts.items():
        print(text)
        if options.write:
            write_measured(name, text)


if __name__ == "__main__":
    main()
