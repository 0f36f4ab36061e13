"""docs/config.md tells of every key what the schema and the YAML files say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megarl.config.docs import allowed_in_words, config_reference, default_values, type_in_words
from megarl.config.schema import ActorConfig, RolloutConfig, key

PAGE = Path(__file__).resolve().parents[2] / "docs" / "config.md"


def rule_of(**bounds: Any) -> dict[str, Any]:
    return dict(key("", **bounds).metadata)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == config_reference(), "run: python -m megarl.config.docs > docs/config.md"


@pytest.mark.parametrize("schema", [ActorConfig, RolloutConfig])
def test_each_key_has_a_row_with_its_meaning(schema: type) -> None:
    rows = config_reference().splitlines()
    for field in dataclasses.fields(schema):
        if field.metadata["doc"] and not dataclasses.is_dataclass(field.type):
            ending = f"| {field.metadata['doc']} |"
            nested = any(row.startswith("## ") and row.endswith(f".{field.name}") for row in rows)
            assert nested or any(row.startswith(f"| `{field.name}` |") and row.endswith(ending) for row in rows)


def test_defaults_are_those_of_the_composed_files() -> None:
    values = default_values("ppo_megatron_trainer")
    assert values["actor_rollout_ref"]["actor"]["ppo_mini_batch_size"] == 256
    assert "| `ppo_mini_batch_size` | integer | `256` | at least 1 |" in config_reference()


def test_types_read_as_yaml() -> None:
    kinds = (int, bool, str | None, tuple[str, ...], float | None)
    assert [type_in_words(kind) for kind in kinds] == [
        "integer", "boolean", "string or null", "list of strings", "number or null",
    ]  # fmt: skip


def test_bounds_and_choices_are_spelled_out() -> None:
    assert allowed_in_words(rule_of(above=0.0, high=1.0)) == "above 0, at most 1"
    assert allowed_in_words(rule_of(low=1)) == "at least 1"
    assert allowed_in_words(rule_of(choices=("cosine", "linear"))) == "`cosine`, `linear`"
    assert allowed_in_words(rule_of()) == ""
