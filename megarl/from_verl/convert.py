"""Converters of verl's values to ours, by the names that verl_keys.yaml calls them. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megarl.catalog import ESTIMATORS, SINKS
from megarl.checks.transformer_fields import OURS
from megarl.config.verl_keys import verl_rows

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
CORRECTION = "algorithm.rollout_correction"
_CPU_ADAM = "optim.override_optimizer_config.optimizer_cpu_offload"
# verl's loss -> ours. verl's own of the same name are those of POLICY_LOSSES.
_LOSSES = {"vanilla": "ppo_clip"} | {
    name: name for name in ("gspo", "geo_mean", "cispo", "sapo", "gpg", "clip_cov", "kl_cov")
}
_MEAN_OF_SEQUENCES = ("gspo", "sapo")
_ESTIMATORS = {"rloo_vectorized": "rloo", "grpo_vectorized": "grpo"} | {name: name for name in ESTIMATORS}
_CRITERIA = {
    "token_k1": "token", "seq_sum_k1": "sequence", "seq_mean_k1": "geometric", "seq_mean_k3": "sequence_k3",
    "token": "token", "sequence": "sequence", "geometric": "geometric",
}  # fmt: skip


@dataclass(frozen=True)
class Unused:
    """A value that needs no override: ``why``."""

    why: str


@dataclass(frozen=True)
class Missing:
    """A value that asks for what isn't there: ``what``."""

    what: str


@dataclass(frozen=True)
class Noted:
    """A value of ours, with what a reader has to know of it."""

    value: Any
    note: str


@dataclass(frozen=True)
class Settings:
    """verl's run: what it sets, and verl's defaults for the rest."""

    given: Mapping[str, Any]

    def __call__(self, key: str, default: Any = None) -> Any:
        """Return the value of a key of verl's: as given, else verl's default in the table, else ``default``."""
        row = verl_rows().get(key)
        return self.given.get(key, default if row is None or row.default is None else row.default)

    def number(self, key: str, default: int) -> int:
        """Return a value that is an integer, ``default`` where it isn't one yet."""
        value = self(key, default)
        return value if type(value) is int else default

    @property
    def is_megatron(self) -> bool:
        """Whether verl's backend is Megatron: also where nothing speaks for FSDP."""
        engine = self.given.get("model_engine", self.given.get(f"{ACTOR}.strategy"))
        if engine is not None:
            return bool(engine == "megatron")
        return any(".megatron." in key for key in self.given) or not any(".fsdp_config." in key for key in self.given)

    @property
    def has_critic(self) -> bool:
        """Whether verl has a critic in this run."""
        enable = self("critic.enable")
        return self("algorithm.adv_estimator", "gae") == "gae" if enable is None else bool(enable)

    @property
    def bypasses(self) -> bool:
        """Whether verl takes the engine's log-probs for the old ones."""
        return bool(self(f"{CORRECTION}.bypass_mode", False))

    def optimizer_steps(self, role: str) -> int:
        """Return the optimizer steps in one step of the run; verl's mini-batch counts prompts."""
        mini = self.number(f"{ACTOR}.ppo_mini_batch_size", 256)
        epochs = self.number(f"{ACTOR}.ppo_epochs", 1)
        if role != ACTOR:
            mini, epochs = self.number(f"{role}.ppo_mini_batch_size", mini), self.number(f"{role}.ppo_epochs", epochs)
        return max(1, self.number("data.train_batch_size", 1024) // mini) * epochs


Converter = Callable[[Any, Settings, str], Any]  # (value, verl's run, verl's key) -> our value, Unused, Missing, Noted


def _is_open(value: Any) -> bool:
    """Whether a value is text with a variable or command in it that wasn't expanded."""
    return isinstance(value, str) and "$" in value


def _unless(*unused: Any, why: str) -> Converter:
    return lambda value, run, key: Unused(why) if any(value is other for other in unused) else value


def _times_n(value: Any, run: Settings, key: str) -> Any:
    n = run.number(f"{ROLLOUT}.n", 1)
    return Noted(value * n, f"{value} prompts x {n} = {value * n:,} rollouts") if type(value) is int else value


def _minus_one_is_null(value: Any, run: Settings, key: str) -> Any:
    return None if value in (-1, 0) else value


def _resume_mode(value: Any, run: Settings, key: str) -> Any:
    if value == "resume_path":
        return Noted(run("trainer.resume_from_path"), "a checkpoint of megarl's: those of verl are not read")
    return "never" if value == "disable" else value


def _overlong_prompts(value: Any, run: Settings, key: str) -> Any:
    if run("data.filter_overlong_prompts"):
        return "filter"
    return run("data.truncation", "error")


def _warmup(role: str) -> Converter:
    """Return the converter of verl's warm-up in steps of the run, which a share of it stands for unless it is given."""

    def convert(value: Any, run: Settings, key: str) -> Any:
        steps, times = run(f"{role}.optim.lr_warmup_steps"), run.optimizer_steps(role)
        if isinstance(steps, int) and steps > 0:
            return Noted(steps * times, f"{steps} steps x {times} optimizer steps in each")
        return steps if _is_open(steps) else 0

    return convert


def _warmup_ratio(role: str) -> Converter:
    """Return the converter of verl's warm-up as a share of the run."""

    def convert(value: Any, run: Settings, key: str) -> Any:
        steps = run(f"{role}.optim.lr_warmup_steps")
        if isinstance(steps, int) and steps > 0:
            return Unused("lr_warmup_steps is given")
        return value or Unused("there is no warm-up")

    return convert


def _decay_style(value: Any, run: Settings, key: str) -> Any:
    return value if _is_open(value) or value in ("constant", "cosine", "linear") else Missing(f"the schedule {value}")


def _min_lr(value: Any, run: Settings, key: str) -> Any:
    style = run(f"{key.rpartition('.')[0]}.lr_decay_style")
    return Unused("the schedule is constant") if style == "constant" else value


def _precision_aware(role: str) -> Converter:
    def convert(value: Any, run: Settings, key: str) -> Any:
        return Unused("Adam steps on the host") if value and run(f"{role}.{_CPU_ADAM}") else value

    return convert


def _optimizer_offload(role: str) -> Converter:
    def convert(value: Any, run: Settings, key: str) -> Any:
        return Unused("Adam's state stays on the host") if value and run(f"{role}.{_CPU_ADAM}") else value

    return convert


def _transformer_field(value: Any, run: Settings, key: str) -> Any:
    section, _, field = key.rpartition(".")
    if field == "moe_aux_loss_coeff" and run(f"{section}.moe_router_load_balancing_type", "none") == "none":
        return Unused("moe_router_load_balancing_type is none")
    if "pipeline" in field and field in OURS and value:
        return Missing("stages of other sizes than equal ones")
    return Unused("megarl decides this field") if field in OURS else value


def _of_fsdp(value: Any, run: Settings, key: str) -> Any:
    return Unused("the backend is Megatron") if run.is_megatron else value


def _loss_mode(value: Any, run: Settings, key: str) -> Any:
    if run.bypasses:  # verl then has a loss of its own, whatever loss_mode says
        return _bypass_loss(run(f"{CORRECTION}.loss_type", "ppo_clip"), run, key)
    return value if _is_open(value) else _LOSSES.get(value, Missing(f"the policy loss {value}"))


def _of_loss(loss: str) -> Converter:
    def convert(value: Any, run: Settings, key: str) -> Any:
        is_on = run(f"{ACTOR}.policy_loss.loss_mode", "vanilla") == loss
        return value if is_on else Unused(f"a setting of {loss}")

    return convert


def _aggregation(value: Any, run: Settings, key: str) -> Any:
    is_fixed = run(f"{ACTOR}.policy_loss.loss_mode", "vanilla") in _MEAN_OF_SEQUENCES and not run.bypasses
    return "seq-mean-token-mean" if is_fixed else value


def _val_temperature(value: Any, run: Settings, key: str) -> Any:
    return run(f"{ROLLOUT}.val_kwargs.temperature", 0) if run(f"{ROLLOUT}.val_kwargs.do_sample", False) else 0


def _function_name(value: Any, run: Settings, key: str) -> Any:
    path = run(f"{key.rpartition('.')[0]}.path")
    return value if path else Unused("no file of yours is named")


def _function_argument(value: Any, run: Settings, key: str) -> Any:
    path = run(f"{key.partition('.reward_kwargs')[0]}.path")
    return value if path else Unused("no file of yours is named")


def _same_response_length(value: Any, run: Settings, key: str) -> Any:
    longest = run("data.max_response_length", 512)
    return Unused("it is data.max_response_length") if value == longest else Missing("a buffer that ends elsewhere")


def _reward_model(value: Any, run: Settings, key: str) -> Any:
    path = run("reward_model.model.path", "~/models/FsfairX-LLaMA3-RM-v0.1")
    return path if run("reward_model.enable", False) else Unused("reward_model.enable is false")


def _estimator(value: Any, run: Settings, key: str) -> Any:
    return value if _is_open(value) else _ESTIMATORS.get(value, Missing(f"the estimator {value}"))


def _num_generations(value: Any, run: Settings, key: str) -> Any:
    return Noted(100, "there is always a limit") if type(value) is int and value < 1 else value


def _of_weights(value: Any, run: Settings, key: str) -> Any:
    """Return what is said of weights, where a run has some: with verl's bypass a clipped loss has none."""
    if run.bypasses and run(f"{CORRECTION}.loss_type", "ppo_clip") == "ppo_clip":
        return Unused("the ratio of a bypass is the weight")
    return value if run(f"{CORRECTION}.rollout_is") else Unused("there are no weights")


def _bypass_loss(value: Any, run: Settings, key: str) -> Any:
    if not run.bypasses:
        return Unused("there is no bypass")
    return {"ppo_clip": "ppo_clip", "reinforce": "gpg"}.get(value, Missing(f"the loss {value} beside a bypass"))


def _cap(value: Any, run: Settings, key: str) -> Any:
    """Return verl's threshold of weights: a number caps them, ``low_high`` is a band."""
    found = _of_weights(value, run, key)
    if isinstance(found, str) and "_" in found and not _is_open(found):
        low, _, high = found.partition("_")
        return {"band": [float(low), float(high)]}
    return found if isinstance(found, Unused) else {"cap": found}


def _rejections(value: Any, run: Settings, key: str) -> Any:
    names = [name.strip() for name in str(run(f"{CORRECTION}.rollout_rs") or "").split(",") if name.strip()]
    if unknown := [name for name in names if name not in _CRITERIA]:
        return Missing(f"rejection by {', '.join(unknown)}")
    bounds = str(run(f"{CORRECTION}.rollout_rs_threshold")).split(",")
    bounds = bounds * len(names) if len(bounds) == 1 else bounds
    lower = run(f"{CORRECTION}.rollout_rs_threshold_lower")
    return [_rejection(name, bound, lower) for name, bound in zip(names, bounds, strict=False)] or Unused("none")


def _rejection(name: str, bound: str, lower: Any) -> dict[str, Any]:
    """Return one rejection of ours. verl bounds -log r of the k1 criteria, so that its bounds are those of 1/r."""
    low, _, high = bound.strip().rpartition("_")
    if name.endswith("k3"):
        return {"criterion": _CRITERIA[name], "low": 0.0, "high": float(high)}
    if lower is not None or not name.endswith("k1"):
        return {"criterion": _CRITERIA[name], "low": float(lower or 1 / float(high)), "high": float(high)}
    least = float(low) if low else 1 / float(high)
    return {"criterion": _CRITERIA[name], "low": 1 / float(high), "high": 1 / least}


def _old_rollout_is(value: Any, run: Settings, key: str) -> Any:
    """Return level and cap from the keys of verl before rollout_correction was a section."""
    is_on, cap = run("algorithm.rollout_is"), run("algorithm.rollout_is_threshold")
    if not is_on or cap is None:
        return Unused("there are no weights")
    level = run("algorithm.rollout_is_level", "token") if is_on is True else is_on
    return {"level": level, "cap": cap} if level in ("token", "sequence") else Missing(f"weights by {level}")


def _sinks(value: Any, run: Settings, key: str) -> Any:
    names = [value] if isinstance(value, str) else list(value)
    left = [name for name in names if name in SINKS]
    others = [name for name in names if name not in SINKS and not _is_open(name)]
    return Noted(left, f"there is no sink {', '.join(others)}") if others else left


CONVERTERS: Mapping[str, Converter] = {
    "actor_optimizer_offload": _optimizer_offload(ACTOR),
    "actor_precision_aware": _precision_aware(ACTOR),
    "actor_warmup": _warmup(ACTOR),
    "actor_warmup_ratio": _warmup_ratio(ACTOR),
    "aggregation": _aggregation,
    "bypass_loss": _bypass_loss,
    "chat_template_kwargs": _unless(None, why="no arguments"),
    "clip_ratio": lambda value, run, key: Unused("verl clips at clip_ratio_low and clip_ratio_high, 0.2 unless set"),
    "critic_optimizer_offload": _optimizer_offload("critic"),
    "critic_precision_aware": _precision_aware("critic"),
    "critic_warmup": _warmup("critic"),
    "critic_warmup_ratio": _warmup_ratio("critic"),
    "decay_style": _decay_style,
    "estimator": _estimator,
    "function_argument": _function_argument,
    "function_name": _function_name,
    "loss_mode": _loss_mode,
    "min_lr": _min_lr,
    "minus_one_is_null": _minus_one_is_null,
    "num_generations": _num_generations,
    "of_clip_cov": _of_loss("clip_cov"),
    "of_fsdp": _of_fsdp,
    "of_kl_cov": _of_loss("kl_cov"),
    "old_rollout_is": _old_rollout_is,
    "overlong_prompts": _overlong_prompts,
    "rejections": _rejections,
    "resume_mode": _resume_mode,
    "reward_model": _reward_model,
    "same_response_length": _same_response_length,
    "sinks": _sinks,
    "times_n": _times_n,
    "token_cap": lambda value, run, key: {"level": "token", "cap": value} if value and value > 0 else Unused("off"),
    "transformer_field": _transformer_field,
    "unless_false": _unless(False, why="verl packs on Megatron in any case"),
    "unless_null": _unless(None, why="it is left to chance or to the number of rows in verl"),
    "val_temperature": _val_temperature,
    "weights_cap": _cap,
    "weights_level": _of_weights,
    "weights_normalized": lambda value, run, key: _of_weights(value, run, key) if value else Unused("off"),
}
