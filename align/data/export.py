"""Preferences for other tools: one row for each pair of a chosen and a rejected answer, in TRL's conversational format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align import files
from align.data.mixture import read_records
from align.data.records import Message, Messages, Preference
from align.errors import InputError, Problem
from align.recipe.schema import DataSource

_OURS = ("train", "finished", "sampled")
"""Keys of a message that only this package knows."""


def export_pairs(location: Path | str, out: Path, source: DataSource | None = None) -> int:
    """Write the preferences of ``location`` (a file, a folder or a hub id) to the JSONL file ``out``; returns how many pairs there are.
    ``source`` says how they are to be read.

    A row has ``id``, ``prompt``, ``chosen`` and ``rejected``, the last three as lists of messages. A preference with several rejected
    answers becomes as many rows, whose ids end in ``#1``, ``#2``, ... . That a sample was cut (``finished: false``) is not written: other
    tools train an end token onto it.

    Raises:
        InputError: ``out`` exists or is no ``.jsonl`` file, a row is bad, or has tools, which the format does not carry.
        EnvironmentFault: the disk is full or cannot be written.
    """
    if out.suffix != ".jsonl":
        raise InputError(f"{out} must end in .jsonl")
    if out.exists():
        raise InputError(f"{out} exists", hint="remove it, or write to another file")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent}")
    source = source or DataSource(path=str(location))
    count = 0
    with files.atomic_lines(out) as write:
        for record in read_records([source], [location], "preference", seed=0, rejects=None):
            assert isinstance(record, Preference)
            for pair in _pairs(record):
                write(pair)
                count += 1
    return count


def _pairs(record: Preference) -> Iterator[dict[str, Any]]:
    if record.tools:
        hint = "leave such rows out: an exported row has no place for tools"
        raise InputError(Problem("has tools", record.origin.source, record.origin.line, hint=hint))
    for number, rejected in enumerate(record.rejected, 1):
        id = record.id if len(record.rejected) == 1 else f"{record.id}#{number}"
        yield {"id": id, "prompt": _plain(record.prompt), "chosen": _plain(record.chosen), "rejected": _plain(rejected)}


def _plain(messages: Messages) -> list[Message]:
    plain: Any = [{key: value for key, value in message.items() if key not in _OURS} for message in messages]
    return list(plain)
