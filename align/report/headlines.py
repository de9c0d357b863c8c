"""The few numbers that say how a stage went, by its kind: for lists, comparisons and model cards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from align.report.run import StageRecord
from align.report.values import mapping, number

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Headline:
    """One number, with what it was before where that is known."""

    words: str
    after: float
    before: float | None = None
    form: str = ".3f"

    def __str__(self) -> str:
        """``held-out loss 2.879 -> 2.486``."""
        before = "" if self.before is None else f"{self.before:{self.form}} -> "
        return f"{self.words} {before}{self.after:{self.form}}"


def headlines(stage: StageRecord) -> list[Headline]:
    """Those of a stage's result; empty when there is none, or it says nothing that is known here."""
    return list(_KINDS.get(stage.kind, _loss)(stage.summary))


def _change(summary: Summary, key: str, words: str, form: str = ".3f") -> Iterator[Headline]:
    """A held-out metric before and after training."""
    after = number(summary, "eval_after", key)
    if after is not None:
        yield Headline(words, after, number(summary, "eval_before", key), form)


def _value(summary: Summary, words: str, *keys: str, form: str = ".3f") -> Iterator[Headline]:
    value = number(summary, *keys)
    if value is not None:
        yield Headline(words, value, form=form)


def _loss(summary: Summary) -> Iterator[Headline]:
    yield from _change(summary, "loss", "held-out loss")


def _dpo(summary: Summary) -> Iterator[Headline]:
    yield from _change(summary, "rewards/accuracies", "held-out pairs ranked right", ".1%")
    yield from _change(summary, "rewards/margins", "held-out margin")


def _reward(summary: Summary) -> Iterator[Headline]:
    yield from _value(summary, "held-out accuracy", "held_out", "natural", "accuracy", "value", form=".1%")
    yield from _value(summary, "of length alone", "held_out", "natural", "accuracy_length", "value", form=".1%")


def _ppo(summary: Summary) -> Iterator[Headline]:
    yield from _value(summary, "held-out reward, change", "held_out_change", "mean", form="+.3f")
    yield from _value(summary, "KL to the reference, nats per token", "last_iteration", "kl")


def _kept(summary: Summary) -> Iterator[Headline]:
    yield from _value(summary, "prompts", "prompts", form=",.0f")
    yield from _value(summary, "kept", "kept", form=",.0f")


def _label(summary: Summary) -> Iterator[Headline]:
    yield from _value(summary, "prompts", "prompts", form=",.0f")
    yield from _value(summary, "preferences", "preferences", form=",.0f")


def _evaluate(summary: Summary) -> Iterator[Headline]:
    """The margin of the first policy, and of the others their difference to it."""
    policies = mapping(summary, "metrics", "margin")
    for policy in policies:
        difference = number(policies, policy, "difference", "mean")
        if difference is None:
            yield from _value(policies, f"margin of {policy}", policy, "mean")
        else:
            yield Headline(f"margin of {policy}, difference", difference, form="+.3f")


_KINDS: dict[str, Callable[[Summary], Iterator[Headline]]] = {
    "dpo": _dpo,
    "reward": _reward,
    "ppo": _ppo,
    "self_contrast": _kept,
    "select_prompts": _kept,
    "label": _label,
    "evaluate": _evaluate,
}
"""All other kinds: the held-out loss, where there is one."""
