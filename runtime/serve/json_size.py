"""How many values a JSON text may hold, counted before it is parsed.

A parser makes an object of every value, without giving way to other threads, so 25 MB of short keys would stop the
server for seconds and take ten times their size. Counting takes no memory, and ends where there are too many.
"""

from __future__ import annotations

MAX_QUOTES = 1_000_000
"""Quotation marks, and backslashes before them, that are looked at."""
_BACKSLASH = ord("\\")


def holds_more_values(content: bytes, most: int) -> bool:
    """Whether a JSON text may hold more than `most` names and values.

    Outside of strings every `,`, `:`, `[` and `{` counts one; there is one before all names and values but the first.

    Args:
        content: UTF-8. If it is no JSON, the parser will say so.
        most: The limit; a text with more than `MAX_QUOTES` quotation marks is above every limit.
    """
    count = looked = place = 0
    while True:
        quote = content.find(b'"', place)
        end = len(content) if quote < 0 else quote
        count += sum(content.count(mark, place, end) for mark in (b",", b":", b"[", b"{"))
        if count > most:
            return True
        if quote < 0:
            return False
        place, escaped = quote + 1, True
        while escaped:
            quote = content.find(b'"', place)
            if quote < 0:
                return False
            before = quote - 1
            while before >= place and content[before] == _BACKSLASH and quote - before <= MAX_QUOTES:
                before -= 1
            escaped = (quote - before) % 2 == 0
            looked += quote - before
            if looked > MAX_QUOTES:
                return True
            place = quote + 1
