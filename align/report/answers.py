"""The answers that the report page shows: those of several policies to the same prompts side by side, from evaluations
and from stages that ask before and after training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.data.answer_file import TARGET, by_prompt, said
from align.report.views.view import view_of
from align.runs.record import StageRecord
from align.runs.samples import answers_of, before_and_after
from align.runs.values import clipped, count, in_order, jsonl, mapping, number, short, text, texts

_BUDGET = 600_000
"""Number of characters of answers on a page, limited so that the page of a large run still opens at once."""
_LONGEST = 6_000
"""Characters of one text that are shown."""
_SAMPLES = 3
"""Number of a policy's answers to one prompt that are shown."""
_PROMPTS = 100
"""Number of an evaluation's prompts that are shown."""


@dataclass(frozen=True)
class PolicyAnswers:
    """One policy's answers to a prompt."""

    who: str
    text: str
    more: tuple[str, ...] = ()
    """Further samples."""
    facts: str = ""


@dataclass(frozen=True)
class PromptAnswers:
    """A prompt and all answers to it."""

    where: str
    """The stage that asked, and the prompt's id if it has one."""
    prompt: tuple[tuple[str, str], ...]
    """(role, text) of each message; a single entry without role if the prompt is only known as the text that the model
    read."""
    answers: tuple[PolicyAnswers, ...]

    @property
    def length(self) -> int:
        """Number of characters."""
        return sum(len(text) for _, text in self.prompt) + sum(
            len(text) for one in self.answers for text in (one.text, *one.more)
        )


@dataclass(frozen=True)
class AnswerPage:
    """The prompts that the page shows, and the number of prompts there were."""

    asked: tuple[PromptAnswers, ...]
    total: int


def answers(stages: Sequence[StageRecord]) -> AnswerPage:
    """The answers of all stages, as many as the page has room for. Evaluations come first, since they ask several
    policies."""
    compared = [stage for stage in stages if view_of(stage.kind).compares]
    evaluated = [one for stage in compared for one in _evaluated(stage)]
    total = sum(count(stage.report, "prompts") for stage in compared)
    training = list(_before_and_after([stage for stage in stages if not view_of(stage.kind).compares]))
    kept: list[PromptAnswers] = []
    room = _BUDGET
    for one in [*evaluated, *training]:
        room -= one.length
        if room < 0 and kept:
            break
        kept.append(one)
    return AnswerPage(tuple(kept), max(total, len(evaluated)) + len(training))


def _evaluated(stage: StageRecord) -> Iterator[PromptAnswers]:
    """An evaluation's first prompts, each with the data's answer and every policy's answers with their numbers."""
    numbers = [mapping(row, "policies") for row in jsonl(stage.folder / "data.jsonl", _PROMPTS)]
    grouped = by_prompt(row for row in answers_of(stage) if row.part == "data")
    for group, of_policies in zip(grouped, numbers, strict=False):
        by_policy: dict[str, list[str]] = {}
        for row in group:
            by_policy.setdefault(row.policy, []).append(clipped(row.text, _LONGEST))
        shown = []
        for name in in_order(by_policy, (TARGET, *texts(stage.report, "policies"))):
            first, *more = by_policy[name][:_SAMPLES]
            shown.append(PolicyAnswers(name, first, tuple(more), _facts(mapping(of_policies, name))))
        yield PromptAnswers(f"{stage.name}, {group[0].prompt_id}", _turns(group[0].prompt), tuple(shown))


def _turns(prompt: Any) -> tuple[tuple[str, str], ...]:
    """(role, text) of a prompt's messages."""
    turns = [("", prompt)] if isinstance(prompt, str) else [(text(one, "role"), text(one, "content")) for one in prompt]
    return tuple((role, clipped(content, _LONGEST)) for role, content in turns)


def _facts(of_policy: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {short(value)}" for name in of_policy if (value := number(of_policy, name)) is not None)


def _before_and_after(stages: Sequence[StageRecord]) -> Iterator[PromptAnswers]:
    """The answers before and after training. A prompt that several stages asked is shown once, and so are equal
    answers, with the names of all policies that gave them."""
    by_prompt: dict[str, list[tuple[str, str, str]]] = {}
    for stage in stages:
        for before, after in before_and_after(stage):
            answers = by_prompt.setdefault(str(before.prompt), [])
            answers += [
                (stage.name, f"before {stage.name}", said(before)),
                (stage.name, f"after {stage.name}", said(after)),
            ]
    for prompt, answers in by_prompt.items():
        who: dict[str, list[str]] = {}
        for _, name, answer in answers:
            who.setdefault(answer, []).append(name)
        names = list(dict.fromkeys(stage for stage, _, _ in answers))
        shown = tuple(PolicyAnswers(", ".join(names), clipped(answer, _LONGEST)) for answer, names in who.items())
        yield PromptAnswers(", ".join(names), (("", clipped(prompt, _LONGEST)),), shown)
