"""Rows of parquet files, with errors that name the file, the row group and the row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megarl.errors import DataError, nearest

_BATCH_ROWS = 256


@dataclass(frozen=True)
class Row:
    """One row and where it lies. index: its number in the file, from 0. place: of the file in the list, from 0."""

    file: str
    place: int
    row_group: int
    index: int
    values: Mapping[str, Any]

    @property
    def uid(self) -> str:
        """Name the row the same way in every epoch, after every resume and however the path is typed."""
        return f"{self.place}:{self.index}"

    @property
    def origin(self) -> str:
        """Name the row for a person."""
        return f"{self.file}:{self.index}"

    def error(self, text: str) -> DataError:
        """Return an error that says where the row is."""
        return DataError(f"{self.file}, row group {self.row_group}, row {self.index}: {text}")


def read_rows(files: Sequence[str], required: Mapping[str, str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the rows of several files, some hundred in memory at a time.

    required: the columns that must be there, each with a phrase that tells the user where its name comes from.
    An absent optional column is None in every row. Raises DataError before the first row of a file is yielded.
    """
    if not files:
        raise DataError("no data files were given. fix: name at least one parquet file")
    for place, file in enumerate(files):
        with open_parquet(file) as parquet:
            columns = parquet.schema_arrow.names
            for column, origin in required.items():
                _require_column(file, column, origin, columns)
            present = [column for column in (*required, *optional) if column in columns]
            yield from _rows_of(file, place, parquet, present, [column for column in optional if column not in columns])


def check_footer(file: str, required: Mapping[str, str]) -> int:
    """Return the number of rows that a file's footer promises. Raises DataError as ``read_rows`` would."""
    with open_parquet(file) as parquet:
        for column, origin in required.items():
            _require_column(file, column, origin, parquet.schema_arrow.names)
        return int(parquet.metadata.num_rows)


def open_parquet(file: str) -> pq.ParquetFile:
    """Open a parquet file. ``~`` is the home folder. Raises DataError if it is missing, truncated or not parquet."""
    path = Path(file).expanduser()
    if not path.is_file():
        found = "is a folder, not a parquet file" if path.is_dir() else "does not exist"
        raise DataError(
            f"{file} {found}. fix: correct data.train_files or data.val_files, or write it: "
            "python -m megarl.data.prepare --help"
        )
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: str, error: Exception) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{file} can't be read: it is truncated or not parquet ({reason}). fix: write or copy it again")


def _require_column(file: str, column: str, origin: str, columns: Sequence[str]) -> None:
    if column in columns:
        return
    hint = nearest(column, columns)
    raise DataError(
        f"{file} has no column {column!r} ({origin}). its columns: {', '.join(columns)}" + (f". {hint}" if hint else "")
    )


def _rows_of(file: str, place: int, parquet: pq.ParquetFile, present: list[str], absent: list[str]) -> Iterator[Row]:
    nothing = dict.fromkeys(absent)
    index = 0
    for group in range(parquet.num_row_groups):
        for batch in _batches(file, parquet, group, present):
            for values in _python_rows(file, place, group, index, batch):
                yield Row(file, place, group, index, {**values, **nothing})
                index += 1


def _batches(file: str, parquet: pq.ParquetFile, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield a row group in parts: arrow can't hold more than 2 GiB of nested strings in one piece."""
    try:
        yield from parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _python_rows(file: str, place: int, group: int, first: int, batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch as dicts, maps in them too. first: the number of its first row in the file."""
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
        return
    except _UNREADABLE_VALUES:
        pass  # of some row, found one by one
    for number in range(batch.num_rows):
        row = Row(file, place, group, first + number, {})
        try:
            [values] = batch.slice(number, 1).to_pylist(maps_as_pydicts="strict")
        except UnicodeDecodeError as error:
            where = f"byte {error.start} of {error.object[:40]!r}"
            raise row.error(f"a text is not UTF-8: {where}. fix: write the file from decoded text") from error
        except _UNREADABLE_VALUES as error:
            raise row.error(f"a value can't be read: {error}") from error
        yield values


# Text that isn't UTF-8, a map that has a key twice, a date that Python can't name.
_UNREADABLE_VALUES = (ValueError, KeyError, OverflowError)
