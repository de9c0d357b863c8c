"""What is printed for people: the console, and text of models and data, which must not steer the terminal; numbers."""

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
    """Standard output, or standard error where the other is for machines; 140 columns wide where it is no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(width=None if stream.isatty() else 140, stderr=stderr)


@contextmanager
def whoever_reads(gone: Callable[[], None]) -> Iterator[None]:
    """Inside, standard output and standard error are :class:`Lasting`. ``gone`` is called when nobody reads standard
    output any more."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(Any, Lasting(sys.stdout, gone)), cast(Any, Lasting(sys.stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class Lasting:
    """A stream that a closed terminal or a reader that is gone cannot make fail: from then on, what is written to it is
    lost.

    Hours of training must not be lost because nobody looks at their progress any more. What is to be done about a pipe
    that nobody reads (``| head``) is for ``gone``; a terminal that is closed sends a signal.
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
    """Text of a model or of data: no markup, no control characters, none that turn the direction of writing."""
    return Text("".join(c if c.isprintable() or c == "\n" else "?" for c in text))


_NAMES = {"unpaired": "labelled answer", "graded": "graded answer"}


def counted(number: int, kind: str) -> str:
    """A number of records of a kind.

    >>> counted(2, "preference"), counted(1, "unpaired"), counted(26, "unpaired")
    ('2 preferences', '1 labelled answer', '26 labelled answers')
    """
    return f"{number:,} {_NAMES.get(kind, kind)}{'s' * (number != 1)}"


def fixed(value: float, digits: int, *, signed: bool = False) -> str:
    """A number with so many decimals; one that rounds to nothing has no sign.

    >>> fixed(-0.0000001, 6, signed=True), fixed(-1234.5678, 2), fixed(0.25, 1, signed=True)
    ('0.000000', '-1,234.57', '+0.2')
    """
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    return text if any(c in "123456789" or c.isalpha() for c in text) else text.lstrip("+-")


def byte_size(number_of_bytes: float) -> str:
    """Bytes for people.

    >>> byte_size(3_400_000_000), byte_size(541_000_000), byte_size(812)
    ('3.4 GB', '541.0 MB', '812 B')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number_of_bytes >= factor:
            return f"{number_of_bytes / factor:,.1f} {unit}"
    return f"{number_of_bytes:.0f} B"
