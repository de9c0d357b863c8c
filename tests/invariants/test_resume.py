"""A run that was stopped anywhere and goes on is the run that was never stopped: same weights, progress and metrics, no
row twice."""

from __future__ import annotations

import itertools
import json
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align import files
from align.errors import EnvironmentFault, InputError, Interrupted
from align.stages.sft import SftTrainer
from align.training import trainer as training
from align.training.trainer import Trainer
from tests.invariants.test_trainer import log, trainer, trees, weights

DATA = trees(12)
SETTINGS: dict[str, dict[str, Any]] = {
    "nothing saved": {},
    "saved": {"save_steps": 2, "save_total_limit": 1},
    "best": {"save_steps": 2, "eval_steps": 1, "load_best_model": True, "learning_rate": 0.02},
    # The loss rises from the first step on, so patience ends the run at step 4 of 6.
    "patience": {
        "save_steps": 2,
        "eval_steps": 2,
        "early_stopping_patience": 2,
        "load_best_model": True,
        "learning_rate": 0.5,
    },
    "patience, saved every step": {
        "save_steps": 1,
        "eval_steps": 1,
        "early_stopping_patience": 1,
        "learning_rate": 0.5,
    },
}


class Killed(BaseException):
    """Nothing in the package catches it."""


def build(work: Path, settings: dict[str, Any]) -> SftTrainer:
    return trainer(work, DATA, batch_size=4, epochs=2, lr_scheduler_type="constant", **settings)


def outcome(run: SftTrainer, work: Path) -> dict[str, Any]:
    """All that must be the same, without times."""
    progress = {name: value for name, value in asdict(run.progress).items() if name != "seconds"}
    rows = [{name: value for name, value in row.items() if "second" not in name} for row in log(work)]
    return {
        "progress": progress,
        "rows": rows,
        "weights": {name: value.tolist() for name, value in weights(run.model).items()},
    }


def points(monkeypatch: pytest.MonkeyPatch, die_at: int | None) -> Callable[[], int]:
    """Count the places around every step, evaluation and checkpoint, and before a folder appears or goes; die at number
    ``die_at``.

    Gives how many there were.
    """
    numbers = itertools.count()
    last = [0]

    def point() -> None:
        last[0] = next(numbers)
        if last[0] == die_at:
            raise Killed

    def around(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            point()
            result = original(*arguments, **options)
            point()
            return result

        monkeypatch.setattr(owner, name, wrapped)

    for name in ("_evaluate", "save", "optimizer_step"):
        around(Trainer, name)
    folders = ("checkpoints", "best")
    monkeypatch.setattr(
        files,
        "fault",
        lambda operation, path: point() if operation == "rename" and path.parent.name in folders else None,
    )
    return lambda: last[0] + 1


@pytest.mark.parametrize("name", SETTINGS)
def test_killed_at_every_place(tmp_path: Path, name: str) -> None:
    settings = SETTINGS[name]
    with pytest.MonkeyPatch.context() as patch:
        count = points(patch, None)
        whole = build(tmp_path / "whole", settings)
        whole.fit()
    expected = outcome(whole, tmp_path / "whole")
    assert ("patience" in name) == (whole.progress.step < whole.total_steps)
    assert count() > 8
    for place in range(count()):
        work = tmp_path / str(place)
        with pytest.MonkeyPatch.context() as patch:
            points(patch, place)
            with pytest.raises(Killed):
                build(work, settings).fit()
        again = build(work, settings)
        again.fit()
        assert outcome(again, work) == expected, place


@pytest.mark.parametrize("name", SETTINGS)
def test_asked_to_stop_after_every_step(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attempt makes one step, saves and ends: also right after the evaluation that ends the run."""
    settings = SETTINGS[name]
    whole = build(tmp_path / "whole", settings)
    whole.fit()
    with monkeypatch.context() as patch:
        patch.setattr(training, "stop_requested", lambda: signal.SIGTERM)
        for step in range(1, whole.progress.step + 1):
            with pytest.raises(Interrupted, match=f"stopped at step {step} of"):
                build(tmp_path / "part", settings).fit()
        again = build(tmp_path / "part", settings)
        again.fit()  # no step is left, so nobody is asked to stop
    assert outcome(again, tmp_path / "part") == outcome(whole, tmp_path / "whole")


def test_weights_of_the_best_evaluation_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    """Killed after a better evaluation than the checkpoint knows of, and the checkpoint is what a run with other
    rounding goes on from."""
    settings = {"save_steps": 3, "eval_steps": 1, "load_best_model": True}
    run = build(tmp_path, settings)
    run.evaluate = lambda: {"loss": -float(run.progress.step)}  # type: ignore[method-assign]
    run.after_step = lambda metrics: _die(run.progress.step == 5)  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run.fit()
    known = sorted(int(folder.name[-8:]) for folder in (tmp_path / "best").iterdir())
    state = json.loads((tmp_path / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert state["progress"]["best_step"] == 3 and known == [3, 4]
    at_three = load_file(tmp_path / "checkpoints" / "step-00000003" / "weights.safetensors")
    again = build(tmp_path, settings)
    again.evaluate = lambda: {"loss": 0.0}  # type: ignore[method-assign]
    assert again.fit().best_step == 3
    assert all(torch.equal(value, at_three[name]) for name, value in weights(again.model).items())


def _die(now: bool) -> None:
    if now:
        raise Killed


def damaged(content: bytes) -> Iterator[bytes]:
    """A flipped bit in the middle, half of it zeroed, cut, empty."""
    half = len(content) // 2
    yield content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
    yield content[:half] + bytes(len(content) - half)
    yield content[:half]
    yield b""


def test_every_file_damaged_in_turn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever an interrupted run left: what comes out is as if nothing had happened, or the run refuses. In any case
    it says so."""
    settings = {"save_steps": 2, "eval_steps": 2, "load_best_model": True, "learning_rate": 0.02}
    whole = build(tmp_path / "whole", settings)
    whole.fit()
    expected = outcome(whole, tmp_path / "whole")
    kept = tmp_path / "kept"
    run = build(kept, settings)
    run.after_step = lambda metrics: _die(run.progress.step == 5)  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run.fit()
    names = sorted(path.relative_to(kept) for path in kept.rglob("*") if path.is_file())
    assert len({path.name for path in names}) >= 6
    for number, name in enumerate(names):
        for how, content in enumerate(damaged((kept / name).read_bytes())):
            work = tmp_path / f"{number}-{how}"
            _copy(kept, work)
            (work / name).write_bytes(content)
            caplog.clear()
            again = build(work, settings)
            try:
                again.fit()
            except InputError as error:
                assert str(work) in str(error)
                continue
            found = outcome(again, work)
            if name.name == "metrics.jsonl":  # an account of what was done; nothing is trained by it
                assert "metrics.jsonl is damaged" in caplog.text
                assert {**found, "rows": []} == {**expected, "rows": []}
                continue
            assert found == expected, (name, how)
            used = "step-00000004" in str(name)  # the older checkpoint and its best weights are not looked at
            assert ("skipped a damaged checkpoint" in caplog.text) == used, (name, how)


def _copy(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def test_without_a_setting_a_checkpoint_comes_with_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 15 minutes: here a step takes ten, so the second, the fourth and the sixth have one; the last needs
    none."""
    now = itertools.count(0, 600)
    monkeypatch.setattr(training.time, "monotonic", lambda: float(next(now)))
    saved: list[int] = []
    run = build(tmp_path, {})
    keep = training.save_checkpoint
    monkeypatch.setattr(
        training, "save_checkpoint", lambda root, step, *a, **o: (saved.append(step), keep(root, step, *a, **o))[1]
    )
    run.fit()
    assert (
        saved
        and saved[0] <= 2
        and max(b - a for a, b in itertools.pairwise([0, *saved])) <= 2
        and run.total_steps not in saved
    )


def test_a_full_disk_ends_no_run_that_needs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But one that was asked for must be there."""

    def full(*arguments: Any, **options: Any) -> None:
        raise EnvironmentFault("checkpoints: not enough disk space")

    monkeypatch.setattr(training, "save_checkpoint", full)
    with pytest.raises(EnvironmentFault):
        build(tmp_path / "asked", {"save_steps": 1}).fit()
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    run = build(tmp_path / "unasked", {})
    assert run.fit().step == run.total_steps


@pytest.mark.parametrize(
    "change", [{"microbatch_tokens": 1}, {"microbatch_tokens": 10_000}, {"layout": "padded"}, {"layout": "packed"}]
)
def test_memory_settings_may_change_on_the_way(tmp_path: Path, change: dict[str, Any]) -> None:
    """Stopped at step 3 and continued with other micro-batches: the same up to rounding."""
    whole = build(tmp_path / "whole", {})
    whole.fit()
    with pytest.MonkeyPatch.context() as patch:
        run = build(tmp_path / "part", {})
        patch.setattr(training, "stop_requested", lambda: signal.SIGINT if run.progress.step == 3 else None)
        with pytest.raises(Interrupted):
            run.fit()
    again = build(tmp_path / "part", change)
    again.fit()
    assert again.progress.step == 6
    for row, other in zip(log(tmp_path / "whole"), log(tmp_path / "part"), strict=True):
        assert row["step"] == other["step"] and math.isclose(row.get("loss", 0), other.get("loss", 0), abs_tol=1e-5)
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(value, weights(again.model)[name], atol=1e-4, rtol=0)
