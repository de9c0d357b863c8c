"""Reward benchmarks of an evaluation: how often the recipe's scorers and judge agree with people about which answers
are right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from align import files
from align.data.records import Prompt
from align.data.sources.mixture import read_records, shared_prompts
from align.evaluation.compare import Found, compare
from align.evaluation.reward_bench.items import LONGER, Bench, Item, Result, of_lengths, of_scores
from align.evaluation.reward_bench.read import read_bench, refuse_pairs_where_scores_are_needed
from align.recipe.schema import EvaluateStage
from align.scoring.scorer import Answer
from align.stages.context import StageContext
from align.stages.evaluate.reward_bench_judge import judge_bench
from align.stages.evaluate.scorers import score_once, scorer_names
from align.terminal import fixed
from align.training.launch import Ranks

Results = dict[str, list[Result | None]]
"""Scorer or judge -> its result on each item; None if a judge's replies could not be read."""


@dataclass(frozen=True)
class Opened:
    """A reward benchmark whose file has been read."""

    name: str
    """Prefix of its metrics and name of its file in the result: the benchmark's name, with a number if the recipe has
    it twice."""
    path: str
    bench: Bench
    items: list[Item]
    title: str
    """Name shown to the user."""


@dataclass(frozen=True)
class BenchMeasures:
    """What an evaluation reports of one benchmark."""

    metrics: dict[str, Found]
    about: dict[str, Any]
    warnings: list[str]


def open_benches(spec: EvaluateStage, ctx: StageContext) -> list[Opened]:
    """The recipe's reward benchmarks. Raises InputError for a file of another kind, and for a benchmark on which the
    recipe's judge cannot be used."""
    read = [(task.data.path, *read_bench(task.data, ctx.resolve(task.data.path))) for task in spec.reward_benches]
    names = [bench.NAME for _, bench, _ in read]
    opened = []
    for place, (path, bench, items) in enumerate(read):
        refuse_pairs_where_scores_are_needed(spec.judge, bench, path)
        name, title = bench.NAME, bench.TITLE
        if names.count(name) > 1:
            name, title = f"{name}-{names[: place + 1].count(name)}", f"{title} ({Path(path).name})"
        opened.append(Opened(name, path, bench, items, title))
    return opened


def measure(opened: Opened, spec: EvaluateStage, ctx: StageContext, group: Ranks) -> BenchMeasures | None:
    """The numbers of every scorer, of the judge and of the control; None in processes other than the first.

    Scores and replies of an interrupted run are reused. Raises as scorers and
    :meth:`~align.evaluation.chat_server.ChatServer.ask` do.
    """
    results = _scored(opened, spec, ctx, group)
    if not group.first:
        return None
    about: dict[str, Any] = {"path": opened.path, "title": opened.bench.TITLE, "items": len(opened.items)}
    warnings: list[str] = []
    if spec.judge is not None:
        judged, about["judge"], warnings = judge_bench(spec.judge, ctx, opened.title, opened.bench, opened.items)
        results |= judged
    items, known = _known_to_all(opened.items, results)
    if not items:
        return BenchMeasures({}, about, [*warnings, f"{opened.title}: none of the judge's replies could be read"])
    if len(items) < len(opened.items):
        warnings.append(
            f"{opened.title}: {len(opened.items) - len(items):,} of {len(opened.items):,} items are left out, for"
            " everybody"
        )
    known[LONGER] = [of_lengths(opened.bench, item) for item in items]
    if why := opened.bench.incomplete(items):
        warnings.append(f"{opened.title}: {why}")
    about |= _counts(items, known) | {
        "details": compare(opened.bench.details(items, known), next(iter(known)), seed=ctx.seed)
    }
    if about["details"]:
        ctx.console.print(_details_table(opened, about["details"]))
    metrics = {
        _renamed(name, opened): _titled(metric, opened) for name, metric in opened.bench.measures(items, known).items()
    }
    if not any(about["ties"].values()):
        metrics.pop(f"{opened.name}/score_ties_half", None)  # it would repeat the same numbers
    about["trained_on"] = seen = _seen_in_training(spec, ctx, items)
    for who, prompts in seen.items():
        warnings.append(f"{opened.title}: {who} was trained on {prompts:,} of its {len(items):,} prompts")
    warnings += _no_better_than_length(opened, metrics, ctx.seed)
    _write(ctx.out / f"{opened.name}.jsonl", items, known)
    return BenchMeasures(metrics, about, warnings)


def _scored(opened: Opened, spec: EvaluateStage, ctx: StageContext, group: Ranks) -> Results:
    # An answer without text is replaced by white space: an empty one would mean that the prompt itself is to be scored.
    answers = [Answer(item.prompt, text or " ") for item in opened.items for text in item.answers]
    found: Results = {}
    for number, (name, scorer) in enumerate(zip(scorer_names(spec.scorers), spec.scorers, strict=True)):
        scores = iter(score_once(scorer, f"{opened.name}/{number}", ctx, answers, None, group))
        found[name] = [of_scores(opened.bench, item, list(islice(scores, len(item.answers)))) for item in opened.items]
    return found


def _known_to_all(items: Sequence[Item], results: Results) -> tuple[list[Item], dict[str, list[Result]]]:
    """The items that every scorer and judge has a result for."""
    places = [place for place in range(len(items)) if all(own[place] is not None for own in results.values())]
    known = {who: [result for place in places if (result := own[place]) is not None] for who, own in results.items()}
    return [items[place] for place in places], known


def _counts(items: Sequence[Item], results: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """Counts of items, for the report."""
    return {
        "groups": dict(Counter(item.group for item in items)),
        "pairs": sum(len(item.pairs) for item in items),
        "ties": {who: int(sum((result.half == 0.5).sum() for result in own)) for who, own in results.items()},
    }


def _seen_in_training(spec: EvaluateStage, ctx: StageContext, items: Sequence[Item]) -> dict[str, int]:
    """For each scorer, how many of the benchmark's prompts the stages of this recipe trained it on; scorers with none
    are left out."""
    asked = [Prompt(item.prompt, item.id, item.origin) for item in items]
    found: dict[str, int] = {}
    for who, scorer in zip(scorer_names(spec.scorers), spec.scorers, strict=True):
        model = getattr(scorer, "model", None) or getattr(scorer, "policy", None)
        for source, want in ctx.trained_on(model) if model else ():
            records = read_records([source], [ctx.resolve(source.path)], want, seed=ctx.seed, rejects=None)
            if shared := len(shared_prompts(records, asked)):
                found[who] = max(shared, found.get(who, 0))
    return found


def _no_better_than_length(opened: Opened, metrics: Mapping[str, Found], seed: int) -> Iterator[str]:
    """Warnings about scorers and judges that are not clearly better than a rule that only looks at length."""
    metric = metrics.get(f"{opened.name}/score")
    estimates = {} if metric is None else metric.estimates(LONGER, seed)
    for who, entry in estimates.items():
        low = entry["difference"]["low"] if "difference" in entry else None
        if low is not None and low <= 0:
            numbers = f"{entry['mean']:.3f} and {estimates[LONGER]['mean']:.3f}"
            yield f"{opened.title}: {who} is not clearly above a rule that prefers the {LONGER}: {numbers}"


def _details_table(opened: Opened, details: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """A table of detailed numbers, scorers and judges side by side; the report has the intervals."""
    everybody = list(next(iter(details.values())))
    table = Table(title=f"{opened.title}, in detail (as its own code counts)", title_justify="left")
    for header in ("", *everybody):
        table.add_column(Text(header), justify="right" if header else "left", overflow="fold")
    for name, of in details.items():
        table.add_row(Text(name), *(fixed(of[who]["mean"], 3) for who in everybody))
    return table


def _renamed(name: str, opened: Opened) -> str:
    return f"{opened.name}/{name.partition('/')[2]}"


def _titled(metric: Found, opened: Opened) -> Found:
    """The metric with the file's name in its title, if the recipe has the benchmark twice."""
    return replace(metric, words=metric.words.replace(opened.bench.TITLE, opened.title, 1))


def _write(path: Path, items: Sequence[Item], results: Mapping[str, Sequence[Result]]) -> None:
    """Write each item with all results on it, for people and programs to read."""
    with files.atomic_lines(path) as write:
        for place, item in enumerate(items):
            of = {
                who: {
                    **({} if own[place].scores is None else {"scores": _rounded(own[place].scores)}),
                    "official": _rounded(own[place].official),
                    "ties_half": _rounded(own[place].half),
                }
                for who, own in results.items()
            }
            answers = {"right": list(item.answers[: item.right]), "wrong": list(item.answers[item.right :])}
            write({"id": item.id, "group": item.group, "prompt": list(item.prompt), **answers, "scorers": of})


def _rounded(values: Any) -> Any:
    return np.round(values, 6).tolist()
