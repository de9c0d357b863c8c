"""Models on the command line: runs and their stages by name, besides paths and hub ids; and how the commands read their
data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from align import cli
from align.commands.named_models import model_named, model_of_run
from align.errors import InputError
from align.pipeline.artifacts import read_manifest, write_manifest
from tests.support.report_run import write_run

RUNS = Path("runs")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reward = write_run(RUNS / "mine", ["sft", "reward"]) / "stages" / "reward"
    made = read_manifest(reward)
    write_manifest(
        reward, type="reward_model", stage="reward", identity=made.identity, encoder=made.encoder, summary=made.summary
    )


def test_a_run_stands_for_the_last_model_that_it_left() -> None:
    for text in ("mine", "mine/", "runs/mine", "./runs/mine"):
        assert Path(model_named(text, RUNS)) == Path("runs/mine/stages/sft"), text
        assert Path(model_named(text, RUNS, ["reward_model"])) == Path("runs/mine/stages/reward")
    assert Path(model_named("mine/sft", RUNS)) == Path("runs/mine/stages/sft")
    assert model_of_run("org/name", RUNS) is None and model_named("org/name", RUNS) == "org/name"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine/reward", "stage reward of runs/mine left no policy; stages that did: sft"),
        ("mine/sftt", "runs/mine has no stage sftt; did you mean `sft`?"),
        ("mnie", "no such file or folder: mnie .*; did you mean `mine`?"),
        ("nothing", "no such file or folder: nothing .*; a hub id is written org/name"),
    ],
)
def test_names_that_lead_nowhere(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_named(text, RUNS)


def test_a_path_that_exists_is_meant() -> None:
    Path("mine/sft").mkdir(parents=True)
    assert model_named("mine/sft", RUNS) == "mine/sft"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["align", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_every_command_that_takes_a_model_takes_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what reads data takes the keys of a source: chat, generate, score, eval."""
    seen: dict[str, Any] = {}
    Path("rows.csv").write_text("prompt\nhi\n")
    Path("runs/mine/stages/sft/config.json").write_text("{}")
    monkeypatch.setattr("align.commands.chat.chat", lambda model, **options: seen.update(chat=model))
    monkeypatch.setattr(
        "align.commands.generate.generate",
        lambda model, *given, **options: seen.update(generate=(model, options["source"])),
    )
    monkeypatch.setattr(
        "align.scoring.reward_model.RewardModelScorer", lambda model, **options: seen.update(score=model.path)
    )
    monkeypatch.setattr(
        "align.commands.score.score_rows", lambda scorer, place, source: seen.update(rows=source) or iter(())
    )
    monkeypatch.setattr(
        "align.pipeline.runner.run_recipe", lambda loaded, **options: seen.update(eval=loaded.recipe) or sys.exit(0)
    )
    reading = ("--format", "prompt")
    assert call(monkeypatch, "chat", "mine") == 0
    assert call(monkeypatch, "generate", "mine/sft", "--prompts", "rows.csv", *reading) == 0
    assert call(monkeypatch, "score", "mine", "rows.csv", *reading) == 0
    assert call(monkeypatch, "eval", "mine", "--data", "rows.csv", *reading) == 0
    assert Path(seen["chat"]) == Path(seen["generate"][0]) == Path("runs/mine/stages/sft")
    assert Path(seen["score"]) == Path("runs/mine/stages/reward")
    spec = seen["eval"].stages["eval"]
    assert spec.policies == ["runs/mine/stages/sft"]
    assert seen["generate"][1].format == seen["rows"].format == spec.data[0].format == "prompt"


def test_a_wrong_format_names_its_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.csv").write_text("Q\nhi\n")
    for command in (
        ("generate", "mine", "--prompts", "rows.csv"),
        ("score", "mine", "rows.csv"),
        ("eval", "mine", "--data", "rows.csv"),
    ):
        assert call(monkeypatch, *command, "--format", "nothing_known") == 2
        assert "error: --format: no format `nothing_known`" in capsys.readouterr().err
