from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megarl.roles import Training
from megarl.train.schedule import learning_rate

LINEAR = Training(
    lr=1.0,
    min_lr=0.2,
    weight_decay=0.0,
    betas=(0.9, 0.95),
    eps=1e-8,
    clip_grad=1.0,
    schedule="linear",
    warmup_steps=4,
    total_steps=8,
)


def _rates(training: Training) -> list[float]:
    return [learning_rate(training, update) for update in range(1, training.total_steps + 1)]


def test_warm_up_rises_evenly_and_the_first_update_after_it_has_the_peak() -> None:
    assert _rates(LINEAR)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_linear_schedule_goes_down_evenly_to_one_update_before_the_least_rate() -> None:
    assert _rates(LINEAR)[4:] == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_a_cosine_schedule_is_half_way_at_half_its_length() -> None:
    cosine = replace(LINEAR, schedule="cosine", warmup_steps=0, min_lr=0.0)
    assert _rates(cosine) == pytest.approx([(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)])
    assert learning_rate(cosine, 5) == pytest.approx(0.5)


def test_a_run_of_one_optimizer_step_trains_at_the_peak() -> None:
    for schedule in ("cosine", "linear", "constant"):
        assert learning_rate(replace(LINEAR, schedule=schedule, warmup_steps=0, total_steps=1), 1) == 1.0


def test_no_update_of_a_run_has_a_rate_of_zero() -> None:
    for schedule in ("cosine", "linear"):
        assert min(_rates(replace(LINEAR, schedule=schedule, min_lr=0.0))) > 0


def test_a_constant_schedule_stays_at_the_peak() -> None:
    assert set(_rates(replace(LINEAR, schedule="constant"))[4:]) == {1.0}


def test_updates_beyond_the_schedule_have_the_least_rate() -> None:
    assert learning_rate(LINEAR, 9) == learning_rate(LINEAR, 100) == pytest.approx(0.2)


def test_a_share_of_the_run_is_so_many_updates_of_warm_up() -> None:
    share = replace(LINEAR, schedule="constant", warmup_steps=0, warmup_ratio=0.5)
    assert _rates(share) == _rates(replace(LINEAR, schedule="constant", warmup_steps=4))


@pytest.mark.parametrize("asked", [{"warmup_steps": 20}, {"warmup_steps": 0, "warmup_ratio": 1.0}])
def test_a_warm_up_beyond_the_run_ends_before_its_last_update(asked: dict[str, float]) -> None:
    assert _rates(replace(LINEAR, total_steps=2, **asked)) == [1.0, 1.0]
    assert _rates(replace(LINEAR, total_steps=1, **asked)) == [1.0]
    assert _rates(replace(LINEAR, total_steps=3, **asked))[:2] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("limit", "grad_norm", "is_taken"),
    [
        (None, 1e30, True),
        *((limit, bad, False) for limit in (None, 5.0) for bad in (math.inf, math.nan)),
        *((5.0, norm, norm <= 5.0) for norm in (0.0, 5.0, 5.001)),
    ],
)
def test_a_step_is_taken_for_a_gradient_that_is_finite_and_not_above_the_limit(
    limit: float | None, grad_norm: float, is_taken: bool
) -> None:
    assert replace(LINEAR, skip_grad_norm=limit).takes(grad_norm) == is_taken
