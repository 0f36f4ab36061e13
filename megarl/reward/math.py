"""Scores of answers that end with a number, and of answers that must match word for word."""

from __future__ import annotations

import re
from decimal import Decimal

_SIGN = r"(?:-\$?|\$-?)?"
_VALUE = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
# What may not follow: "12 dollars" and "12." are 12, but "1,2", "1.2.3", "3/4", "3e5", "6*2" and "7th" are not.
_NOT_MORE = r"(?!\.?\w|[.,/:^*=+-]+[0-9])"
_NUMBER = re.compile(_SIGN + _VALUE)
_MARKED = re.compile(rf"[ \t]*({_SIGN}{_VALUE}){_NOT_MORE}")
# A minus right after a word or a number is a hyphen or a subtraction, not a sign.
_ANYWHERE = re.compile(rf"(?:(?<![\w.,)]){_SIGN})?{_VALUE}")


def marked_number(text: str) -> Decimal | None:
    """Return the number right after the last ``####``, or None. ``$``, thousands commas and a final dot are allowed."""
    _, mark, rest = text.rpartition("####")
    match = _MARKED.match(rest) if mark else None
    return to_number(match[1]) if match else None


def ends_with_marked_number(text: str) -> bool:
    """Whether a text has exactly one ``####`` and nothing but a number after it."""
    parts = text.split("####")
    return len(parts) == 2 and _NUMBER.fullmatch(parts[1].strip()) is not None


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, or None."""
    numbers = _ANYWHERE.findall(text)
    return to_number(numbers[-1]) if numbers else None


def to_number(text: str) -> Decimal:
    """Return the value of ``1,234.50``, ``-$3`` or the like. Raises ValueError if the text is no such number."""
    if not _NUMBER.fullmatch(text.strip()):
        raise ValueError(f"{text!r} is not a number")
    return Decimal(text.strip().replace(",", "").replace("$", ""))


def score_number(answer: Decimal | None, ground_truth: str) -> float:
    """Return 1 if the answer has the value of the ground truth (``18`` and ``18.00`` have the same), else 0."""
    return float(answer == to_number(ground_truth))


def score_exact_match(solution_str: str, ground_truth: str) -> float:
    """Return 1 if the response is the ground truth, apart from white space around either, else 0."""
    return float(solution_str.strip() == ground_truth.strip())


def score_single_mark(solution_str: str, ground_truth: str) -> float:
    """Return 1 if the response has exactly one ``####`` and the text after it is the ground truth, else 0."""
    parts = solution_str.split("####")
    return float(len(parts) == 2 and parts[1].strip() == ground_truth.strip())


def why_no_number(ground_truth: str) -> str:
    """Return why no answer with a number has the value of a ground truth, empty where one has."""
    return "" if _NUMBER.fullmatch(ground_truth.strip()) else "it is no number"


def why_no_single_mark(ground_truth: str) -> str:
    """Return why no text after the one ``####`` of a response is a ground truth, empty where one is."""
    return "it contains ####, which separates the answer" if "####" in ground_truth else ""
