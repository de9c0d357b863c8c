"""How answers are scored: the block that several stages take as `reward` or `quality`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import regex
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from align.errors import InputError
from align.recipe.blocks.base import Reference, Strict, unknown_name
from align.recipe.language.effects import Needs
from align.recipe.reference_syntax import import_object, names_code


class Scorer(Strict):
    """What `reward` and `quality` are: one of the kinds below, told by its key. Higher scores are better."""


def _function(text: str) -> str:
    try:
        if not callable(import_object(text)):
            raise InputError(f"`{text[:80]}` is not a function")
    except InputError as error:
        raise unknown_name(error, ()) from error
    return text


def pattern(text: str) -> str:
    """``text``, if it is a regular expression (of the Python package `regex`)."""
    try:
        regex.compile(text)
    except regex.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return text


class ModelScorer(Scorer):
    """A reward model: one that a `reward` stage made, or any sequence-classification model with one label, with its own
    tokenizer and chat template. The text alone is its short form."""

    key_needs: ClassVar[tuple[Needs, ...]] = (
        Needs(
            "revision chat_template chat_template_kwargs max_length",
            lambda scorer: not scorer.model.startswith("stage:"),
            "with {model}, which knows its own template and length",
        ),
    )

    model: Annotated[str, Reference(("reward_model",)), Field(min_length=1)]
    """`stage:NAME`, a folder, or a hub id."""
    revision: str | None = None
    """Commit of a hub model. Pin it to make a run repeatable."""
    chat_template: Annotated[str, Reference(hub=False), Field(min_length=1)] | None = None
    """Only for models of other people: a Jinja file, where the tokenizer has no chat template."""
    chat_template_kwargs: dict[str, str | int | bool] = Field(default={})
    """Only for models of other people: passed to the chat template."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of its weights. The score itself is computed in fp32 always."""
    max_length: int | None = Field(default=None, ge=2)
    """Only for models of other people: longest conversation, in the model's own tokens; what it can read when absent. A
    longer one is an error: nothing is cut in silence."""
    batch_tokens: int = Field(default=2048, ge=1)
    """Tokens of one forward pass. A memory setting: it changes no score."""


class ImplicitScorer(Scorer):
    """The reward that a policy trained on preferences carries in itself (https://arxiv.org/abs/2305.18290): `beta`
    times the log-prob that it gives an answer beyond what its reference gives it, summed over the answer's tokens, in
    nats."""

    policy: Annotated[str, Reference(("policy",)), Field(min_length=1)]
    """The trained policy: `stage:NAME`, a folder, or a hub id."""
    reference: Annotated[str, Reference(("policy",)), Field(min_length=1)]
    """The policy that it was trained from, with the same tokenizer."""
    beta: float = Field(default=0.1, gt=0)
    """The scale: that of the training, where scores are to be on its scale. It changes no order."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the weights of both."""
    batch_tokens: int = Field(default=2048, ge=1)
    """Tokens of one forward pass. A memory setting: it changes no score."""


class FunctionScorer(Scorer):
    """A function of yours. The text `package.module:function` alone is its short form."""

    function: Annotated[str, AfterValidator(_function)]
    """`package.module:function`, called with a list of answers (`align.scoring.scorer.Answer`); it returns as many
    finite numbers."""


class EnsembleScorer(Scorer):
    """Several scorers as one."""

    ensemble: list[Scoring] = Field(min_length=2)
    """The members: scorers as everywhere, so an ensemble may be one of them."""
    combine: Literal["mean", "min"] = "mean"
    """`mean` of the members' scores, or the smallest of them (`min`: what any member finds bad is bad). Scores are
    taken as they are, so members should be on one scale."""


class Rule(Scorer):
    """A rule that looks at the text of an answer. Scores go from 0 (broken) to 1 (kept)."""

    rule: str
    """Which rule this is."""


class LengthRule(Rule):
    """A range that the length should be in: 1 inside; outside the ratio to the nearer end (half as long, or twice as
    long: 0.5)."""

    rule: Literal["length"]
    """`length`"""
    min: int = Field(default=0, ge=0)
    """Shortest length that costs nothing."""
    max: int | None = Field(default=None, ge=1)
    """Longest length that costs nothing."""
    unit: Literal["words", "characters"] = "words"
    """What is counted. Every Chinese character is a word."""

    @model_validator(mode="after")
    def _a_range(self) -> LengthRule:
        if self.min == 0 and self.max is None:
            raise ValueError("needs `min`, `max` or both")
        if self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min}) is larger than max ({self.max})")
        return self


class FormatRule(Rule):
    """A form that the answer should have: the share of these conditions that it meets."""

    rule: Literal["format"]
    """`format`"""
    starts_with: str | None = None
    """Text that it begins with."""
    ends_with: str | None = None
    """Text that it ends with."""
    contains: list[str] = Field(default=[])
    """Texts that it contains, such as headings of sections; each is a condition."""
    max_lines: int | None = Field(default=None, ge=1)
    """Most lines, blank ones left out."""

    @model_validator(mode="after")
    def _a_condition(self) -> FormatRule:
        if not (self.starts_with or self.ends_with or self.contains or self.max_lines):
            raise ValueError("needs at least one of starts_with, ends_with, contains and max_lines")
        return self


class RegexRule(Rule):
    """A regular expression: 1 where it matches, else 0. An answer on which it takes longer than a second is an
    error."""

    rule: Literal["regex"]
    """`regex`"""
    pattern: Annotated[str, AfterValidator(pattern)]
    """In the syntax of the Python package `regex`, which is that of `re` and more."""
    match: Literal["search", "full"] = "search"
    """`search`: anywhere in the answer. `full`: the whole of it."""


class JsonRule(Rule):
    """JSON: 1 where the whole answer is a JSON value (and an object with the required keys, if there are any), else
    0."""

    rule: Literal["json"]
    """`json`"""
    required: list[str] = Field(default=[])
    """Keys that the object must have."""


class LanguageMixRule(Rule):
    """Chinese and English mixed in one answer, which the GLM-4 report (https://arxiv.org/abs/2406.12793) credits RLHF
    with reducing: 1 for one language, 0 for half and half."""

    rule: Literal["language_mix"]
    """`language_mix`"""
    tolerance: float = Field(default=0.1, ge=0, lt=0.5)
    """Share of the smaller language that costs nothing: names, units, code. A Chinese character counts like an English
    word."""


class RepetitionRule(Rule):
    """Repetition inside an answer: different n-grams of words, as a share of all."""

    rule: Literal["repetition"]
    """`repetition`"""
    n: int = Field(default=3, ge=1)
    """Words in an n-gram."""


RULES: dict[str, type[Rule]] = {
    "length": LengthRule,
    "format": FormatRule,
    "regex": RegexRule,
    "json": JsonRule,
    "language_mix": LanguageMixRule,
    "repetition": RepetitionRule,
}
SCORERS: dict[str, type[Scorer]] = {
    "model": ModelScorer,
    "function": FunctionScorer,
    "ensemble": EnsembleScorer,
    "policy": ImplicitScorer,
}
"""The key that tells what a scorer is; rules are told by the value of `rule`."""


def _scorer(value: Any) -> Any:
    """A text is a model or a function; a mapping is validated by the class that its keys name."""
    if isinstance(value, Scorer):
        return value
    if isinstance(value, str):
        value = {"function" if names_code(value) else "model": value}
    keys = (*SCORERS, "rule")
    told = [key for key in keys if key in value] if isinstance(value, Mapping) else []
    if len(told) != 1:
        raise ValueError(
            f"expected a reward model, a package.module:function, or a mapping with one of the keys {', '.join(keys)}"
        )
    if told[0] != "rule":
        return SCORERS[told[0]].model_validate(value)
    name = value["rule"]
    if not isinstance(name, str) or name not in RULES:
        error = InputError(f"no rule `{str(name)[:80]}`; known: {', '.join(RULES)}")
        details = InitErrorDetails(type=unknown_name(error, RULES), loc=("rule",), input=name)
        raise ValidationError.from_exception_data("Rule", [details]) from error
    return RULES[name].model_validate(value)


Scoring = Annotated[
    ModelScorer
    | ImplicitScorer
    | FunctionScorer
    | EnsembleScorer
    | LengthRule
    | FormatRule
    | RegexRule
    | JsonRule
    | LanguageMixRule
    | RepetitionRule,
    BeforeValidator(_scorer),
]
"""The type of a recipe field that holds a scorer."""

EnsembleScorer.model_rebuild()
