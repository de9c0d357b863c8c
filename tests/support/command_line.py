"""The command line, called in the test's own process."""

from __future__ import annotations

from collections.abc import Callable

Call = Callable[..., tuple[int, str, str]]
"""Words of a command line -> exit code, standard output, standard error."""
