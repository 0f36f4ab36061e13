"""``python -m megarl.verify``: what it measures, what it writes, and that it tells of what is over its tolerance."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.launch import Finished, python, run
from tests.tiny_task import write_weights

COMMAND = python("-m", "megarl.verify", "--model=model", "--no-engine", "--max-ranks=2")
LAYOUTS = ("one_rank", "pp2")


@pytest.fixture(scope="module")
def folder(tiny_task: Path) -> Path:
    """Return a folder with model/, which has weights."""
    write_weights(tiny_task / "model")
    return tiny_task


def _verify(folder: Path, page: str, *more: str) -> Finished:
    return run([*COMMAND, f"--out={page}", *more], folder)


def _table(page: Path) -> dict[str, list[str]]:
    """Return the cells of the page's table by layout."""
    rows = [line.strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("|")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}


def test_each_layout_is_measured_and_the_page_says_what_was_found(folder: Path) -> None:
    finished = _verify(folder, "good.md", f"--layouts={','.join(LAYOUTS)}")
    assert finished.code == 0, finished.output
    table = _table(folder / "good.md")
    assert [name for name in table if name in LAYOUTS] == list(LAYOUTS)
    for name in LAYOUTS:
        num_ranks, logprobs, _in_bf16, *training, export, _engine = table[name]
        loss, grad_norm, distributed_grad_norm, *later = map(float, training)
        assert int(num_ranks) == {"one_rank": 1, "pp2": 2}[name]
        assert 0 < float(logprobs) <= 2e-5
        assert max(loss, grad_norm, distributed_grad_norm) <= 1e-5
        assert max(later) <= 1e-4
        assert export == "equal"
    assert len([line for line in finished.stdout.splitlines() if re.match(r"\[ +\d/2\] ok", line)]) == len(LAYOUTS)
    assert finished.processes == ()


@pytest.mark.long
def test_a_figure_over_its_tolerance_is_named_and_ends_with_exit_code_1(folder: Path) -> None:
    finished = _verify(folder, "bad.md", "--layouts=one_rank", "--logprob-tolerance=0")
    assert finished.code == 1
    assert re.search(r"^model on one_rank: log-probs \S+ OVER 0\.0e\+00$", finished.stderr, re.MULTILINE)
    assert "1 failed" in (folder / "bad.md").read_text()


@pytest.mark.long
def test_what_there_is_no_time_for_is_left_out_and_counted(folder: Path) -> None:
    finished = _verify(folder, "short.md", f"--layouts={','.join(LAYOUTS)}", "--minutes=0.001")
    assert finished.code == 0, finished.output
    assert [name for name in _table(folder / "short.md") if name in LAYOUTS] == ["one_rank"]
    assert "There was no time for 1 more" in (folder / "short.md").read_text()


@pytest.mark.long
def test_every_layout_of_the_tiny_models_is_within_tolerance_and_engines_answer_as_hugging_face(folder: Path) -> None:
    command = python("-m", "megarl.verify", "--layouts=all", "--max-ranks=4", "--out=all.md")
    finished = run(command, folder, timeout_s=3600.0)
    assert finished.code == 0, finished.output
    rows = [line for line in (folder / "all.md").read_text().splitlines() if re.match(r"\| \w", line)]
    answered = [row for row in rows if row.endswith("| equal | equal |")]
    assert len(answered) == 2 * 3  # layouts with an engine, models


TWO_RANKS = ("-m", "megarl.verify", "--model=model", "--no-engine")


@contextmanager
def _two_agents(folder: Path, *more: str) -> Iterator[list[Future[Finished]]]:
    """Have two of torchrun's agents run the command, with a rank each, as if on two nodes; yield their ends to come."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    temp = folder / "temp"  # one that is killed leaves a folder there
    temp.mkdir(exist_ok=True)
    place = ("--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}")
    with ThreadPoolExecutor() as threads:
        agents = [("-m", "torch.distributed.run", *place, f"--node-rank={node}", *TWO_RANKS, *more) for node in (0, 1)]
        yield [threads.submit(run, python(*agent), folder, environ={"TMPDIR": str(temp)}) for agent in agents]


def _below_torchrun() -> list[psutil.Process]:
    """Return what torchrun's agents have started, with what that has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "GROUP_RANK" in process.environ():
                found.append(process)
    return found


def _listening(processes: list[psutil.Process]) -> set[str]:
    """Return the addresses that processes listen on."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found |= {c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
    return found


def _wait_for(is_so: Callable[[], bool], agents: list[Future[Finished]]) -> None:
    """Wait until something is so while agents run."""
    while not is_so():
        assert not any(agent.done() for agent in agents), [agent.result().output for agent in agents if agent.done()]
        time.sleep(0.05)


@pytest.mark.long
def test_two_torchrun_agents_find_the_figures_of_one_machine_and_listen_on_loopback_alone(folder: Path) -> None:
    layouts, addresses = "--layouts=one_rank,tp2", set[str]()
    with _two_agents(folder, layouts, "--out=agents.md") as agents:
        while not all(agent.done() for agent in agents):
            addresses |= _listening(_below_torchrun())
            time.sleep(0.2)
    finished = [agent.result() for agent in agents]
    assert [(done.code, done.processes) for done in finished] == [(0, ()), (0, ())], finished[0].output
    alone = run(python(*TWO_RANKS, layouts, "--max-ranks=2", "--out=alone.md"), folder)
    assert alone.code == 0, alone.output
    assert _table(folder / "agents.md") == _table(folder / "alone.md")
    assert "torchrun --nnodes=2 --nproc-per-node=1 -m megarl.verify" in (folder / "agents.md").read_text()
    assert "127.0.0.1" in addresses and addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert not list(folder.glob("megarl_verify_*"))


@pytest.mark.long
def test_the_loss_of_a_process_of_torchruns_ends_both_agents_and_is_told_of_once(folder: Path) -> None:
    def has_begun() -> bool:
        return any("[  2/" in path.read_text() for path in folder.glob("stdout.*"))

    for path in folder.glob("stdout.*"):
        path.unlink()
    with _two_agents(folder, "--layouts=all", "--out=lost.md") as agents:
        _wait_for(has_begun, agents)
        [lost] = [p for p in _below_torchrun() if p.environ()["RANK"] == "1" and "megarl.verify" in p.cmdline()]
        os.kill(lost.pid, signal.SIGKILL)
    first, second = (agent.result() for agent in agents)
    assert (first.code, second.code) == (1, 1)
    assert first.output.count("WorkerError: rank 1 on ") == 1
    assert "Signal 9 (SIGKILL)" in second.output
    assert (first.processes, second.processes) == ((), ())
    assert not list(folder.glob("megarl_verify_*"))
