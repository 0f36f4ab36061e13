"""What is asked of the environment that SGLang is in, before anything starts."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest

from megarl import __version__
from megarl.errors import ConfigError
from megarl.launchers.sglang_environment import SGLANG_VERSION, check_sglang, sglang_python
from tests.unit.composed_configs import ppo_config

KEY = "actor_rollout_ref.rollout.sglang.python"


def interpreter(folder: Path, says: str) -> str:
    """Return the path of a program in the place of Python, which prints a line whatever it is asked."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def told(sglang: str | None, megarl: str | None) -> str:
    """Return what an interpreter says of its packages."""
    return json.dumps({"sglang": sglang, "megarl": megarl})


def refused(python: str) -> str:
    """Return what is said of an interpreter that is refused."""
    with pytest.raises(ConfigError) as caught:
        check_sglang(python)
    [problem] = caught.value.problems
    assert problem.key == KEY and "make sglang" in problem.fix
    return problem.allowed


def test_without_a_key_it_is_this_interpreter() -> None:
    assert sglang_python(ppo_config()) == sys.executable


def test_a_link_to_an_interpreter_is_not_followed(tmp_path: Path) -> None:
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    assert sglang_python(ppo_config(**{KEY: str(link)})) == str(link)


def test_the_versions_that_are_checked_with_pass(tmp_path: Path) -> None:
    python = interpreter(tmp_path, told(SGLANG_VERSION, __version__))
    check_sglang(python)


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (told("0.4.0", __version__), f"must have sglang {SGLANG_VERSION}, and has 0.4.0"),
        (told(SGLANG_VERSION, None), f"must have megarl {__version__}, and doesn't have it"),
        ("Python 3", "is no interpreter that answers"),
    ],
)
def test_another_version_or_none_is_named(tmp_path: Path, says: str, why: str) -> None:
    assert why in refused(interpreter(tmp_path, says))


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "No such file" in refused(str(tmp_path / "none"))


def test_this_environment_is_asked_by_its_own_packages() -> None:
    """It has this megarl and, since vLLM is in it, no SGLang."""
    assert refused(sys.executable) == f"must have sglang {SGLANG_VERSION}, and doesn't have it"
