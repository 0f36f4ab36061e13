"""Every sink gets every step, and a name that can't be opened says how to fix it."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarl.errors import ConfigError, ResourceError
from megarl.monitor.rundir import forget_later_steps
from megarl.monitor.sinks import JsonlSink, Tracker, open_tracker


def records(path: Path) -> list[dict[str, float | None]]:
    """Read a metrics file back, refusing NaN and Infinity, which are not JSON."""

    def refuse(word: str) -> float:
        raise ValueError(word)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_jsonl_holds_one_object_a_step_with_step_and_wall_time(tmp_path: Path) -> None:
    before = time.time()
    with open_tracker(["jsonl"], tmp_path, "project", "experiment", {}) as tracker:
        tracker.log(1, {"reward/mean": 0.25})
        tracker.log(2, {"reward/mean": 0.5})
    first, second = records(tmp_path / "metrics.jsonl")
    assert (first["step"], first["reward/mean"], second["step"], second["reward/mean"]) == (1, 0.25, 2, 0.5)
    assert first["wall_time_s"] is not None
    assert before <= first["wall_time_s"] <= time.time()


def test_jsonl_is_readable_before_the_run_ends(tmp_path: Path) -> None:
    tracker = open_tracker(["jsonl"], tmp_path, "project", "experiment", {})
    tracker.log(1, {"reward/mean": 0.25})
    assert records(tmp_path / "metrics.jsonl")[0]["reward/mean"] == 0.25
    tracker.close()


def test_nan_and_infinities_become_null_and_are_counted(tmp_path: Path) -> None:
    with open_tracker(["jsonl"], tmp_path, "project", "experiment", {}) as tracker:
        tracker.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
        tracker.log(2, {"a": 1.0})
    first, second = records(tmp_path / "metrics.jsonl")
    assert (first["a"], first["b"], first["c"], first["d"]) == (None, None, None, 1.0)
    assert (first["monitor/non_finite"], second["monitor/non_finite"]) == (3, 0)


def test_a_resumed_run_appends_to_its_metrics(tmp_path: Path) -> None:
    for step in (1, 2):
        with open_tracker(["jsonl"], tmp_path, "project", "experiment", {}) as tracker:
            tracker.log(step, {})
    assert [record["step"] for record in records(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_line_torn_by_a_crash_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "rew', encoding="utf-8")
    sink = JsonlSink(path)
    sink.log(2, {})
    sink.close()
    assert [record["step"] for record in records(path)] == [1, 2]


def test_tensorboard_shows_each_step_of_a_run_that_went_on_once(tmp_path: Path) -> None:
    for first, last in ((1, 5), (3, 6), (4, 7)):  # killed after steps 5 and 6, gone on after steps 2 and 3
        forget_later_steps(tmp_path, first - 1)
        with open_tracker(["tensorboard"], tmp_path, "project", "experiment", {}) as tracker:
            for step in range(first, last + 1):
                tracker.log(step, {"loss": 100 * first + step})
        newest = max((tmp_path / "tensorboard").iterdir())
        newest.write_bytes(newest.read_bytes() + b"\x20\0\0")  # what is left of a record that was being written
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    points = [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors("loss")]
    assert points == [(1, 101), (2, 102), (3, 303), *((step, 400 + step) for step in range(4, 8))]


def test_tensorboard_reads_back_what_was_logged_without_torch(tmp_path: Path) -> None:
    with open_tracker(["tensorboard"], tmp_path, "project", "experiment", {}) as tracker:
        tracker.log(1, {"reward/mean": 0.25})
        tracker.log(2, {"reward/mean": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors("reward/mean")]
    assert points == [(1, 0.25), (2, 0.5)]


def test_console_writes_one_line_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_tracker(["console"], tmp_path, "project", "experiment", {}, total_steps=2) as tracker:
        tracker.log(1, {"reward/mean": 0.25})
    assert capsys.readouterr().out == "  step   reward\n     1     0.25\n"


def test_an_unknown_sink_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_tracker(["console", "tensorbord"], tmp_path, "project", "experiment", {})
    text = str(caught.value)
    assert "trainer.logger = 'tensorbord'" in text
    assert "console, tensorboard, jsonl, wandb" in text
    assert "did you mean 'tensorboard'?" in text


def test_a_sink_named_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names a sink twice"):
        open_tracker(["jsonl", "jsonl"], tmp_path, "project", "experiment", {})
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "tensorboard.summary")])
def test_a_sink_whose_package_is_missing_says_what_to_install(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # how Python itself marks a module that can't be imported
    with pytest.raises(ConfigError) as caught:
        open_tracker([name], tmp_path, "project", "experiment", {})
    assert f"trainer.logger = '{name}'" in str(caught.value)
    assert f"pip install {name}, or take {name} out of trainer.logger" in str(caught.value)


class NoAccount(ModuleType):
    """The wandb package where nobody is logged in."""

    def init(self, **_: object) -> None:
        """Refuse, as wandb does."""
        raise RuntimeError("api_key not configured (no-tty)")


def test_a_sink_that_can_not_be_opened_is_the_users_to_mend_and_the_others_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", NoAccount("wandb"))
    with pytest.raises(ConfigError) as caught:
        open_tracker(["jsonl", "wandb"], tmp_path, "project", "experiment", {})
    text = str(caught.value)
    assert "trainer.logger = 'wandb': can't be opened: RuntimeError: api_key not configured (no-tty)" in text
    assert "fix: wandb login, or WANDB_MODE=offline in the environment, or take wandb out of trainer.logger" in text


@pytest.mark.parametrize("name", ["jsonl", "console"])
def test_a_full_disk_ends_a_run_with_one_line_and_nothing_on_top(name: str, tmp_path: Path) -> None:
    file = {"jsonl": "metrics.jsonl", "console": "console.log"}[name]
    (tmp_path / file).symlink_to("/dev/full")
    with (
        pytest.raises(ResourceError, match=f"{file} can't be written: No space left on device"),
        open_tracker([name], tmp_path, "project", "experiment", {}) as tracker,
    ):
        tracker.log(1, {"reward/mean": 1.0})


def test_a_tensorboard_folder_that_can_not_be_written_is_named() -> None:
    with pytest.raises(ResourceError, match=r"/sys/tensorboard can't be written: .* bytes free"):
        open_tracker(["tensorboard"], Path("/sys"), "project", "experiment", {})


def test_a_stage_of_the_start_is_told_with_its_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_tracker(["console"], tmp_path, "project", "experiment", {}, total_steps=2) as tracker:
        tracker.stage(2, 3, "starting 4 ranks")
    assert capsys.readouterr().out == "2 of 3: starting 4 ranks\n"


def test_the_console_is_kept_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_tracker(["console"], tmp_path, "project", "experiment", {}, total_steps=2) as tracker:
        tracker.log(1, {"reward/mean": 0.25})
        tracker.show("a table\nof two lines")
    written = capsys.readouterr().out
    assert (tmp_path / "console.log").read_text() == written
    assert written.splitlines()[2:] == ["a table", "of two lines"]


def test_a_warning_is_seen_with_a_console_and_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("console", "jsonl"):
        with open_tracker([name], tmp_path, "project", "experiment", {}) as tracker:
            tracker.warn("rewards fail")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("rewards fail\n", "rewards fail\n")


class FullDisk:
    """A sink that can't write its last bytes."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take nothing."""

    def close(self) -> None:
        """Fail as a file on a full disk does."""
        raise OSError("no space left on device")


def test_a_sink_that_fails_to_close_is_reported_after_the_others_closed(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    with pytest.raises(ExceptionGroup) as caught:
        Tracker([FullDisk(), sink]).close()
    assert caught.group_contains(OSError, match="no space left")
    with pytest.raises(ValueError, match="closed file"):
        sink.log(1, {})


def test_the_error_of_a_run_is_not_hidden_by_a_sink_that_fails_to_close() -> None:
    with pytest.raises(ZeroDivisionError) as caught, Tracker([FullDisk()]):
        raise ZeroDivisionError
    assert "sinks failed to close" in caught.value.__notes__[0]
