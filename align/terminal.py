"""Printing for the user: the console, text of models and data that must not control the terminal, and numbers."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from rich.console import Console
from rich.text import Text


def console(*, stderr: bool = False) -> Console:
    """Standard output, or standard error if the former is for programs; 140 columns wide if it is not a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(width=None if stream.isatty() else 140, stderr=stderr)


@contextmanager
def whoever_reads(gone: Callable[[], None]) -> Iterator[None]:
    """Inside, standard output and standard error are :class:`Lasting`. ``gone`` is called when standard output has no
    reader any more."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(Any, Lasting(sys.stdout, gone)), cast(Any, Lasting(sys.stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class Lasting:
    """A stream that does not fail when the terminal is closed or the reader is gone: output is then dropped.

    Hours of training must not be lost because nobody reads the progress any more. ``gone`` decides what to do about a
    closed pipe (``| head``); a closed terminal sends a signal.
    """

    def __init__(self, stream: IO[str], gone: Callable[[], None] = lambda: None) -> None:
        self._stream, self._gone = stream, gone

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of any stream."""
        with self._silently():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As of any stream."""
        with self._silently():
            self._stream.flush()

    @contextmanager
    def _silently(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            nothing = os.open(os.devnull, os.O_WRONLY)
            # For what is buffered, and for all that writes to it without this class
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
            if error.errno == errno.EPIPE:
                self._gone()


def plain(text: str) -> Text:
    """Text of a model or of data, to print without markup, control characters and changes of the text's direction."""
    return Text("".join(c if c.isprintable() or c == "\n" else "?" for c in text))


_NAMES = {"unpaired": "labelled answer", "graded": "graded answer"}


def counted(number: int, kind: str) -> str:
    """A number of records of a kind.

    >>> counted(2, "preference"), counted(1, "unpaired"), counted(26, "unpaired")
    ('2 preferences', '1 labelled answer', '26 labelled answers')
    """
    return f"{number:,} {_NAMES.get(kind, kind)}{'s' * (number != 1)}"


def fixed(value: float, digits: int, *, signed: bool = False) -> str:
    """A number with ``digits`` decimals; one that rounds to zero has no sign.

    >>> fixed(-0.0000001, 6, signed=True), fixed(-1234.5678, 2), fixed(0.25, 1, signed=True)
    ('0.000000', '-1,234.57', '+0.2')
    """
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    return text if any(c in "123456789" or c.isalpha() for c in text) else text.lstrip("+-")


def byte_size(number_of_bytes: float) -> str:
    """A number of bytes as text.

    >>> byte_size(3_400_000_000), byte_size(541_000_000), byte_size(812)
    ('3.4 GB', '541.0 MB', '812 B')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number_of_bytes >= factor:
            return f"{number_of_bytes / factor:,.1f} {unit}"
    return f"{number_of_bytes:.0f} B"
