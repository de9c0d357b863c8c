"""What a wheel carries: the package, the shipped recipes and their data, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.support.root import ROOT


def test_the_wheel_carries_recipes_and_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("alignkit-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"align/_shipped/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    shipped |= {f"align/_shipped/data/quickstart/{path.name}" for path in (ROOT / "data" / "quickstart").iterdir()}
    shipped |= {f"align/_shipped/data/probes/{path.name}" for path in (ROOT / "data" / "probes").iterdir()}
    assert shipped <= names
    assert "align/evaluation/prompts/pairwise.en.txt" in names
    assert "align/errors.py" in names
    assert {f"align/report/html/page.{ending}" for ending in ("html.jinja", "css", "js")} <= names, (
        "a report is made from these"
    )
    assert all(name.startswith(("align/", "alignkit-")) for name in names), (
        "something outside the package would be installed"
    )
