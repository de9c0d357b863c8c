"""Reading JSON of a run's folder, which may be damaged, without exceptions; and formatting numbers and untrusted
text."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

_NOT_PLAIN = re.compile(r"[^\x20-\x7e\n\t]")
_LARGEST = 1e30  # so that results computed from two of them are finite
_JOINERS = "\u200c\u200d"  # part of words in some scripts, and of emoji


def at(value: Any, *keys: str) -> Any:
    """The value under ``keys`` in nested objects; None when there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def number(value: Any, *keys: str) -> float | None:
    """A finite number under ``keys``, of a size that something measured can have; None for anything else."""
    found = at(value, *keys)
    plain = isinstance(found, (int, float)) and not isinstance(found, bool)
    return float(found) if plain and -_LARGEST <= found <= _LARGEST else None


def count(value: Any, *keys: str) -> int:
    """A whole number under ``keys``; 0 for anything else."""
    return int(number(value, *keys) or 0)


def text(value: Any, *keys: str) -> str:
    """A text under ``keys``; empty for anything else."""
    found = at(value, *keys)
    return found if isinstance(found, str) else ""


def mapping(value: Any, *keys: str) -> Mapping[str, Any]:
    """An object under ``keys``; empty for anything else."""
    found = at(value, *keys)
    return found if isinstance(found, Mapping) else {}


def rows(value: Any, *keys: str) -> list[Mapping[str, Any]]:
    """The objects of a list under ``keys``."""
    found = at(value, *keys)
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []


def texts(value: Any, *keys: str) -> list[str]:
    """The texts of a list under ``keys``."""
    found = at(value, *keys)
    return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []


def in_order(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """The names that are in ``order``, in that order, then the others.

    >>> in_order(["dpo", "new", "sft"], ["sft", "ppo", "dpo"])
    ['sft', 'dpo', 'new']
    """
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def jsonl(path: Path, most: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects in the lines of a file, or in its first ``most``. Damaged lines are skipped; a missing file gives
    nothing."""
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
            for line in islice(lines, most):
                try:
                    value = json.loads(line)
                except ValueError:
                    continue
                if isinstance(value, dict):
                    yield value
    except OSError:
        return


def decimals(*values: float | None) -> int:
    """The number of decimals for numbers that are compared with each other: the largest gets three or four digits.

    >>> decimals(2.879, 0.5), decimals(-75.2), decimals(0.0012)
    (3, 2, 5)
    """
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    return 3 if not largest else min(6, max(0, (3 if largest >= 1 else 2) - math.floor(math.log10(largest))))


def short(value: float | None) -> str:
    """A number with three or four digits; whole numbers with all digits.

    >>> short(0.54304), short(25354), short(None)
    ('0.543', '25,354', '-')
    """
    if value is None:
        return "-"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.2e}" if abs(value) < 1e-4 or abs(value) >= 1e15 else f"{value:,.{decimals(value)}f}"


def percent(part: float, whole: float = 1.0) -> str:
    """A share as text.

    >>> percent(12, 80)
    '15 %'
    """
    share = 100 * part / whole if whole else 0.0
    return f"{share:.1f} %" if 0 < share < 10 else f"{share:.0f} %"


def duration(seconds: float | None) -> str:
    """A duration as text.

    >>> duration(154.2), duration(3720), duration(0.4)
    ('2 min 34 s', '1 h 02 min', '0.4 s')
    """
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def visible(untrusted: str) -> str:
    """``untrusted`` with invisible characters, and those that change how the text around them is shown, replaced by
    their codes.

    These are control characters, text direction marks, zero-width characters and lone surrogates; white space and
    joiners are kept.

    >>> visible("a\\x1b[1m\\u202eb")
    'a[U+001B][1m[U+202E]b'
    """
    return _NOT_PLAIN.sub(lambda match: _written_out(match[0]), untrusted)


def _written_out(character: str) -> str:
    shows = character in _JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    return character if shows else f"[U+{ord(character):04X}]"


def clipped(untrusted: str, limit: int) -> str:
    """The first ``limit`` characters of a text, with the total number if it is longer."""
    return untrusted if len(untrusted) <= limit else f"{untrusted[:limit]} … [{len(untrusted):,} characters]"
