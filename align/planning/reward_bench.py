"""How many answers the reward benchmarks of an evaluation will have scored and judged, counted from the files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from align.errors import InputError, Problem
from align.evaluation.reward_bench.read import read_bench, refuse_pairs_where_scores_are_needed
from align.pipeline.folder import RunFolder
from align.planning.data_size import LARGEST_JSON, ROWS, data_faults, locate
from align.planning.planner import PlanRow
from align.recipe.kinds.judge import Judge
from align.recipe.load import LoadedRecipe
from align.recipe.schema import DataSource, EvaluateStage


def rows(loaded: LoadedRecipe, spec: EvaluateStage, run: RunFolder) -> Iterator[PlanRow]:
    """Rows for each benchmark. Raises :class:`~align.planning.data_size.UnreadableData` for a file of another kind."""
    for task in spec.reward_benches:
        location = locate(loaded, run, task.data.path)
        if isinstance(location, str):
            yield PlanRow("reward benchmark", "unknown", f"{task.data.path} on the hub is not downloaded to plan")
            continue
        with data_faults():
            bench, items = read_bench(task.data, location)
        answers = sum(len(item.answers) for item in items)
        there = f"{bench.TITLE}: {len(items):,} prompts with {answers:,} answers"
        if spec.scorers:
            each = f", by each of {len(spec.scorers)} scorers" if len(spec.scorers) > 1 else ""
            yield PlanRow("scored answers", f"{answers * len(spec.scorers):,}", there + each)
        if spec.judge is not None:
            pairs = (
                sum(len(item.pairs) for item in items)
                if "pairwise" in spec.judge.methods and not bench.NEEDS_SCORES
                else 0
            )
            graded = answers if "pointwise" in spec.judge.methods else 0
            how = [*([f"{pairs:,} pairs in both orders"] if pairs else []), *([f"{graded:,} grades"] if graded else [])]
            yield PlanRow("judge's replies", f"{2 * pairs + graded:,} at most", f"{bench.TITLE}: {' and '.join(how)}")


def bench_faults(judge: Judge | None, source: DataSource, location: Path) -> list[Problem]:
    """What is wrong with the first rows of a reward benchmark's file; also when the stage's judge cannot be used on
    it."""
    if location.suffix == ".json" and location.is_file() and location.stat().st_size > LARGEST_JSON:
        return []
    try:
        bench, _ = read_bench(source, location, most=ROWS)
        refuse_pairs_where_scores_are_needed(judge, bench, source.path)
    except InputError as error:
        return list(error.problems)
    return []
