from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.algorithm.kl_control import AdaptiveKL, FixedKL, KLControlSettings, kl_controllers
from megarl.errors import ConfigError


def test_a_fixed_coefficient_stays() -> None:
    controller = kl_controllers.get("fixed")(KLControlSettings(coef=0.01))
    assert controller == FixedKL(0.01)
    assert controller.after(kl=100.0, num_rollouts=64) == controller


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(0.1, 1.0), (0.11, 1.01), (0.09, 0.99), (5.0, 1.02), (0.0, 0.98), (-1.0, 0.98)],  # error clipped to +-0.2
)
def test_an_adaptive_coefficient_follows_the_clipped_relative_error(kl: float, factor: float) -> None:
    controller = AdaptiveKL(coef=0.5, target=0.1, horizon=1000)
    assert controller.after(kl, num_rollouts=100).coef == pytest.approx(0.5 * factor, rel=1e-12)


def test_it_settles_where_the_kl_meets_its_target() -> None:
    controller = kl_controllers.get("adaptive")(KLControlSettings(coef=1.0, target=0.1, horizon=200))
    for _ in range(500):
        controller = controller.after(kl=0.02 / controller.coef, num_rollouts=100)
    assert 0.02 / controller.coef == pytest.approx(0.1, rel=1e-3)


@given(kls=st.lists(st.floats(-10, 10), max_size=40), num_rollouts=st.integers(1, 499))
def test_the_coefficient_never_turns_its_sign(kls: list[float], num_rollouts: int) -> None:
    controller = AdaptiveKL(coef=0.1, target=0.05, horizon=100)
    for kl in kls:
        controller = controller.after(kl, num_rollouts)
    assert controller.coef > 0


def test_a_controller_resumed_from_its_coefficient_goes_on_as_if_never_stopped() -> None:
    settings = KLControlSettings(coef=0.2, target=0.1, horizon=100)
    going = kl_controllers.get("adaptive")(settings).after(0.3, 10)
    resumed = kl_controllers.get("adaptive")(replace(settings, coef=going.coef))
    assert resumed.after(0.07, 10) == going.after(0.07, 10)


def test_an_unknown_type_is_an_error_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"kl_ctrl\.type = 'adaptiv'.*\n.*did you mean 'adaptive'"):
        kl_controllers.get("adaptiv")
