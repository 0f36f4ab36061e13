"""The seeds of a step's rollouts: of the run, the step and the place in the batch, and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarl.controller.engine_on_ranks import EngineOnRanks
from megarl.controller.observer import Observer
from megarl.controller.reward_log import RewardLog
from megarl.controller.sampler import RolloutSampler
from megarl.controller.scoring import Scorer
from megarl.data.mixing import MixedOrder
from megarl.data.order import Order
from megarl.data.verbs import verbs_tokenizer
from megarl.monitor.timing import Stopwatch
from megarl.reward.pool import RewardPool
from megarl.reward.registry import RewardSpec
from megarl.types import Prompt, Rollout, Sampling
from tests.unit.composed_configs import ppo_config
from tests.unit.stand_ins import PlainRanks


def seeds(
    folder: Path,
    order: Order | MixedOrder,
    *,
    origin: str = "a.parquet",
    run_seed: int = 0,
    steps: int = 1,
    ranks: int = 1,
    tp: int = 1,
    max_generations: int = 1,
) -> list[tuple[int, int]]:
    """Return the first token of the prompt and the seed of every request of some steps, in order."""
    asked: list[tuple[int, int]] = []

    def answer(rank: int, verb: str, work: Any) -> Any:
        if verb != "generate" or rank % tp:
            return None
        asked.extend((request.token_ids[0], request.seed) for request in work.requests)
        return tuple((Rollout((5,), (-0.1,), "stop", 0),) * 2 for _ in work.requests)

    (folder / "my_reward.py").write_text("def compute_score(**_):\n    return 1.0\n")
    config = ppo_config().reward
    prompts = tuple(Prompt(f"0:{i}", (i, 1), "", "mine", "1", {}, f"{origin}:{i}") for i in range(8))
    with RewardPool(1, 30.0, RewardSpec(path=str(folder / "my_reward.py")), 0.0) as pool:
        sampler = RolloutSampler(
            prompts,
            order,
            EngineOnRanks(PlainRanks(ranks, answer), tp, Observer()),
            Scorer(config, verbs_tokenizer(), 8, pool, None, Observer(), RewardLog(folder, print)),
            Sampling(n=2),
            run_seed,
            max_generations,
            0,
            Stopwatch(),
        )
        for step in range(1, steps + 1):
            sampler.take(step)
    return asked


IN_FILE_ORDER = Order(8, 4, False, 0)


def test_a_row_that_comes_twice_in_a_step_is_sampled_with_two_seeds(tmp_path: Path) -> None:
    one_row_of_two_files = MixedOrder((1, 7), (1.0, 1.0), 8, False, 0)
    asked = seeds(tmp_path, one_row_of_two_files)
    assert [row for row, _ in asked].count(0) == 4
    assert len({seed for _, seed in asked}) == 8


def test_seeds_follow_from_the_run_s_seed_the_step_and_the_place_in_the_batch(tmp_path: Path) -> None:
    asked = seeds(tmp_path, IN_FILE_ORDER, steps=2)
    assert len({seed for _, seed in asked}) == 8
    assert asked == seeds(tmp_path, IN_FILE_ORDER, steps=2, origin="/somewhere/else/a.parquet")
    assert not {seed for _, seed in asked} & {s for _, s in seeds(tmp_path, IN_FILE_ORDER, steps=2, run_seed=1)}
    other_rows = seeds(tmp_path, Order(8, 4, True, 3), steps=2)
    assert [row for row, _ in other_rows] != [row for row, _ in asked]
    assert [seed for _, seed in other_rows] == [seed for _, seed in asked]


@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (4, 2), (4, 4)])
def test_the_layout_does_not_change_seeds(tmp_path: Path, ranks: int, tp: int) -> None:
    assert sorted(seeds(tmp_path, IN_FILE_ORDER, ranks=ranks, tp=tp)) == sorted(seeds(tmp_path, IN_FILE_ORDER))


def test_a_group_that_is_replaced_gets_a_seed_of_its_own_each_time(tmp_path: Path) -> None:
    asked = seeds(tmp_path, IN_FILE_ORDER, max_generations=3)  # all rewards are equal, so all groups are replaced
    assert len(asked) == len({seed for _, seed in asked}) == 12
    assert asked == seeds(tmp_path, IN_FILE_ORDER, max_generations=3)
