"""Reading the data of a training stage in the form that its kind needs. ``align plan`` reads them in the same way, to
count steps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from align.batching.loader import StepPlan, plan_steps
from align.data.chat.encoder import Encoder
from align.data.report import DataReport
from align.data.sources.mixture import read_records
from align.data.tree import Tree
from align.data.trees.balance import BalancedTrees
from align.data.trees.build import UNLEARNED, TooLong
from align.data.trees.load import load_trees
from align.data.trees.store import TreeStore
from align.errors import InputError, Problem
from align.recipe.blocks.base import RecordType, RowLimits, RowUse
from align.recipe.schema import Data, Lora, Train


class TrainsOnRows(Protocol):
    """The keys of a stage that trains on rows of data."""

    @property
    def data(self) -> Data:
        """Rows to train on."""
        ...

    @property
    def eval_data(self) -> Data | None:
        """Held-out rows."""
        ...

    @property
    def max_length(self) -> int:
        """Maximum length of a row, in tokens."""
        ...

    @property
    def too_long(self) -> TooLong:
        """What happens to longer ones."""
        ...

    @property
    def train(self) -> Train:
        """Optimiser, schedule, memory."""
        ...

    @property
    def lora(self) -> Lora | None:
        """Settings of adapters; None when all weights are trained."""
        ...

    @property
    def starting_model(self) -> str | None:
        """As of every stage."""
        ...

    def record_types(self) -> Mapping[str, RecordType]:
        """As of every stage."""
        ...

    def row_limits(self, key: str) -> RowLimits | None:
        """As of every stage."""
        ...

    def row_use(self) -> RowUse:
        """As of every stage."""
        ...


@dataclass(frozen=True)
class StageData:
    """The data of a training stage, encoded as trees."""

    trees: TreeStore
    report: DataReport
    examples: TreeStore | BalancedTrees
    """What steps are made of: all trees, or the trees and answers that each epoch draws from them."""
    held_out: TreeStore | None
    held_out_report: DataReport | None
    marks: str | None = None
    """A line for the user about the margins that the loss uses; None without margins."""

    def plan(self, train: Train, seed: int) -> StepPlan:
        """The steps that a stage will take."""
        return plan_steps(
            self.examples.sizes,
            seed=seed,
            epochs=train.epochs,
            batch_size=train.batch_size,
            tokens_per_step=train.tokens_per_step,
            max_steps=train.max_steps,
            epoch_indices=self.examples.epoch if isinstance(self.examples, BalancedTrees) else None,
        )

    def leaked(self) -> list[str]:
        """Ids of held-out trees whose prompt is trained on as well, which makes the held-out numbers too good."""
        if self.held_out is None:
            return []
        held_out = {index: _digest(self.held_out[index]) for index in range(len(self.held_out))}
        wanted = set(held_out.values())
        trained = {digest for index in range(len(self.trees)) if (digest := _digest(self.trees[index])) in wanted}
        return [self.held_out[index].id for index, digest in held_out.items() if digest in trained]

    def lines(self) -> list[str]:
        """Lines for the user: what was read, and what was left out and why."""
        held_out = self.held_out_report.lines() if self.held_out_report else []
        marks = [self.marks] if self.marks else []
        return [*self.report.lines(), *marks, *(f"held out: {line}" for line in held_out)]


def _digest(tree: Tree) -> bytes:
    return hashlib.sha256(tree.trunk.tobytes()).digest()


def read_data(
    spec: TrainsOnRows,
    *,
    resolve: Callable[[str], Path | str],
    encoder: Encoder,
    cache: Path,
    seed: int,
    rejects: Path | None,
    with_held_out: bool = True,
) -> StageData:
    """Read the stage's ``data`` as trees and, ``with_held_out``, its ``eval_data``. Raises as
    :func:`~align.data.trees.load.load_trees`."""
    limits, want, use = spec.row_limits("data"), spec.record_types()["data"], spec.row_use()
    load = partial(
        load_trees,
        want,
        resolve=resolve,
        encoder=encoder,
        max_length=spec.max_length,
        too_long=spec.too_long,
        train_on="last" if limits is None else limits.train_on,
        seed=seed,
        cache=cache,
        grades=use.grades,
    )
    filters, eval_filters = _filters(spec, resolve, seed) if use.filters else (None, None)
    trees, report = load(spec.data, rejects=rejects, filters=filters)
    held_out: TreeStore | None = None
    held_out_report: DataReport | None = None
    if spec.eval_data and with_held_out:
        held_out, held_out_report = load(spec.eval_data, rejects=None, filters=eval_filters)
    examples = BalancedTrees(trees, seed=seed, epochs=spec.train.epochs) if use.length_balance else trees
    if use.grades:
        _require_grades(use, spec.data, trees, report)
    return StageData(trees, report, examples, held_out, held_out_report, _marks(use, spec.data, trees))


def _require_grades(use: RowUse, data: Data, trees: TreeStore, report: DataReport) -> None:
    """Raises InputError for a grade to learn that no answer has."""
    given = trees.marks(len(use.grades))[:, 2:]
    absent = [name for i, name in enumerate(use.grades) if np.isnan(given[:, i]).all()]
    if absent:
        others = [what.removeprefix(f"{UNLEARNED}: ") for what in report.noted if what.startswith(UNLEARNED)]
        hint = f"the data have {', '.join(others)} as well" if others else None
        paths = ", ".join(source.path for source in data)
        raise InputError(
            [Problem("no answer has this grade", file=paths, key=f"grades.{name}", hint=hint) for name in absent]
        )


def _marks(use: RowUse, data: Data, trees: TreeStore) -> str | None:
    """A line about the pairs' margins, if the loss uses them. Raises InputError for a key that needs margins or votes
    which the data do not have."""
    if not use.margins and not use.needs_votes:
        return None
    margins, shares = trees.marks().T
    paths = ", ".join(source.path for source in data)
    if use.needs_votes and (shares == 1).all():
        hint = "remove it; votes come from a `better` with several judges, or from the column `votes`"
        message = "has no effect: no judges disagree in these data"
        raise InputError(Problem(message, file=paths, key=use.needs_votes, hint=hint))
    margins = margins[margins != 0]
    if use.needs_margins and not len(margins):
        hint = (
            "remove it; `margin: gap` in `format` takes margins from the answers' scores, a column `margin` has its own"
        )
        message = "has no effect: no pair of these data has a margin"
        raise InputError(Problem(message, file=paths, key=use.needs_margins, hint=hint))
    if not use.margins or not len(margins):
        return None
    low, middle, high = (float(number) for number in np.quantile(margins, (0, 0.5, 1)))
    return f"margins of {len(margins):,} pairs: {low:.4g} to {high:.4g}, median {middle:.4g}"


def _filters(spec: TrainsOnRows, resolve: Callable[[str], Path | str], seed: int) -> tuple[Any, Any]:
    """The filter of the training data and that of the held-out data."""
    from align.data.trees.filters import PreferenceFilter, prompt_digests

    return PreferenceFilter(
        prompt_digests(_records(spec.eval_data, resolve, seed)) if spec.eval_data else ()
    ), PreferenceFilter()


def _records(data: Data, resolve: Callable[[str], Path | str], seed: int) -> Any:
    return read_records(data, [resolve(source.path) for source in data], "preference", seed=seed, rejects=None)
