"""The errors of this package. Every failure that a user can cause or fix is one of these, and is printed as one line
for each problem.

Exit codes: 2 input or configuration, 3 environment (disk, memory, device, a missing package), 1 internal, 129/130/143
signals.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from align.secrets import hide


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where. Prints as ``file:line:col key: what; hint``, with secrets hidden."""

    message: str
    """What is wrong, in the user's terms. Never echoes more than 80 characters of content."""
    file: str | None = None
    line: int | None = None
    col: int | None = None
    key: str | None = None
    """Dotted recipe key (``stages.sft.data``) or field of a data row."""
    hint: str | None = None
    """What to do about it."""

    def __str__(self) -> str:
        where = ":".join(str(part) for part in (self.file, self.line, self.col) if part is not None)
        subject = " ".join(part for part in (where, self.key) if part)
        text = f"{subject}: {self.message}" if subject else self.message
        return hide(f"{text}; {self.hint}" if self.hint else text)


class AlignError(Exception):
    """Base of all errors this package raises on purpose."""

    exit_code = 1

    def __init__(self, problem: str | Problem | Sequence[Problem], *, hint: str | None = None) -> None:
        if isinstance(problem, str):
            problem = Problem(problem, hint=hint)
        self.problems: tuple[Problem, ...] = (problem,) if isinstance(problem, Problem) else tuple(problem)
        super().__init__("\n".join(str(p) for p in self.problems))


class InputError(AlignError):
    """A recipe, an argument, a data file or a model folder is wrong."""

    exit_code = 2


class EnvironmentFault(AlignError):
    """The machine lacks something: disk, memory, device, permission, an installed package."""

    exit_code = 3


class TrainingFault(AlignError):
    """Training produced something that must not be continued from, such as a non-finite loss."""

    exit_code = 1


class Interrupted(AlignError):
    """Stopped by a signal after saving; ``exit_code`` is 129 (SIGHUP), 130 (SIGINT) or 143 (SIGTERM). After SIGPIPE
    (standard output was closed) it is 3, as for other faults of the machine."""

    def __init__(self, signum: int, message: str) -> None:
        closed = signum == signal.SIGPIPE
        super().__init__(f"standard output was closed: {message}" if closed else message)
        self.exit_code = EnvironmentFault.exit_code if closed else 128 + signum
