"""What a person sees in the terminal: progress, the metrics that matter, sampled rollouts."""

from __future__ import annotations

import math
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from megarl.monitor.disk import LineFile

# In the order they are shown. A line shows those that its step has; every metric goes to the other sinks.
HEADLINE = (
    "reward/mean",
    "val/reward_mean",
    "loss/train",
    "loss/val",
    "actor/policy_loss",
    "actor/kl",
    "actor/entropy",
    "actor/grad_norm",
    "actor/moe/load_max",
    "critic/value_loss",
    "response/mean_tokens",
    "response/share_cut",
    "rollout_train/logprob_diff_max",
    "time_s/step",
)
# Shown where they aren't 0.
TROUBLES = ("reward/num_raised", "reward/num_timeout", "reward/num_invalid")
MAX_CELL_LINES = 8


class Progress:
    """Show a bar of steps and, above it, one line of metrics a step.

    The bar appears only where ``stream`` is a terminal, so that log files hold the lines alone.
    """

    def __init__(
        self,
        total_steps: int | None = None,
        stream: TextIO | None = None,
        headline: Sequence[str] = HEADLINE,
        log_file: Path | None = None,
    ) -> None:
        """Open the bar. log_file: takes every line as well, but no bar."""
        self._log_file = None if log_file is None else LineFile(log_file)
        self._stream = sys.stdout if stream is None else stream
        self._headline = headline
        self._bar = tqdm(total=total_steps, unit="step", file=self._stream, disable=None, dynamic_ncols=True)
        self._started = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the bar to ``step`` (counted from 1) and write its line."""
        if not self._started:
            # A resumed run does not start at step 1; steps of the earlier run must not count as speed of this one.
            self._bar.initial = max(0, step - 1)
            self._started = True
        self._bar.n = step
        self.write(metrics_line(step, metrics, self._headline))

    def write(self, text: str) -> None:
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


def metrics_line(step: int, metrics: Mapping[str, float], headline: Sequence[str] = HEADLINE) -> str:
    """Return one line of the headline metrics, of failures, and of each metric that is NaN or infinite."""
    shown = [name for name in headline if name in metrics]
    shown += [name for name in TROUBLES if metrics.get(name) and name not in shown]
    shown += [name for name, value in metrics.items() if name not in shown and not math.isfinite(value)]
    return "  ".join([f"step {step}", *(f"{name} {metrics[name]:.4g}" for name in shown)])


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
    widths = _column_widths(width)
    header = ("score", "prompt", "response", "truth")
    body = [(f"{row.score:.4g}", row.prompt, row.response, row.ground_truth) for row in rows]
    rule = "-+-".join("-" * column for column in widths)
    lines = [*_row_lines(header, widths)]
    for cells in body:
        lines += [rule, *_row_lines(cells, widths)]
    return "\n".join(lines)


def _column_widths(width: int) -> tuple[int, int, int, int]:
    """Share ``width`` among score, prompt, response and ground truth; the response gets half of the text."""
    score = 10
    text = max(width - score - 3 * len(" | "), 24)
    prompt, truth = text * 3 // 10, text // 5
    return score, prompt, text - prompt - truth, truth


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
