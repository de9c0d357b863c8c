"""A run as one HTML file. It loads nothing from the network, contains no markup from data, and has the same bytes for
the same run."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from align import files
from align.report.answers import answers
from align.report.data_account import Audit, audit
from align.report.estimates import Change
from align.report.html.charts import BarChart, LineChart
from align.report.html.curves import bars, curves, optimiser_curves
from align.report.html.graph import graph
from align.report.measures import changes, facts
from align.report.views.view import of_the_first_measure
from align.report.warnings import Note, notes
from align.runs.record import RunRecord, StageRecord
from align.runs.values import at, clipped, duration, mapping, number, text, texts, visible
from align.terminal import byte_size

FILE = "report.html"
"""Name of the page in a run folder."""

_HERE = Path(__file__).parent
_RECIPE = 200_000
"""Number of characters of the recipe that are shown."""


@dataclass(frozen=True)
class StageSection:
    """The page's section about one stage."""

    record: StageRecord
    changes: list[Change]
    facts: list[tuple[str, str]]
    audit: Audit | None
    curves: list[LineChart]
    optimiser: list[LineChart]
    bars: list[BarChart]
    origin: list[tuple[str, str]]

    @property
    def headline(self) -> list[Change]:
        """The stage's headline numbers."""
        return of_the_first_measure(self.changes)


def write_report(run: RunRecord, path: Path | None = None) -> Path:
    """Write the page, by default into the run folder. Raises :class:`~align.errors.EnvironmentFault`."""
    path = path or run.folder / FILE
    files.atomic_write(path, render(run))
    return path


def render(run: RunRecord) -> str:
    """The page as text. Damaged or missing parts of the run are left out."""
    css, js = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    parts = [_part(stage) for stage in run.stages]
    return _environment().get_template("page.html.jinja").render(
        run=run,
        policy=(
            f"default-src 'none'; style-src '{_hash(css)}'; script-src '{_hash(js)}'; base-uri 'none'; "
            "form-action 'none'"
        ),
        css=Markup(css),
        js=Markup(js),
        summary=summary(run),
        graph=graph(run),
        parts=parts,
        notes=all_notes(run),
        answers=answers(run.stages),
        command=shlex.join(texts(run.about, "command")),
        recipe=clipped(run.recipe, _RECIPE),
        packages=[(name, str(version)) for name, version in sorted(mapping(run.about, "packages").items())],
    )  # fmt: skip


def all_notes(run: RunRecord) -> list[Note]:
    """The warnings of all stages, in the order of the stages."""
    return [note for stage in run.stages for note in notes(stage)]


def summary(run: RunRecord) -> list[tuple[str, str]]:
    """Time and memory of the whole run, as (word, value)."""
    seconds = [stage.seconds for stage in run.stages if stage.seconds is not None]
    memory = [value for stage in run.stages if (value := number(stage.report, "peak_memory_bytes")) is not None]
    bytes_ = sum(stage.manifest.bytes for stage in run.stages if stage.manifest is not None)
    model = at(run.tree, "model")
    facts = [
        ("state", run.state),
        ("model", model if isinstance(model, str) else text(model, "path") or "-"),
        ("time of all stages", duration(sum(seconds)) if seconds else "-"),
        ("peak memory", byte_size(max(memory)) if memory else "-"),
        ("results", byte_size(bytes_)),
        ("last started", text(run.about, "started") or "-"),
    ]
    return [(word, value) for word, value in facts if value != "-"]


def _part(stage: StageRecord) -> StageSection:
    return StageSection(
        stage,
        changes(stage),
        facts(stage),
        audit(stage),
        curves(stage),
        optimiser_curves(stage),
        bars(stage),
        _origin(stage),
    )


def _origin(stage: StageRecord) -> list[tuple[str, str]]:
    """Digests of a result and of what it was made from."""
    manifest = stage.manifest
    if manifest is None:
        return []
    digests = [
        ("result (sha256)", manifest.digest),
        ("made from (sha256)", manifest.identity.digest),
        ("seed", str(manifest.identity.seed)),
        ("tokenizer and template (sha256)", manifest.encoder or ""),
        *((f"input {name} (sha256)", digest) for name, digest in manifest.identity.inputs.items()),
        *_base(stage.report),
        ("written", manifest.created),
    ]
    return [(word, str(value)) for word, value in digests if value]


def _base(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    base = mapping(report, "base")
    return [
        ("base model", text(base, "path")),
        ("base model (sha256)", text(base, "digest")),
        ("revision", text(base, "revision")),
    ]


def _environment() -> Environment:
    """Jinja's environment. All output is escaped, and invisible characters are written as codes."""
    made = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"duration": duration, "size": byte_size}
    return made


def _hash(inline: str) -> str:
    """Hash of an inline style or script, as a content security policy contains it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}"
