"""The training stages end to end on a tiny model: from files to saved policies, chained, with and without adapters."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from align.batching.tree import build
from align.data.tree import Branch, Tree
from align.errors import InputError
from align.models.compute.forward import batch_logprobs
from align.models.load import load_encoder, load_policy
from align.pipeline.runner import RunResult, run_recipe
from align.pipeline.selection import Selection
from align.preflight.checks import require
from align.recipe.load import LoadedRecipe, load_recipe
from align.recipe.schema import Model
from align.report.estimates import ReportedNumber
from align.stages import dpo as dpo_stage
from tests.support.readme import every_file_is_explained
from tests.support.report_run import reported
from tests.support.root import ROOT
from tests.support.saved import save_tiny

TRAIN = {"learning_rate": 3e-3, "batch_size": 2, "microbatch_tokens": 128, "epochs": 2}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a model, conversations, and the preferences of docs/preferences.md."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model", max_position_embeddings=512)
    found = re.search(
        r"<!-- example: mine.jsonl -->\n```json\n(.*?)```", (ROOT / "docs" / "preferences.md").read_text(), re.DOTALL
    )
    assert found
    (tmp_path / "mine.jsonl").write_text(found.group(1))
    rows = [
        {"messages": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": f"{word} it is."}]}
        for word in ("tea", "rain", "sun", "snow")
    ]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def load(stages: dict[str, Any], model: str = "model") -> LoadedRecipe:
    Path("recipe.yaml").write_text(
        yaml.safe_dump({"name": "r", "model": f"./{model}", "stages": stages}, sort_keys=False)
    )
    return load_recipe("recipe.yaml")


def run(stages: dict[str, Any], text: io.StringIO | None = None, model: str = "model") -> RunResult:
    result = run_recipe(
        load(stages, model), console=Console(file=text or io.StringIO(), width=120), selection=Selection(replace=True)
    )
    every_file_is_explained(result.folder)
    return result


def sft(**options: Any) -> dict[str, Any]:
    return {"kind": "sft", "data": "talk.jsonl", "eval_data": "talk.jsonl", "train": TRAIN, **options}


def dpo(**options: Any) -> dict[str, Any]:
    return {"kind": "dpo", "data": "mine.jsonl", "eval_data": "mine.jsonl", "train": TRAIN, **options}


def test_held_out_prompts_that_are_trained_on_are_told_of(folder: Path) -> None:
    """Nothing is left out of the user's data behind their back, but what such numbers are worth is said."""
    known = (folder / "talk.jsonl").read_text().splitlines()[1]
    new = known.replace("rain", "fog")
    (folder / "held.jsonl").write_text(f"{new}\n{known}\n")
    (warning,) = run({"sft": sft(eval_data="held.jsonl", samples=0)}).summaries["sft"]["warnings"]
    assert warning.startswith("1 of 2 held-out prompts are in the training data too (") and "held.jsonl:2" in warning
    (folder / "held.jsonl").write_text(f"{new}\n")
    assert "warnings" not in run({"sft": sft(eval_data="held.jsonl", samples=0)}).summaries["sft"]


def test_sft_then_dpo(folder: Path) -> None:
    """One recipe, two stages: both improve on what they were given, the second starts at ln 2, a rerun does nothing."""
    text = io.StringIO()
    stages = {"sft": sft(), "dpo": dpo(policy="stage:sft")}
    first = run(stages, text)
    assert first.ran == ("sft", "dpo")
    taught, preferred = first.summaries["sft"], first.summaries["dpo"]
    assert taught["eval_after"]["loss"] < taught["eval_before"]["loss"] - 0.1
    assert preferred["eval_before"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert preferred["eval_after"]["rewards/margins"] > 0.05
    assert preferred["eval_after"]["loss"] < 0.69
    shown = text.getvalue()
    assert "before and after" in shown and "4 preferences" in shown
    rows = [json.loads(line) for line in (first.folder / "stages" / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    found = reported(first.folder)
    assert found["sft"]["held-out loss"].after == ReportedNumber(taught["eval_after"]["loss"])
    assert found["dpo"]["held-out accuracy"].note == "4 prompts; guessing gives 0.5"
    again = run(stages)
    assert again.ran == () and again.up_to_date == ("sft", "dpo")


def test_one_changed_key_reruns_what_follows_from_it(folder: Path) -> None:
    """Another beta: only dpo. Another learning rate of sft: both, and the new policy is its own reference, not
    the old one's."""
    run({"sft": sft(), "dpo": dpo(policy="stage:sft")})
    assert run({"sft": sft(), "dpo": dpo(policy="stage:sft", beta=0.2)}).ran == ("dpo",)
    other = run({"sft": sft(train={**TRAIN, "learning_rate": 1e-3}), "dpo": dpo(policy="stage:sft", beta=0.2)})
    assert other.ran == ("sft", "dpo")
    assert other.summaries["dpo"]["eval_before"]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("second", [{"lora": {"rank": 2}}, {}], ids=["lora", "full"])
def test_lora_then_dpo_is_held_to_the_lora_policy(folder: Path, second: dict[str, Any]) -> None:
    """DPO after LoRA-SFT starts from, and is compared with, the SFT policy and not its base, with an adapter of
    its own or in full."""
    result = run({"sft": sft(lora={"rank": 4, "save_merged": True}), "dpo": dpo(policy="stage:sft", **second)})
    summary = result.summaries["dpo"]
    assert summary["eval_before"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    base, taught, preferred = (
        load_policy(Model(path=str(path)))
        for path in (folder / "model", *(result.folder / "stages" / name for name in ("sft", "dpo")))
    )
    encoder = load_encoder(Model(path=str(folder / "model")))
    trunk = encoder.encode_prompt([{"role": "user", "content": "Name a primary colour."}])
    ids = trunk[:9]
    batch = build([Tree("x", trunk, (Branch(ids, ids > -1),))], [0], layout="tree")
    with torch.no_grad():
        values = [batch_logprobs(m, batch) for m in (base, taught, preferred)]
    assert not torch.allclose(values[0], values[1], atol=1e-3) and not torch.allclose(values[1], values[2], atol=1e-4)
    saved = "adapter_model.safetensors" if second else "model.safetensors"
    assert (result.folder / "stages" / "dpo" / saved).exists()
    assert (result.folder / "stages" / "sft" / "merged" / "model.safetensors").exists()


def test_rows_that_cannot_be_preferred_are_counted(folder: Path) -> None:
    """Equal answers (before or after truncation) and empty ones are never trained on, and each is named with
    its line."""
    good = (folder / "mine.jsonl").read_text().splitlines()
    bad = [
        {"prompt": "a", "chosen": "same", "rejected": "same"},
        {"prompt": "a", "chosen": "", "rejected": "b"},
        {"prompt": "a", "chosen": "long " * 80 + "x", "rejected": "long " * 80 + "y"},
    ]
    (folder / "mine.jsonl").write_text("\n".join([*good, *(json.dumps(row) for row in bad)]) + "\n")
    text = io.StringIO()
    source = {"path": "mine.jsonl", "on_bad_row": "skip"}
    result = run({"dpo": dpo(data=source, eval_data=None, max_length=60, too_long="truncate")}, text)
    rejects = [
        json.loads(line) for line in (result.folder / "stages" / "dpo" / "rejects.jsonl").read_text().splitlines()
    ]
    assert sorted(row["line"] for row in rejects) == [5, 6, 7]
    assert "4 preferences" in text.getvalue()


def test_margins_and_votes_are_used_where_a_recipe_asks(folder: Path) -> None:
    """The run says what margins it uses. A key for which the data have nothing is refused before anything runs, with
    the files' name."""
    rows = [json.loads(line) for line in (folder / "mine.jsonl").read_text().splitlines()]
    said = [{"margin": 1, "votes": {"chosen": 2, "rejected": 1}}, {"margin": [0.5, 4]}, {"margin": 2}, {}]
    (folder / "said.jsonl").write_text(
        "".join(json.dumps({**row, **more}) + "\n" for row, more in zip(rows, said, strict=True))
    )
    text = io.StringIO()
    summary = run(
        {"dpo": dpo(data="said.jsonl", eval_data="said.jsonl", offset=1.0, soft_labels=True)}, text
    ).summaries["dpo"]
    assert "margins of 4 pairs: 0.5 to 4, median 1.5" in text.getvalue()
    assert summary["eval_before"]["loss"] > math.log(2) + 0.1, "no reward differs yet, and all have to"
    for key, value, what in (
        ("offset", 1.0, "no pair of these data has a margin"),
        ("soft_labels", True, "no judges disagree in these data"),
    ):
        with pytest.raises(InputError, match=f"mine.jsonl {key}: has no effect: {what}"):
            require(load({"sft": sft(), "dpo": dpo(**{key: value})}), folder / "runs", nproc=1, selection=Selection())


def test_kto_and_simpo_run_as_stages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses without a plain reference go through the same stage, and so does what it says of the held-out
    answers."""
    for loss, options in (("kto_pair", {}), ("simpo", {"beta": 2.0, "gamma": 0.5})):
        monkeypatch.setattr(dpo_stage, "both_fell", lambda before, after: f"from {before['loss']} to {after['loss']}")
        summary = run({"dpo": dpo(loss=loss, **options)}).summaries["dpo"]
        assert summary["eval_after"]["loss"] < summary["eval_before"]["loss"]
        assert summary["warnings"][-1] == f"from {summary['eval_before']['loss']} to {summary['eval_after']['loss']}"


def test_metrics_reach_the_tracker(folder: Path) -> None:
    """`report_to: [tensorboard]`: every step's loss is in the event file that the result carries."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run({"sft": sft(train={**TRAIN, "report_to": ["tensorboard"]})})
    events = next((result.folder / "stages" / "sft" / "trackers").rglob("events*"))
    found = EventAccumulator(str(events.parent))
    found.Reload()
    rows = [json.loads(line) for line in (result.folder / "stages" / "sft" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert {e.step: pytest.approx(e.value, abs=1e-5) for e in found.Scalars("loss")} == losses


def test_nproc_two_equals_one(folder: Path) -> None:
    """`align run --nproc 2` from the command line: the losses, and the saved weights, of one process."""
    one = run({"sft": sft(samples=0)})
    command = [sys.executable, "-m", "align", "--runs-dir", "two", "run", "recipe.yaml", "--nproc", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("before and after") == 1, "one process speaks"
    assert done.stdout.count("report.html") == 1 and (Path("two") / "r" / "report.html").is_file(), (
        "one process writes the report"
    )
    two = Path("two") / "r" / "stages" / "sft"
    ours = [json.loads(line) for line in (one.folder / "stages" / "sft" / "metrics.jsonl").read_text().splitlines()]
    theirs = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "eval/loss"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-5)
    a, b = (load_file(f / "model.safetensors") for f in (one.folder / "stages" / "sft", two))
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=1e-5, rtol=0)
