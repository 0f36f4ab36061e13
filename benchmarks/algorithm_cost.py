"""Seconds that estimators, policy losses, KL and rollout correction take for a million tokens, on one core.

    OMP_NUM_THREADS=1 python benchmarks/algorithm_cost.py

Losses are timed forward and backward. Compare with a step's own time, which benchmarks/step_breakdown.py prints.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from megarl.algorithm.advantage import AdvantageInputs, AdvantageSettings, estimators
from megarl.algorithm.kl import kl_estimators
from megarl.algorithm.policy_loss import PolicyLossInputs, PolicyLossSettings, policy_losses
from megarl.algorithm.rollout_correction import CorrectionSettings, correct_rollouts

NUM_ROLLOUTS, NUM_TOKENS, GROUP_SIZE, REPEATS = 1024, 1024, 8, 5


def main() -> None:
    """Print a table: what, seconds for a million tokens."""
    torch.manual_seed(0)
    shape = (NUM_ROLLOUTS, NUM_TOKENS)
    rewards_B, mask_BS = torch.randint(0, 2, shape[:1]).float(), torch.rand(shape) < 0.9
    group_B = torch.arange(NUM_ROLLOUTS) // GROUP_SIZE
    inputs = AdvantageInputs(rewards_B, group_B, mask_BS, None, torch.randn(shape), torch.rand(shape[:1]))
    old_BS, new_BS = -torch.rand(shape), -torch.rand(shape)
    print(f"{'':<42}seconds / 1M tokens")
    for name in estimators.names():
        show(f"estimator {name}", lambda name=name: estimators.get(name)(inputs, AdvantageSettings()))
    rows_N = torch.arange(NUM_ROLLOUTS).repeat_interleave(NUM_TOKENS)
    for name in policy_losses.names():
        show(f"loss {name}", lambda name=name: differentiate_loss(name, new_BS, old_BS, rows_N))
    for name in ("kl", "low_var_kl", "low_var_kl+"):
        show(f"kl {name}", lambda name=name: differentiate_kl(name, new_BS, old_BS))
    correction = CorrectionSettings("sequence", cap=2.0)
    show("rollout correction", lambda: correct_rollouts(old_BS, new_BS, mask_BS, correction))


def differentiate_loss(name: str, new_BS: torch.Tensor, old_BS: torch.Tensor, rows_N: torch.Tensor) -> None:
    """Run one policy loss forward and backward."""
    logprobs_N = new_BS.flatten().clone().requires_grad_()
    advantages_N = torch.ones_like(logprobs_N)
    chosen_N = torch.zeros(len(rows_N), dtype=torch.bool)
    inputs = PolicyLossInputs(logprobs_N, old_BS.flatten(), advantages_N, rows_N, NUM_ROLLOUTS, None, chosen_N)
    policy_losses.get(name)(inputs, PolicyLossSettings()).loss_N.sum().backward()


def differentiate_kl(name: str, new_BS: torch.Tensor, old_BS: torch.Tensor) -> None:
    """Run one KL estimator forward and backward."""
    logprobs_BS = new_BS.clone().requires_grad_()
    kl_estimators.get(name)(logprobs_BS, old_BS).sum().backward()


def show(what: str, work: Callable[[], object]) -> None:
    """Time ``work`` on all tokens, after one run to warm up, and print the median for a million."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    print(f"{what:<42}{statistics.median(times) * 1e6 / (NUM_ROLLOUTS * NUM_TOKENS):8.3f}")


if __name__ == "__main__":
    main()
