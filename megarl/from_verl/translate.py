"""A run of verl's, key by key, as overrides of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megarl.config.verl_keys import Row, verl_row, verl_rows
from megarl.from_verl.convert import ACTOR, CONVERTERS, Missing, Noted, Settings, Unused
from megarl.from_verl.read import TRAINER, VerlRun

_CONFIGS = ("ppo_trainer", "ppo_megatron_trainer")


@dataclass
class Translation:
    """What became of a run. ours: our overrides; the rest are sentences, each about a key of verl's.

    changed: values that mean something else here, or stand for one of verl's defaults. missing: what isn't there, by
    what it is. opened: values that only a shell knows.
    """

    backend: str
    ours: dict[str, Any] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)


def translated(verl: VerlRun) -> Translation:
    """Return the Translation of a run of verl's."""
    given, run = verl.given, Settings(verl.given)
    found = Translation("ppo_megatron_trainer" if run.is_megatron else "ppo_trainer")
    if verl.module != TRAINER:
        found.missing[verl.module] = "another trainer than main_ppo"
    if verl.config_name not in _CONFIGS:
        found.opened.append(f"--config-name={verl.config_name}: values of that file are unknown here")
    found.opened += [
        f"case {text}: none of its branches was read; give the variable as NAME=value" for text in verl.undecided
    ]
    for row in verl_rows().values():
        if row.default is not None and row.verl not in given and _counts(row.verl, run):
            _take(row, row.verl, row.default, run, found.defaults, Translation(found.backend))
    for key, value in given.items():
        known = verl_row(key)
        if isinstance(value, str) and "$" in value:
            found.opened.append(f"{key}={value}")
        if known is None:
            found.missing[key] = "a key that isn't known here"
        else:
            _take(known, key, value, run, found.ours, found)
    _add_what_follows(run, found)
    found.defaults = {key: value for key, value in found.defaults.items() if key not in found.ours}
    return found


def _counts(key: str, run: Settings) -> bool:
    """Whether verl reads the default of a key in this run: its role and its backend are there."""
    return (run.has_critic or not key.startswith("critic.")) and (run.is_megatron or ".megatron." not in key)


def _take(row: Row, key: str, value: Any, run: Settings, ours: dict[str, Any], found: Translation) -> None:
    """Put what a key becomes into ``ours``, or say in ``found`` why nothing does."""
    if row.kind == "none":
        found.unused.append(f"{key}: {row.note}")
        return
    if row.kind == "missing":
        is_idle = any(value == other and type(value) is type(other) for other in row.idle) or value in ("", [])
        if is_idle or (row.where is not None and run(row.where) in (None, False, 0, "", *row.idle)):
            found.unused.append(f"{key}: {value!r} asks for nothing")
        else:
            found.missing[key] = row.note
        return
    answer = CONVERTERS[row.by](value, run, key) if row.by else value
    if isinstance(answer, Unused):
        found.unused.append(f"{key}: {answer.why}")
    elif isinstance(answer, Missing):
        found.missing[key] = answer.what
    else:
        result = answer.value if isinstance(answer, Noted) else answer
        is_same = row.kind != "meaning" or (row.our_key(key) == key and result == value)
        note = answer.note if isinstance(answer, Noted) else "" if is_same else row.note
        if note:
            found.changed.append(f"{row.our_key(key)}={result}: {note}; verl has {key}={value}")
        ours.update(_leaves(row.our_key(key), result))


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key, value


def _add_what_follows(run: Settings, found: Translation) -> None:
    """Add what verl does without a key and we ask to be said."""
    values = {**found.defaults, **found.ours}
    has_kl = values.get(f"{ACTOR}.use_kl_loss", False) or values.get("algorithm.use_kl_in_reward", False)
    if values.get("algorithm.adv_estimator") == "grpo" and not has_kl:
        found.ours["algorithm.kl_free"] = True
        found.changed.append("algorithm.kl_free=True: grpo without a KL term is said by name")
    mode = f"{ACTOR}.loss_agg_mode"
    fixed = CONVERTERS["aggregation"](values.get(mode, "token-mean"), run, mode)
    if fixed != values.get(mode, "token-mean"):
        found.ours[mode] = fixed
        found.changed.append(f"{mode}={fixed}: verl's {run(f'{ACTOR}.policy_loss.loss_mode')} is so whatever it says")


def without(found: Translation, keys: Mapping[str, str]) -> Translation:
    """Return ``found`` without some of our overrides. keys: each with why it isn't needed."""
    dropped = [f"{key}: {why}" for key, why in keys.items() if key in found.ours]
    return Translation(
        found.backend,
        {key: value for key, value in found.ours.items() if key not in keys},
        [line for line in found.changed if line.partition("=")[0] not in keys],
        {key: value for key, value in found.defaults.items() if key not in keys},
        [*found.unused, *dropped],
        found.missing,
        found.opened,
    )
