"""Which stages a run takes up: `--only`, `--from`, `--force`, `--fresh`; and the plan says what the run does."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from align.errors import InputError
from align.pipeline import artifacts
from align.pipeline.selection import Selection
from align.planning.plan import make_plan, show
from tests.support.workshop import RECIPE, Workshop, snapshot

NAMES = ("sft", "dpo", "last")
DIAMOND = RECIPE + '  aside: {{kind: "{module}:Toy", policy: "stage:sft", data: b.jsonl}}\n'


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Workshop:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Workshop(tmp_path, re.sub(r"\W", "_", request.node.name))


def test_only_the_named_stages_run(shop: Workshop) -> None:
    assert shop.run(selection=Selection(only=["sft"]))[1] == ["sft: running (first run)"]
    assert shop.status(only=["dpo"]) == {"sft": "up to date: ", "dpo": "to run: first run", "last": "not selected: "}
    assert shop.run(selection=Selection(only=["dpo"]))[1] == ["sft: up to date", "dpo: running (first run)"]
    assert not (shop.folder / "stages" / "last").exists()


def test_what_a_selected_stage_needs_is_never_made_in_passing(shop: Workshop) -> None:
    """Nor taken as it is when it is out of date. The plan refuses with the run's words."""
    expected = (
        r"stages.sft: stage last needs the result of stage sft, which is not up to date \(first run\); `align run` runs"
        r" all stages"
    )
    with pytest.raises(InputError, match=expected):
        shop.run(selection=Selection(only=["last"]))
    with pytest.raises(InputError, match=expected):
        make_plan(shop.load(), shop.runs, selection=Selection(only=["last"]))
    assert not (shop.folder / "stages" / "sft").exists()


def test_from_takes_a_stage_and_all_that_follows_from_it(shop: Workshop) -> None:
    """And nothing beside it."""
    shop.recipe(text=DIAMOND)
    shop.run()
    (shop.root / "b.jsonl").write_text("changed\n")
    assert shop.run(selection=Selection(start=["dpo"], replace=True))[1] == [
        "sft: up to date",
        "dpo: running (input b.jsonl changed)",
        "last: running (input stage:dpo, b.jsonl changed)",
    ]
    assert shop.status()["aside"] == "to run: input b.jsonl changed"


def test_a_forced_stage_runs_and_what_follows_only_if_its_result_is_another(shop: Workshop) -> None:
    shop.run()
    before = snapshot(shop.folder / "stages" / "dpo")
    assert shop.status(force=["sft"])["sft"] == "to run: forced"
    assert shop.run(selection=Selection(force=["sft"]))[1] == [
        "sft: running (forced)",
        "dpo: up to date",
        "last: up to date",
    ]
    assert snapshot(shop.folder / "stages" / "dpo") == before
    result = shop.folder / "stages" / "sft"
    manifest = artifacts.read_manifest(result)
    (result / "config.json").write_text("chance made another result")
    artifacts.write_manifest(
        result, type=manifest.type, stage="sft", identity=manifest.identity, encoder=None, summary={}
    )
    shop.run()
    assert shop.run(selection=Selection(force=["sft"], replace=True))[1] == [
        "sft: running (forced)",
        "dpo: running (input stage:sft changed)",
        "last: running (input stage:dpo changed)",
    ]


def test_a_forced_stage_that_failed_keeps_its_result(shop: Workshop) -> None:
    shop.run()
    before = snapshot(shop.folder / "stages")
    with pytest.raises(RuntimeError):
        shop.run("stages.sft.fail=always", selection=Selection(force=["sft"], replace=True))
    assert snapshot(shop.folder / "stages") == before


def test_fresh_begins_anew(shop: Workshop) -> None:
    """Only for the settings that run: the work of others, to which the user may return, stays."""
    for seed in (8, 9):
        with pytest.raises(RuntimeError):
            shop.run("stages.sft.fail=once", f"stages.sft.seed={seed}")
    assert "from the beginning" in shop.status("stages.sft.fail=once", "stages.sft.seed=9", fresh=True)["sft"]
    with pytest.raises(RuntimeError):  # what would have gone on begins anew, and so fails once more
        shop.run("stages.sft.fail=once", "stages.sft.seed=9", selection=Selection(fresh=True))
    result, lines = shop.run("stages.sft.fail=once", "stages.sft.seed=8")
    assert lines[0].endswith("going on from an earlier attempt)")
    assert result.summaries["sft"] == {"attempts": 2}


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(only=["dop"]), "--only dop: recipe.yaml has no such stage; did you mean `dpo`?"),
        (Selection(start=["xyz"]), "--from xyz: recipe.yaml has no such stage; it has: sft, dpo, last"),
        (Selection(force=["lst"]), "--force lst: recipe.yaml has no such stage; did you mean `last`?"),
        (Selection(only=["sft"], start=["dpo"]), "--only and --from exclude each other"),
        (Selection(only=["sft"], force=["dpo"]), "--force dpo: the stage is not among those that this command may run"),
    ],
)
def test_a_wrong_choice_is_told_before_anything_runs(shop: Workshop, selection: Selection, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        shop.run(selection=selection)
    assert not shop.folder.exists()


def test_kinds_and_names_may_exclude_each_other(shop: Workshop) -> None:
    with pytest.raises(InputError, match="the stages that --only or --from names are not among those"):
        Selection(kinds=[f"{shop.module}:Other"], only=["sft"]).stages(shop.load())


def planned(shop: Workshop, selection: Selection) -> str:
    printed = io.StringIO()
    show(make_plan(shop.load(), shop.runs, selection=selection), Console(file=printed, width=200))
    return printed.getvalue()


def test_the_plan_says_what_runs_and_why(shop: Workshop) -> None:
    shop.run()
    text = planned(shop, Selection(force=["dpo"]))
    assert "to run: forced" in text and "waits: dpo to run first" in text
    assert text.splitlines()[-1] == "would run: dpo, last"
    text = planned(shop, Selection(only=["dpo"]))
    assert text.splitlines()[-1] == "nothing to do: the selected stages are up to date"
    text = planned(shop, Selection(only=["sft", "last"], force=["sft"]))
    assert "not selected: has to be up to date once sft has run" in text
    assert text.splitlines()[-1] == "would run: sft, last"
