"""``torch.cuda`` as Megatron sees it on CPU: the device is the CPU, and every call is synchronous."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType, SimpleNamespace

import torch

_CPU = torch.device("cpu")


class Stream:
    """A stream or an event. Work on CPU is done when it is launched, so there is nothing to wait for."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_stream(self, stream: Stream) -> None: ...

    def wait_event(self, event: Stream) -> None: ...

    def wait(self, stream: Stream | None = None) -> None: ...

    def record(self, stream: Stream | None = None) -> None: ...

    def record_event(self, event: Stream | None = None) -> Stream:
        return self

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    # There is one order of execution: a side stream is the current stream.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


_STREAM = Stream()


def _nothing(*args: object, **kwargs: object) -> None: ...


def _current_stream(device: object = None) -> Stream:
    return _STREAM


def _context(*args: object, **kwargs: object) -> AbstractContextManager[None]:
    return nullcontext()


def _get_rng_state(device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: object = None) -> None:
    torch.set_rng_state(state)


class CudaView(ModuleType):
    """Answer for the CPU where ``torch.cuda`` would ask a GPU; everything else is the real ``torch.cuda``."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.is_available = lambda: False
        self.device_count = lambda: 0
        self.current_device = lambda: _CPU
        self.set_device = self.synchronize = self.empty_cache = _nothing
        self.Stream = self.Event = Stream
        self.current_stream = self.default_stream = _current_stream
        self.stream = self.device = _context
        self.nvtx = SimpleNamespace(range_push=_nothing, range_pop=_nothing, range=_context)
        self.default_generators = {_CPU: torch.default_generator}
        self.manual_seed = self.manual_seed_all = torch.manual_seed
        self.get_rng_state, self.set_rng_state = _get_rng_state, _set_rng_state
        self.random = SimpleNamespace(get_rng_state=_get_rng_state, set_rng_state=_set_rng_state)

    def __getattr__(self, name: str) -> object:
        return getattr(torch.cuda, name)
