"""The Python environment that SGLang is installed in, beside this one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megarl import __version__
from megarl.config.schema import PPOConfig
from megarl.errors import ConfigError, Problem

SGLANG_VERSION = "0.5.23"
_KEY = "actor_rollout_ref.rollout.sglang.python"
_FIX = f"make sglang, then {_KEY}=.venv-sglang/bin/python"
# Neither is imported: that takes ten seconds.
_ASK = """
import importlib.metadata as m, importlib.util as u, json, pathlib, re
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return None
megarl = u.find_spec("megarl")
print(json.dumps({"sglang": version("sglang"), "megarl": megarl and re.search(
    '__version__ = "(.*)"', pathlib.Path(megarl.origin).read_text())[1]}))
"""
_ASK_S = 60.0


def sglang_python(config: PPOConfig) -> str:
    """Return the interpreter that SGLang runs in."""
    named = config.actor_rollout_ref.rollout.sglang.python
    # The link itself, not what it leads to: it is by its place that an interpreter finds its packages.
    return sys.executable if named is None else str(Path(named).expanduser().absolute())


def check_sglang(python: str, node: str = "") -> None:
    """Raise ConfigError unless an interpreter has this megarl and the SGLang that it is checked with.

    node: which this runs on, where it isn't the command's.
    """
    try:
        done = subprocess.run([python, "-I", "-c", _ASK], capture_output=True, text=True, timeout=_ASK_S, check=True)
        found = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise _refused(python, node, f"is no interpreter that answers: {error}") from error
    for name, needed in (("sglang", SGLANG_VERSION), ("megarl", __version__)):
        if found[name] != needed:
            has = "doesn't have it" if found[name] is None else f"has {found[name]}"
            raise _refused(python, node, f"must have {name} {needed}, and {has}")


def _refused(python: str, node: str, why: str) -> ConfigError:
    if not node:
        return ConfigError([Problem(_KEY, python, why, _FIX)])
    return ConfigError([Problem(_KEY, python, f"{why} on {node}", "make sglang there, in a folder of the same path")])
