"""The device memory of an engine's weights and KV cache, given back for training and taken back in two parts.

No engine is imported here: whoever builds one hands it over.
"""

from __future__ import annotations

from typing import Protocol

PARTS = ("weights", "kv_cache")  # vLLM's and SGLang's names of them
_DISCARD = 2  # vLLM's level of sleep at which no copy of the weights goes to the host


class Sleeper(Protocol):
    """What of ``vllm.LLM`` is used here, and what another engine is made to look like."""

    def sleep(self, level: int) -> None:
        """Unmap the memory of all parts. level: what is kept of them, in vLLM's numbers."""
        ...

    def wake_up(self, tags: list[str]) -> None:
        """Map the memory of some parts again, at the addresses that it had."""
        ...


class EngineMemory:
    """Which parts of an engine's memory are there, and whether its weights are those that were published last.

    Weights come back without their values: a publication brings them anew, from the trainer on the same devices. A copy
    on the host would cost its memory, and two ways over the bus at every step.
    """

    def __init__(self, engine: Sleeper) -> None:
        self._engine = engine
        self._away: tuple[str, ...] = ()
        self.has_lost_weights = False

    def give_back(self) -> None:
        """Free all parts that are there; no effect where none is."""
        if self._away != PARTS:
            self._take(self._away)  # nothing is put to sleep that is half awake
            self._engine.sleep(level=_DISCARD)
            self._away, self.has_lost_weights = PARTS, True

    def take_weights(self) -> None:
        """Have memory for the weights."""
        self._take(PARTS[:1])

    def take_all(self) -> None:
        """Have memory for weights and KV cache."""
        self._take(PARTS)

    def _take(self, parts: tuple[str, ...]) -> None:
        for part in (part for part in parts if part in self._away):
            self._engine.wake_up(tags=[part])
            self._away = tuple(left for left in self._away if left != part)
