"""Every test starts real worker processes. Functions under test are written to files, as users write them."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megarl.errors import RewardError
from megarl.reward.pool import RewardPool
from megarl.reward.registry import RewardSpec
from megarl.types import RewardRequest, RewardResult

TIMEOUT_S = 1.0
SCORE_ON_FAILURE = -1.0

# The response says what the function is to do, so that one batch can hold functions of every kind.
ON_COMMAND = """
import ctypes, math, os, re, signal, subprocess, sys, time

def compute_score(data_source, solution_str, ground_truth, extra_info):
    command, _, argument = solution_str.partition(" ")
    if command == "return":
        return eval(argument)
    if command == "raise":
        raise ValueError(argument)
    if command == "exit":
        sys.exit(argument)
    if command == "die":
        os._exit(3)
    if command == "crash":
        ctypes.string_at(0)
    if command == "loop":
        while True:
            try:
                time.sleep(1)
            except BaseException:
                pass
    if command == "block":
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
        re.match(r"(a+)+$", "a" * 60 + "b")
    if command == "child":
        child = subprocess.Popen(["sleep", "600"])
        open(argument, "w").write(str(child.pid))
        time.sleep(600)
    if command == "pid":
        return os.getpid()
"""


def request(response: str) -> RewardRequest:
    return RewardRequest("mine", "", response, "", {})


@pytest.fixture
def spec(tmp_path: Path) -> RewardSpec:
    path = tmp_path / "on_command.py"
    path.write_text(ON_COMMAND)
    return RewardSpec(path=str(path))


def score(spec: RewardSpec, *responses: str, num_workers: int = 2, timeout_s: float = 30.0) -> list[RewardResult]:
    with RewardPool(num_workers, timeout_s, spec, SCORE_ON_FAILURE) as pool:
        return pool.score([request(response) for response in responses])


def exists(process_id: int) -> bool:
    """Tell whether a process runs. One that ended but wasn't collected by its parent doesn't."""
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Callable[[], bool], limit_s: float = 20.0) -> bool:
    end = time.monotonic() + limit_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_results_come_in_the_order_of_requests_however_long_each_takes(spec: RewardSpec) -> None:
    responses = [f"return time.sleep({0.03 * (i % 3)}) or {i}" for i in range(100)]
    results = score(spec, *responses, num_workers=3)
    assert [result.score for result in results] == list(range(100))
    assert {result.outcome for result in results} == {"ok"}


def test_nothing_to_score_is_no_work(spec: RewardSpec) -> None:
    assert score(spec) == []


def test_a_function_gets_the_fields_of_its_request(tmp_path: Path) -> None:
    path = tmp_path / "fields.py"
    path.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    assert (data_source, solution_str, ground_truth, extra_info) == ('d', 'r', 'g', {'index': [1]})\n"
        "    return 1\n"
    )
    with RewardPool(1, 5.0, RewardSpec(path=str(path)), 0.0) as pool:
        assert pool.score([RewardRequest("d", "p", "r", "g", {"index": [1]})]) == [RewardResult(1.0, "ok")]


@pytest.mark.parametrize(
    ("value", "number"), [("1", 1.0), ("-2.5", -2.5), ("True", 1.0), ("{'score': 0.5, 'accuracy': 1}", 0.5)]
)
def test_numbers_and_mappings_with_a_score_are_rewards(spec: RewardSpec, value: str, number: float) -> None:
    assert score(spec, f"return {value}", num_workers=1) == [RewardResult(number, "ok")]


def test_parts_of_a_reward_come_by_name_and_one_that_is_no_number_is_invalid(spec: RewardSpec) -> None:
    named = replace(spec, components=("correct", "format"))
    values = [
        "{'score': 1, 'format': 0.5, 'correct': True, 'text': 'kept out'}",
        "{'score': 1, 'correct': 1}",
        "{'score': 1, 'correct': 1, 'format': 1e39}",
        "{'correct': 1, 'format': 1}",
        "1",
    ]
    good, *bad = score(named, *[f"return {value}" for value in values])
    assert good == RewardResult(1.0, "ok", components=(1.0, 0.5))
    assert [(r.score, r.outcome, r.components) for r in bad] == [
        (SCORE_ON_FAILURE, "invalid", (SCORE_ON_FAILURE, SCORE_ON_FAILURE))
    ] * 4
    assert "no number as its 'format', which algorithm.gdpo_reward_keys names" in bad[0].detail
    assert bad[1].detail == "the function returned 1e+39, not a finite number in float32"
    assert "not a number" in bad[2].detail and "no number as its 'correct'" in bad[3].detail


def test_what_is_no_finite_number_is_invalid(spec: RewardSpec) -> None:
    values = ["math.nan", "math.inf", "-math.inf", "None", "'1'", "[1]", "{'accuracy': 1}", "1j", "1e308", "-4e38"]
    values += ["10 ** 400", "10 ** 9999"]
    results = score(spec, *[f"return {value}" for value in values])
    assert [(r.score, r.outcome) for r in results] == [(SCORE_ON_FAILURE, "invalid")] * len(values)
    assert "nan" in results[0].detail
    assert "'1', not a number" in results[4].detail
    assert "1e+308, not a finite number in float32" in results[8].detail


def test_the_largest_float32_is_a_reward(spec: RewardSpec) -> None:
    (result,) = score(spec, "return 3.4028234e38", num_workers=1)
    assert (result.score, result.outcome) == (3.4028234e38, "ok")


def test_a_function_that_raises_or_exits_costs_its_own_reward_alone(spec: RewardSpec) -> None:
    raised, exited, after = score(spec, "raise no unit", "exit now", "return 1", num_workers=1)
    assert (raised.score, raised.outcome) == (SCORE_ON_FAILURE, "raised")
    assert raised.detail.startswith("ValueError: no unit (")
    assert "on_command.py:" in raised.detail
    assert (exited.outcome, after) == ("raised", RewardResult(1.0, "ok"))


def test_a_failure_has_the_traceback_of_the_function_alone_and_a_kind(spec: RewardSpec) -> None:
    first, second, other = score(spec, "raise one", "raise two", "return nowhere", num_workers=1)
    assert first.kind == second.kind != other.kind
    assert first.traceback.splitlines()[-1] == "ValueError: one"
    assert "raise ValueError(argument)" in first.traceback
    assert "megarl" not in first.traceback
    assert "NameError: name 'nowhere' is not defined" in other.traceback


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "GeneratorExit", "type('Own', (BaseException,), {})"])
def test_errors_that_programs_seldom_catch_are_those_of_a_function_too(spec: RewardSpec, error: str) -> None:
    failed, after = score(spec, f"return (_ for _ in ()).throw({error})", "return 1", num_workers=1)
    assert (failed.outcome, after.score) == ("raised", 1.0)
    assert failed.detail.startswith(("KeyboardInterrupt", "GeneratorExit", "on_command.Own", "Own", "megarl_reward"))


def test_an_error_whose_text_fails_is_still_a_result(tmp_path: Path) -> None:
    path = tmp_path / "mute.py"
    path.write_text(
        "class Mute(Exception):\n    def __str__(self):\n        raise ValueError\n"
        "def compute_score(**_):\n    raise Mute\n"
    )
    (result,) = score(RewardSpec(path=str(path)), "", num_workers=1)
    assert result.outcome == "raised" and "Mute" in result.detail


@pytest.mark.parametrize("command", ["loop", "block"])
def test_a_function_that_hangs_is_killed_and_the_others_are_scored(spec: RewardSpec, command: str) -> None:
    responses = [f"return {i}" for i in range(40)]
    responses[3] = responses[20] = command
    start = time.monotonic()
    results = score(spec, *responses, timeout_s=TIMEOUT_S)
    assert time.monotonic() - start < 15.0
    assert [i for i, r in enumerate(results) if r.outcome == "timeout"] == [3, 20]
    assert [r.score for r in results] == [SCORE_ON_FAILURE if i in (3, 20) else i for i in range(40)]
    assert results[3].detail == "no result after 1 s"


@pytest.mark.parametrize(("command", "cause"), [("die", "exited with status 3"), ("crash", "died of signal 11")])
def test_a_function_that_ends_its_process_costs_its_own_reward_alone(
    spec: RewardSpec, command: str, cause: str
) -> None:
    results = score(spec, "return 1", command, "return 2", command, "return 3", num_workers=1)
    assert [r.outcome for r in results] == ["ok", "raised", "ok", "raised", "ok"]
    assert cause in results[1].detail


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("return os.kill(os.getpid(), 9)", "was killed, by the function itself or by the system"),
        ("return os.closerange(3, 4096)", "lost its connection to the run"),
        ("return os.kill(os.getpid(), 15)", "died of signal 15"),
    ],
)
def test_a_death_is_told_as_what_it_was(spec: RewardSpec, command: str, says: str) -> None:
    failed, after = score(spec, command, "return 1", num_workers=1)
    assert (failed.outcome, after.score) == ("raised", 1.0)
    assert says in failed.detail


@pytest.mark.parametrize(("command", "outcome", "timeout_s"), [("loop", "timeout", 0.1), ("die", "raised", 30.0)])
def test_a_batch_in_which_nothing_is_scored_is_given_up(
    spec: RewardSpec, command: str, outcome: str, timeout_s: float
) -> None:
    results = score(spec, *[command] * 60, num_workers=1, timeout_s=timeout_s)
    assert [r.outcome for r in results[:10]] == [outcome] * 10
    assert {r.outcome for r in results[10:]} == {"timeout"}
    assert results[-1].detail.startswith("not tried: 10 calls in a row hung or ended their process")


def test_a_batch_in_which_some_calls_are_answered_is_not_given_up(spec: RewardSpec) -> None:
    results = score(spec, *["die", "die", "return 1"] * 8, num_workers=1)
    assert [r.outcome for r in results] == ["raised", "raised", "ok"] * 8


def test_a_batch_has_a_deadline_of_its_own(spec: RewardSpec) -> None:
    with RewardPool(1, 30.0, spec, SCORE_ON_FAILURE, batch_timeout_s=1.0) as pool:
        start = time.monotonic()
        results = pool.score([request(r) for r in ("return 1", *["return time.sleep(0.4) or 2"] * 20)])
        assert time.monotonic() - start < 15.0
        assert results[0] == RewardResult(1.0, "ok")
        assert (results[-1].outcome, results[-1].score) == ("timeout", SCORE_ON_FAILURE)
        assert results[-1].detail == "not scored within reward.batch_timeout_s = 1 s of the batch"
        assert pool.score([request("return 3")]) == [RewardResult(3.0, "ok")]


def test_a_batch_that_takes_long_says_how_far_it_is(spec: RewardSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megarl.reward.pool._NEWS_S", 0.2)
    news: list[str] = []
    with RewardPool(1, 30.0, spec, 0.0) as pool:
        pool.score([request(r) for r in ("raise one", "return time.sleep(1) or 1", "return 1")], news.append)
    assert news[0].startswith("reward function: 1 of 3 rollouts after 0 s, 1 of them failed")


def test_what_functions_and_their_children_print_is_kept_and_bounded(spec: RewardSpec, tmp_path: Path) -> None:
    path = tmp_path / "talks.py"
    path.write_text(
        "import subprocess, sys\nprint('loaded')\n"
        "def compute_score(solution_str, **_):\n"
        "    print(solution_str)\n    print('aside', file=sys.stderr)\n"
        "    subprocess.run(['echo', 'a child'])\n    return 1\n"
    )
    with RewardPool(1, 30.0, RewardSpec(path=str(path)), 0.0) as pool:
        pool.score([request("hello")])
        assert pool.take_printed().splitlines() == ["loaded", "hello", "aside", "a child"]
        assert pool.take_printed() == ""
        results = pool.score([request("x" * 300_000)] * 8)
        printed = pool.take_printed()
    assert {result.outcome for result in results} == {"ok"}
    assert 900_000 < len(printed) < 1_100_000
    assert printed.rstrip().endswith("[more was printed: the first 1,000,000 bytes are kept]")


def test_the_deadline_is_for_one_request_not_for_many(spec: RewardSpec) -> None:
    responses = [f"return time.sleep({TIMEOUT_S / 4}) or 1"] * 6
    assert {result.outcome for result in score(spec, *responses, num_workers=1, timeout_s=TIMEOUT_S)} == {"ok"}


def test_a_pool_is_used_again_after_failures(spec: RewardSpec) -> None:
    with RewardPool(2, TIMEOUT_S, spec, SCORE_ON_FAILURE) as pool:
        for _ in range(2):
            results = pool.score([request("loop"), request("die"), request("return 7")])
            assert [r.outcome for r in results] == ["timeout", "raised", "ok"]


def test_a_worker_that_died_between_batches_is_replaced_without_loss(spec: RewardSpec) -> None:
    with RewardPool(1, TIMEOUT_S, spec, SCORE_ON_FAILURE) as pool:
        worker = int(pool.score([request("pid")])[0].score)
        os.kill(worker, signal.SIGKILL)
        assert wait_until(lambda: not exists(worker))
        assert pool.score([request("return 1")] * 5) == [RewardResult(1.0, "ok")] * 5


def test_long_texts_pass_in_both_directions(spec: RewardSpec) -> None:
    text = "x" * 300_000
    results = score(spec, *[f"return len('{text}')"] * 8, f"raise {text}")
    assert [r.score for r in results[:8]] == [300_000.0] * 8
    assert len(results[8].detail) == 1_000


def test_512_trivial_rewards_cost_little() -> None:
    requests = [RewardRequest("verbs", "", "8 - 3 = 5 #### 5", "5", {"finish_reason": "stop"})] * 512
    with RewardPool(2, 5.0, RewardSpec(), 0.0) as pool:
        durations = []
        for _ in range(5):
            start = time.perf_counter()
            assert sum(result.score for result in pool.score(requests)) == 512
            durations.append(time.perf_counter() - start)
    assert min(durations) < 0.3


def test_a_pool_can_be_used_from_threads(spec: RewardSpec) -> None:
    scores: dict[int, list[float]] = {}
    with RewardPool(2, 5.0, spec, 0.0) as pool:

        def work(base: int) -> None:
            scores[base] = [r.score for r in pool.score([request(f"return {base + i}") for i in range(50)])]

        threads = [threading.Thread(target=work, args=(base,)) for base in (0, 1000, 2000)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert scores == {base: [base + i for i in range(50)] for base in (0, 1000, 2000)}


def test_a_function_that_cannot_be_loaded_fails_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"no such \.py file"):
        RewardPool(2, TIMEOUT_S, RewardSpec(path=str(tmp_path / "none.py")), 0.0)


def test_a_file_that_ends_its_process_fails_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "ends.py"
    path.write_text("import os\nos._exit(5)\n")
    with pytest.raises(RewardError, match="did not start: the worker process exited with status 5"):
        RewardPool(1, TIMEOUT_S, RewardSpec(path=str(path)), 0.0)


def test_what_a_file_printed_before_it_failed_is_with_the_error(tmp_path: Path) -> None:
    path = tmp_path / "says.py"
    path.write_text("print('no licence found')\n1 / 0\n")
    with pytest.raises(RewardError, match="no licence found") as caught:
        RewardPool(1, TIMEOUT_S, RewardSpec(path=str(path)), 0.0)
    assert "ZeroDivisionError: division by zero" in str(caught.value)
    assert f'{path}", line 2, in <module>' in str(caught.value)


def test_a_function_gets_its_keyword_arguments_with_every_call(tmp_path: Path) -> None:
    path = tmp_path / "weighted.py"
    path.write_text("def compute_score(solution_str, weight, **_):\n    return weight * len(solution_str)\n")
    with RewardPool(2, 30.0, RewardSpec(path=str(path), kwargs={"weight": 0.5}), 0.0) as pool:
        assert [r.score for r in pool.score([request("four"), request("to")])] == [2.0, 1.0]


@pytest.mark.parametrize(("num_workers", "timeout_s"), [(0, 1.0), (1, 0.0), (1, -1.0), (1, math.nan), (1, math.inf)])
def test_sizes_without_sense_are_refused(num_workers: int, timeout_s: float) -> None:
    with pytest.raises(RewardError, match=r"reward\.(num_workers|timeout_s) = "):
        RewardPool(num_workers, timeout_s, RewardSpec(), 0.0)


def test_closing_ends_every_worker(spec: RewardSpec) -> None:
    with RewardPool(3, TIMEOUT_S, spec, 0.0) as pool:
        workers = {int(result.score) for result in pool.score([request("pid")] * 60)}
        assert all(exists(worker) for worker in workers)
    assert not any(exists(worker) for worker in workers)


def test_a_hanging_function_takes_the_processes_it_started_with_it(spec: RewardSpec, tmp_path: Path) -> None:
    (result,) = score(spec, f"child {tmp_path / 'pid'}", num_workers=1, timeout_s=TIMEOUT_S)
    child = int((tmp_path / "pid").read_text())
    assert result.outcome == "timeout"
    assert wait_until(lambda: not exists(child))


LEAVERS = {
    "a session of its own": "subprocess.Popen(['sleep', '600'], start_new_session=True)",
    "a daemon": "subprocess.Popen(['setsid', 'sh', '-c', 'sleep 600 & echo $! > {pid}'])",
}


@pytest.mark.parametrize("way", LEAVERS)
@pytest.mark.parametrize(
    "after", ["time.sleep(600)", *(pytest.param(a, marks=pytest.mark.long) for a in ("os._exit(3)", "1"))]
)
def test_processes_that_left_the_group_are_ended_too(tmp_path: Path, way: str, after: str) -> None:
    """Whether the function hangs, ends its process, or goes well and the pool is closed."""
    pid, path = tmp_path / "pid", tmp_path / "leaver.py"
    path.write_text(
        "import os, subprocess, time\ndef compute_score(**_):\n"
        f"    child = {LEAVERS[way].format(pid=pid)}\n"
        f"    if {way == 'a session of its own'}:\n        open('{pid}', 'w').write(str(child.pid))\n"
        f"    while not (os.path.exists('{pid}') and open('{pid}').read()):\n        time.sleep(0.02)\n"
        f"    return {after}\n"
    )
    with RewardPool(1, 2.0, RewardSpec(path=str(path)), 0.0) as pool:
        pool.score([request("")])
    assert not exists(int(pid.read_text()))


PARENT = """
import os, sys, threading, time
from megarl.reward.pool import RewardPool
from megarl.reward.registry import RewardSpec
from megarl.types import RewardRequest

pool = RewardPool(2, 1.5, RewardSpec(path=sys.argv[1]), 0.0)
requests = [RewardRequest("mine", "", "pid", "", {})] * 40
print(*{int(result.score) for result in pool.score(requests)}, flush=True)
if sys.argv[2] == "fork":
    sibling = os.fork()
    if sibling == 0:
        time.sleep(600)
    print(sibling, flush=True)
if sys.argv[2] in ("block", "loop"):
    busy = [RewardRequest("mine", "", sys.argv[2], "", {})] * 2
    threading.Thread(target=pool.score, args=(busy,), daemon=True).start()
    time.sleep(0.5)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("state", ["idle", "loop", "block", "fork"])
def test_no_worker_outlives_a_parent_that_is_killed(spec: RewardSpec, state: str) -> None:
    """idle, in a function that swallows all exceptions, in one that keeps the interpreter, or with a forked sibling."""
    command = [sys.executable, "-c", PARENT, str(spec.path), state]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    forked = None
    try:
        workers = [int(word) for word in parent.stdout.readline().split()]
        forked = int(parent.stdout.readline()) if state == "fork" else None
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        parent.wait()
        assert workers
        assert wait_until(lambda: not any(exists(worker) for worker in workers))
    finally:
        parent.kill()
        if forked is not None:
            os.kill(forked, signal.SIGKILL)
        parent.stdout.close()


def test_an_interrupted_batch_leaves_the_pool_ready_for_the_next(spec: RewardSpec) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with RewardPool(2, 30.0, spec, 0.0) as pool:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                pool.score([request("loop")] * 2)
            assert pool.score([request("return 4")] * 3) == [RewardResult(4.0, "ok")] * 3
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_workers_load_no_torch(spec: RewardSpec) -> None:
    assert score(spec, "return 'torch' in sys.modules", num_workers=1) == [RewardResult(0.0, "ok")]
