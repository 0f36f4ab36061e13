"""Every name, keyword and word that the engine takes from vLLM on GPUs is there, in each release that setup.py allows.

No GPU is needed to know it: the sources say so. The installed build for CPU has the files of the one for GPUs as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from tests.structure.megatron_facts import ANY, open_release
from tests.structure.test_gpu_requirements import asked
from tests.structure.vllm_facts import UNSAID, all_uses, facts_of, files_of, words_of

RELEASES = Path(__file__).with_name("vllm_releases.json")
FACTS: dict[str, dict[str, Any]] = json.loads(RELEASES.read_text(encoding="utf-8"))


def missing(names: Mapping[str, Any], words: Mapping[str, bool]) -> list[str]:
    """Return a sentence for each use that a release doesn't know."""
    lines = []
    for (module, name), keywords in all_uses().items():
        if f"{module}:{name}" not in names:
            lines.append(f"{module} {name} isn't in {RELEASES.name}: write it anew")
            continue
        taken = names[f"{module}:{name}"]
        if taken is None:
            lines.append(f"{module} has no {name}")
        elif ANY not in taken:
            lines += [f"{module} {name} takes no {word}" for word in keywords if word not in taken]
    unwanted = {f"{file}: {word}" for file, word in UNSAID}
    return lines + [f"{word} stands there: {stands}" for word, stands in words.items() if stands == (word in unwanted)]


@pytest.mark.parametrize("version", FACTS)
def test_a_release_for_gpus_has_every_name_keyword_and_word(version: str) -> None:
    assert missing(FACTS[version]["names"], FACTS[version]["words"]) == []


def test_the_installed_release_has_them_too() -> None:
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM isn't installed")
    folder = Path(spec.origin).parents[1]
    assert missing(facts_of(open_release(folder)), words_of(files_of(folder))) == []


def test_the_facts_are_of_releases_that_setup_py_allows() -> None:
    (requirement,) = [r for r in asked("EXTRAS", "gpu") if r.name == "vllm"]
    assert all(requirement.specifier.contains(version) for version in FACTS) and len(FACTS) == 3
    assert requirement.specifier == SpecifierSet(">=0.30,<0.33")


def test_the_scan_sees_what_the_engine_is_built_with() -> None:
    uses = all_uses()
    arguments = uses["vllm.engine.arg_utils", "EngineArgs"]
    assert {"disable_custom_all_reduce", "compilation_config", "enable_sleep_mode", "async_scheduling"} <= {*arguments}
    assert ("vllm.sampling_params", "SamplingParams.logprobs") in uses
    assert ("vllm.envs", "VLLM_ALLREDUCE_USE_SYMM_MEM") in uses


def test_a_release_without_a_name_or_with_a_clock_in_its_scheduling_is_caught() -> None:
    version = next(iter(FACTS))
    names, words = FACTS[version]["names"], FACTS[version]["words"]
    without = names | {"vllm.entrypoints.llm:LLM.sleep": None, "vllm.engine.arg_utils:EngineArgs": ["model"]}
    lines = missing(without, words | {"vllm/v1/engine/core.py: .done()": True})
    assert "vllm.entrypoints.llm has no LLM.sleep" in lines
    assert "vllm.engine.arg_utils EngineArgs takes no disable_custom_all_reduce" in lines
    assert lines[-1] == "vllm/v1/engine/core.py: .done() stands there: True"
