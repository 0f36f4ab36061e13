"""Chats as the rows of a data file hold them: messages, and the tools that may be called in them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, TypeAlias

from megarl.data.parquet import Row

Message: TypeAlias = dict[str, Any]
Tool: TypeAlias = dict[str, Any]

TOOLS = "tools"  # the column, which a file may lack
_LIKE_A_CHAT = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")


@dataclass(frozen=True)
class Chat:
    """Messages, and the JSON schemas of the tools that the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()

    def before(self, turn: int) -> Chat:
        """Return the chat as it stood before a message."""
        return Chat(self.messages[:turn], self.tools)


def row_chat(row: Row, column: str) -> Chat:
    """Return the chat of a row: the messages in ``column``, and its tools.

    A text is one user message, unless it is a chat written as JSON. Fields without a value are dropped at every depth:
    parquet gives every message, every tool and every argument the fields of all. JSON text keeps its nulls.
    Raises DataError where the messages are null or empty, or aren't messages with a role and a text.
    """
    value = row.values[column]
    if isinstance(value, str):
        value = _of_text(row, column, value)
    if value is None:
        raise row.error(f"{column} is null")
    if not isinstance(value, list):
        raise row.error(f"{column} is {_kind(value)}; allowed: a string, or a list of {{role, content}}")
    if not value:
        raise row.error(f"{column} is an empty list of messages")
    has_nulls = value is not row.values[column]
    messages = tuple(
        _message(row, f"message {number} of {column}", message, has_nulls) for number, message in enumerate(value)
    )
    return Chat(messages, _tools(row))


def _of_text(row: Row, column: str, text: str) -> Any:
    """Return the messages that a text stands for."""
    if not _LIKE_A_CHAT.match(text):
        return [{"role": "user", "content": text}]
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise row.error(
            f"{column} looks like a chat written as text, but is no JSON: {error}. fix: write the list itself, or JSON"
        ) from error


def _message(row: Row, where: str, message: object, has_nulls: bool) -> Message:
    """Return a message's fields that have a value. A turn of the assistant may call tools and say nothing.

    has_nulls: whether a null within a field is one that somebody wrote.
    """
    if not isinstance(message, dict) or "role" not in message or not message.keys() & {"content", "tool_calls"}:
        raise row.error(f"{where} is {message!r}; allowed: a struct with role and content")
    fields = {
        name: field if has_nulls else _without_nulls(field)
        for name, field in message.items()
        if field is not None and not (name == "tool_calls" and field == [])
    }
    may_say_nothing = fields.get("role") == "assistant" and "tool_calls" in fields
    for name in ("role", "content"):
        text = fields.get(name)
        if text is not None and not isinstance(text, str):
            raise row.error(f"{name} of {where} is {_kind(text)}; allowed: text")
        if not (text and text.strip()) and (name == "role" or not may_say_nothing):
            raise row.error(f"{name} of {where} is {'null' if text is None else 'empty'}")
    return fields


def _tools(row: Row) -> tuple[Tool, ...]:
    """Return the tools of a row: a list of JSON schemas, or that list or each of them as JSON text."""
    value = row.values.get(TOOLS)
    tools = _of_json(row, value) if isinstance(value, str) else _without_nulls(value or [])
    if not isinstance(tools, list):
        raise row.error(f"{TOOLS} is {_kind(tools)}; allowed: a list of JSON schemas, or such a list as JSON text")
    return tuple(_tool(row, number, _of_json(row, t) if isinstance(t, str) else t) for number, t in enumerate(tools))


def _of_json(row: Row, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise row.error(f"{TOOLS} is text, but no JSON: {error}") from error


def _tool(row: Row, number: int, tool: object) -> Tool:
    if not isinstance(tool, dict) or not isinstance(tool_name(tool), str):
        raise row.error(f"tool {number} of {TOOLS} is {tool!r}; allowed: a JSON schema of a function with a name")
    return tool


def tool_name(tool: Tool) -> Any:
    """Return the name of a tool, or of the tool that a call names; None where it has none."""
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, dict) else None


def _without_nulls(value: Any) -> Any:
    """Return a value of arrow's without the fields that hold nothing, at every depth."""
    if isinstance(value, dict):
        return {name: _without_nulls(field) for name, field in value.items() if field is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"
