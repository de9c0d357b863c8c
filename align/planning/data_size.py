"""How much data a training stage has: counted exactly if that is quick, otherwise estimated. The plan says which."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import AlignError, InputError
from align.pipeline.folder import RunFolder
from align.planning.planner import DataSize, ToPlan, planner_of
from align.recipe import reference_syntax
from align.recipe.load import LoadedRecipe
from align.recipe.schema import DataSource, Model, Train

if TYPE_CHECKING:
    from align.batching.loader import StepPlan
    from align.stages.shared.training_data import StageData

ROWS = 50
"""Number of rows of a source that are checked before a run."""
LARGEST_JSON = 100_000_000
"""A `.json` file is read whole, so before a run only files up to this many bytes are checked."""
EXACT_BYTES = 8_000_000
"""Data of up to this many bytes are encoded to count their tokens."""
_BYTES_PER_TOKEN = 4


class UnreadableData(InputError):
    """Raised when data of a stage cannot be read, or have bad rows."""


@contextmanager
def data_faults() -> Iterator[None]:
    """Turns an InputError raised inside into :class:`UnreadableData`, to distinguish bad data from other mistakes."""
    try:
        yield
    except InputError as error:
        raise UnreadableData(error.problems) from error


def measure(stage: ToPlan, *, counts: bool, streams: bool) -> DataSize:
    """The data of a stage.

    Args:
        counts: encode the data to count them, if that is quick. Only for stages whose data
            :mod:`align.stages.shared.training_data` reads.
        streams: the stage cuts a tree that is much larger than a micro-batch.

    Raises:
        UnreadableData: bad rows, or a file that cannot be read.
        InputError: the model's tokenizer cannot be read.
    """
    loaded, run, model = stage.loaded, stage.run, stage.origin.local
    sources: Sequence[DataSource] = stage.spec.data
    try:
        locations = [locate(loaded, run, source.path) for source in sources]
    except AlignError as error:  # from a stage that has not run yet
        return _of_a_stage(loaded, sources, run) or DataSize(error.problems[0].message)
    if any(isinstance(location, str) for location in locations):
        return DataSize("a data set on the hub is not downloaded to plan")
    size = sum(_size(Path(location)) for location in locations)
    if counts and model is not None and size <= EXACT_BYTES:
        return _encoded(stage, model, streams=streams)
    why = "larger than what is encoded to count" if size > EXACT_BYTES else "the tokenizer is not on this machine"
    filters = ", `where` and `limit` ignored" if any(source.where or source.limit for source in sources) else ""
    words = f"estimated: {size:,} bytes at {_BYTES_PER_TOKEN} a token{filters} ({why})"
    lines, longest = _lines([Path(location) for location in locations])
    return DataSize(
        words, lines, size // _BYTES_PER_TOKEN, longest=None if longest is None else longest // _BYTES_PER_TOKEN
    )


def conversations(loaded: LoadedRecipe, name: str, run: RunFolder) -> DataSize:
    """The number of conversations (or prompts, for an evaluation) that a stage samples for, and of their tokens, about.
    They are counted if that is quick.

    Raises :class:`UnreadableData` for bad rows.
    """
    from align.data.sources.mixture import read_records

    spec: Any = loaded.recipe.stages[name]
    try:
        locations = [locate(loaded, run, source.path) for source in spec.data]
    except AlignError as error:
        return DataSize(error.problems[0].message)
    if any(isinstance(location, str) for location in locations):
        return DataSize("a data set on the hub is not downloaded to plan")
    size = sum(_size(Path(location)) for location in locations)
    if size > EXACT_BYTES:
        return DataSize(
            "lines of the files", _lines([Path(location) for location in locations])[0], size // _BYTES_PER_TOKEN
        )
    rows = characters = 0
    want = spec.record_types()["data"]
    with data_faults():
        for record in read_records(spec.data, locations, want, seed=loaded.recipe.seed, rejects=None):
            rows += 1
            characters += sum(len(message["content"].encode()) for message in getattr(record, "messages", ()))
    return DataSize(
        "counted; more may be dropped for their length", examples=rows, tokens=characters // _BYTES_PER_TOKEN
    )


def _of_a_stage(loaded: LoadedRecipe, sources: Sequence[DataSource], run: RunFolder) -> DataSize | None:
    """An upper bound for data that stages will make which have not run yet; None when the data are not all from one
    such stage, or it gives no bound."""
    parsed = [reference_syntax.parse(source.path, loaded.root) for source in sources]
    names = [ref.name for ref in parsed if isinstance(ref, reference_syntax.StageRef)]
    if not len(names) == len(parsed) == 1:
        return None
    return planner_of(loaded.recipe.stages[names[0]]).makes(loaded, names[0], run)


def locate(loaded: LoadedRecipe, run: RunFolder, text: str) -> Path | str:
    """The path of a reference, which may be a stage's result. Raises AlignError for a stage that has not run yet."""
    ref = reference_syntax.parse(text, loaded.root)
    if not isinstance(ref, reference_syntax.StageRef):
        return reference_syntax.resolve(text, loaded.root)
    folder = run.stage(ref.name)
    if not folder.is_dir():
        raise AlignError(f"what stage {ref.name} will make")
    return folder


def _size(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


def _lines(paths: Sequence[Path]) -> tuple[int | None, int | None]:
    """Rows of JSON Lines files, and bytes of the longest one; None for other formats and for large files."""
    if any(path.suffix != ".jsonl" or path.stat().st_size > 10 * EXACT_BYTES for path in paths):
        return None, None
    lines = [line for path in paths for line in path.read_bytes().split(b"\n") if line]
    return len(lines), max(map(len, lines), default=0)


def _encoded(stage: ToPlan, model: Model, *, streams: bool) -> DataSize:
    """Encode the data and plan the steps as the stage will. Uses the runs' cache if it exists; otherwise all files are
    removed again."""
    from align.models.load import load_encoder
    from align.stages.shared.training_data import read_data

    loaded, run, spec = stage.loaded, stage.run, stage.spec
    seed = loaded.recipe.seed if spec.seed is None else spec.seed
    encoder = load_encoder(model, cache=run.cache if (run.cache / "gguf").is_dir() else None)
    with tempfile.TemporaryDirectory(prefix="align-plan-") as scratch, data_faults():
        read = read_data(
            spec,
            resolve=lambda text: locate(loaded, run, text),
            encoder=encoder,
            cache=run.cache if run.cache.is_dir() else Path(scratch),
            seed=seed,
            rejects=None,
            with_held_out=False,
        )
        plan, report = read.plan(spec.train, seed), read.report
        seen = int(read.examples.sizes[plan.order[: plan.bounds[-1]]].sum())
        at_once, longest = _largest(read, plan, spec.train, streams=streams, device=stage.machine.device)
        words = "encoded with the model's tokenizer"
        return DataSize(words, len(read.trees), report.tokens, report.targets, len(plan), seen, at_once, longest)


def _largest(read: StageData, plan: StepPlan, train: Train, *, streams: bool, device: str) -> tuple[int, int]:
    """Tokens of the largest forward pass of all steps, packed as the loader does, and tokens of the largest single
    example in its layout.

    Args:
        streams: the stage cuts a tree that is much larger than a micro-batch.
    """
    from align.batching.tree import grouped, row_multiple, tokens_of
    from align.models.compute.stream import held_at_once

    layout, limit = train.layout, train.microbatch_tokens
    multiple = row_multiple(layout, limit, device)
    largest = longest = 0
    for step in range(len(plan)):
        trees = [read.examples[i] for i in plan.examples(step).tolist()]
        longest = max(longest, *(tokens_of([tree], layout) for tree in trees))
        for group in grouped(trees, limit, layout):
            size = tokens_of([trees[i] for i in group], layout, multiple)
            if streams and layout == "tree" and len(group) == 1:
                lengths = [len(branch.ids) for branch in trees[group[0]].branches]
                size = min(size, held_at_once(len(trees[group[0]].trunk), lengths, limit))
            largest = max(largest, size)
    return largest, longest
