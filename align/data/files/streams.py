"""Reading text files as numbered lines of UTF-8, decompressed. At most one line is in memory.

Compression is recognised by the suffix. An encoding that the file proves (by a byte order mark, or the zeros of JSON in
UTF-16) is used and reported. Any other encoding than UTF-8 has to be set in the recipe, or is recognised by
:mod:`align.data.files.text_layout` for files of spreadsheets.
"""

from __future__ import annotations

import bz2
import codecs
import errno
import gzip
import io
import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from align.data.rows import Reading
from align.data.strict_json import Fault, clip
from align.errors import InputError, Problem
from align.files import machine_faults

LINE_LIMIT = 16 * 2**20
"""Largest number of bytes in a line. Longer lines are reported and not read into memory."""
HEAD = 2**16
"""Number of bytes at the beginning of a file by which its layout is recognised."""

UTF8 = "utf-8"
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


def _zstd(path: Path) -> BinaryIO:
    import pyarrow

    return cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")))


def _zip(path: Path) -> BinaryIO:
    """The one file in an archive. Raises :class:`InputError` when there are several, or Python does not support its
    compression."""
    try:
        archive = zipfile.ZipFile(path)
        names = [
            entry.filename
            for entry in archive.infolist()
            if not entry.is_dir() and not entry.filename.startswith("__MACOSX/")
        ]
        if len(names) != 1:
            raise InputError(
                Problem(
                    f"holds {len(names)} files; an archive of one file can be read", file=str(path), hint="unpack it"
                )
            )
        return cast(BinaryIO, io.BufferedReader(archive.open(names[0])))
    except RuntimeError as error:  # a password, or an unsupported compression
        raise InputError(Problem(clip(str(error), 80), file=str(path), hint="unpack it")) from error
    # A damaged directory, with impossible sizes, positions or names
    except (ValueError, struct.error) as error:
        raise zipfile.BadZipFile(str(error)) from error


COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstd,
    ".zip": _zip,
}
"""Suffix of compressed files -> function that opens them for reading bytes."""


def kind_of(path: Path) -> str:
    """The suffix of a file's format, in lower case and without that of its compression: ``.jsonl`` for
    ``rows.JSONL.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSED), "")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed.

    Raises, also while it is read: :class:`InputError` when it is not compressed as its name says, or is cut short;
    :class:`EnvironmentFault` when the disk fails.
    """
    opener = COMPRESSED.get(path.suffix.lower())
    with machine_faults(path):
        if opener is None:
            with path.open("rb") as file:
                yield file
            return
        try:
            with ExitStack() as stack:
                yield stack.enter_context(opener(path))
        except _BROKEN as error:
            # EINVAL: a damaged archive names a place before 0
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            what = (
                f"not readable as {path.suffix.lower()}:"
                f" {clip(str(error).splitlines()[0] if str(error) else type(error).__name__, 80)}"
            )
            raise InputError(Problem(what, file=str(path), hint="is it whole?")) from error


@contextmanager
def utf8(path: Path, encoding: str, *, mac: bool = False) -> Iterator[BinaryIO]:
    r"""The bytes of a text file, in UTF-8 and without a mark at the start.

    Args:
        path: the file, compressed or not.
        encoding: the file's encoding. UTF-8 is not decoded here, so that a faulty byte can be reported with its line.
        mac: the lines end in ``\r``, which is replaced by ``\n``.
    """
    with opened(path) as file:
        if encoding == UTF8 and not mac:
            yield file
        else:
            yield cast(BinaryIO, io.BufferedReader(_Recoded(file, path, encoding, mac=mac), 2**18))


class _Recoded(io.RawIOBase):
    """Converts another encoding to UTF-8, block by block."""

    def __init__(self, file: BinaryIO, path: Path, encoding: str, *, mac: bool) -> None:
        self._file = file
        self._path = path
        self._encoding = encoding
        self._mac = mac
        self._decoder = codecs.getincrementaldecoder(encoding)("strict") if encoding != UTF8 else None
        self._ready = b""
        self._lines = 1
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            block = self._file.read(2**17)
            self._ended = not block
            self._ready = self._recoded(block)
        part = self._ready[: len(buffer)]
        buffer[: len(part)] = part
        self._ready = self._ready[len(part) :]
        return len(part)

    def _recoded(self, block: bytes) -> bytes:
        if self._decoder is not None:
            try:
                block = self._decoder.decode(block, self._ended).encode(UTF8)
            except UnicodeError as error:  # a decoding error, or a lone surrogate, which UTF-8 cannot encode
                wrong = error.object[error.start : error.start + 1] if isinstance(error, UnicodeDecodeError) else b""
                byte = f" (byte 0x{wrong.hex()})" if wrong else ""
                hint = "set `encoding` to the one that the file has"
                raise InputError(
                    Problem(f"not {self._encoding}{byte}", str(self._path), self._lines, hint=hint)
                ) from error
        if self._mac:
            block = block.replace(b"\r", b"\n")
        self._lines += block.count(b"\n")
        return block


def head_of(path: Path) -> bytes:
    """The first :data:`HEAD` bytes of a file, decompressed."""
    with opened(path) as file:
        return file.read(HEAD)


def proved_encoding(head: bytes, *, is_json: bool = False) -> str | None:
    """The encoding that a file's first bytes prove; None when they prove none."""
    for mark, name in _BOMS:
        if head.startswith(mark):
            return UTF8 if name == "utf-8-sig" else name
    if is_json and head[:4].count(0) in (2, 3) and any(head[i : i + 1] in b"[{" for i in range(4)):
        # A JSON text begins with two ASCII characters, so zeros tell (RFC 4627, section 3)
        return json.detect_encoding(head)
    return None


def looks_utf16(head: bytes) -> str | None:
    """The variant of UTF-16 without a mark that a text with this beginning probably has, because every second byte is
    zero; else None."""
    part = head[:2048]
    for name, zeros, others in (("utf-16-le", part[1::2], part[::2]), ("utf-16-be", part[::2], part[1::2])):
        if len(part) > 3 and zeros.count(0) > len(zeros) // 2 and not others.count(0):
            return name
    return None


def json_encoding(path: Path, reading: Reading) -> str:
    """The encoding of a JSON file: that of the recipe, that which the file proves (which is reported), else UTF-8."""
    if reading.source.encoding:
        return reading.source.encoding
    encoding = proved_encoding(head_of(path), is_json=True) or UTF8
    if encoding != UTF8:
        reading.told.note(f"{path}: read as {encoding}", encoding=encoding)
    return encoding


def is_mac(head: bytes) -> bool:
    r"""Do lines end in ``\r`` alone, as on Macs before 2001? ``head`` is in UTF-8."""
    return b"\r" in head[:-1] and b"\n" not in head


# Lines


def numbered(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    r"""``(number, line)`` split on ``\n`` only; of a line over the limit only the first ``LINE_LIMIT + 1`` bytes,
    without ``\n``."""
    number = 0
    while line := file.readline(LINE_LIMIT + 1):
        number += 1
        if too_long(line):
            while (rest := file.readline(LINE_LIMIT)) and not rest.endswith(b"\n"):
                pass
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def too_long(line: bytes) -> bool:
    """Is ``line`` the beginning of a line over the limit?"""
    return len(line) > LINE_LIMIT and not line.endswith(b"\n")


def line_fault(line: bytes) -> Fault | None:
    """What is wrong with a line of any format: too long, NUL, or not UTF-8."""
    if too_long(line):
        return Fault(f"line is longer than {LINE_LIMIT >> 20} MiB")
    if (nul := line.find(b"\0")) >= 0:
        return Fault(
            f"NUL byte at offset {nul}",
            hint="was the file cut short by a crash? If it is UTF-16, write `encoding: utf-16-le`",
        )
    return None


def not_utf8(data: bytes, error: UnicodeDecodeError) -> Fault:
    """The offset counts bytes from the start of the line, from 0."""
    offset = error.start - (data.rfind(b"\n", 0, error.start) + 1)
    hint = "save the file as UTF-8, or set `encoding` to the one that it has, such as cp1252"
    return Fault(f"not UTF-8 (byte 0x{data[error.start]:02x} at offset {offset})", hint=hint)
