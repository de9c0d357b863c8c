"""How a table in a text file is written, found out from the file: its encoding, what separates its columns, what ends its lines.

Spreadsheets write tables in the encoding and with the separator of their country and say neither. What the file proves is followed; a
guess is only made where one reading fits, and is always told; else the file is refused with the key to write.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from align.data.rows import Reading
from align.data.streams import HEAD, UTF8, head_of, is_mac, kind_of, looks_utf16, opened, proved_encoding, utf8
from align.errors import InputError, Problem

SEPARATORS = {",": "`,`", ";": "`;`", "\t": "tab", "|": "`|`"}
_USUAL = {".csv": ",", ".tsv": "\t"}
_ROWS = 50
"""Rows at the beginning that are looked at."""

_WESTERN = frozenset("ÀÁÂÄÅÆÇÈÉÊËÍÎÏÑÒÓÔÖØÙÚÛÜßàáâäåæçèéêëìíîïñòóôöøùúûüœŒ‘’“”–—…€£§°«»¿¡·•®©™´\xa0")
r"""What Western European texts have beyond ASCII. Letters are left out that stand where other code pages have a frequent one of theirs
(``ã õ ý þ ð š ž``, superscripts), so that a file in one of those is refused, not misread."""
_HIGH = re.compile(rb"[\x80-\xff]+")
_LONGEST = 2
"""Characters beyond ASCII that may stand side by side in a Western text. Whole words of them are Cyrillic, Greek or Chinese."""


@dataclass(frozen=True)
class Spelling:
    """How a table is written."""

    encoding: str
    separator: str
    skip: int
    """Lines before the header."""
    mac: bool
    r"""Lines end in ``\r``."""


def spelling_of(path: Path, reading: Reading) -> Spelling:
    """How the table at ``path`` is written: as the recipe says, else as found out, which is told.

    Raises :class:`InputError` when it cannot be told which of several readings is meant.
    """
    encoding = reading.source.encoding or _encoding(path)
    with utf8(path, encoding) as file:
        head = file.read(HEAD)
    mac = is_mac(head)
    text = head.removeprefix(codecs.BOM_UTF8).decode(UTF8, "replace")
    text = text.replace("\r", "\n") if mac else text
    said = re.match(r'"?sep=(.)"?\r?\n', text)  # Excel's own way to say it
    usual = _USUAL.get(kind_of(path), "")
    separator = reading.source.separator or (said[1] if said else usual if usual == "\t" else _separator(path, text, len(head) < HEAD))
    found: dict[str, str] = {}
    words = []
    if not reading.source.encoding and encoding != UTF8:
        words, found["encoding"] = [f"read as {encoding}"], encoding
    if not reading.source.separator and separator != usual:
        words.append(f"separated by {SEPARATORS.get(separator, f'`{separator}`')}")
        found["separator"] = separator
    if mac:
        words.append("lines end in a carriage return")
    if words:
        reading.told.note(f"{path}: {', '.join(words)}", **found)
    return Spelling(encoding, separator, 1 if said else 0, mac)


# Encoding


def _encoding(path: Path) -> str:
    head = head_of(path)
    if proved := proved_encoding(head):
        return proved
    if wide := looks_utf16(head):
        raise InputError(Problem("looks like UTF-16 without its mark", file=str(path), hint=f"write `encoding: {wide}`"))
    return _narrow_encoding(path)


def _narrow_encoding(path: Path) -> str:
    """UTF-8, or a code page of one byte a character. The whole file is looked at: a first foreign letter may come late."""
    utf8_letters = wrong = longest = 0
    line, first = 1, None
    seen: set[int] = set()
    for block in _pieces(path):
        if not block.isascii():
            for match in _HIGH.finditer(block):
                run = match[0]
                try:
                    run.decode(UTF8)
                    utf8_letters += 1
                except UnicodeDecodeError:
                    wrong += 1
                    seen.update(run)
                    longest = max(longest, len(run))
                    first = first or line + block.count(b"\n", 0, match.start())
        line += block.count(b"\n")
    if not wrong or utf8_letters:
        return UTF8  # with both, it is UTF-8 that was damaged: those rows are bad rows
    if longest <= _LONGEST and {bytes([code]).decode("cp1252", "replace") for code in seen} <= _WESTERN:
        return "cp1252"
    hint = "set `encoding` to the one that it has, such as cp1252 (Western Europe), cp1250, cp1251 or gb18030, or save it as UTF-8"
    raise InputError(Problem("not UTF-8, and which encoding it has cannot be told", str(path), first, hint=hint))


def _pieces(path: Path) -> Iterator[bytes]:
    """The file in blocks that no run of bytes beyond ASCII crosses."""
    with opened(path) as file:
        rest = b""
        while block := file.read(2**20):
            block = rest + block
            end = len(block)
            while end and block[end - 1] >= 0x80 and len(block) - end < 2**16:
                end -= 1
            rest = block[end:]
            yield block[:end]
        yield rest


# Separator


def _separator(path: Path, text: str, whole: bool) -> str:
    """Of the separators that split the header, the one that splits the first rows into as many cells."""
    if not whole:
        text = text[: text.rfind("\n") + 1] or text
    tables = {mark: _table(text, mark) for mark in SEPARATORS}
    splitting = [mark for mark, rows in tables.items() if rows and len(rows[0]) > 1]
    if len(splitting) > 1:
        splitting = [mark for mark in splitting if all(len(row) == len(tables[mark][0]) for row in tables[mark])] or splitting
    if not splitting:
        if kind_of(path) == ".txt":
            hint = 'give each text a row, for example as JSON lines: {"prompt": "..."}'
            raise InputError(Problem("a text without columns", file=str(path), hint=hint))
        return ","
    if len(splitting) > 1:
        names = " and ".join(SEPARATORS[mark] for mark in splitting)
        lines = " or ".join(f"`separator: '{mark}'`".replace("\t", r"\t").replace("'\\t'", '"\\t"') for mark in splitting)
        raise InputError(Problem(f"{names} could separate the columns", file=str(path), line=1, hint=f"write {lines}"))
    return splitting[0]


def _table(text: str, separator: str) -> list[list[str]]:
    """The first rows; what follows something that is no CSV is left out."""
    rows: list[list[str]] = []
    try:
        for row in csv.reader(text.splitlines(keepends=True), delimiter=separator, strict=True):
            if row:
                rows.append(row)
            if len(rows) == _ROWS:
                break
    except csv.Error:
        pass
    return rows
