"""``align data inspect``: printing rows as a model will see them, with trained tokens in green, and what would be left
out and why."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from align.data.chat.encoder import Encoder
from align.data.formats.column_names import yaml_line
from align.data.formats.formats import Want
from align.data.records import Conversation, Graded, Messages, Preference, Record, Unpaired
from align.data.report import DataReport
from align.data.sources.as_source import as_source, with_mappings
from align.data.sources.contents import wanted_of
from align.data.sources.mixture import Records, read_records
from align.data.tree import Ids, Mask, Tree
from align.data.trees.build import Limits, Unusable, tree_of
from align.errors import InputError
from align.recipe.schema import DataSource
from align.terminal import counted

# Data must not control the terminal in which they are printed.
_VISIBLE = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)] if code not in (9, 10)}


def inspect(
    source: DataSource,
    location: Path | str,
    *,
    model: Encoder | None,
    want: Want | None,
    limit: int,
    console: Console,
    max_length: int = 2048,
) -> DataReport:
    """Print the first ``limit`` records of a source, the report about all of them, and the keys of a recipe that read
    it in the same way.

    With ``model`` they are printed as its tokens: control tokens bold, trained ones green, all others dim; on a console
    without colours the trained ones are between ``⟦ ⟧``. Records longer than ``max_length`` tokens count as dropped.
    Without ``model``, messages are printed as text. ``want`` None: the type of record is recognised.

    Raises :class:`InputError` when there is nothing to read, and, after printing everything, for bad rows: the first
    ten, and their number. If the source skips bad rows, they are listed in the same way, but are not an error.
    """
    want = want or wanted_of(source, location)
    records = read_records([source.model_copy(update={"on_bad_row": "skip"})], [location], want, seed=0, rejects=None)
    report = DataReport(want)
    for record in records:
        if model is None:
            report.trees += 1
            shown = _spoken(record)
        else:
            shown = _encoded(
                record, model, Limits(max_length, "drop", "all"), report, marks=console.color_system is None
            )
        if limit > 0:
            limit -= 1
            console.print(Text(f"{record.origin}  {record.id}", style="bold cyan"), soft_wrap=True)
            console.print(shown, soft_wrap=True)
            console.print()
    _print_account(source, report, records, model, console)
    (read,) = records.report.sources
    for line in read.skipped(source):
        console.print(Text(_visible(line)), soft_wrap=True)
    return report


def _encoded(record: Record, model: Encoder, limits: Limits, report: DataReport, *, marks: bool) -> Text:
    try:
        tree = tree_of(record, model, limits, partial(report.note, origin=record.origin))
    except (Unusable, InputError) as error:
        reason = error.problems[0].message if isinstance(error, InputError) else str(error)
        report.drop(reason, record.origin)
        return Text(f"dropped: {reason}", style="red")
    report.add(tree)
    return _drawn(tree, model, marks=marks)


def _drawn(tree: Tree, model: Encoder, *, marks: bool) -> Text:
    trained = sum(int(branch.mask.sum()) for branch in tree.branches)
    text = Text(f"{tree.size} tokens, {trained} trained\n", style="bold")
    nothing = np.zeros(len(tree.trunk), dtype=np.bool_)
    text.append_text(_runs(tree.trunk, nothing, model, marks=marks))
    for number, branch in enumerate(tree.branches):
        if len(tree.branches) > 1:
            name = "chosen" if number == 0 else f"rejected {number}"
            text.append(f"\n-- {name}, {len(branch.ids)} tokens --\n", style="bold cyan")
        text.append_text(_runs(branch.ids, branch.mask, model, marks=marks))
    return text


def _runs(ids: Ids, mask: Mask, model: Encoder, *, marks: bool) -> Text:
    text = Text(style="not bold")
    for trained, run in groupby(zip(ids.tolist(), mask.tolist(), strict=True), key=lambda token: token[1]):
        if trained and marks:
            text.append("⟦")
        for control, part in groupby((token for token, _ in run), key=model.is_control):
            style = "bold " * control + ("green" if trained else "dim")
            text.append(_visible(model.spell(list(part))), style=style)
        if trained and marks:
            text.append("⟧")
    return text


def _spoken(record: Record) -> Text:
    text = Text()
    for name, messages in _parts(record):
        if name:
            text.append(f"-- {name} --\n", style="bold cyan")
        for message in messages:
            text.append(f"{message['role']}: ", style="bold")
            if message.get("reasoning"):
                text.append(_visible(f"(reasoning: {message['reasoning']}) "), style="dim")
            text.append(_visible(message.get("content", "")) + "\n")
            for call in message.get("tool_calls", []):
                text.append(_visible(f"  call {call.get('function', call)}") + "\n")
    return text


def _parts(record: Record) -> Iterator[tuple[str, Messages]]:
    if isinstance(record, Conversation):
        yield "", record.messages
        return
    yield "", record.prompt
    if isinstance(record, Graded):
        yield ", ".join(f"{name} {grade:g}" for name, grade in record.grades.items()), record.completion
    if isinstance(record, Unpaired):
        yield "good" if record.label else "bad", record.completion
    if isinstance(record, Preference):
        yield "chosen", record.chosen
        for number, answer in enumerate(record.rejected, 1):
            yield f"rejected {number}", answer


def _visible(text: str) -> str:
    return text.translate(_VISIBLE)


def _print_account(
    source: DataSource, report: DataReport, records: Records, model: Encoder | None, console: Console
) -> None:
    report.source_lines, report.sources = records.report.lines(), records.report.as_json()
    lines = report.lines() if model else [*report.source_lines, counted(report.trees, report.want)]
    keys = as_source(source, records.report.sources[0])
    lines.append(f"as a source: {yaml_line(keys)}")
    lines += [f"the same, to be changed: {yaml_line(written_out)}" for written_out in with_mappings(keys, report.want)]
    for line in lines:
        console.print(Text(_visible(line)), soft_wrap=True)
