"""Loading prompts for sampling: as messages, and as tokens with the generation prompt for the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from align import files
from align.data.chat.encoder import Encoder
from align.data.records import Prompt
from align.data.report import DataReport
from align.data.sources.mixture import read_records
from align.data.trees.build import TOO_LONG, Limits, Unusable, tree_of
from align.data.trees.load import origins_to_skip
from align.errors import InputError, Problem
from align.recipe.schema import DataSource


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt and its tokens."""

    record: Prompt
    ids: tuple[int, ...]
    """Tokens, which end with the generation prompt."""


def load_prompts(
    sources: Sequence[DataSource],
    *,
    resolve: Callable[[str], Path | str],
    encoder: Encoder,
    max_length: int,
    seed: int,
    rejects: Path | None,
    limit: str = "max_length",
) -> tuple[list[EncodedPrompt], DataReport]:
    """All prompts of ``sources``, and what became of the rows. Prompts of more than ``max_length`` tokens are left out
    and counted.

    ``limit`` is the recipe key of that length.

    Raises:
        InputError: bad rows, or prompts that the chat template refuses (unless their source skips them), or no prompt
            is left.
    """
    report = DataReport("prompt")
    bounds = Limits(max_length, "drop", "last")
    locations = [resolve(source.path) for source in sources]
    skipping = origins_to_skip(sources, locations)
    records = read_records(sources, locations, "prompt", seed=seed, rejects=rejects)
    prompts = []
    for record in records:
        assert isinstance(record, Prompt)
        try:
            tree = tree_of(record, encoder, bounds, partial(report.note, origin=record.origin))
        except Unusable as reason:
            report.drop(f"longer than {limit}" if str(reason) == TOO_LONG else str(reason), record.origin)
        except InputError as error:
            if record.origin.source not in skipping:
                raise InputError(record.origin.blamed(error.problems[0])) from error
            report.drop(error.problems[0].message, record.origin)
        else:
            report.add(tree)
            prompts.append(EncodedPrompt(record, tuple(tree.trunk.tolist())))
    report.source_lines, report.sources = records.report.lines(), records.report.as_json()
    if not prompts:
        reasons = ", ".join(f"{count.total:,} {reason}" for reason, count in report.dropped.items())
        where = ", ".join(source.path for source in sources)
        raise InputError(
            Problem(
                f"0 prompts left of {records.report.given:,}: {reasons}", file=where, hint=f"{limit} is {max_length:,}"
            )
        )
    return prompts, report


def digest(prompts: Sequence[EncodedPrompt]) -> str:
    """Hex sha256 of the ids and tokens of these prompts, in order."""
    return files.digest_json([[prompt.record.id, list(prompt.ids)] for prompt in prompts])
