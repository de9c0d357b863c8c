"""IFEval on answers made by hand: every kind of instruction kept and broken, and strict against loose."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("if_verifiable", reason="IFEval's checkers are in the extra `eval`")
pytest.importorskip("punkt", reason="IFEval's sentences are in the extra `eval`")

from align.data.records import Origin, Prompt
from align.data.strict_json import RowError
from align.evaluation.tasks import ifeval
from align.evaluation.tasks.task import open_task
from align.recipe.kinds.tasks import IfevalTask

TASK = open_task(IfevalTask.model_validate({"task": "ifeval", "data": "ifeval.jsonl"}))

ENGLISH = "The weather in this part of the country is mild in spring and the gardens are full of flowers"
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "keywords:existence": ({"keywords": ["sun", "rain"]}, "Sun after rain.", "Sun after snow."),
    "keywords:frequency": ({"keyword": "tea", "frequency": 2, "relation": "at least"}, "Tea is tea.", "Tea is hot."),
    "keywords:forbidden_words": ({"forbidden_words": ["never"]}, "Always.", "Never."),
    "keywords:letter_frequency": ({"letter": "z", "let_frequency": 2, "let_relation": "at least"}, "Jazz.", "Zoo."),
    "language:response_language": (
        {"language": "de"},
        "Das Wetter ist heute sehr schön, und wir gehen in den Garten.",
        f"{ENGLISH}.",
    ),
    # "Dr." and "e.g." end no sentence, which a split at every period would get wrong
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        "Dr. Smith went home at 5 p.m. yesterday. He was tired.",
        "He went home. He was tired. He slept.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "One.\n***\nTwo.", "One.\n\nTwo."),
    "length_constraints:number_words": (
        {"num_words": 4, "relation": "at least"},
        "One two three four.",
        "One two three.",
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First this.\n\nThen that.",
        "First this.\n\nNow that.",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "Dear [name], from [place].", "Dear [name]."),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Yes.\nP.S. And more.", "Yes. And more."),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* One\n* Two", "* One\n* Two\n* Three"),
    "detectable_format:constrained_response": ({}, "My answer is yes.", "Yes."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*One* and *two*.", "*One* and two."),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Part", "num_sections": 2},
        "Part 1\na\nPart 2\nb",
        "Part 1\na",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{a: 1}"),
    "detectable_format:title": ({}, "<<A title>>\nText.", "A title\nText."),
    "combination:two_responses": ({}, "One.\n******\nTwo.", "One. Two."),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it again."}, "Say it again. It.", "It."),
    "startend:end_checker": ({"end_phrase": "That is all."}, "Well. That is all.", "That is all. Well."),
    "startend:quotation": ({}, '"Quoted."', '"Quoted." Not.'),
    # capitals glued to a period or a bracket are words of their own
    "change_case:capital_word_frequency": (
        {"capital_frequency": 3, "capital_relation": "at least"},
        "We saw NASA. Then (ESA) and JAXA.",
        "We saw NASA. Then ESA.",
    ),
    "change_case:english_capital": ({}, f"{ENGLISH.upper()}.", f"{ENGLISH}."),
    "change_case:english_lowercase": ({}, f"{ENGLISH.lower()}.", f"{ENGLISH}."),
    "punctuation:no_comma": ({}, "One and two.", "One, two."),
}


def prompt(*instructions: tuple[str, dict[str, Any]], text: str = "Say it again.") -> Prompt:
    row = {
        "key": 7,
        "prompt": text,
        "instruction_id_list": [name for name, _ in instructions],
        "kwargs": [s for _, s in instructions],
    }
    form = ifeval.as_prompt(json.loads(json.dumps(row)))
    return Prompt(({"role": "user", "content": text},), form["id"], Origin("f", 1), fields=form)


def test_there_are_25_kinds_and_all_are_tried() -> None:
    assert set(CASES) == set(ifeval.checkers()) and len(CASES) == 25


@pytest.mark.parametrize("kind", CASES)
def test_every_kind_kept_and_broken(kind: str) -> None:
    settings, kept, broken = CASES[kind]
    one = prompt((kind, settings))
    assert TASK.grade(one, kept) == {
        name: (1.0, 1.0) for name in ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
    }
    assert TASK.grade(one, broken)["prompt_strict"] == (0.0, 1.0)


def test_strict_and_loose_by_prompt_and_by_instruction() -> None:
    """A comma in the first line: strict sees it, loose also tries without that line. The title is missing in any
    case."""
    one = prompt(("punctuation:no_comma", {}), ("detectable_format:title", {}))
    assert TASK.grade(one, "Sure, here it is:\nNo commas here.") == {
        "prompt_strict": (0.0, 1.0),
        "prompt_loose": (0.0, 1.0),
        "instruction_strict": (0.0, 2.0),
        "instruction_loose": (1.0, 2.0),
    }
    only = prompt(("punctuation:no_comma", {}))
    assert TASK.grade(only, "Sure, here it is:\nNo commas here.")["prompt_loose"] == (1.0, 1.0)
    assert TASK.grade(only, "")["prompt_loose"] == (0.0, 1.0), "an empty answer follows nothing"


def test_the_eight_variants_of_the_paper() -> None:
    assert ifeval.variants("a\n*b*\nc") == ["a\n*b*\nc", "*b*\nc", "a\n*b*", "*b*", "a\nb\nc", "b\nc", "a\nb", "b"]


def test_the_hubs_rows_with_every_key_of_every_kind() -> None:
    """There an instruction's unused settings are null."""
    row = {
        "key": 1,
        "prompt": "p",
        "instruction_id_list": ["length_constraints:number_words"],
        "kwargs": [{"num_words": 2, "relation": "at least", "keyword": None, "language": None}],
    }
    assert ifeval.as_prompt(row)["kwargs"] == [{"num_words": 2, "relation": "at least"}]


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"instruction_id_list": []}, "instruction_id_list", "expected a list of instructions"),
        (
            {"instruction_id_list": ["punctuation:no_dots"]},
            "instruction_id_list",
            "no instruction of IFEval is called `punctuation:no_dots`",
        ),
        ({"kwargs": []}, "kwargs", "expected a list of 1 mappings"),
        ({"kwargs": [{"num_words": 3}]}, "kwargs", "punctuation:no_comma"),
    ],
)
def test_rows_that_cannot_be_used(change: dict[str, Any], field: str, message: str) -> None:
    row = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    with pytest.raises(RowError, match=message) as caught:
        ifeval.as_prompt({**row, **change})
    assert caught.value.field == field


def test_a_short_text_is_of_the_same_language_every_time() -> None:
    one = prompt(("language:response_language", {"language": "fi"}))
    assert len({TASK.grade(one, "Oslo no")["prompt_strict"] for _ in range(12)}) == 1


def test_brackets_without_end_break_nothing() -> None:
    assert TASK.grade(prompt(("detectable_format:json_format", {})), "[" * 100_000)["prompt_strict"] == (0.0, 1.0)
