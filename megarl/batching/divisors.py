"""Divisors of a count, for errors that say which sizes would do."""

from __future__ import annotations

from math import isqrt


def divisors(number: int) -> list[int]:
    """Return every divisor of a positive number, in order: soon for a billion too, which a typing mistake may ask."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
