"""The mapping that `format` and `columns` of a data source accept, which says how rows of any shape are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from align.recipe.language.marks import Reference
from align.recipe.language.strict import Strict, unknown_name_of
from align.recipe.rows.places import Place, place, template
from align.recipe.rows.presets import PRESETS


def _place(text: str) -> str:
    template(text)  # raises ValueError
    return text


At = Annotated[str, AfterValidator(_place), Field(min_length=1)]
"""A place in a row, or a text with places."""


def _only_place(text: str) -> str:
    place(text)  # raises ValueError
    return text


PlaceText = Annotated[str, AfterValidator(_only_place), Field(min_length=1)]
"""A single place in a row. Texts with places are not allowed, because the value is compared and not used as text."""


class Constant(Strict):
    """The same text for every row."""

    value: str
    """The text."""


class FileAt(Strict):
    """The same for every row, from a file beside the recipe."""

    file: Annotated[str, Reference(hub=False), Field(min_length=1)]
    """A JSON file, such as a list of tools."""


class SystemAt(Strict):
    """Where the system's text stands, in a list of places for the prompt."""

    system: At
    """The place."""


class Better(Strict):
    """How a row tells which answer is better: one of `winner`, `score`, `signed`, `ranking`, `position` and `label`."""

    winner: PlaceText | None = None
    """A value that names the best answer. If several judges compared the answers, a list of such values; their votes
    are counted."""
    score: PlaceText | Annotated[list[PlaceText], Field(min_length=1)] | None = None
    """One number for each answer. With `chosen` and `rejected`: two places, and the number of the rejected answer must
    not be the better one."""
    signed: PlaceText | None = None
    """One number for two answers, whose sign names the better one; `negative` says which."""
    ranking: PlaceText | None = None
    """The answers' names or numbers, the best first: a list, or a text such as `A>B=C`. With several judges, the mean
    rank counts."""
    position: bool = False
    """The answers are listed in order, the best first."""
    label: PlaceText | None = None
    """Whether an answer is good (true or 1) or not (false or 0), each judged by itself; `good` and `bad` name other
    values."""
    values: list[str | int | bool] = Field(default=[])
    """The values of `winner` that stand for the first answer, the second, and so on. When absent, the answers are
    numbered from 0. Upper and lower case and blanks make no difference."""
    ties: list[str | int | bool] = Field(default=[])
    """The values of `winner` that mean that no answer is better."""
    order: Literal["high", "low"] = "high"
    """Whether a `high` or a `low` score is better; ranks are `low`."""
    negative: Literal[0, 1] | None = None
    """Which answer (0 the first, 1 the second) a negative `signed` number favours."""
    good: list[str | int | bool] = Field(default=[])
    """The values of `label` that mean that an answer is good, if they are not true or 1: `[up]`. Upper and lower case
    and blanks make no difference."""
    bad: list[str | int | bool] = Field(default=[])
    """The values of `label` that mean that an answer is bad: `[down]`. Any other value is an error; an empty one means
    that nobody judged the answer."""
    names: list[str] = Field(default=[])
    """The names that `ranking` uses for the answers."""
    only: dict[PlaceText, str | int | bool] = Field(default={})
    """Count only votes that have this value in another list of the same length, such as `{votes.status: submitted}`."""

    @model_validator(mode="after")
    def _one(self) -> Better:
        named = [name for name in ("winner", "score", "signed", "ranking", "label") if getattr(self, name) is not None]
        named += ["position"] * self.position
        if len(named) != 1:
            raise ValueError(
                f"needs one of winner, score, signed, ranking, position, label; has {' and '.join(named) or 'none'}"
            )
        if self.signed is not None and self.negative is None:
            raise ValueError("`signed` needs `negative: 0` or `negative: 1`: which answer a negative number favours")
        owners = {
            "values": "winner",
            "ties": "winner",
            "names": "ranking",
            "only": "winner",
            "negative": "signed",
            "order": "score",
            "good": "label",
            "bad": "label",
        }
        for key, owner in owners.items():
            if key in self.model_fields_set and owner != named[0]:
                raise ValueError(f"`{key}` belongs to `{owner}`, and has no effect on `{named[0]}`")
        if bool(self.good) != bool(self.bad):
            raise ValueError("`good` and `bad` belong together: each lists the values of `label` that stand for it")
        both = {str(value).strip().lower() for value in self.good} & {str(value).strip().lower() for value in self.bad}
        if both:
            raise ValueError(f"`good` and `bad` both list {', '.join(sorted(both))}")
        return self


class Dialogue(Strict):
    """A text that contains a whole dialogue. It is cut into turns at the marks of the speakers. A first piece without a
    mark is the user's turn."""

    within: list[At] = Field(default=[], alias="in")
    """The places that hold such texts. When absent, the prompt, or the answers if there is no prompt."""
    user: str = Field(min_length=1)
    """The mark of the user, such as `"\\n\\nHuman:"`."""
    assistant: str = Field(min_length=1)
    """The mark of the assistant."""
    system: str | None = None
    """The mark of the system."""
    tool: str | None = None
    """The mark of a tool's result."""
    end: str | None = None
    """The mark that ends a turn of the assistant. A last turn without it was cut off, so its end is not trained."""


class Turns(Strict):
    """The names of the parts of a turn, if they are not the usual ones."""

    role: str | None = None
    """The speaker."""
    content: str | list[str] | None = None
    """The text. With several keys, the first whose text is not empty."""
    reasoning: str | None = None
    """The assistant's reasoning before the answer."""
    train: str | None = None
    """Whether the turn is trained on."""
    roles: dict[Literal["system", "user", "assistant", "tool"], str | list[str]] = Field(default={})
    """Other names that the data use for the speakers."""
    pairs: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    """Instead of turns, each item of the list has a question and its answer, under these two keys."""


class Tags(Strict):
    """Marks in the assistant's texts. Reasoning and tool calls that stand between an opening and a closing mark become
    fields of the message; other marks are removed."""

    reasoning: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    """Reasoning, for example `["<think>", "</think>"]`."""
    calls: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    """A tool call as JSON, for example `["<tool_call>", "</tool_call>"]`."""
    results: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    """Marks around the result of a tool; they are removed."""
    drop: list[str] = Field(default=[])
    """Marks that are removed."""


class TreeAt(Strict):
    """Messages that answer each other, one in a row or nested inside it. The assistant's messages with the same parent
    are the answers to compare, and the path from the first message to them is the prompt."""

    id: str | None = None
    """A message's own id."""
    parent: str | None = None
    """The id of the message that it answers."""
    root: PlaceText | None = None
    """The place of the first message of a nested tree."""
    children: str | None = None
    """The key under which a message holds its answers."""
    score: str | None = None
    """How good a message is."""
    order: Literal["high", "low"] = "high"
    """Whether a `high` or a `low` score is better."""


class RowMapping(Strict):
    """Says what each place in a row holds. Places are written `a.b`, `a[*].b`, `a[-1]`, `a[:2]`, `a[key=value]`; if the
    value on the way is a text of JSON, it is parsed. `align data formats` shows the mappings of known data sets."""

    preset: str | None = None
    """Start from a known mapping; the other keys of this mapping replace its keys."""
    messages: At | None = None
    """A whole conversation: a list of turns."""
    prompt: At | SystemAt | Annotated[list[At | SystemAt], Field(min_length=1)] | None = None
    """The prompt: a place, a text with places (`"{title}\\n\\n{body}"`), or a list of these. When absent, the turns
    that all answers begin with."""
    completion: At | Constant | None = None
    """The answer."""
    chosen: At | None = None
    """The better answer, or a list of equally good ones."""
    rejected: At | None = None
    """The worse answer, or several."""
    answers: At | Annotated[list[At], Field(min_length=1)] | None = None
    """Answers to compare; `better` says how the row tells which is better."""
    better: Better | None = None
    """How the row tells which answer is better."""
    grades: dict[str, PlaceText] = Field(default={})
    """For a reward model that is trained on grades: the name of each grade and its place in the row, as in
    `{helpfulness: scores.help, brevity: scores.short}`; with several `answers`, places of lists. A grade that is null
    or empty is left out."""
    group: At | Annotated[list[At], Field(min_length=1)] | None = None
    """Rows with the same value here belong together: they answer the same prompt. Votes add up, scores are averaged."""
    tree: TreeAt | None = None
    """Rows that form trees."""
    pairs: Literal["best", "each", "all", "ends"] = "best"
    """Which preferences to make. `best`: the best answer against all worse ones; `each`: the same for each of several
    equally best answers; `all`: every answer against all worse ones; `ends`: the best against the worst."""
    min_gap: float | None = Field(default=None, gt=0)
    """A smaller difference of scores or votes counts as a tie."""
    margin: At | None = None
    """By how much the chosen answer is better. `gap` computes it for each rejected answer, as the difference of scores
    or votes. Otherwise a place: of one number for all rejected answers, or of a list with a number for each."""
    json_texts: list[At] = Field(default=[], alias="json")
    """Places whose text is to be parsed as JSON, where a text that looks like a list might also be meant as text."""
    dialogue: Dialogue | None = None
    """For texts that contain whole dialogues, with marks such as `Human:` before each speaker's turns."""
    weave: bool = False
    """Lists of texts are turns that alternate, the user's first. A list of prompts and a list of answers are the user's
    and the assistant's turns."""
    turns: Turns | None = None
    """The names of the parts of a turn."""
    system: At | Constant | None = None
    """The system message. An empty text means that there is none."""
    tools: At | Constant | FileAt | Annotated[list[At], Field(min_length=1)] | None = None
    """The tools that the assistant may call: a place, a list of places (the first one that has tools counts), or
    `{file: tools.json}` for every row."""
    reasoning: At | None = None
    """The assistant's reasoning before the completion."""
    tags: Tags | None = None
    """Marks inside the assistant's texts."""
    train: PlaceText | None = None
    """Which of the assistant's messages are trained on: `all`, `last`, or a place with one flag for each message."""
    finished: dict[PlaceText, list[str | bool | int]] | None = None
    """A place, and the values there that mean that the last answer is complete: `{finish_reason: [stop]}`. With other
    values the answer is trained without its end token."""
    repair: list[Literal["leading_assistant", "trailing_user", "same_speaker"]] = Field(default=[])
    """Repair these conversations: leave out what the assistant says before the user's first turn, or what the user says
    after the assistant's last one, or join two turns in a row of the same speaker. Repaired conversations are
    counted."""
    answer: At | None = None
    """The right answer, for rewards that check it."""
    extract: Literal["####", "boxed"] | dict[Literal["tag", "after", "regex"], str] | None = None
    """How to find the right answer in the text of `answer`: after the last `####`, in the last `boxed`, in a tag, after
    a text, or by the group of a regular expression."""
    id: At | None = None
    """The row's id."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("preset"), str):
            name = value["preset"]
            if name not in PRESETS:
                raise unknown_name_of(f"no preset `{name[:60]}`; `align data formats` lists them", PRESETS)
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> RowMapping:
        if self.preset is not None:
            for part in PRESETS[self.preset].parts:
                merged = {**part.mapping, **self.given()}
                RowMapping.model_validate(merged)
            return self
        kinds = [
            name for name in ("messages", "completion", "chosen", "answers", "tree") if getattr(self, name) is not None
        ]
        if len(kinds) > 1:
            raise ValueError(f"{' and '.join(kinds)} are different kinds of rows; name one")
        if not kinds and self.prompt is None:
            raise ValueError(
                "needs messages, prompt and completion, chosen and rejected, answers and better, tree, or a prompt"
            )
        if (self.chosen is None) != (self.rejected is None):
            raise ValueError("chosen and rejected belong together")
        if self.answers is not None and self.better is None and not self.grades:
            raise ValueError("answers need `better`: how the row tells which is better (or `grades`)")
        if self.grades and self.answers is None and self.completion is None and self.messages is None:
            raise ValueError("`grades` are of answers, a completion or messages; name one")
        if self.completion is not None and self.prompt is None:
            raise ValueError("a completion needs a prompt")
        if self.weave and self.answers is not None and not isinstance(self.prompt, str):
            raise ValueError("`weave` needs a `prompt` that is one place: the list of the user's turns")
        if self.better is not None:
            self._fitting(self.better)
        if self.group is not None and (self.answers is None or self.better is None):
            raise ValueError("`group` needs answers and better")
        if self.extract is not None and self.answer is None:
            raise ValueError("`extract` needs `answer`")
        return self

    def _fitting(self, better: Better) -> None:
        """Raises ValueError when `better` does not apply to rows of this kind."""
        if self.tree is not None or (self.messages is not None and better.label is None):
            raise ValueError(f"`better` has no effect on {'tree' if self.tree else 'messages'}")
        if self.chosen is not None and not (isinstance(better.score, list) and len(better.score) == 2):
            raise ValueError(
                "chosen and rejected are decided by name; `better` may only name the two scores that must agree"
            )
        if self.completion is not None and better.label is None:
            raise ValueError("a completion may only have `better: {label: ...}`; to compare rows use answers and group")

    def given(self) -> dict[str, Any]:
        """The keys that the recipe sets, as written."""
        written = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        written.pop("preset", None)
        return written

    def places(self, *, graded: bool = False) -> Iterator[Place]:
        """Every place that the mapping reads, with those of grades if ``graded``."""
        texts: list[Any] = [self.messages, self.completion, self.chosen, self.rejected, self.system, self.tools]
        texts += self.tools if isinstance(self.tools, list) else []
        texts += self.grades.values() if graded else []
        texts += [self.reasoning, self.id, *(self.finished or {})]  # the right answer's column stays with the record
        texts += self.prompt if isinstance(self.prompt, list) else [self.prompt]
        for several in (self.answers, self.group):
            texts += several if isinstance(several, list) else [several]
        if self.train not in (None, "all", "last"):
            texts.append(self.train)
        if self.margin != "gap":
            texts.append(self.margin)
        if self.tree is not None:
            tree = self.tree
            texts += [tree.id, tree.parent, tree.root, tree.children, tree.score]
            texts += ["text", "role"] if tree.parent else []
        if self.better is not None:
            better = self.better
            texts += [better.winner, better.signed, better.ranking, better.label, *better.only]
            texts += better.score if isinstance(better.score, list) else [better.score]
        for text in texts:
            text = text.system if isinstance(text, SystemAt) else text
            if isinstance(text, str):
                at = template(text)
                yield from [at] if isinstance(at, Place) else (part for part in at.parts if isinstance(part, Place))
