"""A host of engines in a process of its own: who may be one, what its engines do, and what ends with what.

The engine is a small program in the place of SGLang's interpreter: to every group it answers with the prompt.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from megarl import __version__
from megarl.errors import ConfigError, ResourceError, WorkerError
from megarl.launchers.engine_hosts import EngineHost, EngineOnHost, HostedEngines
from megarl.launchers.engine_processes import EngineLost
from megarl.launchers.group import WorkerGroup
from megarl.launchers.host_address import HostsAddress, named_hosts
from megarl.launchers.host_calls import RemoteHost, serve_calls
from megarl.launchers.host_meeting import CameHost, HostFacts, Welcome, called_hosts, come
from megarl.launchers.late_hosts import LateHosts
from megarl.launchers.sglang_environment import SGLANG_VERSION
from megarl.parallel.layout import Layout
from megarl.ranks.spec import EngineStart
from megarl.rollout.served import Answer, Ask, Done, Ready
from megarl.rollout.sglang import SglangSpec
from megarl.types import GenerationRequest, Rollout, Sampling
from tests.unit.small_roles import role_on
from tests.unit.stand_ins import PlainRanks

TOKEN, WAIT_S, ANSWER_S = "the token of this job", 60.0, 60.0
ENGINE = """#!{python}
import json
import sys
from multiprocessing.connection import Connection

if "-c" in sys.argv:  # it is asked what it has
    print(json.dumps({has}))
    sys.exit()
from megarl.rollout.served import Done, Ready
from megarl.types import Rollout

connection = Connection(int(sys.argv[-1]))
start = connection.recv()
connection.send(Ready())
while True:
    for ask in connection.recv():
        tokens = ask.request.token_ids
        for index in ask.indices:
            connection.send(Done(ask.number, index, Rollout(tokens, (0.0,) * len(tokens), "length", start.spec.seed)))
"""


@dataclass
class Meeting:
    """A place where hosts come to, the hosts that were started, and what the controller has of those that were met."""

    address: HostsAddress
    hosts: list[subprocess.Popen[str]]
    remotes: list[RemoteHost] = field(default_factory=list)

    def start_host(self, **environ: str) -> subprocess.Popen[str]:
        """Start a host; ``environ`` is added to its variables."""
        own = {"MEGARL_PLATFORM": "cpu", "MEGARL_JOB_TOKEN": TOKEN, "MEGARL_START_S": str(WAIT_S), **environ}
        command = [sys.executable, "-m", "megarl.engine_host", self.address.place]
        output = subprocess.PIPE
        host = subprocess.Popen(command, env={**os.environ, **own}, stdout=output, stderr=output, text=True)
        self.hosts.append(host)
        return host

    def met(self, **environ: str) -> RemoteHost:
        """Return a started host once it has come."""
        [came] = called_hosts(self.address, 1, Welcome(environ, 1, 2, WAIT_S), lambda text: None)
        return RemoteHost(came.line, came.facts.name, WAIT_S)


@contextmanager
def at_a_free_port() -> Iterator[Meeting]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    meeting = Meeting(HostsAddress("127.0.0.1", port, TOKEN, WAIT_S), [])
    yield meeting
    for host in meeting.hosts:
        host.kill()
        host.communicate()


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meeting]:
    monkeypatch.setenv("MEGARL_PLATFORM", "cpu")
    with at_a_free_port() as meeting:
        yield meeting


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[Meeting, Meeting]]:
    """Return two places, each with a host, which import torch at the same time."""
    with at_a_free_port() as first, at_a_free_port() as second, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGARL_PLATFORM", "cpu")
        for meeting in (first, second):
            meeting.start_host()
            meeting.remotes.append(meeting.met(NCCL_DEBUG="INFO"))
        yield first, second


@pytest.fixture
def start(tmp_path: Path) -> EngineStart:
    """Return what an engine starts with whose answers are of publication 7."""
    return starts(tmp_path, SGLANG_VERSION)


def starts(folder: Path, version: str) -> EngineStart:
    """Return what an engine starts with whose environment says that it has a version of SGLang."""
    program = folder / "python"
    program.write_text(ENGINE.format(python=sys.executable, has={"sglang": version, "megarl": __version__}))
    program.chmod(0o700)
    spec = SglangSpec(str(program), "model", "float32", 1, 64, 8, None, 0.5, True, 7)
    return EngineStart(spec, role_on(Layout(1)))


def heard(engine: EngineOnHost) -> Answer:
    """Return the next answer of an engine."""
    deadline = time.monotonic() + ANSWER_S
    while time.monotonic() < deadline:
        if (answer := engine.receive(0.2)) is not None:
            return answer
    raise AssertionError("no answer")


def until(is_so: Callable[[], object]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + ANSWER_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def asks(number: int, *tokens: int) -> tuple[Ask, ...]:
    return (Ask(number, GenerationRequest(tokens, 0), Sampling(n=2), (0, 1)),)


def engines_of(host: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(host.pid).children()


def test_engines_on_a_host_answer_are_killed_and_replaced_and_end_with_the_controller(
    two: tuple[Meeting, Meeting], start: EngineStart
) -> None:
    meeting = two[0]
    [program], [remote] = meeting.hosts, meeting.remotes
    engines = HostedEngines(start, 2, [remote])
    first, second = engines.start(0), engines.start(1)
    assert (heard(first), heard(second)) == (Ready(), Ready())
    for process in engines_of(program):  # variables of the run reach them, and its secret doesn't
        variables = process.environ()
        assert variables["NCCL_DEBUG"] == "INFO" and "MEGARL_JOB_TOKEN" not in variables
    for number, engine in enumerate((first, second)):
        engine.send(asks(number, 5, 6))
        rollout = Rollout((5, 6), (0.0, 0.0), "length", 7)
        assert [heard(engine), heard(engine)] == [Done(number, 0, rollout), Done(number, 1, rollout)]

    program.send_signal(signal.SIGTERM)  # the run's to act on, which may have rollouts to wait for
    program.send_signal(signal.SIGUSR1)
    before = engines_of(program)
    before[0].kill()
    with pytest.raises(EngineLost, match=r"died of signal 9 \(Killed\)"):
        heard(first)
    first.kill()
    again = engines.start(0)
    assert heard(again) == Ready()
    first.send(asks(8, 1))  # an order for the one before reaches none
    again.send(asks(9, 4))
    assert isinstance(done := heard(again), Done) and done.number == 9
    second.kill()
    with pytest.raises(WorkerError, match=r"(?s)receive failed on .*Traceback .*KeyError: 77"):
        remote.submit(EngineHost.receive, 77, 0.1).result()

    [left] = engines_of(program)
    remote.end("the run has ended")
    assert program.wait(ANSWER_S) == 0
    until(lambda: not left.is_running())
    said, errors = program.communicate()
    assert said.endswith(f"the run at {meeting.address.place} has ended\n") and errors == ""


def test_another_sglang_on_the_node_of_engines_is_refused_with_the_name_of_the_node(
    two: tuple[Meeting, Meeting], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        HostedEngines(starts(tmp_path, "0.4.0"), 2, two[1].remotes).start(0)
    [problem] = refused.value.problems
    assert problem.allowed == f"must have sglang {SGLANG_VERSION}, and has 0.4.0 on {socket.gethostname()}"
    assert problem.fix == "make sglang there, in a folder of the same path"
    assert not engines_of(two[1].hosts[0])


def test_a_host_that_is_killed_takes_its_engines_with_it_and_is_named(
    two: tuple[Meeting, Meeting], start: EngineStart
) -> None:
    [program], [remote] = two[1].hosts, two[1].remotes
    engines = HostedEngines(start, 2, [remote])
    engine = engines.start(0)
    assert heard(engine) == Ready()
    processes = engines_of(program)
    program.kill()
    gone = rf"the engine host on {re.escape(socket.gethostname())} is gone: "
    with pytest.raises(EngineLost, match=gone):
        heard(engine)
    engine.send(asks(0, 1))
    engine.kill()
    with pytest.raises(EngineLost, match=gone):
        engines.start(0)
    until(lambda: not any(process.is_running() for process in processes))


def slept(host: EngineHost, seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_a_host_that_is_stopped_is_lost_and_one_that_takes_long_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megarl.launchers.host_calls._SILENCE_S", 1.0)
    monkeypatch.setattr("megarl.launchers.host_calls._START_S", 1.0)
    monkeypatch.setattr("megarl.launchers.host_calls._BEAT_S", 0.1)
    (here, there), (silent, _its_end) = socket.socketpair(), socket.socketpair()
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve_calls, there, cast(EngineHost, None), 1)
        works, stopped = RemoteHost(here, "works", 0.5), RemoteHost(silent, "stopped", 0.5)
        assert works.submit(slept, 2.5).result(ANSWER_S) == 2.5
        with pytest.raises(EngineLost, match="stopped is gone: nothing was heard of it for 1 s"):
            stopped.submit(slept, 0.0).result(ANSWER_S)
        works.end("the run has ended")
        serving.result(ANSWER_S)


def test_a_host_that_comes_within_a_run_may_take_a_place_once_it_knows_the_token_and_fits(
    meeting: Meeting, start: EngineStart
) -> None:
    told: list[str] = []
    late = LateHosts(meeting.address, Welcome({}, 1, 2, WAIT_S), told.append)
    program = meeting.start_host()
    other = meeting.start_host(MEGARL_PLATFORM="cuda", MEGARL_GPU="H100", CUDA_VISIBLE_DEVICES="0")
    with pytest.raises(ResourceError, match="has another token"):
        come(replace(meeting.address, token="another"))
    assert other.wait(ANSWER_S) == 1
    why = f"{(name := socket.gethostname())} is a cuda machine, {name} a cpu machine"
    assert other.communicate()[1] == f"ResourceError: {why}\n"

    found: list[RemoteHost] = []
    until(lambda: found.extend([host] if (host := late.next()) else []) or found)
    assert sorted(told) == [
        f"{name} (127.0.0.1) came for engines and is refused: {why}",
        f"{name} has come for the engines of a host that is gone",
    ]
    [remote] = found
    assert heard(HostedEngines(start, 2, [remote]).start(1)) == Ready()
    program.kill()
    until(lambda: remote.is_gone)
    assert late.next() is None


@dataclass(eq=False)
class PlainHost:
    """A host in this process. verbs: that it was asked for, with their arguments."""

    name: str
    is_gone: bool = False
    verbs: list[tuple[object, ...]] = field(default_factory=list)

    def submit(self, verb: Callable[..., Any], *arguments: Any) -> Future[Any]:
        self.verbs.append((verb.__name__, *arguments))
        answer: Future[Any] = Future()
        if self.is_gone:
            answer.set_exception(EngineLost(f"{self.name} is gone"))
        else:
            answer.set_result(self.name)
        return answer

    def tell(self, verb: Callable[..., None], *arguments: Any) -> None:
        raise AssertionError

    def end(self, why: str) -> None:
        self.is_gone = True


def test_a_lost_node_of_engines_is_given_to_a_host_that_has_come_before_the_next_publication(
    start: EngineStart,
) -> None:
    ranks, hosts = PlainRanks(2, lambda rank, verb, _: f"of {rank}"), [PlainHost("first"), PlainHost("second")]
    late: list[PlainHost] = []
    engines = HostedEngines(start, 2, hosts, lambda: late.pop(0) if late else None)

    def published() -> tuple[int, ...]:
        for host in (*hosts, *late, spare):
            host.verbs.clear()
        ranks.calls.clear()
        with engines.receiving(cast(WorkerGroup, ranks)) as numbers:
            return numbers

    spare = PlainHost("spare")
    assert published() == () and ranks.calls[1] == ("meet_hosts", [("first", "second")] * 2)
    late.append(spare)
    assert published() == () and ranks.calls == [] and late == [spare]  # while none is lost
    hosts[1].is_gone = True
    assert published() == (2, 3)
    assert ranks.calls == [("segment", [None, None]), ("meet_hosts", [("spare",)] * 2)]
    assert spare.verbs == [("meeting",), ("meet", ("of 0", "of 1")), ("receive_weights",)]
    assert hosts[0].verbs == [("receive_weights",)]
    assert published() == () and ranks.calls == [] and spare.verbs == hosts[0].verbs == [("receive_weights",)]
    assert engines.start(3).host is spare

    hosts[0].is_gone = True
    assert published() == () and spare.verbs == [("receive_weights",)]  # nobody has come
    late.append(PlainHost("third", is_gone=True))  # and this one is lost before the ranks meet it
    assert published() == () and ranks.calls[-1] == ("meet_hosts", [()] * 2)
    late.append(last := PlainHost("last"))
    assert published() == (0, 1) and last.verbs[-1] == ("receive_weights",)


def test_a_host_without_the_token_is_turned_away_and_missed(meeting: Meeting) -> None:
    stranger = meeting.start_host(MEGARL_JOB_TOKEN="another")
    short = HostsAddress("127.0.0.1", meeting.address.port, TOKEN, 8.0)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(called_hosts, short, 2, Welcome({}, 1, 1, 1.0), lambda text: None)
        assert stranger.wait(ANSWER_S) == 1
        with pytest.raises(ResourceError) as missing:
            found.result()
    assert stranger.communicate()[1] == (
        f"ResourceError: the run at {short.place} has another token. fix: MEGARL_JOB_TOKEN must be the same on all "
        "nodes of a run\n"
    )
    assert str(missing.value) == (
        f"2 hosts of engines (actor_rollout_ref.rollout.nnodes) are waited for at {short.place}, and 0 came in 8 s "
        "(none); 1 came that didn't know the token. fix: type on each node of engines, with the run's "
        f"MEGARL_JOB_TOKEN: MEGARL_JOB_TOKEN=... python -m megarl.engine_host {short.place}; or wait longer: "
        "MEGARL_START_S=SECONDS"
    )


def test_a_stranger_that_says_anything_else_is_turned_away(meeting: Meeting) -> None:
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(meeting.met)
        until(lambda: _is_turned_away(meeting.address))
        meeting.start_host()
        assert found.result(ANSWER_S).name == socket.gethostname()


def _is_turned_away(address: HostsAddress) -> bool:
    """Say what isn't asked for, and return whether the connection is ended for that. False where nobody is there."""
    try:
        with socket.create_connection((address.host, address.port)) as line:
            line.sendall(b"\x00\x00\x00\x10" + b"GET / HTTP/1.1\r\n")
            while line.recv(4096):
                continue
    except ConnectionRefusedError:
        return False
    except ConnectionResetError:
        return True
    return True


def test_a_host_that_has_ended_is_noticed_before_it_is_welcomed() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        host = CameHost(HostFacts("node2", "cpu", None, {}), ours, ("10.0.0.2", 40000))
        assert not host.is_gone()
        theirs.close()
        assert host.is_gone()


def test_a_host_that_does_not_fit_is_refused_and_both_sides_say_why(meeting: Meeting) -> None:
    program = meeting.start_host(MEGARL_PLATFORM="cuda", MEGARL_GPU="H100", CUDA_VISIBLE_DEVICES="0")
    name = socket.gethostname()
    with pytest.raises(ResourceError, match=f"^{name} is a cuda machine, {name} a cpu machine$"):
        meeting.met()
    assert program.wait(ANSWER_S) == 1
    assert program.communicate()[1] == f"ResourceError: {name} is a cuda machine, {name} a cpu machine\n"


def test_a_host_without_a_run_says_how_to_start_one(meeting: Meeting) -> None:
    program = meeting.start_host(MEGARL_START_S="1")
    assert program.wait(ANSWER_S) == 1
    assert re.match(
        rf"ResourceError: no run is at {meeting.address.place} in 1 s: .*refused.* fix: start it with "
        rf"MEGARL_ENGINE_HOSTS={meeting.address.place} on the node of rank 0",
        program.communicate()[1],
    )


def test_what_a_person_is_told_while_hosts_are_waited_for(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megarl.launchers.host_meeting._TELL_S", 0.0)
    told: list[str] = []
    with pytest.raises(ResourceError, match=r"and 0 came in 0\.5 s"):
        called_hosts(
            HostsAddress("127.0.0.1", meeting.address.port, TOKEN, 0.5), 2, Welcome({}, 1, 1, 1.0), told.append
        )
    assert told == [
        "waiting for 2 hosts of engines: MEGARL_JOB_TOKEN=... python -m megarl.engine_host "
        f"{meeting.address.place} on each node"
    ]


def test_a_port_that_is_taken_is_named(meeting: Meeting) -> None:
    with (
        socket.create_server(("127.0.0.1", meeting.address.port)),
        pytest.raises(
            ResourceError,
            match=rf"port {meeting.address.port} of 127.0.0.1 can't be had: Address already in use\. fix: ",
        ),
    ):
        called_hosts(meeting.address, 1, Welcome({}, 1, 1, 1.0), lambda text: None)


def test_where_hosts_come_to_is_read_from_the_environment() -> None:
    assert named_hosts({}) is None
    found = named_hosts({"MEGARL_ENGINE_HOSTS": "[fd00::1]:29510", "MEGARL_JOB_TOKEN": "t", "MEGARL_START_S": "90"})
    assert found == HostsAddress("fd00::1", 29510, "t", 90.0)
    assert found.command == "MEGARL_JOB_TOKEN=... python -m megarl.engine_host [fd00::1]:29510"


@pytest.mark.parametrize(
    ("environ", "key"),
    [
        ({"MEGARL_ENGINE_HOSTS": "node1", "MEGARL_JOB_TOKEN": "t"}, "MEGARL_ENGINE_HOSTS = 'node1'"),
        ({"MEGARL_ENGINE_HOSTS": "node1:0", "MEGARL_JOB_TOKEN": "t"}, "MEGARL_ENGINE_HOSTS = 'node1:0'"),
        ({"MEGARL_ENGINE_HOSTS": "node1:29510"}, "MEGARL_JOB_TOKEN: isn't set"),
        (
            {"MEGARL_ENGINE_HOSTS": "node1:29510", "MEGARL_JOB_TOKEN": "t", "MEGARL_START_S": "5 min"},
            "MEGARL_START_S = '5 min': must be a number of seconds",
        ),
    ],
)
def test_a_place_that_is_none_and_a_token_that_lacks_are_refused(environ: dict[str, str], key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        named_hosts(environ)


def test_a_host_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGARL_PLATFORM", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    facts = HostFacts.here()
    assert (facts.name, facts.platform, facts.num_devices) == (socket.gethostname(), "cuda", 3)
    assert facts.versions["Python"] == ".".join(map(str, sys.version_info[:3]))
