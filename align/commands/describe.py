"""``align data describe``: statistics of data on one screen, to look at before training."""

from __future__ import annotations

import hashlib
import heapq
import json
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from align.commands.words_alone import TextPair, WordReport, told_apart
from align.data.chat.encoder import Encoder
from align.data.formats.formats import Want
from align.data.formats.own_format import form_of
from align.data.leakage import prompt_digest
from align.data.records import Conversation, Messages, Preference, Prompt, Record
from align.data.sources.mixture import read_records
from align.data.sources.source_report import SourceReport
from align.functional.intervals import Estimate
from align.recipe.schema import DataSource
from align.terminal import fixed

SAMPLE = 2_000
"""Number of pairs for measuring how well words alone predict preferences. They are those of the prompts with the
smallest digests, which is a random choice."""
_LETTERS = 400
"""Number of letters of a record by which its script is recognised."""
_SCRIPTS = {"CJK": "Han", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}


@dataclass
class Description:
    """The statistics of one source."""

    name: str
    want: Want
    read: SourceReport | None = None
    records: int = 0
    answers: int = 0
    """Number of answers of all records: chosen and rejected ones, or the only one of other types of records."""
    prompts: Counter[bytes] = field(default_factory=Counter)
    """Number of records for each prompt, by its digest."""
    seen: set[bytes] = field(default_factory=set)
    doubles: int = 0
    """Number of records equal to an earlier one."""
    lengths: dict[str, array[int]] = field(default_factory=dict)
    """Lengths in characters, and with a model in tokens, of each part."""
    differences: array[int] = field(default_factory=lambda: array("q"))
    """Length of the chosen minus that of the rejected answer in characters, for each pair."""
    margins: array[float] = field(default_factory=lambda: array("d"))
    labels: Counter[str] = field(default_factory=Counter)
    """Counts of the labels of answers that are judged by themselves."""
    scripts: Counter[str] = field(default_factory=Counter)
    told: WordReport | None = None
    _sample: list[tuple[int, int, TextPair]] = field(default_factory=list)

    def add(self, record: Record, tokens: Callable[[Record], dict[str, list[int]]] | None) -> None:
        """Count a record."""
        self.records += 1
        prompt = bytes.fromhex(prompt_digest(record))[:12]
        self.prompts[prompt] += 1
        said = {key: part for key, part in form_of(record).items() if key != "id"}
        digest = hashlib.sha256(
            json.dumps(said, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
        ).digest()[:12]
        self.doubles += digest in self.seen
        self.seen.add(digest)
        parts = parts_of(record)
        self.answers += sum(len(texts) for name, texts in parts.items() if name != "prompt")
        for name, texts in parts.items():
            self.lengths.setdefault(f"{name}, characters", array("q")).extend(map(len, texts))
        for name, counts in (tokens(record) if tokens else {}).items():
            self.lengths.setdefault(f"{name}, tokens", array("q")).extend(counts)
        self.scripts[script_of(" ".join(text for texts in reversed(parts.values()) for text in texts))] += 1
        if isinstance(record, Preference):
            self._compare(record, prompt, parts)
        for key in ("label", "grades"):
            if (value := getattr(record, key, None)) is not None:
                self.labels.update(
                    [f"{key}: {str(value).lower()}"] if key == "label" else [f"graded: {name}" for name in value]
                )

    def _compare(self, record: Preference, prompt: bytes, parts: dict[str, list[str]]) -> None:
        (chosen,) = parts["chosen"]
        self.differences.extend(len(chosen) - len(rejected) for rejected in parts["rejected"])
        self.margins.extend(record.margins or ())
        entry = (-int.from_bytes(prompt, "big"), self.records, TextPair(prompt.hex(), chosen, parts["rejected"][0]))
        if len(self._sample) < SAMPLE:
            heapq.heappush(self._sample, entry)
        else:
            heapq.heappushpop(self._sample, entry)

    def finish(self, read: SourceReport) -> None:
        """Called once all records were counted."""
        self.read = read
        self.told = told_apart([pair for _, _, pair in sorted(self._sample, key=lambda entry: entry[1])])


def parts_of(record: Record) -> dict[str, list[str]]:
    """The texts of a record by part: ``prompt``, and ``chosen`` and ``rejected``, or ``answer``."""
    if isinstance(record, Conversation):
        return {"prompt": [_text(record.messages[:-1])], "answer": [_text(record.messages[-1:])]}
    prompt = {"prompt": [_text(record.prompt)]}
    if isinstance(record, Prompt):
        return prompt
    if isinstance(record, Preference):
        return {**prompt, "chosen": [_text(record.chosen)], "rejected": [_text(answer) for answer in record.rejected]}
    return {**prompt, "answer": [_text(record.completion)]}


def _text(messages: Messages) -> str:
    return "\n".join(message["content"] for message in messages)


def script_of(text: str) -> str:
    """The script (Latin, Han, ...) of most letters of a text; ``none`` for a text without letters."""
    counts = Counter(map(_script, text[:_LETTERS]))
    del counts[""]
    return counts.most_common(1)[0][0] if counts else "none"


@lru_cache(maxsize=65_536)
def _script(character: str) -> str:
    if not character.isalpha():
        return ""
    first = unicodedata.name(character, "").partition(" ")[0]
    return _SCRIPTS.get(first, first.capitalize())


def describe(source: DataSource, location: Path | str, want: Want, encoder: Encoder | None = None) -> Description:
    """Count all records of a source. Bad rows are counted and skipped; they are in ``read``.

    Raises :class:`InputError` when there is nothing to read.
    """
    found = Description(source.path, want)
    records = read_records([source.model_copy(update={"on_bad_row": "skip"})], [location], want, seed=0, rejects=None)

    def tokens(record: Record) -> dict[str, list[int]]:
        assert encoder is not None
        texts = parts_of(record)
        return {
            name: [len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in part]
            for name, part in texts.items()
        }

    for record in records:
        found.add(record, tokens if encoder is not None else None)
    (read,) = records.report.sources
    found.finish(read)
    return found


# Output


def rows_of(found: Sequence[Description]) -> list[tuple[str, list[str]]]:
    """Rows of the table: a name, and the number for each source."""
    made = [_figures(one) for one in found]
    names = list(dict.fromkeys(name for figures in made for name in figures))
    return [(name, [figures.get(name, "") for figures in made]) for name in names]


def shared_lines(found: Sequence[Description]) -> list[str]:
    """For each two sources, how many prompts they share."""
    lines = []
    for one, other in combinations(found, 2):
        both = len(one.prompts.keys() & other.prompts.keys())
        lines.append(f"prompts in both {one.name} and {other.name}: {both:,}")
    return lines


def _figures(one: Description) -> dict[str, str]:
    assert one.read is not None
    several = [count for count in one.prompts.values() if count > 1]
    figures = {
        "rows": f"{one.read.read:,}",
        one.want: f"{one.records:,}",
        **{f"left out, {reason}": f"{count:,}" for reason, count in one.read.reasons.items()},
        **({"left out by where": f"{one.read.left_out:,}"} if one.read.left_out else {}),
        "bad rows": f"{one.read.bad:,}",
        **{f"times {what}": f"{count:,}" for what, count in one.read.notes.items()},
        "prompts": f"{len(one.prompts):,}"
        + (f"; {len(several):,} of them in several rows, up to {max(several):,}" if several else ""),
        "answers a prompt": f"{one.answers / max(1, len(one.prompts)):.2f}" if one.answers else "",
        "rows equal to an earlier one": f"{one.doubles:,}",
        **{name: _spread(values) for name, values in one.lengths.items()},
        **{name: f"{count:,}" for name, count in one.labels.most_common(8)},
        "letters": ", ".join(f"{name} {count / one.records:.0%}" for name, count in one.scripts.most_common(4)),
    }
    if one.want == "preference":
        figures |= _of_pairs(one)
    return {name: text for name, text in figures.items() if text}


def _of_pairs(one: Description) -> dict[str, str]:
    differences = np.array(one.differences)
    unequal = max(1, int((differences != 0).sum()))
    figures = {
        "longer answer chosen": f"{(differences > 0).sum() / unequal:.0%} of {unequal:,} pairs of unequal length"
    }
    if len(one.margins):
        values = np.array(one.margins)
        low, middle, high = (f"{value:.4g}" for value in (values.min(), np.median(values), values.max()))
        figures["margins"] = (
            f"{low} to {high}, median {middle}; {(values == 0).sum():,} ties, {(values < 0).sum():,} below 0"
        )
    else:
        figures["margins"] = "none"
    if one.told is None:
        figures["told by words alone"] = "too few pairs to say"
    else:
        figures |= {"told by length alone": _share(one.told.length), "told by words alone": _share(one.told.words)}
    return figures


def _spread(values: Iterable[int]) -> str:
    numbers: Any = np.array(values)
    middle, most, longest = np.quantile(numbers, [0.5, 0.9, 1.0])
    return f"median {middle:,.0f}, 90 % up to {most:,.0f}, longest {longest:,.0f}"


def _share(estimate: Estimate) -> str:
    text = fixed(estimate.mean, 3)
    bounds = (
        ""
        if estimate.low is None or estimate.high is None
        else f" [{fixed(estimate.low, 3)}, {fixed(estimate.high, 3)}]"
    )
    return f"{text}{bounds} of {estimate.count:,} pairs"
