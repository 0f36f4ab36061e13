"""The life of a run on this node: what happens here and elsewhere, and what follows from it."""

from __future__ import annotations

import contextlib
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megarl.nodes.channel import BEAT_S, SILENCE_S, Channel
from megarl.nodes.children import Children, Ended
from megarl.nodes.programs import NodePrograms
from megarl.nodes.roll_call import Peer

NODE_LOST = 69  # EX_UNAVAILABLE: the same command may go well on other nodes
FAILED = 1
_NOT_OF_A_NODE = (2, 75)  # a mistake of the user's, a run that was told to end: no node can be why
PREEMPT_FILE = "preempt"
"""The name of the file in the log folder whose appearance is passed on to the run as SIGUSR1."""
_POLL_S = 0.5
_OWN_WORDS_S = 20.0  # for the run to say itself what the loss of a part means
_NEWS_S = 5.0  # for a service to see that a process of its own ended, which the run may feel before


@dataclass(frozen=True)
class Said:
    """A message of another node."""

    name: str
    message: dict[str, object]


@dataclass(frozen=True)
class Lost:
    """The silence of another node."""

    name: str
    why: str


@dataclass(frozen=True)
class Signalled:
    """A signal to this process."""

    number: int


Event = Ended | Said | Lost | Signalled


class Watch:
    """One node's programs and its channels to others: the first node's to all, any other's to the first.

    logs: of this job, on a file system that all nodes see. run_code: the run's exit code, as far as this node knows.
    """

    run_code = 0

    def __init__(self, programs: NodePrograms, channels: dict[str, Channel], logs: Path) -> None:
        self.programs, self.channels, self.logs = programs, channels, logs
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.children = Children(self.events.put)
        self.name = socket.gethostname()
        self.stages = list(programs.stages)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, lambda found, _: self.events.put(Signalled(found)))
        for name, channel in channels.items():
            channel.beat()
            threading.Thread(target=self._listen, args=(name, channel), daemon=True).start()

    def _listen(self, name: str, channel: Channel) -> None:
        while True:
            try:
                self.events.put(Said(name, channel.receive()))
            except OSError as error:
                self.events.put(Lost(name, str(error)))
                return

    def _start(self) -> None:
        if self.programs.service is not None:
            name = self.programs.service.name.replace(" ", "_").replace("'", "")
            self.children.start(self.programs.service, self.logs / f"{self.name}_{name}.log")
        self._next_stage()

    def _next_stage(self) -> None:
        if self.stages:
            self.children.start(self.stages[0])

    def _tell(self, message: dict[str, object]) -> None:
        for channel in self.channels.values():
            try:
                channel.send(message)
            except OSError:  # its listener says so
                continue

    def _events(self, until: float | None = None) -> Iterator[Event]:
        """Yield the events of this node and the others, until a time by the clock time.monotonic()."""
        while until is None or time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                yield self.events.get(timeout=_POLL_S)
            self._look()

    def _look(self) -> None:
        """Look for what is told in no message."""

    def _pass_on(self, number: int) -> None:
        if self.stages:
            self.children.signal_run(self.stages[0].name, number)

    def run(self) -> int:
        """Run to the end, and return this node's exit code: the first node's is the run's, as the last stage ends.

        Another's is 0 where the first one saw the run end by itself. Everything that this node started has ended.
        """
        try:
            self._start()
            return self._watch()
        finally:
            self.close()

    def _watch(self) -> int:
        raise NotImplementedError

    def close(self) -> None:
        """End what this node runs, then the channels."""
        self.children.end()
        for channel in self.channels.values():
            channel.close()


class FirstNode(Watch):
    """The node that decides: the run's exit code is what its last stage ends with."""

    is_told = False

    def _look(self) -> None:
        if not self.is_told and (self.logs / PREEMPT_FILE).exists():
            self.is_told = True
            self.events.put(Signalled(signal.SIGUSR1))

    def _watch(self) -> int:
        self.run_code = self._decide()
        self._tell({"end": self.run_code})
        return self.run_code

    def _decide(self) -> int:
        for event in self._events():
            match event:
                case Signalled(number):
                    self._tell({"signal": number})
                    self._pass_on(number)
                case Ended(name, code) if self.stages and name == self.stages[0].name:
                    if code != 0:
                        return self._after_failure(_exit_code(code))
                    if len(self.stages) == 1:
                        return 0
                    self.stages.pop(0)
                    self._next_stage()
                case Lost(name, why):
                    return self._after(f"{name} is lost: {why}", NODE_LOST)
                case _ if ended := self._part_that_ended(event):
                    return self._after(ended, FAILED)
        raise AssertionError("events don't end")

    def _part_that_ended(self, event: Event) -> str:
        """Return the sentence on the end of a part of the run, here or on another node; empty of another event."""
        match event:
            case Ended():
                text = f"{event} on {self.name}"
            case Said(name, {"ended": int(code), "text": str(ended)}) if code != 0:
                text = f"{ended} on {name}"
            case _:
                return ""
        return f"{text}; its output is in {self.logs}" if self.programs.service else text

    def _after_failure(self, code: int) -> int:
        """Return the exit code after the run failed with ``code``.

        A lost node may be why, which answers nothing, or a service that has ended, which is named.
        """
        if code in _NOT_OF_A_NODE:
            return code
        silent, ended, start_s = set(self.channels), "", time.monotonic()
        self._tell({"here": True})
        for event in self._events(start_s + SILENCE_S + BEAT_S) if silent else ():
            ended = ended or self._part_that_ended(event)
            match event:
                case Said(name, {"here": True}):
                    silent.discard(name)
                case Lost(name, why):
                    _say(f"{name} is lost: {why}")
                    return NODE_LOST
            if not silent:
                break
        if self.programs.service:
            news = map(self._part_that_ended, self._events(start_s + _NEWS_S))
            if ended := ended or next(filter(None, news), ""):
                _say(ended)
        return code

    def _after(self, cause: str, code: int) -> int:
        """Return the exit code after a part failed: the run's own words first, then the cause."""
        for event in self._events(time.monotonic() + _OWN_WORDS_S):
            match event:
                case Lost(name, why):  # more serious than what followed from it
                    cause, code = f"{name} is lost: {why}", NODE_LOST
                case Ended(name, _) if self.stages and name == self.stages[0].name:
                    break
        _say(cause)
        return code


class OtherNode(Watch):
    """A node that does as the first one says."""

    def _watch(self) -> int:
        for event in self._events():
            match event:
                case Signalled(number):
                    self._pass_on(number)
                case Said(_, {"signal": int(number)}):
                    self._pass_on(number)
                case Said(_, {"here": True}):
                    self._tell({"here": True})
                case Said(_, {"end": int(code)}):
                    self.run_code = code
                    return 0
                case Ended(name, code):
                    self._tell({"ended": code, "text": str(event)})
                case Lost(name, why):
                    _say(f"{name}, the first node, is lost: {why}")
                    self.run_code = NODE_LOST
                    return NODE_LOST
        raise AssertionError("events don't end")


def first_node(programs: NodePrograms, peers: Sequence[Peer], logs: Path) -> FirstNode:
    """Return the first node's watch over its peers."""
    return FirstNode(programs, {peer.facts.name: peer.channel for peer in peers}, logs)


def other_node(programs: NodePrograms, first: str, channel: Channel, logs: Path) -> OtherNode:
    """Return another node's watch. first: the name of the first node."""
    return OtherNode(programs, {first: channel}, logs)


def _say(text: str) -> None:
    print(f"megarl.nodes: {text}", flush=True)


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code
