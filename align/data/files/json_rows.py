"""Reading rows of JSON files: one object on each line, which is read fast and continues after a faulty line, and other
layouts.

Those are an array of objects, objects one after another (pretty-printed, or with nothing between them), and one object
that contains the rows (``rows: data``). In these a syntax error ends the reading, since it is not known where the next
row begins.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from align.data.files.list_rows import reads_lists
from align.data.files.streams import (
    LINE_LIMIT,
    UTF8,
    head_of,
    is_mac,
    json_encoding,
    line_fault,
    not_utf8,
    numbered,
    too_long,
    utf8,
)
from align.data.records import Origin
from align.data.rows import BadRow, Reading, Row
from align.data.strict_json import Fault, RowDecoder, skip_space
from align.errors import InputError, Problem

JSON_LIMIT = 2**30
"""Largest size in bytes of a file that is one JSON value."""


# One object a line


def read_lines(path: Path, reading: Reading) -> Iterator[Row]:
    """The rows of a file with an object on each line that is not blank; if the first line shows another layout, the
    file is read by that."""
    encoding = json_encoding(path, reading)
    mac = encoding == UTF8 and is_mac(head_of(path))
    with utf8(path, encoding, mac=mac) as file:
        first = next((line for _, line in numbered(file) if line.strip()), b"")
        other = (
            None
            if first.lstrip()[:1] == b"[" and first.rstrip()[-1:] == b"]" and reads_lists(reading.source)
            else _other_way(first, file)
        )
    if other:
        reading.told.note(f"{path}: read as {other}, not one object a line")
    elif mac:
        reading.told.note(f"{path}: lines end in a carriage return")
    if other == ARRAY:
        yield from _Text(path, reading, encoding).array_rows()
        return
    with utf8(path, encoding, mac=mac) as file:
        yield from _one_after_another(file, path, reading) if other else _plain_lines(numbered(file), path, reading)


ARRAY = "an array of objects"
SEQUENCE = "objects one after another"


def _other_way(line: bytes, file: BinaryIO) -> str | None:
    """The layout of a file, judged by its first line with text and what follows; None for one object on each line."""
    if too_long(line):
        return None
    try:
        text = line.decode("utf-8").strip()
        value, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError:
        return _pretty(text, file) if text[:1] in ("{", "[") else None
    except (ValueError, RecursionError):
        return None
    rest = text[end:].lstrip()
    if isinstance(value, dict) and rest.startswith("{"):
        return SEQUENCE
    if isinstance(value, list) and not rest and value and all(isinstance(item, dict) for item in value):
        return None if file.read(2**10).strip() else ARRAY
    return None


def _pretty(text: str, file: BinaryIO) -> str | None:
    """The layout of a file whose first line is only the beginning of a value: the value may end in a later line, or the
    line was cut off."""
    whole = text + "\n" + file.read(LINE_LIMIT).decode("utf-8", "ignore")
    inside = skip_space(whole, 1) if text[0] == "[" else 0
    try:
        value, end = json.JSONDecoder().raw_decode(whole, inside)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    if text[0] == "{":
        return SEQUENCE
    return ARRAY if whole.startswith((",", "]"), skip_space(whole, end)) else None


def _plain_lines(lines: Iterator[tuple[int, bytes]], path: Path, reading: Reading) -> Iterator[Row]:
    decoder, source = RowDecoder(lists=reads_lists(reading.source)), str(path)
    for number, line in lines:
        if not line.strip():
            continue
        parsed = line_fault(line) or _parse_line(decoder, line)
        if isinstance(parsed, Fault):
            content = line[:800].decode("utf-8", "backslashreplace").strip()
            reading.bad(BadRow(parsed.what, source, number, key=parsed.field, hint=parsed.hint, content=content))
        else:
            yield Row(parsed, Origin(source, number))


def _parse_line(decoder: RowDecoder, line: bytes) -> dict[str, Any] | Fault:
    """The object on a line, or what is wrong with it; columns in messages count from 1."""
    try:
        text = line.decode("utf-8").rstrip(" \t\r\n")
        value, end, fault = decoder.decode(text, skip_space(text, 0))
    except UnicodeDecodeError as error:
        return not_utf8(line, error)
    except json.JSONDecodeError as error:
        return Fault(f"invalid JSON (col {error.colno})", hint=error.msg)
    except ValueError as error:
        return Fault(f"invalid JSON: {error}")
    if (end := skip_space(text, end)) != len(text):
        return Fault(f"invalid JSON (col {end + 1})", hint="one object a line, and nothing after it")
    return fault or value


# Objects one after another


def _one_after_another(file: BinaryIO, path: Path, reading: Reading) -> Iterator[Row]:
    """Rows of objects with white space or nothing between them. At most a block and an object are in memory."""
    decoder = RowDecoder(lists=reads_lists(reading.source))
    incremental = codecs.getincrementaldecoder("utf-8")()
    text = ""
    at = 0
    line = 1
    ended = False
    want = 2**16

    def broken(where: int, what: str, hint: str | None = None) -> InputError:
        return _broken(path, text, where, what, hint, line - text.count("\n", 0, at))

    while True:
        at, before = skip_space(text, at), at
        line += text.count("\n", before, at)
        try:
            if at < len(text):
                value, end, fault = decoder.decode(text, at)
                yield from _checked(value, fault, text[at : min(end, at + 800)], line, path, reading)
                line += text.count("\n", at, end)
                at = end
                continue
        except json.JSONDecodeError as error:
            if ended or (error.pos < len(text) - 16 and not error.msg.startswith("Unterminated")):
                raise broken(error.pos, "invalid JSON (col {col})", error.msg) from error
        except ValueError as error:
            raise broken(at, f"invalid JSON: {error}") from error
        if ended:
            return
        want = min(max(2**16, 2 * len(text)), LINE_LIMIT)
        text = text[at:]
        at = 0
        if len(text) > LINE_LIMIT:
            raise broken(0, f"a row is longer than {LINE_LIMIT >> 20} MiB")
        block = file.read(want)
        ended = not block
        try:
            text += incremental.decode(block, ended)
        except UnicodeDecodeError as error:
            raise InputError(
                Problem(f"not UTF-8 (byte 0x{error.object[error.start]:02x})", str(path), hint="set `encoding`")
            ) from error
        if not line - 1 and text.startswith("\ufeff"):
            text = text[1:]


def _checked(value: Any, fault: Fault | None, content: str, line: int, path: Path, reading: Reading) -> Iterator[Row]:
    if fault:
        reading.bad(BadRow(fault.what, str(path), line, key=fault.field, hint=fault.hint, content=content))
    else:
        yield Row(value, Origin(str(path), line))


def _broken(path: Path, text: str, at: int, what: str, hint: str | None = None, first: int = 1) -> InputError:
    """An error about the character at ``at``; ``{col}`` in ``what`` is replaced by its column."""
    what = what.replace("{col}", str(at - text.rfind("\n", 0, at)))
    return InputError(Problem(what, file=str(path), line=text.count("\n", 0, at) + first, hint=hint))


# One value


def read_value(path: Path, reading: Reading) -> Iterator[Row]:
    """A ``.json`` file, which is read whole: an array of objects, objects one after another, or one object.

    One object is a row unless it could contain rows. In that case ``rows`` must say where they are: ``data``, or ``.``
    for the object itself.
    """
    yield from _Text(path, reading, json_encoding(path, reading)).rows()


class _Text:
    """A file that is one JSON value, or several."""

    def __init__(self, path: Path, reading: Reading, encoding: str) -> None:
        self._path, self._reading = path, reading
        self._text = _whole(path, encoding)
        self._decoder = RowDecoder(lists=reads_lists(reading.source))

    def rows(self) -> Iterator[Row]:
        character, at = self._next(0)
        if not character:
            return
        if character == "[":
            if self._reading.source.rows:
                raise self._broken(at, "is an array already: `rows` has nothing to say here")
            yield from self.array_rows()
        elif character == "{":
            value, end, _ = self._decoded(at)
            more, _ = self._next(end)
            if more and not self._reading.source.rows:
                self._reading.told.note(f"{self._path}: read as {SEQUENCE}")
                yield from self._sequence(at)
            elif more:
                raise self._broken(end, "holds several values: `rows` has no one object to look into")
            else:
                yield from self._inside(value, at)
        else:
            raise self._broken(at, "expected an array of objects, or an object")

    def array_rows(self) -> Iterator[Row]:
        """The elements of an array. A syntax error ends the reading, since the beginning of the next element is
        unknown."""
        _, at = self._next(0)
        end = yield from self._array(at)
        character, at = self._next(end)
        if character:
            raise self._broken(at, "invalid JSON (col {col})", "there is more after the closing bracket")

    def _sequence(self, at: int) -> Iterator[Row]:
        line, counted = 1, 0
        while at < len(self._text):
            line, counted = line + self._text.count("\n", counted, at), at
            value, end, fault = self._decoded(at)
            yield from _checked(value, fault, self._text[at : min(end, at + 800)], line, self._path, self._reading)
            at = skip_space(self._text, end)

    def _array(self, at: int) -> Generator[Row, None, int]:
        """The elements of the array that begins at ``at``; returns its end."""
        line, counted = 1, 0
        character, at = self._next(at + 1)
        while character != "]":
            line, counted = line + self._text.count("\n", counted, at), at
            value, end, fault = self._decoded(at)
            yield from _checked(value, fault, self._text[at : min(end, at + 800)], line, self._path, self._reading)
            character, at = self._next(end)
            comma = character == ","
            if comma:
                character, at = self._next(at + 1)
            if comma == (character == "]"):
                raise self._broken(
                    at, "invalid JSON (col {col})", "expected a comma and an object, or the closing bracket"
                )
        return at + 1

    def _inside(self, value: Any, at: int) -> Iterator[Row]:
        """The rows inside the file's only object."""
        place = self._reading.source.rows
        if place is None:
            if could := _places(value):
                lines = " or ".join(f"`rows: {name}`" for name in could[:_NAMED])
                more = f" (or one of {len(could) - _NAMED:,} more places)" if len(could) > _NAMED else ""
                hint = f"write {lines}{more} if its rows stand there, or `rows: .` if the object is the row"
                raise self._broken(at, "is one object", hint)
            place = "."
        if place == ".":
            yield from self._sequence(at)
            return
        at = self._position(place, at)
        if self._text[at] == "[":
            yield from self._array(at)
        elif self._text[at] == "{":
            yield from self._by_id(at)
        else:
            raise self._broken(at, f"`rows: {place}`: expected a list of rows, or an object of rows")

    def _by_id(self, at: int) -> Iterator[Row]:
        """The values of the object at ``at``; the key becomes the row's ``id`` if it has none."""
        for key, start in self._members(at):
            value, end, fault = self._decoded(start)
            line = self._text.count("\n", 0, start) + 1
            if not fault:
                value = value if "id" in value else {"id": key, **value}
            yield from _checked(
                value, fault, self._text[start : min(end, start + 800)], line, self._path, self._reading
            )

    def _position(self, place: str, at: int) -> int:
        """The position at which the value of ``place``, such as ``a.b``, begins in the object at ``at``."""
        done: list[str] = []
        for name in place.split("."):
            if self._text[at] != "{":
                raise self._broken(at, f"`rows: {place}`: {'.'.join(done)} is no object")
            found = {key: start for key, start in self._members(at)}
            if name not in found:
                raise self._broken(
                    at, f"`rows: {place}`: there is no {name}", f"there are {', '.join(list(found)[:10])}"
                )
            done.append(name)
            at = found[name]
        return at

    def _members(self, at: int) -> Iterator[tuple[str, int]]:
        """Each key of the well-formed object at ``at``, with the position of its value."""
        character, at = self._next(at + 1)
        while character != "}":
            key, at = json.decoder.scanstring(self._text, at + 1)  # type: ignore[attr-defined]
            _, at = self._next(at)  # the colon
            _, at = self._next(at + 1)
            yield key, at
            _, end, _ = self._decoded(at)
            character, at = self._next(end)
            if character == ",":
                character, at = self._next(at + 1)

    def _decoded(self, at: int) -> tuple[Any, int, Fault | None]:
        try:
            return self._decoder.decode(self._text, at)
        except json.JSONDecodeError as error:
            raise self._broken(error.pos, "invalid JSON (col {col})", error.msg) from error
        except ValueError as error:
            raise self._broken(at, f"invalid JSON: {error}") from error

    def _next(self, at: int) -> tuple[str, int]:
        at = skip_space(self._text, at)
        return self._text[at : at + 1], at

    def _broken(self, at: int, what: str, hint: str | None = None) -> InputError:
        return _broken(self._path, self._text, at, what, hint)


_NAMED = 8
"""Number of places that a message names."""


def _places(value: Any) -> list[str]:
    """The places in an object, at any depth, that could be its rows: lists of objects, the longest first, then objects
    of objects, the largest first.

    Places inside such rows are not listed; rows are lists of objects, and objects whose values are objects with a
    common key. Names with a dot cannot be part of a place.
    """
    found: list[tuple[bool, int, str]] = []
    todo = [("", value)]
    while todo:
        before, one = todo.pop()
        for key, item in one.items() if isinstance(one, dict) else ():
            place = f"{before}{key}"
            if not key or "." in key:
                continue
            if _holds_rows(item):
                found.append((isinstance(item, dict), -len(item), place))
            if isinstance(item, dict) and not (_holds_rows(item) and set.intersection(*map(set, item.values()))):
                todo.append((f"{place}.", item))
    return [place for _, _, place in sorted(found, key=lambda entry: entry[:2])]


def _holds_rows(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, dict) for item in value)
    return isinstance(value, dict) and len(value) > 1 and all(isinstance(item, dict) for item in value.values())


def _whole(path: Path, encoding: str) -> str:
    with utf8(path, encoding) as file:
        data = file.read(JSON_LIMIT + 1)
    if len(data) > JSON_LIMIT:
        raise InputError(
            Problem(f"larger than {JSON_LIMIT >> 20} MiB", file=str(path), hint="store many rows as .jsonl")
        )
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        fault = not_utf8(data, error)
        raise InputError(
            Problem(fault.what, str(path), data.count(b"\n", 0, error.start) + 1, hint=fault.hint)
        ) from error
