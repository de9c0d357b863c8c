"""How answers are scored: the block that several stages take as `reward` or `quality`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import regex
from pydantic import AfterValidator, BeforeValidator, Field, FiniteFloat, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from align.errors import InputError
from align.recipe.blocks.base import Reference, Strict, unknown_name
from align.recipe.language.effects import Needs
from align.recipe.reference_syntax import import_object, names_code


def _weights(grades: dict[str, float]) -> dict[str, float]:
    if grades and not any(grades.values()):
        raise ValueError("all weights are 0, so every score would be")
    return grades


GradeWeights = Annotated[dict[Annotated[str, Field(min_length=1)], FiniteFloat], AfterValidator(_weights)]
"""The type of a recipe field that makes one score of several grades: their names, each with its weight."""


class ScorerSpec(Strict):
    """A scorer gives answers numbers; higher is better. `reward`, `quality` and `scorers` take one of the kinds below,
    which is recognised by its key."""


def _function(text: str) -> str:
    try:
        if not callable(import_object(text)):
            raise InputError(f"`{text[:80]}` is not a function")
    except InputError as error:
        raise unknown_name(error, ()) from error
    return text


def pattern(text: str) -> str:
    """Returns ``text`` if it is a regular expression of the Python package `regex`; raises ValueError otherwise."""
    try:
        regex.compile(text)
    except regex.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return text


class ModelScorer(ScorerSpec):
    """A reward model: one that a `reward` stage made, or any sequence-classification model, with its own tokenizer and
    chat template. Instead of the mapping, its `model` alone may be written as a text."""

    key_needs: ClassVar[tuple[Needs, ...]] = (
        Needs(
            "revision chat_template chat_template_kwargs max_length grades",
            lambda scorer: not scorer.model.startswith("stage:"),
            "with {model}, which knows its own template, length and grades",
        ),
    )

    model: Annotated[str, Reference(("reward_model",)), Field(min_length=1)]
    """`stage:NAME`, a folder, or a hub id."""
    revision: str | None = None
    """Commit of a hub model. Pin it to make a run repeatable."""
    chat_template: Annotated[str, Reference(hub=False), Field(min_length=1)] | None = None
    """Only for models that were not trained with align: a Jinja file, if the tokenizer has no chat template."""
    chat_template_kwargs: dict[str, str | int | bool] = Field(default={})
    """Only for models that were not trained with align: passed to the chat template."""
    grades: GradeWeights = Field(default={})
    """Only for models that were not trained with align: which of a model's outputs make up the score, each with its
    weight, such as `{helpfulness: 0.65, verbosity: -0.4}`. Needed if there are several; what they are called is
    `id2label` in the model's config.json. The weights are of the outputs as the model's head gives them (logits)."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of its weights. The score itself is computed in fp32 always."""
    max_length: int | None = Field(default=None, ge=2)
    """Only for models that were not trained with align: longest conversation, in the model's own tokens; when absent,
    the model's number of positions. A longer conversation is an error and is not cut."""
    batch_tokens: int = Field(default=2048, ge=1)
    """Tokens of one forward pass. It changes memory and speed, and no score."""


class ImplicitScorer(ScorerSpec):
    """The implicit reward of a policy that was trained on preferences (https://arxiv.org/abs/2305.18290): `beta` times
    the difference between the log-probs of an answer under the policy and under its reference, summed over the answer's
    tokens, in nats."""

    policy: Annotated[str, Reference(("policy",)), Field(min_length=1)]
    """The trained policy: `stage:NAME`, a folder, or a hub id."""
    reference: Annotated[str, Reference(("policy",)), Field(min_length=1)]
    """The policy that the training of `policy` started from, with the same tokenizer."""
    beta: float = Field(default=0.1, gt=0)
    """The scale of the scores. Use the `beta` of the training to get rewards on its scale. It does not change which
    answer scores higher."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the weights of both."""
    batch_tokens: int = Field(default=2048, ge=1)
    """Tokens of one forward pass. It changes memory and speed, and no score."""


class FunctionScorer(ScorerSpec):
    """A function of your own. Instead of the mapping, `package.module:function` alone may be written as a text."""

    function: Annotated[str, AfterValidator(_function)]
    """`package.module:function`, a function that gets a list of answers (`align.scoring.scorer.Answer`) and returns one
    finite number for each."""


class EnsembleScorer(ScorerSpec):
    """Several scorers as one."""

    ensemble: list[Scoring] = Field(min_length=2)
    """The members. Each may be any scorer, also an ensemble."""
    combine: Literal["mean", "min"] = "mean"
    """`mean`: the mean of the members' scores. `min`: the smallest of them, so that an answer has to be good by every
    member. Scores are not rescaled, so the members should have the same scale."""


class Rule(ScorerSpec):
    """A rule that looks at the text of an answer. Scores go from 0 (broken) to 1 (kept)."""

    rule: str
    """Which rule this is."""


class LengthRule(Rule):
    """Rewards answers whose length is in a range. The score is 1 inside the range, and outside it the ratio to the
    nearer end (for an answer half as long as `min` or twice as long as `max`: 0.5)."""

    rule: Literal["length"]
    """`length`"""
    min: int = Field(default=0, ge=0)
    """Shortest length with score 1."""
    max: int | None = Field(default=None, ge=1)
    """Longest length with score 1."""
    unit: Literal["words", "characters"] = "words"
    """What is counted. Every Chinese character counts as a word."""

    @model_validator(mode="after")
    def _a_range(self) -> LengthRule:
        if self.min == 0 and self.max is None:
            raise ValueError("needs `min`, `max` or both")
        if self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min}) is larger than max ({self.max})")
        return self


class FormatRule(Rule):
    """Rewards answers of a certain form. The score is the share of the conditions below that the answer meets."""

    rule: Literal["format"]
    """`format`"""
    starts_with: str | None = None
    """Text that it begins with."""
    ends_with: str | None = None
    """Text that it ends with."""
    contains: list[str] = Field(default=[])
    """Texts that it contains, such as headings of sections; each is a condition."""
    max_lines: int | None = Field(default=None, ge=1)
    """Largest number of lines, without blank ones."""

    @model_validator(mode="after")
    def _a_condition(self) -> FormatRule:
        if not (self.starts_with or self.ends_with or self.contains or self.max_lines):
            raise ValueError("needs at least one of starts_with, ends_with, contains and max_lines")
        return self


class RegexRule(Rule):
    """Rewards answers that match a regular expression: the score is 1 if it matches, else 0. If it takes longer than a
    second for an answer, that is an error."""

    rule: Literal["regex"]
    """`regex`"""
    pattern: Annotated[str, AfterValidator(pattern)]
    """The regular expression, in the syntax of the Python package `regex`, which is that of `re` with additions."""
    match: Literal["search", "full"] = "search"
    """`search`: anywhere in the answer. `full`: the whole of it."""


class JsonRule(Rule):
    """Rewards answers in JSON: the score is 1 if the whole answer is a JSON value (an object with the required keys, if
    there are any), else 0."""

    rule: Literal["json"]
    """`json`"""
    required: list[str] = Field(default=[])
    """Keys that the object must have."""


class LanguageMixRule(Rule):
    """Lowers the score of answers that mix Chinese and English: it is 1 for one language and 0 for half and half. (The
    GLM-4 report, https://arxiv.org/abs/2406.12793, says that RLHF reduced such mixing.)"""

    rule: Literal["language_mix"]
    """`language_mix`"""
    tolerance: float = Field(default=0.1, ge=0, lt=0.5)
    """Share of the less frequent language that does not lower the score, since names, units and code may be in it. A
    Chinese character counts as much as an English word."""


class RepetitionRule(Rule):
    """Lowers the score of answers that repeat themselves. The score is the number of different n-grams of words divided
    by the number of all."""

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
SCORERS: dict[str, type[ScorerSpec]] = {
    "model": ModelScorer,
    "function": FunctionScorer,
    "ensemble": EnsembleScorer,
    "policy": ImplicitScorer,
}
"""The key by which each kind of scorer is recognised; rules are recognised by the value of `rule`."""


def _scorer(value: Any) -> Any:
    """Makes a mapping of a text (a model or a function); a mapping is validated by the class that its keys select."""
    if isinstance(value, ScorerSpec):
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
