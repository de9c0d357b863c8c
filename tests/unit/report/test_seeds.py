"""Several seeds: means and intervals over runs, against a case by hand; the command that makes them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from align.report.estimates import Change, ReportedNumber
from align.report.text import seeds
from align.report.text.seeds import as_json, over_seeds
from tests.support.report_run import write_run


def run(folder: Path, before: float, after: float, stages: Sequence[str] = ("sft",)) -> Path:
    return write_run(folder, stages, sft={"eval_before": {"loss": before}, "eval_after": {"loss": after}})


def held_out(folders: Sequence[Path]) -> Change:
    (loss,) = (change for change in over_seeds(folders)["sft"] if change.measure == "held-out loss")
    return loss


def test_three_seeds_by_hand(tmp_path: Path) -> None:
    """2.0, 2.2, 2.7: mean 2.3, standard deviation 0.36056, 4.3027 of Student's t with two degrees of freedom: 2.3 -+
    0.8957."""
    folders = [run(tmp_path / str(i), 3.0, after) for i, after in enumerate((2.0, 2.2, 2.7))]
    loss = held_out(folders)
    assert loss.before == ReportedNumber(3.0), "the same in all runs, so it has no interval"
    assert loss.after is not None and loss.difference is not None
    assert vars(loss.after) == pytest.approx({"value": 2.3, "low": 2.3 - 0.8957, "high": 2.3 + 0.8957}, abs=1e-4)
    assert vars(loss.difference) == pytest.approx(
        {"value": -0.7, "low": -0.7 - 0.8957, "high": -0.7 + 0.8957}, abs=1e-4
    )
    assert loss.verdict == "no difference shown"


def test_differences_are_those_of_each_run(tmp_path: Path) -> None:
    """Runs that start from different places and all gain 0.5, to 0.01: the interval is of the gains."""
    folders = [
        run(tmp_path / str(i), before, before - gain)
        for i, (before, gain) in enumerate(((1.0, 0.5), (3.0, 0.51), (9.0, 0.49)))
    ]
    loss = held_out(folders)
    assert loss.difference is not None and loss.difference.value == pytest.approx(-0.5)
    assert loss.difference.low is not None and loss.difference.low > -0.53
    assert loss.verdict == "better"


def test_what_not_every_run_has_is_left_out(tmp_path: Path) -> None:
    both, one = run(tmp_path / "a", 3.0, 2.0, ["sft", "dpo"]), run(tmp_path / "b", 3.0, 2.5)
    found = over_seeds([both, one])
    assert found["sft"] and not found["dpo"]


def test_the_table_and_its_json(tmp_path: Path) -> None:
    folders = [run(tmp_path / str(i), 3.0, after) for i, after in enumerate((2.0, 2.2, 2.7))]
    text = io.StringIO()
    seeds.show("mine", folders, Console(file=text, width=140))
    assert "mine: means over 3 seeds" in text.getvalue() and "2.300 [1.404, 3.196]" in text.getvalue()
    entry = next(entry for entry in as_json(folders) if entry["measure"] == "held-out loss")
    assert (
        entry["stage"] == "sft"
        and entry["before"] == {"value": 3.0}
        and entry["after"]["low"] == pytest.approx(1.4043, abs=1e-4)
    )


def test_a_share_over_seeds_stays_a_share(tmp_path: Path) -> None:
    """0.02, 0.5 and 0.02 over three seeds: Student's interval alone would begin below 0."""
    folders = []
    for i, accuracy in enumerate((0.02, 0.49, 0.03)):
        folder = tmp_path / str(i)
        folders.append(write_run(folder, ["dpo"], dpo={"eval_after": {"rewards/accuracies": accuracy}}))
    (found,) = (change for change in over_seeds(folders)["dpo"] if change.measure == "held-out accuracy")
    assert (
        found.after is not None
        and found.after.low == 0.0
        and found.after.high is not None
        and 0.5 < found.after.high <= 1.0
    )
    assert found.verdict == "within chance"


def test_few_prompts_are_few_with_any_number_of_seeds(tmp_path: Path) -> None:
    folders = []
    for i, after in enumerate((2.0, 2.001, 2.002, 2.0)):
        changed = {"eval_before": {"loss": 3.0}, "eval_after": {"loss": after}, "held_out_data": {"trees": 4}}
        folders.append(write_run(tmp_path / str(i), ["sft"], sft=changed))
    assert held_out(folders).verdict == "too few"
