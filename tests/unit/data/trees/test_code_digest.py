"""Encoded data are made again when the code that made them has changed, and only then."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import align


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, to be changed."""
    return Path(shutil.copytree(Path(align.__file__).parent, tmp_path_factory.mktemp("copy") / "align"))


def digest(package: Path) -> str:
    code = "from align.data.trees.code_digest import code_digest; print(code_digest())"
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=package.parent, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    ("module", "decides"),
    [
        ("data/chat/encoder.py", True),
        ("data/chat/call_proof.py", True),
        ("data/mapping/better.py", True),
        ("data/files/json_rows.py", True),
        ("recipe/rows/presets.yaml", True),
        ("recipe/rows/mapping.py", True),
        ("data/formats/other_tools.py", False),  # writes rows for other tools
        ("data/files/written.py", False),
        ("commands/convert_data.py", False),
        ("commands/inspect_data.py", False),
        ("report/html/page.py", False),
        ("training/trainer.py", False),
    ],
)
def test_a_change_counts_where_it_can_change_a_token(package: Path, module: str, decides: bool) -> None:
    before = digest(package)
    with (package / module).open("a") as file:
        file.write("\n# a change\n")
    assert (digest(package) != before) is decides
