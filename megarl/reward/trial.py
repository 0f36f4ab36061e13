"""A reward function is tried on a few rows before a run starts."""

from __future__ import annotations

from collections.abc import Mapping

from megarl.errors import RewardError
from megarl.reward.pool import RewardPool
from megarl.types import RewardRequest


def try_reward(pool: RewardPool, requests: Mapping[str, RewardRequest]) -> None:
    """Raise RewardError, with the function's traceback, where it fails on one of the requests. requests: by origin."""
    results = pool.score(list(requests.values()))
    for (origin, request), result in zip(requests.items(), results, strict=True):
        if result.outcome != "ok":
            printed = pool.take_printed().strip()
            said = f"\nit printed:\n{printed[-2_000:]}" if printed else ""
            raise RewardError(
                f"the reward function failed on {origin}, tried with its ground truth {request.ground_truth!r} as the "
                f"response: {result.outcome}: {result.detail}\n{result.traceback}{said}".rstrip()
                + "\nfix the function; if it needs what only a run has, reward.try_first=false leaves this out"
            )
