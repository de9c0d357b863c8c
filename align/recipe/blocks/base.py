"""What every part of a recipe is made of: references, data sources, models, and what all stages have in common."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from align.errors import InputError
from align.recipe.language.marks import ArtifactType as ArtifactType
from align.recipe.language.marks import RecordType as RecordType
from align.recipe.language.marks import Reference as Reference
from align.recipe.language.strict import Strict as Strict
from align.recipe.language.strict import unknown_name_of
from align.recipe.reference_syntax import import_object
from align.recipe.rows.mapping import RowMapping
from align.recipe.rows.places import place
from align.recipe.rows.presets import PRESETS

PolicyRef = Annotated[str, Reference(("policy",)), Field(min_length=1)]


def name_of_run(text: str) -> str:
    """Checks the name of a run. It is used as a directory name, so separators and `..` are not allowed."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text):
        raise ValueError("a name is 1 to 64 letters, digits, `.`, `_` or `-`, and begins with a letter or digit")
    return text


def name_of_stage(text: str) -> str:
    """Checks the name of a stage. It has no dot, since keys are written `stages.NAME.train`."""
    if "." in text:
        raise ValueError("the name of a stage has no `.`")
    return name_of_run(text)


FORMATS = ("messages", "preference", "unpaired", "graded", "prompt", "alpaca", "sharegpt", "hh_rlhf", "ultrafeedback")
"""Row formats that have a name; `align.data.formats.formats` implements them."""


def _format(text: str) -> str:
    if text in FORMATS:
        return text
    if text in PRESETS:
        if asks := PRESETS[text].asks:
            raise ValueError(f"{text} has to be told more: {asks}")
        return text
    try:
        if ":" not in text:
            known = (
                f"known: {', '.join(FORMATS)}, the presets that `align data formats` lists, or your own as"
                " package.module:function"
            )
            raise InputError(f"no format `{text[:80]}`; {known}")
        if not callable(import_object(text)):
            raise InputError(f"`{text[:80]}` is not a function")
    except InputError as error:
        raise unknown_name(error, (*FORMATS, *PRESETS)) from error
    return text


def unknown_name(error: InputError, known: Iterable[str]) -> PydanticCustomError:
    """The error of pydantic for an unknown name; ``known`` are the names from which a hint is chosen."""
    problem = error.problems[0]
    return unknown_name_of("; ".join(filter(None, (problem.message, problem.hint))), known)


def _encoding(text: str) -> str:
    try:
        "a".encode(text)
        return codecs.lookup(text).name
    except (LookupError, UnicodeError, ValueError) as error:
        raise ValueError(f"no encoding `{text[:80]}`; for example utf-8, utf-16, cp1252, gb18030, shift_jis") from error


def _listed(value: Any) -> Any:
    """Makes a list of a single path or source."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


def _place(text: str) -> str:
    place(text)
    return text


Scalar = str | int | float | bool | None


class Condition(Strict):
    """A condition that `where` of a data source may have for a place, instead of a value."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    min: float | None = None
    """A number at least this large. Text that can be read as a number counts as one, since a CSV cell is always
    text."""
    max: float | None = None
    """A number at most this large."""
    not_: Scalar | list[Scalar] = Field(default=None, alias="not")
    """Anything but this value, or these values. `null` means that there is no value, as in an empty cell of a CSV or
    TSV file."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("an empty condition: expected `min`, `max` or `not`")
        return self


class Join(Strict):
    """Another file with the rest of each row, such as the questions to a file of answers."""

    path: Annotated[str, Reference(hub=False), Field(min_length=1)]
    """The other file. Its columns are added to the row, except those that the row already has."""
    on: Annotated[str, AfterValidator(_place)] | Annotated[dict[str, str], Field(min_length=1, max_length=1)]
    """The place that says which rows belong together, such as `custom_id`; or `{our place: the other file's place}`."""

    @property
    def places(self) -> tuple[str, str]:
        """The joining place in the row, and that in the other file."""
        return (self.on, self.on) if isinstance(self.on, str) else next(iter(self.on.items()))


Reading = Annotated[
    Annotated[str, AfterValidator(_format), Tag("name")] | Annotated[RowMapping, Tag("mapping")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "mapping"),
]
"""The name of a row format, or a mapping."""


class DataSource(Strict):
    """Rows of one file, folder, hub data set or stage."""

    path: Annotated[str, Reference(("preferences", "prompts")), Field(min_length=1)]
    """A local file (JSON lines, JSON, CSV, TSV, Parquet, Arrow; texts also compressed), a folder,
    `stage:NAME`, `package:PKG/FILE`, or a hub data set id."""
    format: Reading | None = None
    """The format of the rows: a name (`messages`, `preference`, `unpaired`, `graded`, `prompt`, `alpaca`, `sharegpt`,
    `hh_rlhf`, `ultrafeedback`, or a preset that `align data formats` lists), your own converter
    (`package.module:function`), or a mapping. When absent, it is recognised from the first rows."""
    columns: RowMapping | None = None
    """A row mapping like that of `format`, under the name that other tools use for it: `columns: {prompt: Question,
    completion: Reply}`."""
    split: str | None = Field(default=None, min_length=1)
    """Split of a hub data set, or of a folder whose files are sorted by split. `train` when absent."""
    subset: str | None = Field(default=None, min_length=1)
    """Subset (configuration) of a hub data set that has several, or of a downloaded copy, such as `main` of
    `openai/gsm8k`."""
    revision: str | None = None
    """Commit of a hub data set. Pin it to make a run repeatable."""
    encoding: Annotated[str, AfterValidator(_encoding)] | None = None
    """Encoding of a text file that is not UTF-8, such as `cp1252`, `utf-16` or `gb18030`. When absent, it is recognised
    if the file leaves no doubt, and the run says which it is."""
    separator: Literal[",", ";", "\t", "|"] | None = None
    """The character between the columns of a text table. When absent, it is recognised from the header, and the run
    says which it is."""
    rows: str | None = Field(default=None, min_length=1)
    """Where the rows are in a `.json` file that is one object: `data`, `data.train`; `.` if the object itself is the
    only row."""
    where: dict[Annotated[str, AfterValidator(_place)], Scalar | list[Scalar] | Condition] = Field(default={})
    """Keep only rows with these values. Maps a place in the row (`lang`, `info.lang`, `turns[*].lang`) to a value, a
    list of allowed values, or a condition, for example `{lang: [en, de], score: {min: 3}, answer: {not: null}}`. `null`
    means that there is no value. An empty cell of a CSV or TSV file has no value; the text `""` in JSON is a value.
    Rows that are left out are counted."""
    unique: Annotated[str, AfterValidator(_place)] | None = None
    """Of rows that have the same value here, use only the first: `prompt` (the prompt, whatever the format calls it) or
    a place in the row. The others are counted."""
    explode: Annotated[str, AfterValidator(_place)] | None = None
    """A place that holds a list: the row becomes one row for each item, which takes the place of the list. In these
    rows, `where` compares other lists of the same length item by item. So a list of verdicts, for example, can select
    from a list of answers."""
    ignore: list[str] = Field(default=[])
    """Columns to ignore, as if they were not there."""
    join: Join | None = None
    """Another file with the rest of each row: `{path: questions.jsonl, on: custom_id}`."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first N rows that `where` keeps."""
    weight: float | None = Field(default=None, gt=0)
    """Share in a mixture, relative to the other sources. All sources have a weight, or none has (then: every row
    once)."""
    on_bad_row: Literal["error", "skip"] = "error"
    """`error` stops at bad rows and lists them; `skip` writes them to a rejects file with line and reason, and counts
    them."""

    @property
    def reading(self) -> str | RowMapping | None:
        """How rows are read, from either of the two keys."""
        return self.columns if self.columns is not None else self.format

    @property
    def own_format(self) -> str | None:
        """The user's own converter, as ``module:function``."""
        return self.format if isinstance(self.format, str) and ":" in self.format else None

    @model_validator(mode="after")
    def _one_reading(self) -> Self:
        if self.columns is not None and self.format is not None:
            raise ValueError("`format` and `columns` both say how rows are read; give one")
        return self


def _all_or_none_weighted(sources: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
    if len({source.weight is None for source in sources}) > 1:
        raise ValueError("some sources have a `weight` and some have none; give all a weight, or none")
    return sources


Data = Annotated[
    tuple[DataSource, ...], BeforeValidator(_listed), Field(min_length=1), AfterValidator(_all_or_none_weighted)
]


def _day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise ValueError(f"`{text[:40]}` is no date; write it as year, month and day: 2026-11-30") from None


class Model(Strict):
    """The model that the recipe starts from."""

    path: Annotated[str, Reference(), Field(min_length=1)]
    """A local folder or `.gguf` file, `package:PKG/FILE`, or a hub id."""
    revision: str | None = None
    """Commit of a hub model. Pin it to make a run repeatable."""
    chat_template: Annotated[str, Reference(hub=False), Field(min_length=1)] | None = None
    """A Jinja file that replaces the model's own chat template."""
    chat_template_kwargs: dict[str, str | int | bool] = Field(default={})
    """Passed to the chat template everywhere: training, rollouts, scoring, chat."""
    chat_template_date: Annotated[str, AfterValidator(_day)] | None = None
    """The date that a chat template gets if it prints the current date, such as `2026-11-30`. When absent 2024-07-26,
    so that no result depends on the day on which it was made. Refused for a template that prints no date."""


def as_model(value: Any) -> Any:
    """A path stands for a model with nothing else said."""
    return {"path": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class RowLimits:
    """How long the rows of a source may be, and which of their messages are used."""

    max_length: int
    """Longest row, in tokens of the stage's model."""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to longer ones."""
    train_on: Literal["all", "last"] = "last"
    """Which assistant messages of a conversation are used."""
    room: int = 0
    """Tokens of `max_length` that stay free for an answer which the stage samples."""


@dataclass(frozen=True)
class RowUse:
    """What a stage that trains on rows uses of them besides their tokens."""

    grades: tuple[str, ...] = ()
    """The grades of answers that are learned, in this order."""
    filters: bool = False
    """Leave out preferences that contradict each other, and prompts of the held-out data."""
    length_balance: bool = False
    """Draw pairs such that the longer answer wins as often as the shorter one."""
    margins: bool = False
    """The loss uses the margins of pairs."""
    needs_margins: str = ""
    """The key that has no effect, and is refused, if no pair has a margin; empty for none."""
    needs_votes: str = ""
    """The key that has no effect, and is refused, if no judges disagree; empty for none."""


class Stage(Strict):
    """The base of all stages. Its fields are the keys that every stage has; its class variables describe a kind of
    stage.

    A third party's stage is a subclass, used as `kind: package.module:Class`. Only `produces` and `implementation` are
    required."""

    produces: ClassVar[ArtifactType]
    """Type of the result."""
    implementation: ClassVar[str]
    """`module:function`, imported only when the stage runs: `function(spec, context) -> None`."""
    words: ClassVar[str] = ""
    """Name of the kind in sentences, such as `supervised fine-tuning`; that of the recipe when empty."""
    starts_from: ClassVar[str] = "policy"
    """The field that names the model which the stage starts from. If it is absent or empty, that is the recipe's
    `model`; if it is a list, the first entry."""
    reads: ClassVar[Mapping[str, RecordType]] = {}
    """Fields with data, and the record type of each. The first rows of these data are checked before a run."""
    trains_on: ClassVar[tuple[str, ...]] = ("data", "prompts")
    """Fields with the data that a result is trained on or made from. The report warns when a policy is evaluated on
    them."""
    keeps_checkpoints: ClassVar[bool] = False
    """Does an interrupted stage resume from checkpoints of the trainer only? False for a stage that keeps its progress
    in the work folder in another way."""
    always_samples: ClassVar[bool] = False
    """Does the stage always open the engine of its `rollout`, or does that depend on its other keys?"""
    version: ClassVar[int] = 1
    """Version of the results. Raise it when the same configuration and inputs give another result than before: stages
    of this kind then run again."""
    plan: ClassVar[str] = "align.planning.training:TrainingPlanner"
    """`module:Class` of a subclass of `align.planning.planner.Planner`, which gives the rows of a stage's plan and its
    requirements. The module must not import torch."""
    view: ClassVar[str] = "align.report.views.view:View"
    """`module:Class` of a subclass of `align.report.views.view.View`, which says what the report shows. The module must
    not import torch."""
    files: ClassVar[Mapping[str, str]] = {}
    """Files of a result besides those that every result of its type has: pattern of the name -> what it is, for the
    README of the run folder."""
    neutral: ClassVar[tuple[str, ...]] = ()
    """Keys that do not change the result: a stage does not run again when only these change."""

    kind: str
    """Which stage this is."""
    seed: int | None = Field(default=None, ge=0)
    """Replaces the recipe's seed for this stage."""

    def neutral_keys(self) -> tuple[str, ...]:
        """:attr:`neutral`, and the keys that do not change the result because of the values of other keys."""
        return self.neutral

    @property
    def starting_model(self) -> str | None:
        """The value of the field :attr:`starts_from`; None for the recipe's model."""
        named = getattr(self, type(self).starts_from, None)
        return next(iter(named), None) if isinstance(named, (list, tuple)) else named

    def record_types(self) -> Mapping[str, RecordType]:
        """:attr:`reads`; overridden if the record type depends on other keys."""
        return type(self).reads

    def sources(self) -> Iterator[tuple[str, DataSource, RecordType]]:
        """(key inside the stage, source, record type) of all data sources."""
        for name, wanted in self.record_types().items():
            for i, source in enumerate(getattr(self, name) or ()):
                yield f"{name}.{i}", source, wanted

    def row_limits(self, key: str) -> RowLimits | None:
        """How long the rows of the source at ``key`` (:meth:`sources`) may be; None when the stage has no limit, or
        makes its prompts of several rows."""
        length = getattr(self, "max_length", None)
        return RowLimits(length, getattr(self, "too_long", "drop")) if isinstance(length, int) else None

    def row_use(self) -> RowUse:
        """What the training uses of the rows besides their tokens."""
        return RowUse()

    def refuses_start(self, made_by: Stage) -> tuple[str, str] | None:
        """(why this stage cannot start from the result of ``made_by``, what to do); None when it can."""
        return None
