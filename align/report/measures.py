"""Before and after: the numbers that say whether a stage did what it was run for, with intervals where the stage left
what they need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from align.functional.intervals import ANY, DIFFERENCE, SHARE, Range, wilson
from align.report.trained import trained_on, trained_on_bench
from align.report.verdicts import Direction, rounding_of, verdict
from align.runs.record import StageRecord
from align.runs.values import count, decimals, in_order, mapping, number, percent, short, size, text, texts
from align.terminal import fixed


@dataclass(frozen=True)
class Estimate:
    """A number, and its 95 % interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: Any, *keys: str, name: str = "value") -> Estimate | None:
        """``{name, low, high}`` under ``keys``, or a plain number."""
        found = mapping(value, *keys)
        if not found:
            plain = number(value, *keys)
            return None if plain is None else cls(plain)
        middle = number(found, name)
        return None if middle is None else cls(middle, number(found, "low"), number(found, "high"))

    @property
    def scale(self) -> float:
        """Its size, or that of its uncertainty where this is larger: what decimals are chosen by."""
        return (
            abs(self.value)
            if self.low is None or self.high is None
            else max(abs(self.value), (self.high - self.low) / 2)
        )

    def words(self, digits: int, *, signed: bool = False) -> str:
        """``0.712 [0.651, 0.773]``."""
        shown = fixed(self.value, digits, signed=signed)
        if self.low is None or self.high is None:
            return shown
        return f"{shown} [{fixed(self.low, digits, signed=signed)}, {fixed(self.high, digits, signed=signed)}]"


@dataclass(frozen=True)
class Change:
    """One measure of a stage, before and after it."""

    stage: str
    measure: str
    before: Estimate | None
    after: Estimate | None
    difference: Estimate | None = None
    """After minus before."""
    better: Direction | None = None
    chance: float | None = None
    """What guessing gives: ``after`` is compared with it instead of with ``before``."""
    subject: str = ""
    """Whose measure it is, where a stage measures several policies."""
    note: str = ""
    items: int | None = None
    """Prompts that were measured, where that is known."""
    trained: bool = False
    """The stage was trained on some of them."""
    dtype: str = "fp32"
    """What it was computed in."""
    within: Range = ANY
    """The least and the largest value that the measure can have."""

    @property
    def title(self) -> str:
        """The measure, and whose."""
        return f"{self.measure}: {self.subject}" if self.subject else self.measure

    @classmethod
    def between(
        cls, stage: str, measure: str, before: float | None, after: Estimate | None, **more: Any
    ) -> Change | None:
        """With the difference of two numbers; None without an ``after``."""
        if after is None:
            return None
        difference = None if before is None else Estimate(after.value - before)
        return cls(stage, measure, None if before is None else Estimate(before), after, difference, **more)

    @property
    def cells(self) -> tuple[str, str, str]:
        """Before, after and difference as text, with the same decimals."""
        estimates = (self.before, self.after, self.difference)
        values = [estimate.value for estimate in estimates if estimate is not None]
        whole = all(value == int(value) for value in values) and all(e is None or e.low is None for e in estimates)
        small = self.difference.scale if self.difference is not None else 0.0
        digits = 0 if whole else max(decimals(*values), min(6, 1 - math.floor(math.log10(small))) if small else 0)
        before, after, difference = (
            "" if estimate is None else estimate.words(digits, signed=k == 2) for k, estimate in enumerate(estimates)
        )
        return before, after, difference

    def __str__(self) -> str:
        """``held-out loss 2.879 -> 2.486``."""
        before, after, _ = self.cells
        return f"{self.title} {before} -> {after}" if before else f"{self.title} {after}"

    @property
    def verdict(self) -> str:
        """By the one rule for them; empty for what is neither good nor bad."""
        scale = max((abs(part.value) for part in (self.before, self.after) if part is not None), default=0.0)
        return verdict(
            self.after,
            self.difference,
            better=self.better,
            chance=self.chance,
            rounding=rounding_of(scale, self.dtype, self.items),
            items=self.items,
            trained=self.trained,
        )


def changes(stage: StageRecord) -> list[Change]:
    """The measures of a stage that has a result, the most important one first."""
    if stage.manifest is None and not stage.report:
        return []
    return [change for change in _KINDS.get(stage.kind, _training)(stage) if change is not None]


def headlines(stage: StageRecord) -> list[Change]:
    """The few of them that say how the stage went, for lists, comparisons and model cards: of an evaluation one measure
    of every policy, of other stages the first two."""
    found = changes(stage)
    return of_the_first_measure(found) if stage.kind == "evaluate" else found[:2]


def of_the_first_measure(found: list[Change]) -> list[Change]:
    """The most important measure, of every policy where a stage compares several."""
    return [change for change in found if change.measure == found[0].measure]


# Kinds

_EVALUATED: dict[str, tuple[str, Direction | None]] = {
    "loss": ("held-out loss", "down"),
    "rewards/accuracies": ("held-out accuracy", "up"),
    "rewards/margins": ("held-out margin of implicit rewards", "up"),
    "logps/chosen": ("log-prob of held-out chosen answers, nats", "up"),
    "logps/rejected": ("log-prob of held-out rejected answers, nats", None),
    "accuracy": ("held-out accuracy", "up"),
    "margin": ("held-out margin of scores", "up"),
    "reward": ("reward on held-out prompts", "up"),
    "sft_loss": ("loss on held-out conversations", "down"),
    "finished": ("share of held-out answers that end", "up"),
    "length": ("length of held-out answers, tokens", None),
}
_FIRST = {
    "dpo": ("rewards/accuracies", "rewards/margins", "loss", "logps/chosen", "logps/rejected"),
    "reward": ("accuracy", "loss", "margin"),
    "ppo": ("reward", "sft_loss", "finished", "length"),
    "sft": ("loss",),
}


def _training(stage: StageRecord) -> Iterator[Change | None]:
    """Held-out metrics."""
    before, after = mapping(stage.report, "eval_before"), mapping(stage.report, "eval_after")
    for key in _FIRST.get(stage.kind) or in_order(after, ("reward", *_EVALUATED)):
        words, better = _EVALUATED.get(key, (f"held-out {key}", None))
        within = SHARE if key in _SHARES else ANY
        yield Change.between(
            stage.name,
            words,
            number(before, key),
            Estimate.of(after, key),
            better=better,
            within=within,
            **_circumstances(stage),
        )


_SHARES = ("rewards/accuracies", "accuracy", "finished")


def _circumstances(stage: StageRecord) -> dict[str, Any]:
    """Of a stage's held-out numbers: how many prompts, whether they were trained on, and the precision."""
    train = mapping(stage.manifest.identity.config, "train") if stage.manifest is not None else {}
    return {
        "items": count(stage.report, "held_out_data", "trees") or None,
        "trained": count(stage.report, "held_out_leaked") > 0,
        "dtype": "bf16" if "bf16" in (text(train, "dtype"), text(train, "autocast")) else "fp32",
    }


def _dpo(stage: StageRecord) -> Iterator[Change | None]:
    for change in _training(stage):
        if (
            change
            and change.after
            and change.measure == "held-out accuracy"
            and change.items
            and 0 <= change.after.value <= 1
        ):
            bounds = wilson(change.after.value, change.items) if change.items > 1 else (None, None)
            note = f"{change.items:,} prompts; guessing gives 0.5"
            change = replace(change, after=Estimate(change.after.value, *bounds), chance=0.5, note=note)
        yield change


def _reward(stage: StageRecord) -> Iterator[Change | None]:
    held_out = mapping(stage.report, "held_out")
    for change in _training(stage):
        found = Estimate.of(held_out, "natural", "accuracy")
        if change and found and change.measure == "held-out accuracy":
            difference = None if change.before is None else Estimate(found.value - change.before.value)
            change = replace(change, after=found, difference=difference, chance=0.5, note=_pairs(held_out, "natural"))
        yield change
    balanced = Estimate.of(held_out, "length_balanced", "accuracy")
    words, note = "accuracy where length tells nothing", _pairs(held_out, "length_balanced")
    about = _circumstances(stage) | {"items": count(held_out, "length_balanced", "prompts") or None, "within": SHARE}
    yield Change.between(stage.name, words, None, balanced, better="up", chance=0.5, note=note, **about)
    for key, words in (
        ("accuracy_longer_wins", "accuracy where the longer answer wins"),
        ("accuracy_shorter_wins", "accuracy where the shorter answer wins"),
        ("accuracy_length", "baseline: accuracy of length alone"),
        ("accuracy_words", "baseline: accuracy of words alone"),
        ("length_correlation", "correlation of score and length"),
        ("calibration_error", "calibration error"),
    ):
        within = DIFFERENCE if key == "length_correlation" else SHARE
        yield Change.between(stage.name, words, None, Estimate.of(held_out, "natural", key), within=within)


def _pairs(held_out: Mapping[str, Any], which: str) -> str:
    return (
        f"{count(held_out, which, 'pairs'):,} pairs of {count(held_out, which, 'prompts'):,} prompts; guessing"
        " gives 0.5"
    )


def _ppo(stage: StageRecord) -> Iterator[Change | None]:
    changed = mapping(stage.report, "held_out_change")
    interval = changed.get("interval")
    low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
    for change in _training(stage):
        if (
            change
            and change.difference
            and change.measure == _EVALUATED["reward"][0]
            and (mean := number(changed, "mean")) is not None
        ):
            difference, prompts = Estimate(mean, number(low), number(high)), count(changed, "prompts")
            change = replace(
                change, difference=difference, items=prompts or None, note=f"{prompts:,} prompts, greedy answers"
            )
        yield change
    for key, words in (
        ("reward", "reward of sampled answers"),
        ("kl", "KL from the reference, nats per token"),
        ("entropy", "entropy"),
    ):
        values = [value for row in stage.metrics if (value := number(row, f"rollout/{key}")) is not None]
        if values:
            quarter = max(1, len(values) // 4)  # a single iteration's prompts may be easy or hard
            first, last = (sum(part) / quarter for part in (values[:quarter], values[-quarter:]))
            note = f"first and last {quarter} of {len(values)} iterations"
            yield Change.between(stage.name, words, first, Estimate(last), note=note)


_LESS_IS_BETTER = ("loss", "unfinished", "mixed_languages", "probe-identity/claims")
_NEITHER = ("length", "distinct_1", "distinct_2")
_ORDER = ("margin", "similarity", "loss", "target_logprob", "unfinished", "mixed_languages", *_NEITHER)
"""Of an evaluation's own measures. Before them what the recipe asked for: benchmarks, scorers, judges."""


def _better(name: str) -> Direction | None:
    """Which way a metric of an evaluation is better; benchmarks, scorers and judges count what is good."""
    if name in _NEITHER or "win_rate" in name:
        return None
    return "down" if name in _LESS_IS_BETTER or name.endswith("/unfinished") else "up"


def _evaluate(stage: StageRecord) -> Iterator[Change | None]:
    metrics, scorers = mapping(stage.report, "metrics"), texts(stage.report, "scorers")
    on_data, on_benches = trained_on(stage), trained_on_bench(stage)
    order, control = [*texts(stage.report, "policies"), *scorers], text(stage.report, "control")
    for name in sorted(
        in_order(metrics, texts(stage.report, "measures")), key=lambda name: name in _ORDER and _ORDER.index(name) + 1
    ):
        policies = metrics[name]
        words = text(stage.report, "words", name) or name
        of_bench = name.partition("/")[0] in mapping(stage.report, "benches")
        baseline = next(iter(scorers), "") if of_bench else text(stage.report, "baseline")
        trained = on_benches if of_bench else on_data
        chance = 0.5 if "win_rate" in name else None
        before = Estimate.of(policies, baseline, name="mean")
        others = in_order((policy for policy in mapping(policies) if policy not in (baseline, control)), order)
        known = number(policies, control, "mean") if of_bench else None
        beside = "" if known is None else f"{control}: {short(round(known, 3))}"
        if not others:
            yield Change.between(stage.name, words, None, before, subject=baseline, note=beside)
        for policy in others:
            after = Estimate.of(policies, policy, name="mean")
            difference = Estimate.of(policies, policy, "difference", name="mean")
            note = "; ".join(part for part in (f"before: {baseline}" if before else "", beside) if part)
            if after is not None:
                items = None if number(policies, policy, "count") is None else count(policies, policy, "count")
                within = SHARE if chance is not None else ANY
                seen = trained or count(stage.report, "benches", name.partition("/")[0], "trained_on", policy) > 0
                yield Change(
                    stage.name,
                    words,
                    before,
                    after,
                    difference,
                    _better(name),
                    chance,
                    policy,
                    note,
                    items,
                    seen,
                    within=within,
                )


def _select_prompts(stage: StageRecord) -> Iterator[Change | None]:
    yield _counts(stage, "prompts, given and kept", "prompts", "kept")


def _label(stage: StageRecord) -> Iterator[Change | None]:
    yield _counts(stage, "prompts in, preferences out", "prompts", "preferences")
    pairs = count(stage.report, "pairs")
    longer = number(stage.report, "longer_chosen")
    if pairs and longer is not None:
        yield Change.between(
            stage.name,
            "share of pairs whose longer answer is chosen",
            None,
            Estimate(longer / pairs),
            note=f"{pairs:,} pairs",
        )


def _self_contrast(stage: StageRecord) -> Iterator[Change | None]:
    yield _counts(stage, "prompts in, preferences out", "prompts", "kept")
    before, after = number(stage.report, "similarity"), Estimate.of(stage.report, "similarity_of_negatives")
    note = f"{count(stage.report, 'samples'):,} samples; before: all of them, after: those taken as rejected answers"
    yield Change.between(stage.name, "similarity of samples to the target", before, after, note=note)


def _counts(stage: StageRecord, words: str, given: str, left: str) -> Change | None:
    before, after = number(stage.report, given), number(stage.report, left)
    if before is None or after is None:
        return None
    return Change(
        stage.name,
        words,
        Estimate(before),
        Estimate(after),
        note=f"{percent(after, before)} of them" if "kept" in words else "",
    )


_KINDS: dict[str, Callable[[StageRecord], Iterator[Change | None]]] = {
    "dpo": _dpo,
    "reward": _reward,
    "ppo": _ppo,
    "evaluate": _evaluate,
    "select_prompts": _select_prompts,
    "label": _label,
    "self_contrast": _self_contrast,
}


def facts(stage: StageRecord) -> list[tuple[str, str]]:
    """What a stage cost and is made of, as (word, value); of a kind that is not known here, all plain numbers of its
    summary."""
    report = stage.report
    found: list[tuple[str, str]] = []
    for key, words in (
        ("steps", "steps"),
        ("iterations", "iterations"),
        ("tokens", "tokens"),
        ("tokens_per_second", "tokens/s"),
    ):
        if (value := number(report, key)) is not None:
            found.append((words, short(round(value, 1))))
    if (memory := number(report, "peak_memory_bytes")) is not None:
        found.append(("peak memory", size(memory)))
    if (trained := number(report, "trainable_parameters")) is not None:
        whole = number(report, "parameters")
        found.append(
            (
                "trained parameters",
                f"all {short(trained)}" if trained == whole else f"{short(trained)} of {short(whole)}",
            )
        )
    if best := number(report, "best_step"):
        found.append(
            ("highest held-out reward" if stage.kind == "ppo" else "lowest held-out loss", f"after step {short(best)}")
        )
    if stage.kind not in {*_KINDS, "sft"}:
        known = {
            "steps",
            "iterations",
            "tokens",
            "tokens_per_second",
            "peak_memory_bytes",
            "trainable_parameters",
            "best_step",
        }
        found += [
            (key, short(value))
            for key in stage.summary
            if key not in known and (value := number(stage.summary, key)) is not None
        ]
    return found
