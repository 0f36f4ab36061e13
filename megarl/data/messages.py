"""Chat messages as the rows of a data file hold them."""

from __future__ import annotations

from typing import Any, TypeAlias

from megarl.data.parquet import Row

Message: TypeAlias = dict[str, Any]


def row_messages(row: Row, column: str) -> list[Message]:
    """Return a row's chat messages; a plain string is one user message.

    Fields without a value are dropped: parquet gives every message the fields of all.
    Raises DataError where the value is null or empty, or isn't messages with a role and a text.
    """
    value = row.values[column]
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if value is None:
        raise row.error(f"{column} is null")
    if not isinstance(value, list):
        raise row.error(f"{column} is {_kind(value)}; allowed: a string, or a list of {{role, content}}")
    if not value:
        raise row.error(f"{column} is an empty list of messages")
    return [_message(row, column, number, message) for number, message in enumerate(value)]


def _message(row: Row, column: str, number: int, message: object) -> Message:
    where = f"message {number} of {column}"
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise row.error(f"{where} is {message!r}; allowed: a struct with role and content")
    for field in ("role", "content"):
        text = message[field]
        if text is not None and not isinstance(text, str):
            raise row.error(f"{field} of {where} is {_kind(text)}; allowed: text")
        if text is None or not text.strip():
            raise row.error(f"{field} of {where} is {'null' if text is None else 'empty'}")
    return {name: field for name, field in message.items() if field is not None}


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"
