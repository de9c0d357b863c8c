"""What the first rows of a file decide when nobody says how it is read: a bad first row, transcripts, pictures. And
huge numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align.data.formats.formats import Want
from align.data.records import Preference, Prompt, Record, Unpaired
from align.data.sources.mixture import read_records
from align.errors import InputError
from align.recipe.schema import DataSource
from align.scoring import scorer
from align.scoring.scorer import Answer
from align.scoring.stored import score_answers

ASK, SAY, WORSE = "What is the capital?", "Paris, of course.", "Lyon, I think."


def turns(*said: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def read(folder: Path, rows: list[Any], want: Want, **keys: Any) -> list[Record]:
    """A text stands for a line as it is."""
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return list(read_records([DataSource(path=str(path), **keys)], [path], want, seed=0, rejects=None))


# A bad first row

GOOD: dict[str, tuple[Want, dict[str, Any]]] = {
    "messages": ("conversation", {"messages": turns(ASK, SAY)}),
    "prompt and completion": ("conversation", {"prompt": ASK, "completion": SAY}),
    "own words": ("conversation", {"question": ASK, "response": SAY}),
    "sharegpt": ("conversation", {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": SAY}]}),
    "alpaca": ("conversation", {"instruction": ASK, "input": "", "output": SAY}),
    "pair": ("preference", {"prompt": ASK, "chosen": SAY, "rejected": WORSE}),
    "hh": (
        "preference",
        {"chosen": f"\n\nHuman: {ASK}\n\nAssistant: {SAY}", "rejected": f"\n\nHuman: {ASK}\n\nAssistant: {WORSE}"},
    ),
    "label": ("unpaired", {"prompt": ASK, "completion": SAY, "label": True}),
    "prompt": ("prompt", {"prompt": ASK}),
}
BAD: dict[str, Any] = {
    "no JSON": "{",
    "no object": [1, 2],
    "empty object": {},
    "all null": None,
    "other columns": {"zzz": 1},
    "numbers": 3,
}


def _bad(how: str, good: dict[str, Any]) -> Any:
    if how in ("all null", "numbers"):
        return dict.fromkeys(good, BAD[how])
    return BAD[how]


@pytest.mark.parametrize("how", BAD)
@pytest.mark.parametrize("kind", GOOD)
def test_a_bad_first_row_is_a_bad_row_and_no_other_format(kind: str, how: str, tmp_path: Path) -> None:
    """The others are read as they would be without it, and the problem names its line alone."""
    want, good = GOOD[kind]
    if (kind, how) == ("own words", "numbers"):
        pytest.skip("a mapping takes numbers for texts")
    rows = [{**good, "id": f"r{i}"} for i in range(3)]
    expected = read(tmp_path, rows, want)
    with pytest.raises(InputError) as caught:
        read(tmp_path, [_bad(how, good), *rows], want)
    told = [problem for problem in caught.value.problems if problem.line is not None]
    assert [problem.line for problem in told] == [1]
    found = read(tmp_path, [_bad(how, good), *rows], want, on_bad_row="skip")
    assert [(type(one), one.id, said(one)) for one in found] == [(type(one), one.id, said(one)) for one in expected]


def said(record: Record) -> list[Any]:
    parts = [getattr(record, name, ()) for name in ("messages", "prompt", "chosen", "rejected", "completion")]
    return json.loads(json.dumps(parts))


# Transcripts

TRANSCRIPT = f"\n\nHuman: Hello.\n\nAssistant: Hello to you.\n\nHuman: {ASK}\n\nAssistant:"
ASKED = turns("Hello.", "Hello to you.", ASK)


@pytest.mark.parametrize(
    ("want", "row"),
    [
        ("prompt", {"prompt": TRANSCRIPT}),
        ("prompt", {"prompt": TRANSCRIPT, "answer": SAY}),
        ("prompt", {"question": TRANSCRIPT}),
        ("conversation", {"prompt": TRANSCRIPT, "completion": SAY}),
        ("conversation", {"prompt": TRANSCRIPT, "response": SAY}),
        ("conversation", {"instruction": TRANSCRIPT, "output": SAY}),
        ("preference", {"prompt": TRANSCRIPT, "chosen": SAY, "rejected": WORSE}),
        ("preference", {"question": TRANSCRIPT, "chosen": SAY, "rejected": WORSE}),
        ("preference", {"instruction": TRANSCRIPT, "chosen": SAY, "rejected": WORSE}),
        ("preference", {"prompt": TRANSCRIPT, "chosen": turns(ASK, SAY)[1:], "rejected": turns(ASK, WORSE)[1:]}),
        ("preference", {"prompt": TRANSCRIPT, "chosen": SAY, "rejected": WORSE, "margin": 2.0}),
        (
            "preference",
            {"prompt": TRANSCRIPT, "chosen": SAY, "rejected": WORSE, "score_chosen": 2, "score_rejected": 1},
        ),
        ("unpaired", {"prompt": TRANSCRIPT, "completion": SAY, "label": True}),
        ("unpaired", {"question": TRANSCRIPT, "response": SAY, "label": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_transcript_in_the_prompt_is_a_dialogue(want: Want, row: dict[str, Any], tmp_path: Path) -> None:
    """Whatever stands beside it: no model is trained on a user who says "Human:"."""
    (record,) = read(tmp_path, [row], want)
    asked = record.prompt if isinstance(record, (Prompt, Preference, Unpaired)) else record.messages[:-1]
    assert [(message["role"], message["content"]) for message in asked] == [
        (turn["role"], turn["content"]) for turn in ASKED
    ]
    if "margin" in row:
        assert isinstance(record, Preference) and record.margins == (2.0,)


@pytest.mark.parametrize(
    "text", ["Human: is that a name?", "What does\n\nHuman: a\n\nAssistant: b\n\nmean?", "Write: \n\nAssistant:"]
)
def test_a_text_that_only_speaks_of_speakers_is_a_text(text: str, tmp_path: Path) -> None:
    (record,) = read(tmp_path, [{"prompt": text, "completion": SAY}], "conversation")
    assert said(record)[0][0]["content"] == text


# Pictures

PICTURE = {"type": "image_url", "image_url": {"url": "data:..."}}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("kind", GOOD)
def test_rows_with_pictures_are_refused_when_the_format_is_found(kind: str, place: int, tmp_path: Path) -> None:
    """Also where only one of the first rows has them; empty columns and nulls are no pictures."""
    want, good = GOOD[kind]
    empty: list[dict[str, Any]] = [{**good, "images": value} for value in ([], None)]
    assert len(read(tmp_path, empty, want)) == 2
    empty[place]["images"] = ["cat.png"]
    with pytest.raises(InputError, match="has images, and a text model cannot take them"):
        read(tmp_path, empty, want)


@pytest.mark.parametrize(
    "part",
    [PICTURE, {"type": "image"}, {"type": "input_audio", "input_audio": {}}, {"type": "video", "video": "a.mp4"}],
)
def test_pictures_inside_a_message_are_refused(part: dict[str, Any], tmp_path: Path) -> None:
    asked = {"role": "user", "content": [{"type": "text", "text": ASK}, part]}
    with pytest.raises(InputError, match=r"rows.jsonl:1 messages\[?0?.*(image|audio|video|text)"):
        read(tmp_path, [{"messages": [asked, turns("", SAY)[1]]}], "conversation")


# Numbers

HUGE = [1e300, -1e300, 1e39]


@pytest.mark.parametrize("number", HUGE)
def test_margins_that_no_loss_can_compute_with_are_bad_rows(number: float, tmp_path: Path) -> None:
    """In fp32 they are infinite; found in their row, and not by a loss that is no number."""
    pair = {"prompt": ASK, "chosen": SAY, "rejected": WORSE}
    with pytest.raises(InputError, match=r"rows.jsonl:1 margin: "):
        read(tmp_path, [{**pair, "margin": number}], "preference")
    with pytest.raises(InputError, match=r"rows.jsonl:1 d: "):
        read(tmp_path, [{**pair, "d": number}], "preference", columns={**{key: key for key in pair}, "margin": "d"})


@pytest.mark.parametrize("number", HUGE)
def test_scores_of_data_choose_whatever_their_size(number: float, tmp_path: Path) -> None:
    mapping = {"prompt": "p", "answers": "a", "better": {"score": "s"}}
    (record,) = read(
        tmp_path, [{"p": ASK, "a": [WORSE, SAY], "s": [min(number, 0), max(number, 0)]}], "preference", columns=mapping
    )
    assert isinstance(record, Preference) and record.chosen[0]["content"] == SAY


class _Says:
    name = "mine"

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return self.scores


@pytest.mark.parametrize("number", HUGE)
def test_a_reward_that_cannot_be_computed_with_is_refused_when_it_is_given_and_when_it_is_read_back(
    number: float, tmp_path: Path
) -> None:
    """Also one that was kept by a version that took it."""
    answers = [Answer((), "a"), Answer((), "b")]

    def scores(*given: float) -> list[float]:
        options: dict[str, Any] = {
            "folder": tmp_path / "kept",
            "key": {"scorer": 1},
            "console": Console(quiet=True),
            "name": "s",
        }
        return score_answers(lambda: _Says(*given), answers, **options)

    with pytest.raises(InputError, match=r"the scorer mine gave .* as score 2 of 2; expected at most 1e.18 in size"):
        scores(1.0, number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "LARGEST", float("inf"))
        assert scores(1.0, number) == [1.0, number]
    with pytest.raises(InputError, match=r"as score 2 of 2; expected at most 1e.18 in size"):
        scores(1.0, 2.0)
