"""What is printed for people: the console, and text of models and data, which must not steer the terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text


def console() -> Console:
    """Standard output; 140 columns wide where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 140)


def plain(text: str) -> Text:
    """Text of a model or of data: no markup, no control characters, none that turn the direction of writing."""
    return Text("".join(c if c.isprintable() or c == "\n" else "?" for c in text))
