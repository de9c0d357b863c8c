"""What is printed for people: the console, and text of models and data, which must not steer the terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text


def console(*, stderr: bool = False) -> Console:
    """Standard output, or standard error where the other is for machines; 140 columns wide where it is no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(width=None if stream.isatty() else 140, stderr=stderr)


def plain(text: str) -> Text:
    """Text of a model or of data: no markup, no control characters, none that turn the direction of writing."""
    return Text("".join(c if c.isprintable() or c == "\n" else "?" for c in text))
