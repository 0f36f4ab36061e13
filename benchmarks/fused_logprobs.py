"""Log-probs with and without logits that are kept: time and memory of output layer and log-probs, forward and backward.

    python benchmarks/fused_logprobs.py [--hidden 1024] [--tokens 1024] [--repetitions 3] [--write]

Both ways take turns in one process with the same hidden states, weight and targets; the loss has no entropy in it, and
gradients of both are compared. --write puts the table into docs/performance.md.

Shape suffixes: L positions, N those that count, H hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from page import write_measured
from torch import Tensor

from megarl.parallel.fused_vocab import fused_vocab_parallel_logprobs
from megarl.parallel.vocab import vocab_parallel_logprobs

VOCAB_SIZE = 151_936
SHARES = (1.0, 0.5)

Logprobs = Callable[[], Tensor]


@dataclass(frozen=True)
class Head:
    """What both ways are given."""

    hidden_LH: Tensor
    weight_VH: Tensor
    rows_N: Tensor
    targets_N: Tensor
    group: dist.ProcessGroup

    def plain(self) -> Tensor:
        """Return log-probs of logits that are there as a whole."""
        logits_LV = self.hidden_LH @ self.weight_VH.T
        return vocab_parallel_logprobs(
            logits_LV, self.targets_N, group=self.group, vocab_size=VOCAB_SIZE, rows_N=self.rows_N
        )[0]

    def fused(self) -> Tensor:
        """Return log-probs of logits that come and go."""
        return fused_vocab_parallel_logprobs(
            self.hidden_LH, self.weight_VH, self.targets_N, group=self.group, vocab_size=VOCAB_SIZE, rows_N=self.rows_N
        )[0]

    def gradients(self, logprobs: Logprobs) -> tuple[Tensor, ...]:
        """Run one forward and backward pass; return the gradients of hidden states and weight."""
        loss = -logprobs().sum() / len(self.targets_N)
        return torch.autograd.grad(loss, (self.hidden_LH, self.weight_VH))

    def saved_bytes(self, logprobs: Logprobs) -> int:
        """Return the bytes that the forward pass keeps for the backward pass, beside what it was given."""
        resident = {tensor.untyped_storage()._cdata for tensor in (self.hidden_LH, self.weight_VH)}
        saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in resident:
                saved[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logprobs()
        return sum(storage.nbytes() for storage in saved.values())

    def peak_bytes(self, logprobs: Logprobs) -> int:
        """Return the most bytes that a forward and backward pass has allocated at a time, its gradients included."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.gradients(logprobs)
        assert profile.profiler is not None and profile.profiler.kineto_results is not None
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak


def make_head(hidden_size: int, num_tokens: int, share: float) -> Head:
    """Return a random head, of whose positions ``share`` count."""
    generator = torch.Generator().manual_seed(0)
    hidden_LH = torch.randn(num_tokens, hidden_size, generator=generator).requires_grad_()
    weight_VH = (0.02 * torch.randn(VOCAB_SIZE, hidden_size, generator=generator)).requires_grad_()
    count = int(share * num_tokens)
    targets_N = torch.randint(VOCAB_SIZE, (count,), generator=generator)
    assert dist.group.WORLD is not None
    return Head(hidden_LH, weight_VH, torch.arange(num_tokens - count, num_tokens), targets_N, dist.group.WORLD)


def take_turns(head: Head, repetitions: int) -> dict[str, list[float]]:
    """Return CPU seconds of both ways, who is first changing; the first repetition warms up, and compares.

    The CPU's time and not the clock's: other programs hardly change it, and with one thread nothing waits.
    """
    ways = {"plain": head.plain, "fused": head.fused}
    for one, other in zip(*(head.gradients(way) for way in ways.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(one.abs().max()))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions):
        for name in sorted(ways, reverse=repetition % 2 == 1):
            start = time.process_time()
            head.gradients(ways[name])
            seconds[name].append(time.process_time() - start)
    return seconds


def row(head: Head, share: float, repetitions: int) -> str:
    """Return the line of the table for one head."""
    mib = 2**20
    kept = [f"{head.saved_bytes(way) / mib:,.0f}" for way in (head.plain, head.fused)]
    peak = [f"{head.peak_bytes(way) / mib:,.0f}" for way in (head.plain, head.fused)]
    seconds = take_turns(head, repetitions)
    plain, fused = (statistics.median(seconds[name]) for name in ("plain", "fused"))
    ratio = statistics.median(f / p for f, p in zip(seconds["fused"], seconds["plain"], strict=True))
    memory = f"{' -> '.join(kept)} MiB | {' -> '.join(peak)} MiB"
    return f"| {share:.0%} | {memory} | {plain:.2f} -> {fused:.2f} s | {ratio:.2f} |"


def main() -> None:
    """Measure, print, and write the table where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        lines = [
            f"{arguments.tokens:,} positions, hidden size {arguments.hidden:,}, vocabulary {VOCAB_SIZE:,}, float32, "
            f"torch {importlib.metadata.version('torch')}, one thread, medians of "
            f"{arguments.repetitions}:",
            "",
            "| positions that count | kept for the backward pass | most at a time | CPU, both passes | ratio |",
            "|---|---|---|---|---|",
        ]
        for share in SHARES:
            lines.append(row(make_head(arguments.hidden, arguments.tokens, share), share, arguments.repetitions))
        dist.destroy_process_group()
    text = "\n".join(lines)
    print(text)
    if arguments.write:
        write_measured("fused log-probs", text)


if __name__ == "__main__":
    main()
