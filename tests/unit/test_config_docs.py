"""docs/config.md tells of every key what the schema and the YAML files say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megarl.config.defaults import default_values
from megarl.config.docs import allowed_in_words, config_reference, default_in_words, type_in_words
from megarl.config.schema import OptimConfig, key

PAGE = Path(__file__).resolve().parents[2] / "docs" / "config.md"


@cache
def reference() -> str:
    return config_reference()


def rule_of(**bounds: Any) -> dict[str, Any]:
    return dict(key("", **bounds).metadata)


def keys_of(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield section and name of each key that composed values have."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:  # a mapping of the user's own keys is empty
            yield from keys_of(value, f"{path}.{name}" if path else name)
        else:
            yield path, name


def keys_on_the_page(text: str) -> Iterator[tuple[str, str]]:
    """Yield section and name of each row."""
    section = ""
    for line in text.splitlines():
        if line.startswith("### "):
            section = line.removeprefix("### ")
        elif line.startswith("| `"):
            yield section, line.split("`")[1]


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python -m megarl.config.docs > docs/config.md"


@pytest.mark.parametrize(("part", "config_name"), [(1, "ppo_megatron_trainer"), (3, "sft_trainer")])
def test_each_key_of_the_yaml_files_has_a_row(part: int, config_name: str) -> None:
    page = reference().split("\n## ")[part]
    rows = [(section, name) for section, name in keys_on_the_page(page) if not section.endswith("[]")]
    assert sorted(rows) == sorted(keys_of(default_values(config_name)))


def test_the_data_parallel_trainer_has_rows_for_what_it_does_not_share() -> None:
    [_, shared, own, _] = reference().split("\n## ")
    rows = {*keys_on_the_page(shared), *keys_on_the_page(own)}
    assert set(keys_of(default_values("ppo_trainer"))) <= rows
    assert ("actor_rollout_ref.actor.fsdp_config", "param_offload") in rows


def test_a_row_has_type_default_bounds_and_meaning() -> None:
    rows = reference().splitlines()
    assert "| `eps` | number | `1e-08` | above 0, at most 1 | added to the denominator |" in rows


def test_types_read_as_yaml() -> None:
    kinds = (int, bool, str | None, tuple[str, ...], tuple[float, ...] | None, tuple[OptimConfig, ...])
    assert [type_in_words(kind) for kind in kinds] == [
        "integer", "boolean", "string or null", "list of strings", "list of numbers or null", "list of sections",
    ]  # fmt: skip


def test_a_default_that_is_taken_from_another_key_names_it() -> None:
    assert default_in_words("critic.shuffle", "${actor_rollout_ref.actor.shuffle}") == (
        "that of `actor_rollout_ref.actor.shuffle`"
    )
    assert default_in_words("trainer.run_dir", "outputs/run_${now:%Y}") == '`"outputs/run_${now:%Y}"`'
    assert default_in_words("model.path", None) == "required"


def test_bounds_and_choices_are_spelled_out() -> None:
    assert allowed_in_words(rule_of(above=0.0, high=1.0)) == "above 0, at most 1"
    assert allowed_in_words(rule_of(low=1)) == "at least 1"
    assert allowed_in_words(rule_of(choices=("cosine", "linear"))) == "`cosine`, `linear`"
    assert allowed_in_words(rule_of()) == ""
