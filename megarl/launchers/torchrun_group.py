"""The WorkerGroup of ranks that are there: rank 0 is controller and worker, the others serve it.

torchrun starts them, or anything else that starts one process a rank.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from megarl.errors import MegarlError, WorkerError
from megarl.launchers.failure import failures_named
from megarl.launchers.parcels import packed, parcels_of, relay_of
from megarl.launchers.starter import has_peers
from megarl.launchers.watchdog import Watchdog
from megarl.monitor.preemption import Preempted, Preemption
from megarl.ranks.join import join_ranks, limit_collectives, start_worker
from megarl.ranks.meeting import meeting_host
from megarl.ranks.spec import RankSpec
from megarl.ranks.watched import START, Watched, failed_at_once

if TYPE_CHECKING:
    from megarl.ranks.worker import Worker

A = TypeVar("A")
T = TypeVar("T")

_FOREVER = timedelta(days=30)  # a controller may score, validate or wait for long; a dead peer is noticed at once
_END_BY_TORCHRUN_S = 10.0  # torchrun ends all ranks of a node within a second of one's death


@dataclass(frozen=True)
class _Call:
    """What all ranks hear of a call: takers and bytes of every parcel. verb: None ends the run."""

    verb: Callable[[Worker, Any], Any] | None
    takers: tuple[tuple[int, ...], ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The call in an error."""
        return "shutdown" if self.verb is None else self.verb.__name__


def serve() -> None:
    """Be a rank other than 0 until the run ends. A failure ends the process, and torchrun the others."""
    # The controller hears of a signal as well, or from this rank: it is the one that saves.
    preemption = Preemption(None, lambda text: None, partial(has_peers, dict(os.environ)))
    try:
        group = TorchrunGroup.joined(None, preemption)
        if group is not None:
            with preemption.heard():
                group.serve()
    except MegarlError as error:
        print(f"{type(error).__name__} on rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # at once: a peer inside a collective must see the connection close


class TorchrunGroup:
    """The ranks that are there. Rank 0 creates it with the run; the others learn the run from rank 0.

    A call is told to all in one broadcast. Each parcel goes from rank 0 to the first rank that takes it, and from there
    from rank to rank. Answers other than None come back one by one, and with each whether its rank got a signal.
    """

    def __init__(
        self,
        worker: Worker,
        control: dist.ProcessGroup,
        preemption: Preemption,
        watched: Watched,
        watchdog: Watchdog | None,
    ) -> None:
        self.worker, self.control, self.preemption, self.watched = worker, control, preemption, watched
        self._watchdog = watchdog
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.waiting: deque[_Answers[Any]] = deque()

    @classmethod
    def joined(cls, spec: RankSpec | None, preemption: Preemption) -> TorchrunGroup | None:
        """Join the other ranks; return the group once all have started, None where rank 0 has no run for them."""
        with _failures_named(START, preemption):
            platform = join_ranks()
            # Calls travel in a group of their own, apart from the collectives of models and engine.
            control = dist.new_group(backend="gloo", timeout=_FOREVER)
            watchdog = None if spec is None else Watchdog(meeting_host(), dist.get_world_size(), spec.hang_timeout_s)
            told = [None if spec is None or watchdog is None else (spec, watchdog.address)]
            dist.broadcast_object_list(told, src=0, group=control)
            if told[0] is None:
                return None
            spec, address = told[0]
            watched = Watched(address, dist.get_rank(), _fail)
            limit = nullcontext() if watchdog is None else watchdog.limited(START, _fail)
            with watched.at(START), limit:
                worker = start_worker(spec, platform)
            limit_collectives(_FOREVER.total_seconds(), [control])
            return cls(worker, control, preemption, watched, watchdog)

    @property
    def watchdog(self) -> Watchdog:
        """What watches over all ranks, on rank 0."""
        assert self._watchdog is not None
        return self._watchdog

    def submit(self, verb: Callable[[Worker, A], T], arguments: Sequence[A]) -> _Answers[T]:
        """Have every rank run ``verb``, as WorkerGroup says; this one does when the answers are asked for."""
        self.finish(None)  # the others may wait for this rank in a call before
        parcels = parcels_of(arguments)
        contents = packed(parcels)
        call = _Call(verb, parcels.takers, tuple(map(len, contents)))
        with self._failures_named(call.name), self._limited(call.name):
            self._tell(call)
            for content, takers in zip(contents, parcels.takers, strict=True):
                first = takers[0] if takers[0] != self.rank else None
                for receiver in (first,) if first is not None else relay_of(takers, self.rank)[1]:
                    self._send(content, receiver)
        answers: _Answers[T] = _Answers(self, call, arguments[self.rank])
        self.waiting.append(answers)
        return answers

    def shutdown(self) -> None:
        """Let the serving ranks return."""
        self.finish(None)
        with self._failures_named("shutdown"), self._limited("shutdown"):
            self._tell(_Call(None))
            self.worker.shutdown(None)
        self.watchdog.close()

    def abort(self, cause: BaseException) -> None:
        """Do nothing: this process is about to fail, and torchrun, or the loss of this one, then ends the others."""

    def finish(self, last: _Answers[Any] | None) -> None:
        """Run this rank's part of the calls up to ``last``, of all where it is None, and collect their answers."""
        while self.waiting:
            answers = self.waiting.popleft()
            assert answers.call.verb is not None
            with self._failures_named(answers.call.name), self._limited(answers.call.name):
                answers.found = self._gather(answers.call.verb(self.worker, answers.own))
            if answers is last:
                return

    def serve(self) -> None:
        """Answer calls until the controller shuts down."""
        name = "a wait for the next call"
        while True:
            with self._failures_named(name):
                call = self._tell(None)
            name = call.name
            if call.verb is None:
                break
            with self._failures_named(name), self.watched.at(name):
                self._gather(call.verb(self.worker, self._receive(call)))
        with self._failures_named(name):
            self.worker.shutdown(None)

    def _failures_named(self, call: str) -> AbstractContextManager[None]:
        return _failures_named(call, self.preemption)

    @contextmanager
    def _limited(self, call: str) -> Iterator[None]:
        with self.watched.at(call), self.watchdog.limited(call, self._end_all):
            yield

    def _end_all(self, error: WorkerError) -> None:
        _record(error)
        self.watchdog.kill_ranks_here()  # torchrun would give one that is stopped half a minute
        failed_at_once(error)

    def _tell(self, call: _Call | None) -> _Call:
        told = [call]
        dist.broadcast_object_list(told, src=0, group=self.control)
        assert told[0] is not None
        return told[0]

    def _receive(self, call: _Call) -> Any:
        """Return this rank's argument, and hand it on."""
        mine = next(i for i, takers in enumerate(call.takers) if self.rank in takers)
        sender, receivers = relay_of(call.takers[mine], self.rank)
        content = torch.empty(call.sizes[mine], dtype=torch.uint8)
        dist.recv(content, src=0 if sender is None else sender, group=self.control)
        for receiver in receivers:
            dist.send(content, dst=receiver, group=self.control)
        return pickle.loads(content.numpy().tobytes())

    def _send(self, content: bytes, receiver: int) -> None:
        dist.send(torch.frombuffer(bytearray(content), dtype=torch.uint8), dst=receiver, group=self.control)

    def _gather(self, answer: Any) -> list[Any]:
        """Return all answers on rank 0; None travels as a size of 0."""
        content = b"" if answer is None else pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL)
        size = torch.tensor([len(content), self.preemption.is_asked])
        if self.rank != 0:
            dist.gather(size, dst=0, group=self.control)
            if content:
                self._send(content, 0)
            return []
        sizes = [torch.zeros_like(size) for _ in range(self.world_size)]
        dist.gather(size, sizes, dst=0, group=self.control)
        found: list[Any] = [answer]
        for rank in range(1, self.world_size):
            num_bytes, has_signal = sizes[rank].tolist()
            if has_signal:
                self.preemption.ask(f"a signal to rank {rank}")
            there = torch.empty(num_bytes, dtype=torch.uint8)
            if len(there):
                dist.recv(there, src=rank, group=self.control)
            found.append(pickle.loads(there.numpy().tobytes()) if len(there) else None)
        return found


class _Answers(Generic[T]):
    """The answers to a call under torchrun."""

    def __init__(self, group: TorchrunGroup, call: _Call, own: object) -> None:
        self.group, self.call, self.own = group, call, own
        self.found: list[T] | None = None

    def result(self) -> list[T]:
        """Wait for all ranks, and return their answers by rank."""
        if self.found is None:
            self.group.finish(self)
        assert self.found is not None
        return self.found


def _fail(error: WorkerError) -> None:
    """End this rank with an error, whatever its main thread is in."""
    _record(error)
    failed_at_once(error)


def _record(error: Exception) -> None:
    """Give an error to torchrun, whose report ends the output."""
    try:
        raise error
    except Exception:  # noqa: BLE001 - torch takes the text of what is being handled
        get_error_handler().record_exception(error)


@contextmanager
def _failures_named(call: str, preemption: Preemption) -> Iterator[None]:
    """Name a failure and give it to torchrun, whose report ends the output; let that of a lost peer be heard first.

    The loss of one that ended since the machine is wanted back is no failure.
    """
    with failures_named(call):
        try:
            yield
        except MegarlError:
            raise
        except Exception as error:
            if _is_loss_of_a_peer(error):
                if preemption.is_ending or (preemption.limit is None and preemption.is_asked):
                    raise Preempted from error
                time.sleep(_END_BY_TORCHRUN_S)
            get_error_handler().record_exception(error)
            raise


def _is_loss_of_a_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone. gloo raises plain RuntimeErrors from its sources."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))
