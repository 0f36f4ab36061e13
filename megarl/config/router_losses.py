"""Losses on the router of experts, which a run asks for by the names of megatron's TransformerConfig."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megarl.errors import Problem

_TYPE, _BALANCE, _Z = "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff"
ROUTER_LOSS_FIELDS = (_TYPE, _BALANCE, _Z)

_TYPES = ("none", "seq_aux_loss")


@dataclass(frozen=True)
class RouterLosses:
    """Coefficients: of the load-balancing loss of each sequence, and of the z-loss. They are means over sequences."""

    load_balance: float = 0.0
    z: float = 0.0


def router_losses(overrides: Mapping[str, Any]) -> RouterLosses:
    """Return the losses that checked ``override_transformer_config`` asks for."""
    balances = (overrides.get(_TYPE) or "none") != "none"
    return RouterLosses(float(overrides.get(_BALANCE) or 0.0) * balances, float(overrides.get(_Z) or 0.0))


def router_losses_are_whole(key: str, overrides: Mapping[str, Any]) -> Iterator[Problem]:
    """A load-balancing loss is one that no layout changes, and coefficients are numbers. key: of the overrides."""
    for name in (_BALANCE, _Z):
        value = overrides.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            yield Problem(f"{key}.{name}", value, "must be a number, and not negative", f"{key}.{name}=0.001")
    kind, path = overrides.get(_TYPE) or "none", f"{key}.{_TYPE}"
    if kind not in _TYPES:
        allowed = (
            f"must be {' or '.join(_TYPES)}: megatron's others balance the tokens that happen to share a micro-batch, "
            "so the layout would change the loss"
        )
        yield Problem(path, kind, allowed, f"{path}=seq_aux_loss")


def router_losses_are_added(key: str, overrides: Mapping[str, Any]) -> Iterator[Problem]:
    """A load-balancing loss has a coefficient, and a coefficient a loss. key: of the overrides."""
    kind, path = overrides.get(_TYPE) or "none", f"{key}.{_TYPE}"
    if kind == "none" and overrides.get(_BALANCE):
        allowed = f"has no effect where {_TYPE} is none"
        yield Problem(f"{key}.{_BALANCE}", overrides[_BALANCE], allowed, f"+{path}=seq_aux_loss")
    elif kind != "none" and not overrides.get(_BALANCE):
        allowed = f"has no effect where {_BALANCE} is 0"
        yield Problem(path, kind, allowed, f"+{key}.{_BALANCE}=0.001")
