"""Recorded training curves: a difference of one bit is found and placed, and recording does without importing align."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import curves
from tests.support.root import ROOT


def recording() -> dict[str, Any]:
    steps = [
        {"step": n, "loss": (1 / n).hex(), "grad_norm": (0.1 * n).hex(), "kl": (0.01 * n).hex()} for n in range(1, 4)
    ]
    return {"made_with": {"align": "one"}, "curves": {"sft": {"steps": steps, "weights": {"model.safetensors": "aa"}}}}


def change(found: dict[str, Any], metric: str, step: int) -> None:
    """The next number above."""
    row = found["curves"]["sft"]["steps"][step - 1]
    row[metric] = math.nextafter(float.fromhex(row[metric]), math.inf).hex()


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a bit of a loss": (
        lambda r: change(r, "loss", 2),
        f"step 2, loss: {(0.5).hex()} (0.5) and 0x1.0000000000001p-1 (0.5000000000000001)",
    ),
    "a bit of another metric": (lambda r: change(r, "kl", 3), "step 3, kl:"),
    "the first of two": (lambda r: (change(r, "loss", 3), change(r, "grad_norm", 1)), "step 1, grad_norm:"),
    "a metric that is gone": (
        lambda r: r["curves"]["sft"]["steps"][1].pop("kl"),
        "step 2, kl: 0x1.47ae147ae147bp-6 (0.02) and None",
    ),
    "a step that is gone": (lambda r: r["curves"]["sft"]["steps"].pop(), "3 and 2 steps"),
    "the weights": (lambda r: r["curves"]["sft"]["weights"].update({"model.safetensors": "bb"}), "the weights are not"),
    "a file that is new": (
        lambda r: r["curves"]["sft"]["weights"].update({"value": "bb"}),
        "the weights are not: value: None and bb",
    ),
    "a curve that is gone": (lambda r: r["curves"].pop("sft"), "only in the first recording"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_difference_is_found(name: str) -> None:
    """The comparison says where the first one is."""
    made, said = CHANGES[name]
    other = copy.deepcopy(recording())
    made(other)
    [(curve, difference)] = curves.compare(recording(), other)
    assert curve == "sft" and difference is not None and said in difference


def test_equal_recordings_are_equal_and_others_end_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two commits with equal curves are equal; what else they were made with is said."""
    same, other = recording(), recording()
    same["made_with"]["align"] = "two"
    change(other, "loss", 1)
    files = {name: tmp_path / f"{name}.json" for name in ("first", "same", "other")}
    for file, made in zip(files.values(), (recording(), same, other), strict=True):
        file.write_text(json.dumps(made))
    assert curves.main(["--compare", str(files["first"]), str(files["same"])]) == 0
    assert capsys.readouterr().out == "made with align: one and two\nsft: equal to the last bit\n"
    assert curves.main(["--compare", str(files["first"]), str(files["other"])]) == 1
    assert "sft: step 1, loss:" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "{", "[]", '{"curves": {}, "made_with": {}}'])
def test_what_is_no_recording_is_refused(tmp_path: Path, text: str | None) -> None:
    """A file that is missing or something else must not count as equal."""
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(SystemExit) as ended:
        curves.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")])
    assert ended.value.code == 2


def test_nothing_of_align_is_imported() -> None:
    """The program has to work on commits whose modules of align lie elsewhere."""
    asked = (
        "import sys, benchmarks.curves; print(sorted(name for name in sys.modules if name.split('.')[0] == 'align'))"
    )
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
