"""What a person sees in the terminal: progress, the metrics that matter, sampled rollouts."""

from __future__ import annotations

import math
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from megarl.monitor.disk import LineFile

LINE_COLUMNS = 120
# Titles of the metrics of a step's line, in the order they are shown; every metric goes to the other sinks.
HEADLINE: Mapping[str, str] = {
    "reward/mean": "reward",
    "val/reward_mean": "val",
    "loss/train": "loss",
    "loss/val": "val",
    "actor/policy_loss": "loss",
    "actor/kl": "kl",
    "actor/entropy": "entropy",
    "actor/grad_norm": "grad",
    "actor/moe/load_max": "experts",
    "critic/value_loss": "critic",
    "response/mean_tokens": "tokens",
    "response/share_cut": "cut",
    "rollout_train/logprob_diff_max": "mismatch",
    "time_s/step": "seconds",
}
# Shown by their whole names where they aren't 0.
TROUBLES = ("reward/num_raised", "reward/num_timeout", "reward/num_invalid")
MAX_CELL_LINES = 16
_COLUMN, _LINES_UNDER_A_HEADER = 8, 20
_BAR = "{l_bar}{bar:30}{r_bar}"  # of one width, whatever the run waits for


def stage_line(number: int, total: int, what: str) -> str:
    """Return the line that is said when a stage of a start begins."""
    return f"{number} of {total}: {what}"


class StepTable:
    """Lines of steps, in columns that stay where they are. A header comes first, now and then, and with a new column.

    headline: titles by metric.
    """

    def __init__(self, headline: Mapping[str, str] = HEADLINE) -> None:
        self._headline = headline
        self._shown: list[str] = []
        self._lines_to_header = 0

    def interrupt(self) -> None:
        """Have a header above the next line: something else stands above it."""
        self._lines_to_header = 0

    def lines(self, step: int, metrics: Mapping[str, float]) -> str:
        """Return the line of a step, at most LINE_COLUMNS wide, with a header above it where one is due.

        Below it, by their names, failures and each metric that is NaN or infinite and has no column.
        """
        shown = [name for name in self._headline if name in metrics or name in self._shown]
        if self._lines_to_header == 0 or shown != self._shown:
            self._shown, self._lines_to_header = shown, _LINES_UNDER_A_HEADER
            lines = [_row("step", [self._headline[name] for name in shown])]
        else:
            lines = []
        self._lines_to_header -= 1
        lines.append(_row(str(step), [_short(metrics[name]) if name in metrics else "" for name in shown]))
        others = [name for name in TROUBLES if metrics.get(name) and name not in shown]
        others += [n for n, value in metrics.items() if n not in (*shown, *others) and not math.isfinite(value)]
        if others:
            text = "  ".join(f"{name} {metrics[name]:.4g}" for name in others)
            lines += [f"{'':6} {line}" for line in _wrap(text, LINE_COLUMNS - 7)]
        return "\n".join(lines)


class Progress:
    """Show a bar of steps and, above it, a line of metrics for each.

    The bar appears only where ``stream`` is a terminal, so that log files hold the lines alone.
    """

    def __init__(
        self,
        total_steps: int | None = None,
        stream: TextIO | None = None,
        headline: Mapping[str, str] = HEADLINE,
        log_file: Path | None = None,
    ) -> None:
        """Open the bar. log_file: takes every line as well, but no bar."""
        self._log_file = None if log_file is None else LineFile(log_file)
        self._stream = sys.stdout if stream is None else stream
        self._table = StepTable(headline)
        self._bar = tqdm(
            total=total_steps, unit="step", file=self._stream, disable=None, dynamic_ncols=True, bar_format=_BAR
        )
        self._has_stepped = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the bar to ``step`` and write its line. A step 0 is what comes before training."""
        if step > 0 and not self._has_stepped and not self._bar.disable:
            # A resumed run does not start at step 1. Neither steps of the earlier run nor the start of this one must
            # count in the time of a step.
            self._bar.initial = step - 1
            self._bar.start_t = time.time() - metrics.get("time_s/step", 0.0)
            self._has_stepped = True
        self._bar.n = step
        self._write(self._table.lines(step, metrics))

    def wait_for(self, what: str) -> None:
        """Say in the bar what goes on until the next such word; an empty one says nothing."""
        self._bar.set_postfix_str(what)

    def write(self, text: str) -> None:
        """Write text above the bar; the next step's line then has its header again."""
        self._table.interrupt()
        self._write(text)

    def _write(self, text: str) -> None:
        """Write text above the bar; characters that the terminal can't encode are escaped."""
        encoding = self._stream.encoding or "utf-8"
        tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=self._stream)
        self._stream.flush()
        if self._log_file is not None:
            self._log_file.append(text + "\n")

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
        if self._log_file is not None:
            self._log_file.close()


def _row(step: str, cells: Sequence[str]) -> str:
    return " ".join([f"{step:>6}", *(f"{cell:>{_COLUMN}}" for cell in cells)]).rstrip()


def _short(value: float) -> str:
    """Return a number in four digits, in fewer where they don't fit a column."""
    texts = (f"{value:.{digits}g}" for digits in (4, 3, 2, 1))
    return next(text for text in texts if len(text) <= _COLUMN)


@dataclass(frozen=True)
class RolloutRow:
    """One sampled rollout as text."""

    prompt: str
    response: str
    ground_truth: str
    score: float


def rollouts_table(rows: Sequence[RolloutRow], width: int | None = None) -> str:
    """Return a plain table of rollouts that fits ``width`` columns, by default the terminal's.

    Cells wrap. One longer than MAX_CELL_LINES loses its middle: a question and an answer sit at the ends.
    Control characters, line breaks among them, are shown as escapes and so can't move the cursor or forge a row.
    """
    width = shutil.get_terminal_size().columns if width is None else width
    header = ("score", "prompt", "response", "truth")
    body = [(f"{row.score:.4g}", row.prompt, row.response, row.ground_truth) for row in rows]
    longest = [max(_columns(_printable(cell)) for cell in cells) for cells in zip(header, *body, strict=True)]
    widths = _column_widths(width, longest)
    rule = "-+-".join("-" * column for column in widths)
    lines = [*_row_lines(header, widths)]
    for cells in body:
        lines += [rule, *_row_lines(cells, widths)]
    return "\n".join(lines)


def _column_widths(width: int, longest: Sequence[int]) -> tuple[int, int, int, int]:
    """Share ``width`` among score, prompt, response and ground truth. longest: the columns that each would take.

    Score and truth get what they need, the truth a fifth at most; prompt and response share the rest by their lengths,
    a third at least for each, so that both are read in about as many lines.
    """
    score = longest[0]
    text = max(width - score - 3 * len(" | "), 24)
    truth = min(longest[3], text // 5)
    both, needed = text - truth, longest[1] + longest[2]
    prompt = longest[1] if needed <= both else min(max(both * longest[1] // needed, both // 3), both - both // 3)
    return score, prompt, min(longest[2], both - prompt), truth


def _row_lines(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    columns = [_cut(_wrap(_printable(cell), width)) for cell, width in zip(cells, widths, strict=True)]
    for parts in zip_longest(*columns, fillvalue=""):
        padded = (part + " " * (width - _columns(part)) for part, width in zip(parts, widths, strict=True))
        yield " | ".join(padded).rstrip()


def _cut(lines: list[str]) -> list[str]:
    if len(lines) <= MAX_CELL_LINES:
        return lines
    head = (MAX_CELL_LINES - 1) // 2
    return [*lines[:head], "...", *lines[head + 1 - MAX_CELL_LINES :]]


def _printable(text: str) -> str:
    """Escape what str.isprintable refuses: control and format characters, lone surrogates, line separators."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _columns(text: str) -> int:
    """Return the number of terminal columns that a printable text takes."""
    return sum(_char_columns(char) for char in text)


def _char_columns(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _wrap(text: str, width: int) -> list[str]:
    """Break printable text into lines of at most ``width`` columns, at a space where there is one."""
    lines: list[str] = []
    line = ""
    for char in text:
        if _columns(line) + _char_columns(char) > width:
            full, line = (line, "") if char == " " else _break(line)
            lines.append(full)
            if char == " ":
                continue
        line += char
    return [*lines, line]


def _break(line: str) -> tuple[str, str]:
    """Split a full line at its last space; one without a space stays whole."""
    head, _, tail = line.rpartition(" ")
    return (head, tail) if head else (line, "")
