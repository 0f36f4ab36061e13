"""The coefficient of the KL penalty in the reward: fixed, or steered so that the KL stays near a target.

A controller is a value: ``after`` returns the one for the next step. All it learns is ``coef``; ``state`` has the
settings too, so that a controller made of it goes on as one that was never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Protocol

from megarl.algorithm.registry import Registry
from megarl.errors import CheckpointError

_MAX_ERROR = 0.2

# What JSON can hold: the name that kl_ctrl.type has, and the numbers.
State = dict[str, str | int | float]


@dataclass(frozen=True)
class KLControlSettings:
    """Settings of all controllers; each reads its own.

    coef: the coefficient to start (or resume) with. target: KL to keep, in nats, of the same kind as is observed (the
    mean over tokens, or the sum over a response). horizon: rollouts over which the coefficient is corrected.
    """

    coef: float
    target: float = 0.1
    horizon: int = 10_000


class KLController(Protocol):
    """A controller in its present state."""

    @property
    def coef(self) -> float:
        """Return the coefficient of the KL penalty."""

    def after(self, kl: float, num_rollouts: int) -> KLController:
        """Return the controller for the next step, after ``num_rollouts`` with a KL of ``kl``."""

    def state(self) -> State:
        """Return the controller's type and numbers, of which ``from_state`` makes an equal controller."""


kl_controllers: Registry[Callable[[KLControlSettings], KLController]] = Registry("algorithm.kl_ctrl.type")


@dataclass(frozen=True)
class FixedKL:
    """A coefficient that stays."""

    coef: float

    def after(self, kl: float, num_rollouts: int) -> FixedKL:
        """Return the same controller: the coefficient stays."""
        return self

    def state(self) -> State:
        """Return the type and numbers, of which ``from_state`` makes an equal controller."""
        return {"type": "fixed", **asdict(self)}


@dataclass(frozen=True)
class AdaptiveKL:
    """A coefficient in proportion to how far the KL is off its target.

    error = clip(kl / target - 1, -0.2, 0.2); coef' = coef * (1 + error * num_rollouts / horizon).
    Fine-tuning language models from human preferences, arXiv:1909.08593, section 2.2, whose gain K = 0.1 is
    num_rollouts / horizon here, so that it doesn't depend on the batch size.
    """

    coef: float
    target: float
    horizon: int

    def after(self, kl: float, num_rollouts: int) -> AdaptiveKL:
        """Return the controller with the corrected coefficient.

        Needs a horizon above ``num_rollouts`` / 5: a shorter one could turn the sign of the coefficient.
        """
        assert num_rollouts * _MAX_ERROR < self.horizon, f"{num_rollouts} rollouts, horizon {self.horizon}"
        error = min(max(kl / self.target - 1.0, -_MAX_ERROR), _MAX_ERROR)
        return replace(self, coef=self.coef * (1.0 + error * num_rollouts / self.horizon))

    def state(self) -> State:
        """Return the type and numbers, of which ``from_state`` makes an equal controller."""
        return {"type": "adaptive", **asdict(self)}


@kl_controllers.register("fixed")
def _fixed(settings: KLControlSettings) -> KLController:
    return FixedKL(settings.coef)


@kl_controllers.register("adaptive")
def _adaptive(settings: KLControlSettings) -> KLController:
    return AdaptiveKL(settings.coef, settings.target, settings.horizon)


def from_state(state: Mapping[str, object]) -> KLController:
    """Return the controller that has this ``state``, as read from a checkpoint. Raises CheckpointError if none has."""
    kinds: dict[str, type[FixedKL] | type[AdaptiveKL]] = {"fixed": FixedKL, "adaptive": AdaptiveKL}
    kind = kinds.get(str(state.get("type")))
    if kind is None:
        raise CheckpointError(f"a KL controller has type {state.get('type')!r}, must be one of {', '.join(kinds)}")
    names = {f.name for f in fields(kind)}
    numbers = {name: value for name, value in state.items() if name != "type" and _is_number(value)}
    if numbers.keys() != names or state.keys() != names | {"type"}:
        raise CheckpointError(
            f"a KL controller of type {state['type']} has numbers {sorted(names)}, not {dict(state)!r}"
        )
    return kind(**numbers)  # type: ignore[arg-type] # numbers, as just checked


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type] # math takes just these
