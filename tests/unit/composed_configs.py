"""Configs as Hydra composes them from conf/, with single keys changed, for tests that try many."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from megarl.checks.idle import idle_settings
from megarl.checks.rules import run_problems
from megarl.config.build import build_config
from megarl.config.schema import PPOConfig, SFTConfig
from megarl.errors import Problem
from megarl.roles import ModelFacts, Role, roles_of
from megarl.weights.model_shape import ModelShape


@cache
def _composed(config_name: str, overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_module("megarl.conf", version_base="1.3"):
        return compose(config_name, list(overrides))


def composed_values(config_name: str, *overrides: str, **changes: object) -> dict[str, Any]:
    """Return resolved values. changes: dotted keys, as in ``**{"data.train_batch_size": 4}``."""
    config = _composed(config_name, overrides).copy()
    for key, value in changes.items():
        OmegaConf.update(config, key, value, force_add=True)  # a section of free names is empty
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}


def ppo_config(**changes: object) -> PPOConfig:
    """Return a GRPO run on 8 ranks that breaks no rule, with ``changes``."""
    base: dict[str, object] = {
        "actor_rollout_ref.model.path": "model",
        "actor_rollout_ref.actor.use_kl_loss": True,
        "actor_rollout_ref.rollout.n": 4,
        "algorithm.adv_estimator": "grpo",
    }
    return build_config(PPOConfig, composed_values("ppo_megatron_trainer", **(base | changes)))


def sft_config(**changes: object) -> SFTConfig:
    """Return an SFT run on 8 ranks that breaks no rule, with ``changes``."""
    return build_config(SFTConfig, composed_values("sft_trainer", **({"model.path": "model"} | changes)))


def roles_in(config: PPOConfig | SFTConfig, **shapes: ModelShape) -> tuple[Role, ...]:
    """Return the roles of a config. shapes: of the models that were found, by the section that names them."""

    def find(facts: ModelFacts) -> ModelFacts:
        return replace(facts, known_shape=shapes[facts.key], folder="found") if facts.key in shapes else facts

    return roles_of(config, find)


def problems_without_files(config: PPOConfig | SFTConfig) -> list[Problem]:
    """Return the problems of a config that need no file, as of a strict run."""
    roles = roles_in(config)
    return [*idle_settings(config, roles), *run_problems(config, roles)]
