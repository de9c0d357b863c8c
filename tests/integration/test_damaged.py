"""Every file that a run leaves, damaged in turn: the same result as if nothing had happened, or a refusal.
Never another one."""

from __future__ import annotations

import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from align.errors import AlignError
from align.pipeline import artifacts
from align.pipeline.runner import run_recipe
from align.recipe.load import load_recipe
from align.stages.dpo import DpoTrainer
from tests.support.saved import save_tiny

ACCOUNTS = ("recipe.yaml", "README.md", "run.json", "history.jsonl", "report.html", ".align.owner.json", ".align.lock")
"""Of the run, for people: written anew, or only read by `ls` and `show`."""


class Killed(BaseException):
    """As by the kernel."""


def write_recipe(folder: Path) -> None:
    save_tiny(folder / "model", max_position_embeddings=256)
    words = ("tea", "rain", "sun", "snow", "wind", "fog")
    talk = [
        [{"role": "user", "content": f"Say {w}."}, {"role": "assistant", "content": f"{w.title()} it is."}]
        for w in words
    ]
    (folder / "talk.jsonl").write_text(
        "".join(json.dumps({"id": w, "messages": t}) + "\n" for w, t in zip(words, talk, strict=True))
    )
    pairs = [{"prompt": f"Say {w}.", "chosen": f"{w.title()} it is.", "rejected": "No."} for w in words]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    train = {
        "learning_rate": 0.02,
        "batch_size": 2,
        "microbatch_tokens": 64,
        "save_steps": 1,
        "eval_steps": 1,
        "load_best_model": True,
    }
    stages = {
        "sft": {"kind": "sft", "data": "talk.jsonl", "samples": 1, "train": {"learning_rate": 1e-3, "batch_size": 4}},
        "dpo": {
            "kind": "dpo",
            "policy": "stage:sft",
            "data": "pairs.jsonl",
            "eval_data": "pairs.jsonl",
            "samples": 1,
            "train": train,
        },
    }
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"name": "r", "model": "./model", "stages": stages}, sort_keys=False)
    )


def run(runs: Path) -> str:
    said = io.StringIO()
    run_recipe(load_recipe("recipe.yaml"), runs_dir=runs, console=Console(file=said, width=200))
    return said.getvalue()


def digests(runs: Path) -> dict[str, str]:
    """Of the results; reports have times in them, so only what they say of the model counts."""
    found: dict[str, str] = {}
    for stage in ("sft", "dpo"):
        folder = runs / "r" / "stages" / stage
        assert artifacts.verify(folder) == []
        report = json.loads((folder / "report.json").read_text())
        found[stage] = artifacts.artefact_digest(folder)
        found[f"{stage} report"] = json.dumps(
            [report[key] for key in ("eval_before", "eval_after", "best_step", "data")]
        )
        found[f"{stage} answers"] = (folder / "answers.jsonl").read_text()
    return found


def damaged(content: bytes, how: int) -> bytes:
    """A flipped bit, cut in half, empty."""
    half = len(content) // 2
    flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :] if content else b"x"
    return (flipped, content[:half], b"")[how % 3]


@pytest.mark.slow
def test_every_file_of_a_run_and_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second stage was killed after its second step: results, work folder and cache are all there."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.WARNING, "align")
    write_recipe(tmp_path)
    runs = tmp_path / "runs"  # one place for all: a saved policy knows the path of what it started from
    run(runs)
    expected = digests(runs)
    shutil.rmtree(runs)

    def die(trainer: DpoTrainer, metrics: Any) -> None:
        if trainer.progress.step == 3:
            raise Killed

    kept = tmp_path / "kept"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DpoTrainer, "after_step", die)
        run(runs)
    runs.rename(kept)
    names = sorted(path.relative_to(kept) for path in kept.rglob("*") if path.is_file() and path.name not in ACCOUNTS)
    assert {"reference", "checkpoints", "best", "sft"} <= {part for name in names for part in name.parts}
    for number, name in enumerate(names):
        shutil.rmtree(runs, ignore_errors=True)
        shutil.copytree(kept, runs)
        (runs / name).write_bytes(damaged((kept / name).read_bytes(), number))
        caplog.clear()
        try:
            said = run(runs)
        except AlignError as error:
            assert error.exit_code == 2 and str(runs) in str(error), (name, str(error))
            continue
        found = digests(runs)
        assert found == expected, (name, {key for key in found if found[key] != expected[key]})
        if not name.name.endswith(".lock") and (kept / name).read_bytes():
            # An older checkpoint, and weights that only it needs, are looked at by nobody.
            older = "step-00000001" in str(name) or ("best" in name.parts and not _is_best(kept, name))
            assert older or _is_of_the_finished_stage(kept, name) or caplog.text or "damaged" in said, name


def _is_of_the_finished_stage(kept: Path, name: Path) -> bool:
    """Encoded data of a stage that does not run again are not looked at."""
    report = kept / name.parent / "report.json"
    return ".cache" in name.parts and report.is_file() and json.loads(report.read_bytes())["want"] == "conversation"


def _is_best(kept: Path, name: Path) -> bool:
    (newest,) = (kept / "r" / "work").glob("dpo/*/checkpoints/step-00000002/state.json")
    best: int = json.loads(newest.read_text())["progress"]["best_step"]
    return f"step-{best:08d}" in str(name)
