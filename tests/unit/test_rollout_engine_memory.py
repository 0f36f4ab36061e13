"""The engine's memory: what is mapped when, by the calls that vLLM gets."""

from __future__ import annotations

from megarl.rollout.engine_memory import EngineMemory


class Recorded:
    """Stands for vLLM, and holds what it would have mapped."""

    def __init__(self) -> None:
        self.mapped = {"weights", "kv_cache"}
        self.calls: list[str] = []

    def sleep(self, level: int) -> None:
        assert len(self.mapped) == 2, "vLLM lets an engine that is half awake as it is"
        self.mapped.clear()
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        assert not self.mapped & set(tags), "vLLM lets an engine that is awake as it is"
        self.mapped.update(tags)
        self.calls.append(f"wake {' '.join(tags)}")


def test_a_step_maps_the_cache_only_after_the_weights_were_published() -> None:
    vllm = Recorded()
    memory = EngineMemory(vllm)
    memory.give_back()
    assert memory.has_lost_weights
    memory.take_weights()
    assert vllm.mapped == {"weights"}
    memory.take_all()
    memory.give_back()
    assert vllm.calls == ["sleep 2", "wake weights", "wake kv_cache", "sleep 2"]


def test_what_is_there_is_not_asked_for_again() -> None:
    vllm = Recorded()
    memory = EngineMemory(vllm)
    memory.take_weights()
    memory.take_all()
    assert vllm.calls == [] and not memory.has_lost_weights
    memory.give_back()
    memory.give_back()
    memory.take_all()
    memory.take_weights()
    assert vllm.calls == ["sleep 2", "wake weights", "wake kv_cache"]


def test_an_engine_that_is_half_awake_gives_all_back() -> None:
    vllm = Recorded()
    memory = EngineMemory(vllm)
    memory.give_back()
    memory.take_weights()
    memory.give_back()
    assert vllm.mapped == set()
