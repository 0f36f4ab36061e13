"""Values by dotted key: the defaults, as conf/ alone tells them, and those of a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf


@cache
def default_values(config_name: str) -> Mapping[str, Any]:
    """Return the plain values of a main config without overrides, interpolations unresolved."""
    # Whoever composes configs of their own at this moment, as a notebook may, goes on afterwards.
    hydra = GlobalHydra.instance()
    outer = hydra.hydra
    hydra.clear()
    try:
        with initialize_config_module("megarl.conf", version_base="1.3"):
            values = OmegaConf.to_container(compose(config_name), resolve=False)
    finally:
        GlobalHydra.instance().hydra = outer
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}


def default_of(key: str, config_name: str = "ppo_megatron_trainer") -> object:
    """Return the default of a dotted key as a plain value."""
    value: Any = default_values(config_name)
    for name in key.split("."):
        value = value[name]
    assert not (isinstance(value, str) and "${" in value), f"{key} has no default of its own: {value}"
    return value


def resolved_defaults(config_name: str) -> dict[str, Any]:
    """Return the plain values of a main config without overrides."""
    values = OmegaConf.to_container(OmegaConf.create(dict(default_values(config_name))), resolve=True)
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}


def defaults_in(values: Mapping[str, Any], sections: Sequence[str], config_name: str) -> dict[str, Mapping[str, Any]]:
    """Return the values of sections in which nothing is set. values: of the whole config, whose rest stays."""
    tree, found = OmegaConf.create(dict(values)), dict[str, Mapping[str, Any]]()
    for section in sections:
        defaults: Any = default_values(config_name)
        for name in section.split("."):
            defaults = defaults[name]
        OmegaConf.update(tree, section, defaults, merge=False)
    for section in sections:
        resolved = OmegaConf.to_container(OmegaConf.select(tree, section), resolve=True)
        assert isinstance(resolved, dict)
        found[section] = {str(name): value for name, value in resolved.items()}
    return found


def value_of(config: object, key: str) -> Any:
    """Return the value of a dotted key of a config."""
    for name in key.split("."):
        config = getattr(config, name)
    return config
