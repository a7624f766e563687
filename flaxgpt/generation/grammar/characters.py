"""Sets of characters, and the byte sequences that encode them in UTF-8."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

Range = tuple[int, int]  # first and last, of code points or bytes
_ALL = sys.maxunicode + 1


def ranges_of(items: Iterable[tuple[str, Any]], ascii_only: bool) -> tuple[Range, ...]:
    """Return the code points of a character class, without surrogates, as sorted ranges.

    Args:
        items: pairs of a name and a value, as `re` parses the inside of `[...]`.
        ascii_only: whether `\\d`, `\\s` and `\\w` match ASCII characters only.
    """
    members, negated = np.zeros(_ALL, bool), False
    for name, value in items:
        if name == "NEGATE":
            negated = True
        elif name == "LITERAL":
            members[value] = True
        elif name == "RANGE":
            members[value[0] : value[1] + 1] = True
        else:
            members |= _category(str(value), ascii_only)
    if negated:
        members = ~members
    members[0xD800:0xE000] = False  # UTF-8 does not encode them
    edges = np.flatnonzero(np.diff(members.astype(np.int8), prepend=0, append=0)).tolist()
    return tuple((first, end - 1) for first, end in zip(edges[::2], edges[1::2], strict=True))


@functools.cache
def _category(name: str, ascii_only: bool) -> np.ndarray:
    """Return the members of a category of `re`, such as `CATEGORY_NOT_DIGIT`, bool [_ALL]."""
    *negated, kind = name.removeprefix("CATEGORY_").split("_")
    escape = {"DIGIT": "d", "SPACE": "s", "WORD": "w"}[kind]
    pattern = "\\" + (escape.upper() if negated else escape)
    found = re.findall(pattern, "".join(map(chr, range(_ALL))), re.ASCII if ascii_only else 0)
    members = np.zeros(_ALL, bool)
    members[[ord(character) for character in found]] = True
    return members


def utf8_sequences(first: int, last: int) -> Iterator[tuple[Range, ...]]:
    """Yield sequences of byte ranges that together encode a range of code points.

    Within a sequence, each byte varies independently of the others. From Russ Cox, "Regular
    expression matching in the wild" (2010), which describes how RE2 does it.

    >>> list(utf8_sequences(0x70, 0x85))
    [((112, 127),), ((194, 194), (128, 133))]
    """
    for limit in (0x7F, 0x7FF, 0xFFFF):  # the last code points of one, two and three bytes
        if first <= limit < last:
            yield from utf8_sequences(first, limit)
            yield from utf8_sequences(limit + 1, last)
            return
    for following in (1, 2, 3) if last > 0x7F else ():  # bytes that are to vary freely
        low = (1 << 6 * following) - 1
        if first & ~low != last & ~low:
            if first & low:
                split = (first | low) + 1
            elif last & low != low:
                split = last & ~low
            else:
                continue
            yield from utf8_sequences(first, split - 1)
            yield from utf8_sequences(split, last)
            return
    yield tuple(zip(chr(first).encode(), chr(last).encode(), strict=True))
