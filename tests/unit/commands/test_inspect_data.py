"""``align data inspect``: what is trained can be told from what is not, and drops say why."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from align.commands.inspect_data import inspect
from align.data.chat.encoder import Encoder
from align.errors import InputError
from align.recipe.schema import DataSource
from tests.support import tokenizers

ENCODER = Encoder(tokenizers.chatml())


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    chats = [("Hi", "Yes."), ("The dog?", "It sleeps."), ("Hi", "word " * 300)]
    lines = [
        json.dumps({"id": f"r{k}", "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
        for k, (q, a) in enumerate(chats)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*lines, "{not json"]) + "\n", encoding="utf-8")
    return path


def run(
    path: Path,
    *,
    colours: bool = False,
    errors: list[str] | None = None,
    keys: dict[str, Any] | None = None,
    **changes: Any,
) -> str:
    out = io.StringIO()
    console = Console(file=out, width=60, force_terminal=colours, color_system="standard" if colours else None)
    arguments: dict[str, Any] = {"model": ENCODER, "want": None, "limit": 10, "max_length": 100}
    try:
        inspect(DataSource(path=str(path), **(keys or {})), path, console=console, **{**arguments, **changes})
    except InputError as error:
        errors.extend(map(str, error.problems)) if errors is not None else pytest.fail(str(error))
    return out.getvalue()


def test_trained_tokens_stand_out_and_control_tokens_are_visible(rows: Path) -> None:
    shown = run(rows, errors=[])
    assert f"{rows}:1  r0\n" in shown
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n" in shown
    encoded = ENCODER.encode([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}])
    assert f"{len(encoded.ids) - 1} tokens, {encoded.mask.sum()} trained" in shown


def test_on_a_terminal_trained_tokens_are_green_and_others_dim(rows: Path) -> None:
    shown = run(rows, errors=[], colours=True, limit=1)
    assert "\x1b[32mYes.\x1b[0m\x1b[1;32m<|im_end|>\x1b[0m" in shown
    assert "\x1b[2mHi\x1b[0m\x1b[1;2m<|im_end|>\x1b[0m" in shown
    assert "⟦" not in shown


def test_drops_and_bad_rows_are_told_with_lines_and_reasons(rows: Path) -> None:
    errors: list[str] = []
    shown = run(rows, errors=errors, limit=1)
    assert "r1" not in shown, "no more than the limit is drawn"
    assert f"dropped, longer than max_length: 1 ({rows}:3)" in shown
    (error,) = errors  # after all that is printed, one line for the one bad row
    assert error.startswith(f"{rows}:4: invalid JSON")
    assert "2 conversations:" in shown
    assert "dropped: longer than max_length" in run(rows, errors=[])


def test_without_a_model_rows_are_text(rows: Path) -> None:
    shown = run(rows, errors=[], model=None, limit=2)
    assert "user: The dog?\nassistant: It sleeps.\n" in shown
    assert "(messages): 4 rows read" in shown and "tokens" not in shown


def test_a_preference_shows_its_answers_apart(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "The price?", "chosen": "It is $46.", "rejected": "No."}) + "\n")
    shown = run(path)
    assert "-- chosen, " in shown and "⟦It is $46.<|im_end|>⟧" in shown
    assert "-- rejected 1, " in shown and "⟦No.<|im_end|>⟧" in shown
    assert "1 preference:" in shown
    text = run(path, model=None)
    assert "-- chosen --\nassistant: It is $46." in text
    assert "1 prompt:" in run(path, want="prompt")


def test_data_cannot_drive_the_terminal(tmp_path: Path) -> None:
    """Escape sequences in data are shown, not obeyed."""
    path = tmp_path / "a.jsonl"
    message = {"role": "user", "content": "\x1b[2Jboo\x07"}
    path.write_text(json.dumps({"messages": [message, {"role": "assistant", "content": "\x9b31m"}]}) + "\n")
    for model in (ENCODER, None):
        shown = run(path, model=model)
        assert "\x1b" not in shown and "\x07" not in shown and "\x9b" not in shown
        assert "\\x1b[2Jboo\\x07" in shown


def test_a_file_with_no_usable_row_says_why(tmp_path: Path) -> None:
    """Whether the type of the records has to be found out or is given, and whether bad rows may be skipped or not."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": []}\n' * 5)
    for want in (None, "conversation", "prompt"):
        errors: list[str] = []
        run(path, errors=errors, want=want)
        assert errors[0] == f"{path}:1 messages: is empty"


def test_many_bad_rows_are_one_line_each_and_their_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    path.write_text("\n".join([good, *["{"] * 12]))
    errors: list[str] = []
    run(path, errors=errors)
    assert [error.split(":")[1] for error in errors[:-1]] == [str(line) for line in range(2, 12)]
    assert errors[-1] == "12 bad rows in all, the first 10 are listed"


def test_what_was_used_is_printed_to_be_copied(tmp_path: Path) -> None:
    """File kind, encoding, separator and format, as a recipe writes them: read back, it is the same source."""
    path = tmp_path / "a.csv"
    path.write_bytes("prompt;chosen;rejected\nWas?;Schön.;Nein.\n".encode("cp1252"))
    shown = run(path, model=None)
    assert f"{path}: read as cp1252, separated by `;`\n" in shown
    line = shown.rpartition("as a source: ")[2]
    keys = yaml.safe_load(line)
    assert keys == {"path": str(path), "format": "preference", "encoding": "cp1252", "separator": ";"}
    again = run(path, model=None, keys={key: value for key, value in keys.items() if key != "path"})
    assert "read as" not in again
    assert again.rpartition("as a source: ")[2] == line


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": "q", "answers": ["a", "b"], "better": {"winner": "w"}},
            "w: 'A' is none of 0, 1; `values: [A, B]` says",
        ),
        (
            {"prompt": "q", "answers": ["a", "b"], "better": {"ranking": "w"}},
            "w: 'A' is none of 0, 1; `names: [A, B]` says",
        ),
        ({"prompt": "q", "answers": ["a", "b"], "better": {"score": "w"}}, "w: 1 scores for 2 answers"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "better": {"score": ["w", "w"]}},
            "w: expected a number, found 'A'",
        ),
        ({"prompt": "q", "answers": "a", "grades": {"help": "w"}}, "w: expected a number, found 'A'"),
        ({"prompt": "q", "completion": "e"}, "e: is empty"),
    ],
)
@pytest.mark.parametrize("want", [None, "as the mapping"])
def test_a_mapping_of_answers_is_never_shown_as_prompts(
    columns: dict[str, Any], message: str, want: Any, tmp_path: Path
) -> None:
    """What it means is told by its keys, also where no row can be read so."""
    path = tmp_path / "a.csv"
    path.write_text("q,a,b,w,e\nWhich?,yes,no,A,\nWho?,I,you,A,\n")
    kind = "graded" if "grades" in columns else "conversation" if "completion" in columns else "preference"
    errors: list[str] = []
    shown = run(path, keys={"columns": columns}, errors=errors, model=None, want=want and kind)
    assert "prompts" not in shown
    assert errors[0].startswith(f"{path}:2 {message}")


def test_a_preset_of_comparisons_is_never_shown_as_prompts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = {
        "question": {"full_text": "Which?"},
        "answer_0": "yes",
        "answer_1": "no",
        "score_0": "good",
        "score_1": "bad",
    }
    path.write_text(json.dumps(row) + "\n")
    errors: list[str] = []
    assert "prompts" not in run(path, keys={"format": "webgpt"}, errors=errors, model=None)
    assert "expected a number, found 'good'" in errors[0]


@pytest.mark.parametrize("skips", [True, False])
def test_the_printed_source_keeps_every_key_and_bad_rows_that_are_skipped_are_no_error(rows: Path, skips: bool) -> None:
    given = {"format": "messages", "where": {"id": {"not": "r1"}}, **({"on_bad_row": "skip"} if skips else {})}
    errors: list[str] = []
    shown = run(rows, model=None, errors=errors, keys=given)
    (line,) = (line for line in shown.splitlines() if line.startswith("as a source: "))
    assert yaml.safe_load(line.removeprefix("as a source: ")) == {"path": str(rows), **given}
    bad = f"{rows}:4: invalid JSON (col 2)"
    assert any(error.startswith(bad) for error in errors) != skips
    assert (f"left out, a bad row: {bad}" in shown) == skips
    assert "1 bad (first:" in shown
