"""``align data describe``: every figure against one that is counted by hand here, and how far words alone go against
known truths."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from align.cli import app
from align.commands import describe as describing
from align.commands.describe import FileDescription, describe, rows_of, shared_lines
from align.commands.words_alone import TextPair, told_apart
from align.data.chat.encoder import Encoder
from align.data.description import script_of
from align.errors import InputError
from align.recipe.schema import DataSource
from tests.support import tokenizers


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def figures(path: Path, want: Any, encoder: Encoder | None = None, **keys: Any) -> dict[str, str]:
    found = describe(DataSource.model_validate({"path": str(path), **keys}), path, want, encoder)
    return {name: texts[0] for name, texts in rows_of([found])}


ROWS = [
    {"prompt": "Is it warm?", "chosen": "Yes.", "rejected": ["No.", "Perhaps it is."], "margin": [2, 0.5]},
    {"prompt": "Is  it warm?", "chosen": "It is.", "rejected": "It is not.", "margin": 0},
    {"prompt": "今天怎么样？", "chosen": "今天很好。", "rejected": "不好。", "margin": -1},
    {"prompt": "今天怎么样？", "chosen": "今天很好。", "rejected": "不好。", "margin": -1},
]


def test_the_figures_of_preferences(tmp_path: Path) -> None:
    found = figures(write(tmp_path / "a.jsonl", ROWS), "preference")
    assert found == {
        "rows": "4",
        "preference": "4",
        "bad rows": "0",
        "prompts": "2; 2 of them in several rows, up to 2",  # white space is no difference
        "answers a prompt": "4.50",
        "rows equal to an earlier one": "1",
        "prompt, characters": "median 8, 90 % up to 12, longest 12",
        "chosen, characters": "median 5, 90 % up to 6, longest 6",
        "rejected, characters": "median 3, 90 % up to 12, longest 14",
        "letters": "Latin 50%, Han 50%",
        "longer answer chosen": "60% of 5 pairs of unequal length",
        "margins": "-1 to 2, median 0; 1 ties, 2 below 0",
        "told by words alone": "too few pairs to say",
    }


def test_the_figures_of_other_kinds(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bcd"}]}
    found = figures(write(tmp_path / "c.jsonl", [chat]), "conversation")
    assert (found["conversation"], found["answer, characters"]) == ("1", "median 3, 90 % up to 3, longest 3")
    labelled = [{"prompt": "a", "completion": f"b{i}", "label": i == 0} for i in range(3)]
    found = figures(write(tmp_path / "k.jsonl", labelled), "unpaired")
    assert (found["label: true"], found["label: false"], found["answers a prompt"]) == ("1", "2", "3.00")
    found = figures(write(tmp_path / "p.jsonl", [{"prompt": "a"}]), "prompt")
    assert "answers a prompt" not in found and "margins" not in found


def test_tokens_are_those_of_the_model(tmp_path: Path) -> None:
    encoder = Encoder(tokenizers.chatml())
    found = figures(write(tmp_path / "a.jsonl", ROWS[:1]), "preference", encoder)
    length = len(encoder.tokenizer("Yes.", add_special_tokens=False)["input_ids"])
    assert found["chosen, tokens"] == f"median {length}, 90 % up to {length}, longest {length}"


def test_ties_and_other_losses_are_counted_by_their_reason(tmp_path: Path) -> None:
    rows = [{"q": "1+1?", "a": "2", "b": "3", "best": best} for best in ("A", "same", "same", "")]
    better = {"winner": "best", "values": ["A", "B"], "ties": ["same"]}
    found = figures(
        write(tmp_path / "a.jsonl", rows), "preference", format={"prompt": "q", "answers": ["a", "b"], "better": better}
    )
    assert (found["rows"], found["preference"], found["left out, a tie"], found["left out, nobody judged it"]) == (
        "4",
        "1",
        "2",
        "1",
    )


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello, wörld 123", "Latin"),
        ("今天很好 ok", "Han"),
        ("これはペンです", "Japanese"),
        ("안녕하세요", "Korean"),
        ("Привет", "Cyrillic"),
        ("مرحبا", "Arabic"),
        ("12 + 3 = ?", "none"),
    ],
)
def test_the_script_of_most_letters(text: str, script: str) -> None:
    assert script_of(text) == script


# Words alone


def pairs_of(rng: random.Random, count: int, good: str, bad: str, *, more: int = 0) -> list[TextPair]:
    """Answers of random words, of which the better has a word of its own and is longer by so many."""
    words = [f"w{i}" for i in range(200)]

    def text(own: str, length: int) -> str:
        return " ".join([*rng.choices(words, k=length), own]).strip()

    return [TextPair(f"p{i // 2}", text(good, 8 + more), text(bad, 8)) for i in range(count)]


def test_words_that_give_the_better_answer_away_are_found_out() -> None:
    told = told_apart(pairs_of(random.Random(0), 200, "surely", "maybe"))
    assert told is not None and told.words.mean > 0.95
    assert 0.35 < told.length.mean <= 1.0


def test_length_that_gives_it_away_is_found_out_in_either_direction() -> None:
    for more in (4, -4):
        told = told_apart(pairs_of(random.Random(1), 200, "", "", more=more))
        assert told is not None and told.length.mean > 0.95


def test_what_nothing_gives_away_is_at_chance() -> None:
    told = told_apart(pairs_of(random.Random(2), 600, "", ""))
    assert told is not None
    assert abs(told.words.mean - 0.5) < 0.08 and abs(told.length.mean - 0.5) < 0.12


def test_no_prompt_teaches_about_itself() -> None:
    """Each prompt has a word of its own in its good answers: learned from the same prompt it would tell all, from
    others nothing."""
    rng = random.Random(3)
    words = [f"w{i}" for i in range(50)]
    pairs = [
        TextPair(f"p{i}", f"{rng.choice(words)} own{i}", f"{rng.choice(words)} other{i}")
        for i in range(60)
        for _ in range(5)
    ]
    told = told_apart(pairs)
    assert told is not None and told.words.mean < 0.65
    assert told_apart(pairs[:19]) is None and told_apart(pairs[:20]) is None, "too few pairs, and too few prompts"


def test_a_sample_of_prompts_is_enough_and_the_same_whatever_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(describing, "SAMPLE", 30)
    rng = random.Random(4)
    made = pairs_of(rng, 200, "surely", "maybe")
    rows = [
        {"id": i, "prompt": pair.prompt + str(i), "chosen": pair.chosen, "rejected": pair.rejected}
        for i, pair in enumerate(made)
    ]

    def sampled(name: str) -> set[str]:
        path = write(tmp_path / name, rows)
        found = describe(DataSource(path=str(path)), path, "preference")
        assert found.told is not None and found.told.words.count == 30
        return {pair.chosen for _, _, pair in found._sample}

    first = sampled("a.jsonl")
    rng.shuffle(rows)
    assert sampled("b.jsonl") == first


# The command


def test_prompts_that_files_share_are_told(tmp_path: Path) -> None:
    one, other = (
        write(tmp_path / "a.jsonl", ROWS),
        write(tmp_path / "b.jsonl", [*ROWS[2:], {"prompt": "x", "chosen": "y", "rejected": "z"}]),
    )
    done = CliRunner().invoke(app, ["data", "describe", str(one), str(other)])
    assert done.exit_code == 0, done.output
    assert f"prompts in both {one} and {other}: 1" in done.output.replace("\n", "")
    assert len(done.output.splitlines()) < 40, "one screen"


def test_bad_rows_are_an_error_after_all_is_printed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS, {"prompt": "x", "chosen": "y", "rejected": "y"}])
    done = CliRunner().invoke(app, ["data", "describe", str(path)])
    assert "bad rows" in done.output and "Latin" in done.output
    assert isinstance(done.exception, InputError) and done.exception.exit_code == 2
    assert str(done.exception) == f"{path}:5 rejected: chosen and rejected are equal"


def test_a_source_of_which_nothing_is_left_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "x", "chosen": "y", "rejected": "y"}])
    with pytest.raises(InputError, match="0 rows left"):
        figures(path, "preference")
    assert shared_lines([FileDescription("a", "prompt")]) == []


@pytest.mark.parametrize("command", ["describe", "inspect"])
def test_bad_rows_of_a_source_that_skips_them_are_listed_and_no_error(tmp_path: Path, command: str) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS, {"prompt": "x"}, {"prompt": "y"}])
    for source, refused in (
        (f"{{path: {path}, format: preference, on_bad_row: skip}}", False),
        (f"{{path: {path}, format: preference}}", True),
    ):
        result = CliRunner().invoke(app, ["data", command, source, "--want", "preference"])
        assert isinstance(result.exception, InputError) == refused, result.output
        told = result.output + (str(result.exception) if refused else "")
        assert f"{path}:5 chosen: missing" in told and "2 bad rows in all" in told


def test_answers_that_were_left_out_of_rows_are_figures_too(tmp_path: Path) -> None:
    rows = [{"q": "x?", "a": ["one", "two", "", "three", "four"], "s": [3, 1, 1, 3, None]}]
    found = figures(
        write(tmp_path / "a.jsonl", rows),
        "preference",
        format={"prompt": "q", "answers": "a", "better": {"score": "s"}},
    )
    assert {name: count for name, count in found.items() if name.startswith("times ")} == {
        "times an empty answer, left out": "1",
        "times an answer without a score, left out": "1",
        "times an answer as good as the best, left out": "1",
    }
