"""Secrets of the environment stay there."""

from __future__ import annotations

import pytest
import yaml
from omegaconf import OmegaConf

from megarl.config.compose import as_yaml
from megarl.config.secrets import without_secrets

TOKEN = "hf_0123456789abcdef"
ENVIRON = {"HF_TOKEN": TOKEN, "PWD": "/where/i/am", "JUDGE": "a phrase that says nothing", "API_KEY": "short"}


def test_a_secret_is_a_reference_wherever_it_stands() -> None:
    values = {"reward": {"kwargs": {"token": TOKEN, "header": f"Bearer {TOKEN}", "all": [TOKEN, 3]}}, "lr": 1e-6}
    shown = without_secrets(values, environ=ENVIRON)
    reference = "${oc.env:HF_TOKEN}"
    assert shown == {
        "reward": {"kwargs": {"token": reference, "header": f"Bearer {reference}", "all": [reference, 3]}},
        "lr": 1e-6,
    }


def test_a_name_that_an_override_refers_to_is_secret_whatever_it_is() -> None:
    values = {"key": ENVIRON["JUDGE"], "path": "/where/i/am/data", "other": "short"}
    assert without_secrets(values, environ=ENVIRON) == values
    shown = without_secrets(values, ["reward.kwargs.key=${oc.env:JUDGE}"], ENVIRON)
    assert shown == {**values, "key": "${oc.env:JUDGE}"}


def test_a_secret_that_another_begins_with_does_not_show_the_rest() -> None:
    environ = {"TOKEN": "12345678", "LONG_TOKEN": "1234567890"}
    assert without_secrets("1234567890", environ=environ) == "${oc.env:LONG_TOKEN}"


def test_a_written_config_resolves_to_the_secret_again_and_leaves_other_text_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    values = {"token": TOKEN, "text": "costs ${5}"}
    text = as_yaml(values)
    assert TOKEN not in text
    assert yaml.safe_load(text)["token"] == "${oc.env:HF_TOKEN}"
    assert OmegaConf.to_container(OmegaConf.create(text), resolve=True) == values
