"""Recognising the layout of a table in a text file: its encoding, the separator of its columns, and its line ends.

Spreadsheets use the encoding and separator of the user's country without saying which. What the file proves is used.
Otherwise the only layout that fits is used and reported; if several fit, the file is refused with the recipe key to
set.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from align.data.files.streams import HEAD, UTF8, head_of, is_mac, kind_of, looks_utf16, opened, proved_encoding, utf8
from align.data.rows import Reading
from align.errors import InputError, Problem

SEPARATORS = {",": "`,`", ";": "`;`", "\t": "tab", "|": "`|`"}
_USUAL = {".csv": ",", ".tsv": "\t"}
_ROWS = 50
"""Number of rows at the beginning by which the separator is recognised."""

_WESTERN = frozenset("ÀÁÂÄÅÆÇÈÉÊËÍÎÏÑÒÓÔÖØÙÚÛÜßàáâäåæçèéêëìíîïñòóôöøùúûüœŒ‘’“”„‚×–—…€£§°«»¿¡·•®©™´\xa0")
r"""Characters beyond ASCII in Western European texts. Letters are left out whose code is a frequent letter in other
code pages (``ã õ ý þ ð š ž``, superscripts), so that a file in one of those is refused, not misread. Quotation marks
and ``×`` must stand where they belong: in cp850 ``„`` is ``ä`` and ``”`` is ``ö``, in cp1251 ``×`` is a letter."""
_CLOSERS = {"„": "“”", "‚": "‘’"}
"""Opening quotation marks, each with the marks that close it."""
_HIGH = re.compile(rb"[\x80-\xff]+")
_LONGEST = 2
"""Largest number of successive characters beyond ASCII in a Western text. Longer runs are words in Cyrillic, Greek or
Chinese."""


@dataclass(frozen=True)
class Spelling:
    """The layout of a table."""

    encoding: str
    separator: str
    skip: int
    """Number of lines before the header."""
    mac: bool
    r"""Do lines end in ``\r``?"""


def spelling_of(path: Path, reading: Reading) -> Spelling:
    """The layout of the table at ``path``: as the recipe says, or as recognised, which is reported.

    Raises :class:`InputError` when several layouts fit.
    """
    encoding = reading.source.encoding or _encoding(path)
    with utf8(path, encoding) as file:
        head = file.read(HEAD)
    mac = is_mac(head)
    text = head.removeprefix(codecs.BOM_UTF8).decode(UTF8, "replace")
    text = text.replace("\r", "\n") if mac else text
    said = re.match(r'"?sep=(.)"?\r?\n', text)  # Excel's line that names the separator
    usual = _USUAL.get(kind_of(path), "")
    separator: str
    if reading.source.separator:
        separator = reading.source.separator
    elif said:
        separator = said[1]
    elif usual == "\t":
        separator = usual
    else:
        separator = _separator(path, text, len(head) < HEAD)
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
        raise InputError(
            Problem("looks like UTF-16 without its mark", file=str(path), hint=f"write `encoding: {wide}`")
        )
    return _narrow_encoding(path)


def _narrow_encoding(path: Path) -> str:
    """UTF-8, or a code page with one byte for each character. The whole file is read, since the first letter beyond
    ASCII may come late."""
    found = _Beyond()
    line = 1
    for block in _pieces(path):
        if not block.isascii():
            for match in _HIGH.finditer(block):
                found.add(block, match, line)
        line += block.count(b"\n")
    if not found.wrong or found.utf8:
        return UTF8  # with both kinds it is damaged UTF-8, and the rows concerned are bad rows
    foreign = found.foreign or found.unclosed()
    if foreign is None:
        return "cp1252"
    hint = (
        "set `encoding` (on the command line `--encoding`) to the one that it has, such as cp1252 (Western Europe),"
        f" cp1250, cp1251 or gb18030, or save it as UTF-8; what decides is {foreign[0]}"
    )
    raise InputError(Problem("not UTF-8, and which encoding it has cannot be told", str(path), foreign[1], hint=hint))


class _Beyond:
    """Collects what a file has beyond ASCII."""

    def __init__(self) -> None:
        self.utf8 = self.wrong = 0
        """Number of runs of bytes beyond ASCII that are UTF-8, and that are not."""
        self.foreign: tuple[str, int] | None = None
        """A description of the first character that a Western text does not have, and its line."""
        self._codes: set[int] = set()
        self._opened: dict[str, int] = {}

    def add(self, block: bytes, match: re.Match[bytes], first: int) -> None:
        """Count a run of bytes beyond ASCII in a block that begins on line ``first`` of the file."""
        run = match[0]
        try:
            run.decode(UTF8)
            self.utf8 += 1
            return
        except UnicodeDecodeError:
            self.wrong += 1
        self._codes.update(run)
        if self.foreign is not None:
            return
        if len(run) > _LONGEST:
            shown = run.decode("cp1252", "replace")[:8]
            what = f"`{shown}` as cp1252 would read it, {len(run)} characters beyond ASCII side by side"
            self.foreign = what, first + block.count(b"\n", 0, match.start())
            return
        for at in range(match.start(), match.end()):
            character = block[at : at + 1].decode("cp1252", "replace")
            if character not in _WESTERN or _misplaced(character, block, at):
                name = (
                    "which is no character of cp1252" if character == "\ufffd" else f"which is `{character}` in cp1252"
                )
                here = " and does not fit where it stands" if character in _WESTERN else ""
                what = f"byte 0x{block[at]:02x}, {name}{here}, and another character in other encodings"
                self.foreign = what, first + block.count(b"\n", 0, at)
                return
            if character in _CLOSERS and _is_letter(block[at + 1 : at + 2]):
                self._opened.setdefault(character, first + block.count(b"\n", 0, at))

    def unclosed(self) -> tuple[str, int] | None:
        """The first quotation mark that opens before a letter and is never closed, which is a letter in a DOS code
        page; with its line."""
        for character, line in self._opened.items():
            if not self._codes & set(_CLOSERS[character].encode("cp1252")):
                code = character.encode("cp1252")[0]
                return (
                    (
                        f"byte 0x{code:02x}, which is `{character}` in cp1252 and never closed, and another character"
                        " in other encodings"
                    ),
                    line,
                )
        return None


def _misplaced(character: str, block: bytes, at: int) -> bool:
    """Is this a character of Western texts at a place where they do not have it? In DOS code pages the codes of
    quotation marks are letters."""
    before, after = block[max(0, at - 8) : at], block[at + 1 : at + 9]
    if character in _CLOSERS:
        return _is_letter(before[-1:])
    if character in "“”":
        return _is_letter(before[-1:]) and _is_letter(after[:1])
    if character == "×":
        return not (before.rstrip(b" \xa0")[-1:].isdigit() or after.lstrip(b" \xa0")[:1].isdigit())
    return False


def _is_letter(byte: bytes) -> bool:
    return byte.decode("cp1252", "replace").isalpha()


def _pieces(path: Path) -> Iterator[bytes]:
    """The file in blocks, of whole lines if it has line ends; no run of bytes beyond ASCII crosses two blocks."""
    with opened(path) as file:
        rest = b""
        while block := file.read(2**20):
            block = rest + block
            end = block.rfind(b"\n") + 1 or len(block)
            while end and block[end - 1] >= 0x80 and len(block) - end < 2**16:
                end -= 1
            rest = block[end:]
            yield block[:end]
        yield rest


# Separator


def _separator(path: Path, text: str, whole: bool) -> str:
    """The separator that splits the first rows into as many cells as the header."""
    if not whole:
        text = text[: text.rfind("\n") + 1] or text
    tables = {mark: _table(text, mark) for mark in SEPARATORS}
    splitting = [mark for mark, rows in tables.items() if rows and len(rows[0]) > 1]
    if len(splitting) > 1:
        splitting = [
            mark for mark in splitting if all(len(row) == len(tables[mark][0]) for row in tables[mark])
        ] or splitting
    if not splitting:
        if kind_of(path) == ".txt":
            hint = 'give each text a row, for example as JSON lines: {"prompt": "..."}'
            raise InputError(Problem("a text without columns", file=str(path), hint=hint))
        return ","
    if len(splitting) > 1:
        names = " and ".join(SEPARATORS[mark] for mark in splitting)
        lines = " or ".join(
            f"`separator: '{mark}'`".replace("\t", r"\t").replace("'\\t'", '"\\t"') for mark in splitting
        )
        raise InputError(Problem(f"{names} could separate the columns", file=str(path), line=1, hint=f"write {lines}"))
    return splitting[0]


def _table(text: str, separator: str) -> list[list[str]]:
    """The first rows, up to anything that is not CSV."""
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
