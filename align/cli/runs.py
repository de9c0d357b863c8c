"""The commands that show runs and publish their models. They import no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align.errors import InputError

if TYPE_CHECKING:
    from align.runs.record import RunRecord

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or its folder.")]


def _read(name: str, runs_dir: Path) -> RunRecord:
    from align.runs.record import find_run, read_run

    return read_run(find_run(name, runs_dir))


def list_runs(
    ctx: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False
) -> None:
    """List the runs: state, stages, time, and what came out."""
    from align.report.text.ls import listed, show
    from align.terminal import console

    runs = list(listed(ctx.obj))
    if as_json:
        for entry in runs:
            print(json.dumps(entry.as_json(), ensure_ascii=False))
    elif runs:
        show(runs, console())
    else:
        print(f"no runs in {ctx.obj}")


def show(
    ctx: typer.Context,
    run: Run,
    stage: Annotated[
        str | None, typer.Argument(metavar="[STAGE]", help="Show this stage: numbers, data, samples.")
    ] = None,
    iteration: Annotated[
        int | None, typer.Option(min=1, help="Samples of this iteration of a stage with rollouts; else the last.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Samples to show.")] = 3,
) -> None:
    """Show what a run is and how it went, or one of its stages."""
    from align.report.text.show import show_run, show_stage
    from align.terminal import console

    record = _read(run, ctx.obj)
    if stage is not None:
        show_stage(record, record.stage(stage), console(), limit=limit, iteration=iteration)
    elif iteration is not None:
        raise InputError("--iteration: name a stage as well")
    else:
        show_run(record, console())


def report(
    ctx: typer.Context,
    run: Run,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write it here, instead of report.html in the run's folder.")
    ] = None,
) -> None:
    """Write a run's report, one HTML file that opens from disk, and print it in short."""
    from align.report.html.page import write_report
    from align.report.text import summary
    from align.terminal import console

    record = _read(run, ctx.obj)
    summary.show(record, write_report(record, out), console())


def diff(
    ctx: typer.Context,
    run: Run,
    other: Annotated[str, typer.Argument(metavar="RUN", help="The run to compare it with.")],
) -> None:
    """Compare two runs: recipes, data, packages, results."""
    from align.report.text.diff import show
    from align.terminal import console

    show(_read(run, ctx.obj), _read(other, ctx.obj), console())


def verify(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN_OR_FOLDER", help="A run, or the folder of one result.")],
) -> None:
    """Hash every file of a run, and compare what its stages were made from with what is there. Exit code 2 when
    something is wrong."""
    from align.pipeline.artifacts import MANIFEST
    from align.runs.verify import verify_artefact, verify_run

    alone = (Path(run) / MANIFEST).is_file()
    results = [verify_artefact(run, Path(run))] if alone else verify_run(_read(run, ctx.obj))
    wrong = False
    for checked in results:
        print(checked, flush=True)  # printed at once, since a large model takes long
        wrong = wrong or checked.wrong
    if wrong:
        raise typer.Exit(InputError.exit_code)


def push(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="RUN_OR_FOLDER", help="A run, or the folder of a stage's result.")],
    to: Annotated[str, typer.Option("--to", metavar="ORG/NAME", help="The repository on the Hugging Face Hub.")],
    stage: Annotated[str | None, typer.Option(help="Of the run; the last one that left a model when absent.")] = None,
    private: Annotated[bool, typer.Option("--private/--public", help="Who may see it.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card and the files; send nothing.")] = False,
) -> None:
    """Upload a policy or reward model to the Hugging Face Hub, with a card made from the run."""
    from align.publish.push import prepare
    from align.publish.push import push as send

    upload = prepare(source, ctx.obj, to=to, stage=stage)
    if dry_run:
        print(upload.card)
        for line in upload.listing():
            print(line)
        return
    print(f"{to}: pushed {upload.subject.folder} ({len(upload.files) + 1} files): {send(upload, to, private=private)}")


def add_to(app: typer.Typer) -> None:
    """Make them commands of ``app``."""
    app.command("ls")(list_runs)
    app.command()(show)
    app.command()(report)
    app.command()(diff)
    app.command()(verify)
    app.command()(push)
