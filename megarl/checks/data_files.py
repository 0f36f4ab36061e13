"""Data files before a run: they are there, have their columns and rows, and a plan reads the rows themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

from megarl.algorithm.needs import needs_reward_function
from megarl.checks.findings import Findings
from megarl.config.schema import PPOConfig, SFTConfig
from megarl.data.messages import row_chat
from megarl.data.parquet import Row, check_footer, read_rows
from megarl.data.prompts import prompt_columns, row_facts
from megarl.errors import DataError, Problem
from megarl.reward.registry import require_functions, unmatchable

MOST_ROWS = 10_000
"""Rows of a file that a plan reads: a second's worth. A run reads all of them."""


CheckRows = Callable[[Iterable[Row]], None]
"""Raises DataError or RewardError for a row that can't be used."""


class Rewarded(Protocol):
    """A row or a prompt."""

    @property
    def origin(self) -> str:
        """Where it lies, for people."""

    @property
    def data_source(self) -> str:
        """The data set, which selects the reward unless the run names one."""

    @property
    def ground_truth(self) -> str:
        """What the reward compares with."""


def check_prompt_files(config: PPOConfig, found: Findings) -> int | None:
    """Check the files of prompts; return the rows of the training files, None where some aren't here."""
    data, columns = config.data, prompt_columns(config.data.prompt_key)
    for key, files in (("data.train_files", data.train_files), ("data.val_files", data.val_files)):
        if not files:
            found.problems.append(_no_file(key))

    def check_rows(rows: Iterable[Row]) -> None:
        facts = (row_facts(row, data.prompt_key) for row in rows)
        check_rewarded(facts, config)

    return _check_files(data.train_files, data.val_files, data.train_batch_size, columns, check_rows, found)


def check_chat_files(config: SFTConfig, found: Findings) -> int | None:
    """Check the files of chats; return the rows of the training files, None where some aren't here."""
    data, key = config.data, config.data.messages_key
    if not data.train_files:
        found.problems.append(_no_file("data.train_files"))

    def check_rows(rows: Iterable[Row]) -> None:
        for row in rows:
            row_chat(row, key)

    columns = {key: f"data.messages_key = {key!r}"}
    return _check_files(data.train_files, data.val_files, data.train_batch_size, columns, check_rows, found)


def check_rewarded(rows: Iterable[Rewarded], config: PPOConfig) -> None:
    """Check that every row has a reward that some response can earn. Raises RewardError or DataError."""
    name, is_own = config.reward.name, config.reward.path is not None
    if not needs_reward_function(config) or is_own:
        for _ in rows:  # which are looked at as they are taken
            pass
        return
    known: set[str] = set()
    wrong: list[tuple[Rewarded, str]] = []
    for row in rows:
        if name is None and row.data_source not in known:
            require_functions([row.data_source])
            known.add(row.data_source)
        if why := unmatchable(name or row.data_source, row.ground_truth):
            wrong.append((row, why))
    if wrong:
        row, why = wrong[0]
        others = f"; {len(wrong) - 1} more rows have such ones" if len(wrong) > 1 else ""
        raise DataError(
            f"{row.origin}: reward_model.ground_truth = {row.ground_truth!r}: the reward "
            f"{name or row.data_source!r} can never match it: {why}{others}. "
            "fix: correct the row, or name the reward that fits it by reward.name or reward.path"
        )


def _check_files(
    train_files: Sequence[str],
    val_files: Sequence[str],
    batch_size: int,
    columns: Mapping[str, str],
    check_rows: CheckRows,
    found: Findings,
) -> int | None:
    """Check the footers of all files, and where files may be missing the rows of those that are here."""
    total: int | None = 0
    for key, file in _keyed(train_files, val_files):
        if found.notes is not None and not Path(file).expanduser().exists():
            found.notes.append(f"{key}: {file} isn't on this machine: its rows and columns are unread")
            total = None if key == "data.train_files" else total
            continue
        with found.of(key, file):
            count = check_footer(file, columns)
            if not count:
                found.problems.append(Problem(key, file, "has no rows", "write it again, or leave it out"))
            if key == "data.train_files":
                total = None if total is None else total + count
            if found.notes is not None:
                check_rows(islice(read_rows([file], columns, optional=("extra_info",)), MOST_ROWS))
                if count > MOST_ROWS:
                    found.notes.append(f"{key}: the rows of {file} beyond the first {MOST_ROWS:,} of {count:,}")
    if total is not None and 0 < total < batch_size:
        allowed = f"the training files have only {total} rows, not enough for one step"
        found.problems.append(Problem("data.train_batch_size", batch_size, allowed, f"data.train_batch_size={total}"))
    return total or None


def _no_file(key: str) -> Problem:
    return Problem(key, [], "must name at least one parquet file", f"{key}=FILE.parquet")


def _keyed(train_files: Sequence[str], val_files: Sequence[str]) -> Iterator[tuple[str, str]]:
    for file in train_files:
        yield "data.train_files", file
    for file in val_files:
        yield "data.val_files", file
