"""From text to token ids, such that text of the data never becomes a control token.

A *marker* is the text of an added token (``<|im_end|>``, ``<think>``), flagged special or not; tokens of white space
alone are ordinary text. Before the chat template runs, markers in the data are replaced by stand-in words, so the
template does not act on them. The rendered text is then encoded by a copy of the tokenizer in which every marker has a
secret name: the template's markers are renamed, the stand-ins are replaced by the original text, and no text of the
data can equal a secret name.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from align.data.tree import Ids
from align.errors import InputError

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Marker:
    """An added token."""

    text: str
    id: int
    special: bool
    """Is it flagged special in the tokenizer?"""
    greedy: bool
    """Does it remove white space beside it?"""


@dataclass(frozen=True)
class Tokenized:
    """Ids of a text, and the tokens at asked positions."""

    ids: Ids
    places: tuple[int, ...]
    """For each asked character position, the number of tokens that begin before it."""
    merged: int
    """Number of cuts that fell inside a token or changed the tokens before them; the text was encoded in pieces at
    these."""


def any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """A pattern that matches any of ``texts``, the longest first; with no texts it matches nothing."""
    return re.compile("|".join(re.escape(t) for t in sorted(texts, key=lambda t: (-len(t), t))) or r"(?!)")


class _Exact:
    """A tokenizer and its markers by text."""

    def __init__(self, spec: dict[str, Any], markers: dict[str, int], anchors: Sequence[str]) -> None:
        self._tokenizer = Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
        if moved := [text for text, number in markers.items() if self._tokenizer.token_to_id(text) != number]:
            raise InputError(
                f"the tokenizer does not keep its added tokens apart from its vocabulary: {len(moved)} ids moved"
            )
        self._anchor = next(iter(anchors), "")
        self._pattern = any_of(list(markers))
        # The token for unknown characters, if there is one, is also produced by ordinary text.
        self._unknown = next((text for text, number in markers.items() if number == _unknown_id(spec)), None)
        self._is_marker = np.zeros(1 + max(self._tokenizer.get_vocab().values()), dtype=bool)
        self._is_marker[[number for text, number in markers.items() if text != self._unknown]] = True
        self._tails: dict[str, Ids] = {}

    def encode(self, text: str, cuts: Sequence[int]) -> tuple[Ids, Positions, int]:
        """Ids, the character each token begins at, and the number of merged cuts."""
        ids, starts, stops = self._run(text)
        torn = [cut for cut in cuts if not self._holds(text, cut, ids, starts, stops)]
        if not torn:
            return ids, starts, 0
        pieces = [self._piece(text, begin, end) for begin, end in zip([0, *torn], [*torn, len(text)], strict=True)]
        return np.concatenate([p[0] for p in pieces]), np.concatenate([p[1] for p in pieces]), len(torn)

    def _run(self, text: str) -> tuple[Ids, Positions, Positions]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int32)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        expected = sum(match[0] != self._unknown for match in self._pattern.finditer(text))
        if int(self._is_marker[ids].sum()) != expected:
            # Normalisation made a marker of other characters, or a marker's flags prevented it from matching.
            raise InputError(
                "the tokenizer reads a control token where the text has none",
                hint="remove such characters from the row",
            )
        return ids, offsets[:, 0], offsets[:, 1]

    def _piece(self, text: str, begin: int, end: int) -> tuple[Ids, Positions]:
        """Ids of ``text[begin:end]`` as the continuation of what is before it."""
        if begin == 0 or not self._anchor:
            ids, starts, _ = self._run(text[begin:end])
            return ids, starts + begin
        # With a marker before it, tokenizers that treat the start of a text specially (a leading space) do not do so.
        ids, starts, _ = self._run(self._anchor + text[begin:end])
        return ids[1:], starts[1:] + begin - len(self._anchor)

    def _holds(self, text: str, cut: int, ids: Ids, starts: Positions, stops: Positions) -> bool:
        """Are the tokens before ``cut`` the same as those of ``text[:cut]`` by itself? Tokens never cross a marker, so
        only those after the last marker are compared."""
        place = int(np.searchsorted(starts, cut))
        if place and stops[place - 1] > cut:
            return False
        begin = self._last_marker(text, cut)
        alone = self._alone(text[begin:cut])
        return len(alone) <= place and np.array_equal(alone, ids[place - len(alone) : place])

    def _alone(self, tail: str) -> Ids:
        """Ids of ``tail``, cached: in practice it is one of a few generation prompts."""
        known = self._tails.get(tail)
        if known is None:
            known = self._run(tail)[0]
            if len(tail) < 256 and len(self._tails) < 4096:
                self._tails[tail] = known
        return known

    def _last_marker(self, text: str, cut: int) -> int:
        window = 256
        while True:
            begin = max(0, cut - window)
            found = [match.start() for match in self._pattern.finditer(text, begin, cut)]
            if found or begin == 0:
                return found[-1] if found else 0
            window *= 8


def _unknown_id(spec: dict[str, Any]) -> int | None:
    model = spec["model"]
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    vocab = model["vocab"]
    return vocab.get(model.get("unk_token")) if isinstance(vocab, dict) else None


class Tokens:
    """A tokenizer made from the serialised form of another (``backend_tokenizer.to_str()``), with which it shares no
    state."""

    def __init__(self, serialised: str) -> None:
        spec: dict[str, Any] = json.loads(serialised)
        # The template writes all markers, so the tokenizer must add no special tokens, truncation or padding.
        spec.update(post_processor=None, truncation=None, padding=None)
        self._spec = spec
        # The names are random in every process, so data cannot contain them. Ids do not depend on them.
        nonce = secrets.token_hex(8)
        # Letters and digits only, which strip, JSON escapes and templates do not change
        self._stand_in = f"Qx{nonce}n{{}}xQ"
        self._private_name = f"\ue000{nonce}n{{}}\ue001"
        self.markers: dict[str, Marker] = {
            t["content"]: Marker(t["content"], t["id"], t["special"], t["lstrip"] or t["rstrip"])
            for t in spec["added_tokens"]
            if t["content"].strip()
        }
        self.pattern = any_of(list(self.markers))
        self._plain = _Exact(spec, {m.text: m.id for m in self.markers.values()}, [m.text for m in self._anchors()])

    @property
    def canonical(self) -> str:
        """Vocabulary, merges and everything else that ids depend on, as text."""
        return json.dumps(self._spec, ensure_ascii=False, sort_keys=True)

    def _anchors(self) -> list[Marker]:
        return [m for m in self.markers.values() if not m.greedy]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {text: number for number, text in enumerate(self.markers)}

    @cached_property
    def _private(self) -> dict[str, str]:
        return {text: self._private_name.format(number) for text, number in self._numbers.items()}

    @cached_property
    def _twin(self) -> _Exact:
        """The tokenizer with all markers renamed, in the list of added tokens and in the vocabulary."""
        spec = dict(self._spec)
        spec["added_tokens"] = [
            {**t, "content": self._private.get(t["content"], t["content"])} for t in spec["added_tokens"]
        ]
        model = dict(spec["model"])
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {self._private.get(piece, piece): number for piece, number in vocab.items()}
        else:  # unigram: [piece, score] in the order of ids
            model["vocab"] = [[self._private.get(piece, piece), score] for piece, score in vocab]
        if isinstance(unknown := model.get("unk_token"), str):
            model["unk_token"] = self._private.get(unknown, unknown)
        spec["model"] = model
        names = {self._private[m.text]: m.id for m in self.markers.values()}
        return _Exact(spec, names, [self._private[m.text] for m in self._anchors()])

    def hider(self, texts: Sequence[str]) -> Callable[[str], tuple[str, int]]:
        """A function that replaces the markers ``texts`` in a string by stand-ins, and returns how many it replaced."""
        pattern = any_of(texts)

        def hide(text: str) -> tuple[str, int]:
            return pattern.subn(lambda match: self._stand_in.format(self._numbers[match[0]]), text)

        return hide

    def encode(self, text: str, cuts: Sequence[int], places: Sequence[int], *, hidden: bool) -> Tokenized:
        """Encode ``text`` such that the tokens before each of ``cuts`` are those of the text up to there by itself.

        ``cuts`` and ``places`` are character positions, outside of markers and stand-ins. ``hidden`` says that the text
        has stand-ins. Raises InputError when normalisation would turn ordinary characters into a marker.
        """
        exact = self._plain
        if hidden:
            exact = self._twin
            text, moved = self._rename(text, [*cuts, *places])
            cuts, places = moved[: len(cuts)], moved[len(cuts) :]
        ids, starts, merged = exact.encode(text, cuts)
        return Tokenized(ids, tuple(int(p) for p in np.searchsorted(starts, places)), merged)

    @cached_property
    def _renames(self) -> tuple[re.Pattern[str], dict[str, str]]:
        back = {self._stand_in.format(number): text for text, number in self._numbers.items()}
        table = {**self._private, **back}
        return any_of(list(table)), table

    def _rename(self, text: str, positions: Sequence[int]) -> tuple[str, list[int]]:
        pattern, table = self._renames
        pieces: list[str] = []
        moved: dict[int, int] = {}
        begin = length = 0
        for position in [*sorted(set(positions)), len(text)]:
            pieces.append(pattern.sub(lambda match: table[match[0]], text[begin:position]))
            begin, length = position, length + len(pieces[-1])
            moved[position] = length
        return "".join(pieces), [moved[position] for position in positions]
