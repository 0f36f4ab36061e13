"""The timeline of a run: what is written, what is read of it, and how much of it overlaps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megarl.monitor.sinks import open_tracker
from megarl.monitor.timing import Stopwatch
from megarl.monitor.trace import Span, TraceSink, overlap_share, read_spans, training_s
from megarl.trace import main


class Clock:
    """Tells the seconds that it is set to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def timeline(path: Path, clock: Clock) -> None:
    """Write that of a step in which engine 0 generates for half of the update, and engine 1 dies and starts again."""
    trace = TraceSink(path, clock)
    for at_s, number, does, version in (
        (0, 0, "start", -1),
        (1, 1, "start", -1),
        (2, 0, "take weights", -1),
        (3, 0, "", 0),
        (3, 0, "", 0),
        (4, 0, "generate", 0),
        (4, 1, "start", -1),
        (14, 0, "take weights", 0),
    ):
        clock.now_s = at_s
        trace.engine(number, does, version)
    trace.phase("update_actor", 9, 19)
    trace.phase("publish", 19, 21)
    trace.phase("step", 3, 21)
    clock.now_s = 22
    trace.log(1, {"reward/mean": 0.5, "actor/kl": float("nan")})
    trace.close()


def test_each_row_has_its_spans_and_what_goes_on_at_the_end_ends_there(tmp_path: Path) -> None:
    timeline(tmp_path / "trace.json", Clock())
    spans = read_spans(tmp_path / "trace.json")
    first_s = min(span.start_s for span in spans)
    found = [(s.row, s.name, round(s.start_s - first_s, 3), round(s.end_s - first_s, 3)) for s in spans]
    assert found == [
        ("engine 0", "start", 0, 2),
        ("engine 0", "take weights", 2, 3),
        ("engine 0", "generate", 4, 14),
        ("trainer", "update_actor", 9, 19),
        ("controller", "publish", 19, 21),
        ("controller", "step", 3, 21),
        ("engine 0", "take weights", 14, 22),
        ("engine 1", "start", 1, 22),
    ]


def test_a_file_is_an_array_of_events_in_microseconds_whose_rows_have_names(tmp_path: Path) -> None:
    timeline(tmp_path / "trace.json", Clock())
    events = json.loads((tmp_path / "trace.json").read_text().removesuffix(",\n") + "]")
    named = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert named == {0: "controller", 1: "trainer", 2: "engine 0", 3: "engine 1"}
    [update] = [event for event in events if event["name"] == "update_actor"]
    assert (update["ph"], update["tid"], update["dur"]) == ("X", 1, 10_000_000)
    [generated] = [event for event in events if event["name"] == "generate"]
    assert generated["args"] == {"policy_version": 0}
    [end] = [event for event in events if event["name"] == "end of step 1"]
    assert (end["ph"], end["args"]) == ("i", {"reward/mean": 0.5})


def test_a_run_that_goes_on_adds_to_the_timeline_that_is_there(tmp_path: Path) -> None:
    for _ in range(2):
        timeline(tmp_path / "trace.json", Clock())
    assert len(read_spans(tmp_path / "trace.json")) == 16
    assert (tmp_path / "trace.json").read_text().count("[\n") == 1


def test_a_run_writes_the_phases_that_its_stopwatch_takes_with_all_others(tmp_path: Path) -> None:
    with open_tracker(["trace", "jsonl"], tmp_path, "project", "experiment", {}) as tracker:
        watch = Stopwatch(ended=tracker.phase)
        with watch.timed("step"), watch.timed("score_actor"):
            tracker.engine(0, "generate", 3)
        tracker.log(1, {})
    found = [(span.row, span.name) for span in read_spans(tmp_path / "trace.json")]
    assert found == [("trainer", "score_actor"), ("controller", "step"), ("engine 0", "generate")]


def update(start_s: float, end_s: float) -> Span:
    return Span("trainer", "update_actor", start_s, end_s)


def generated(number: int, start_s: float, end_s: float) -> Span:
    return Span(f"engine {number}", "generate", start_s, end_s)


@pytest.mark.parametrize(
    ("spans", "of_any", "of_0", "of_1"),
    [
        ([], 0, 0, 0),
        ([generated(0, 0, 10)], 0, 0, 0),
        ([update(0, 10)], 0, 0, 0),
        ([update(0, 10), generated(0, 10, 20)], 0, 0, 0),
        ([update(0, 10), generated(0, -5, 25)], 1, 1, 0),
        ([update(0, 10), generated(0, 5, 15)], 0.5, 0.5, 0),
        ([update(0, 10), generated(0, 2, 6), generated(1, 4, 7)], 0.5, 0.4, 0.3),
        ([update(0, 10), update(20, 30), generated(0, 5, 25), generated(1, 28, 40)], 0.6, 0.5, 0.1),
        ([update(0, 10), Span("trainer", "update_critic", 10, 20), generated(1, 0, 5)], 0.25, 0, 0.25),
        ([update(0, 10), Span("trainer", "score_ref", 10, 20), generated(0, 5, 15)], 0.5, 0.5, 0),
        ([update(0, 10), Span("controller", "generate", 0, 10)], 0, 0, 0),
        ([update(0, 10), Span("engine 0", "take weights", 0, 10)], 0, 0, 0),
    ],
)
def test_the_overlap_is_the_share_of_the_trainers_time_in_which_engines_generate(
    spans: list[Span], of_any: float, of_0: float, of_1: float
) -> None:
    assert overlap_share(spans) == pytest.approx(of_any)
    assert [overlap_share(spans, number) for number in (0, 1)] == pytest.approx([of_0, of_1])


def test_the_trainers_time_counts_once_where_they_overlap() -> None:
    assert training_s([update(0, 10), update(5, 12), update(20, 21)]) == pytest.approx(13)


def test_a_line_that_a_killed_run_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    timeline(path, Clock())
    spans = read_spans(path)
    with path.open("a") as file:
        file.write('{"name": "update_actor", "pid": 0, "tid": 1, "ph": "X", "args": {}')
    assert read_spans(path) == spans


def test_the_program_says_what_overlapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timeline(tmp_path / "trace.json", Clock())
    main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        "passes and updates took 10.0 s; rollouts were generated in 50% of that time",
        "  engine 0: 50%",
        "  engine 1: 0%",
    ]


def test_a_run_without_a_timeline_is_an_error_that_says_how_to_have_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 2
    assert "fix: name a run whose trainer.logger has trace" in capsys.readouterr().err
