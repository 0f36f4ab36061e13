"""Two nodes on loopback with programs of the shell: what the first ends with, what is said, what is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megarl.nodes.watch import NODE_LOST

# A node of its own process, which is given its end of a connection.
NODE = """
import json, socket, sys
from pathlib import Path
from megarl.nodes.channel import Channel
from megarl.nodes.children import adopt_orphans
from megarl.nodes.programs import NodePrograms, Program
from megarl.nodes.watch import FirstNode, OtherNode

kind, fd, logs, service, stages = json.loads(sys.argv[1])
programs = NodePrograms(Program("service", ("sh", "-c", service)) if service else None,
                        tuple(Program(f"stage {i}", ("sh", "-c", text)) for i, text in enumerate(stages)))
channel = Channel(socket.socket(fileno=fd))
adopt_orphans()
node = {"first": FirstNode, "other": OtherNode}[kind](programs, {"the other": channel}, Path(logs))
sys.exit(node.run())
"""


class Pair:
    """The first node and another. A node is its service and its stages, as texts for the shell."""

    def __init__(self, logs: Path, first: tuple[str, list[str]], other: tuple[str, list[str]]) -> None:
        ends = socket.socketpair()
        self.logs = logs
        self.first, self.other = (
            subprocess.Popen(
                [sys.executable, "-c", NODE, json.dumps([kind, end.fileno(), str(logs), *programs])],
                pass_fds=[end.fileno()],
                stdout=subprocess.PIPE,
                text=True,
            )
            for kind, end, programs in zip(("first", "other"), ends, (first, other), strict=True)
        )
        for end in ends:
            end.close()

    def codes(self) -> tuple[int, int]:
        """Return the exit codes of both."""
        return self.first.wait(60), self.other.wait(60)

    def said(self) -> str:
        """Return what the first node printed."""
        assert self.first.stdout is not None
        return self.first.stdout.read()


def marker() -> str:
    """Return seconds that no other process sleeps."""
    return str(987_000 + int.from_bytes(os.urandom(2)))


def sleeping(seconds: str) -> list[psutil.Process]:
    """Return the processes that sleep so many seconds."""
    return [p for p in psutil.process_iter(["cmdline"]) if seconds in (p.info["cmdline"] or ())]


def test_the_run_ends_with_its_last_stage_and_services_end_with_it(tmp_path: Path) -> None:
    seconds = marker()
    pair = Pair(tmp_path, (f"sleep {seconds}", ["true", "echo done"]), (f"sleep {seconds} & sleep {seconds}", []))
    assert pair.codes() == (0, 0)
    assert pair.said() == "done\n"
    assert [path.name for path in tmp_path.iterdir()] != [] and sleeping(seconds) == []


@pytest.mark.parametrize("code", [1, 2, 75])
def test_a_run_that_fails_ends_with_its_own_code(tmp_path: Path, code: int) -> None:
    pair = Pair(tmp_path, ("", [f"exit {code}", "echo never"]), ("sleep 987", []))
    assert pair.codes() == (code, 0)
    assert "never" not in pair.said()


def test_the_end_of_another_nodes_service_ends_the_run_after_its_own_words(tmp_path: Path) -> None:
    pair = Pair(tmp_path, ("", ["sleep 2; echo own words; exit 1"]), ("exit 7", []))
    assert pair.codes() == (1, 0)
    said = pair.said()
    assert said.index("own words") < said.index("service ended with exit code 7 on the other")


@pytest.mark.parametrize("other", ["sleep 1; exit 7", "sleep 0.5; exit 7"])
def test_a_service_is_named_also_where_the_run_felt_its_end_first(tmp_path: Path, other: str) -> None:
    pair = Pair(tmp_path, ("sleep 987", ["sleep 0.5; echo own words; exit 1"]), (other, []))
    assert pair.codes() == (1, 0)
    said = pair.said()
    named = f"megarl.nodes: service ended with exit code 7 on the other; its output is in {tmp_path}"
    assert said.splitlines() == ["own words", named]


def test_a_node_that_is_lost_has_a_code_of_its_own(tmp_path: Path) -> None:
    pair = Pair(tmp_path, ("", ["sleep 2; exit 1"]), ("sleep 30", []))
    time.sleep(1.5)
    for child in psutil.Process(pair.other.pid).children(recursive=True):
        child.kill()
    pair.other.kill()
    assert pair.first.wait(60) == NODE_LOST
    assert "the other is lost: closed the connection" in pair.said()


def test_the_first_node_that_is_lost_ends_the_others(tmp_path: Path) -> None:
    seconds = marker()
    pair = Pair(tmp_path, ("", ["sleep 5"]), (f"sleep {seconds}", []))
    time.sleep(1.5)
    pair.first.kill()
    assert pair.other.wait(60) == NODE_LOST
    assert sleeping(seconds) == []


def test_a_signal_and_the_file_of_preemption_reach_the_run(tmp_path: Path) -> None:
    text = "trap 'echo told; exit 75' USR1; echo ready; while :; do sleep 0.1; done"
    by_signal = Pair(tmp_path, ("", [text]), ("sleep 987", []))
    assert by_signal.first.stdout is not None and by_signal.first.stdout.readline() == "ready\n"
    by_signal.first.send_signal(signal.SIGUSR1)
    assert by_signal.codes() == (75, 0) and by_signal.said() == "told\n"
    by_file = Pair(tmp_path, ("", [text]), ("sleep 987", []))
    assert by_file.first.stdout is not None and by_file.first.stdout.readline() == "ready\n"
    (tmp_path / "preempt").touch()
    assert by_file.codes() == (75, 0) and by_file.said() == "told\n"
