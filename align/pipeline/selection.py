"""Which stages a command may run, and which of them it runs even if they are up to date."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from align.errors import InputError, Problem
from align.recipe.checks.messages import did_you_mean
from align.recipe.load import LoadedRecipe


@dataclass(frozen=True)
class Selection:
    """The options of a command. The default: all stages, each only if it is not up to date."""

    kinds: Collection[str] = ()
    """Only stages of these kinds."""
    only: Sequence[str] = ()
    """Only these stages."""
    start: Sequence[str] = ()
    """Only these stages and all that depend on them."""
    force: Sequence[str] = ()
    """These run even if they are up to date. Stages that depend on them run again only if their results changed."""
    fresh: bool = False
    """Stages start from the beginning, without the checkpoints of an earlier attempt."""
    replace: bool = False
    """A finished result of other settings or inputs may be replaced; without this the run refuses."""

    def stages(self, loaded: LoadedRecipe) -> frozenset[str]:
        """The stages that may run. Other stages that they need have to be up to date.

        Raises :class:`InputError` for a name that no stage has, and for options that select nothing or contradict each
        other.
        """
        options = {"--only": self.only, "--from": self.start, "--force": self.force}
        problems = [p for option, names in options.items() for p in _unknown(option, names, loaded)]
        if self.only and self.start:
            problems.append(Problem("--only and --from exclude each other", hint="--only A,B names all that may run"))
        if problems:
            raise InputError(problems)
        stages = loaded.recipe.stages
        selected = {name for name in loaded.order if not self.kinds or stages[name].kind in self.kinds}
        if not selected:
            kinds = ", ".join(sorted({spec.kind for spec in stages.values()}))
            raise InputError(
                f"{loaded.path.name} has no stage of kind {' or '.join(sorted(self.kinds))}", hint=f"it has: {kinds}"
            )
        if self.only:
            selected &= set(self.only)
        elif self.start:
            selected &= _following(loaded, self.start)
        left_out = [name for name in self.force if name not in selected]
        if left_out or not selected:
            what = f"--force {left_out[0]}: the stage is" if left_out else "the stages that --only or --from names are"
            raise InputError(
                f"{what} not among those that this command may run",
                hint="`align run` without --only and --from may run all",
            )
        return frozenset(selected)


ALL = Selection()
"""Every stage that is not up to date."""


def needed(loaded: LoadedRecipe, selected: Collection[str]) -> list[str]:
    """The selected stages and all that they depend on, in running order."""
    names: set[str] = set()
    for name in reversed(loaded.order):
        if name in selected or name in names:
            names |= {name, *loaded.dependencies(name)}
    return [name for name in loaded.order if name in names]


def _following(loaded: LoadedRecipe, names: Sequence[str]) -> set[str]:
    """The named stages and all that depend on them."""
    following = set(names)
    for name in loaded.order:
        if following.intersection(loaded.dependencies(name)):
            following.add(name)
    return following


def _unknown(option: str, names: Sequence[str], loaded: LoadedRecipe) -> list[Problem]:
    known = f"it has: {', '.join(loaded.order)}"
    wrong = [name for name in names if name not in loaded.order]
    return [
        Problem(
            f"{option} {name[:80]}: {loaded.path.name} has no such stage",
            hint=did_you_mean(name, loaded.order) or known,
        )
        for name in wrong
    ]
