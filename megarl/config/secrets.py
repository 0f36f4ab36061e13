"""Secrets of the environment, which a config's values may hold and the files of a run must not."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

_NAME = re.compile(r"(?i)(^|_)(key|token|secret|password|passwd|credentials?)(_|$)|apikey")
_REFERENCE = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)")
_FEWEST_CHARACTERS = 8  # what is shorter is no secret, and might stand in any text


def without_secrets(value: T, typed: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> T:
    """Return plain values with ``${oc.env:NAME}`` in place of what the environment keeps under a secret name.

    A name is secret that says so (KEY, TOKEN, PASSWORD, ...) or that an override refers to. typed: the overrides. So it
    doesn't matter whether the shell or the config put the text in, nor what it is a part of.
    """
    referred = {name for text in typed for name in _REFERENCE.findall(text)}
    secrets = {
        text: f"${{oc.env:{name}}}"
        for name, text in environ.items()
        if len(text) >= _FEWEST_CHARACTERS and (name in referred or _NAME.search(name))
    }
    longest_first = sorted(secrets, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first))) if secrets else None
    return _replaced(value, pattern, secrets)


def _replaced(value: T, pattern: re.Pattern[str] | None, secrets: Mapping[str, str]) -> T:
    found: object = value
    if pattern is not None and isinstance(value, str):
        found = pattern.sub(lambda match: secrets[match[0]], value)
    elif isinstance(value, Mapping):
        found = {k: _replaced(v, pattern, secrets) for k, v in value.items()}
    elif isinstance(value, list | tuple):
        found = [_replaced(v, pattern, secrets) for v in value]
    return found  # type: ignore[return-value] # of the kind that it was, lists for tuples
