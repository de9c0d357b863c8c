"""A run on file systems of many sizes, from none to enough: exit 3 with the number of bytes that are missing, or a
whole result."""

from __future__ import annotations

import errno
import json
import os
import re
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
import yaml
from pyarrow import parquet
from safetensors import SafetensorError
from safetensors.torch import save_file

from align import files
from align.errors import EnvironmentFault, InputError
from align.pipeline import artifacts
from align.recipe.load import load_recipe
from tests.support.saved import save_tiny
from tests.support.workshop import run_quietly

SIZES_KB = (40, 100, 260, 600, 4000)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder for small file systems, where this process may mount some."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting needs a privilege")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # torch leaves a file open


def test_every_size(tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("align.pipeline.runner._look_first", lambda *_: None)  # it would refuse most sizes beforehand
    save_tiny(tmp_path / "model", max_position_embeddings=128)
    rows = [
        [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} it is."}] for n in range(6)
    ]
    Path("talk.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    train = {"learning_rate": 1e-3, "batch_size": 2, "save_steps": 1, "eval_steps": 1, "load_best_model": True}
    stage = {"kind": "sft", "data": "talk.jsonl", "eval_data": "talk.jsonl", "samples": 1, "train": train}
    Path("recipe.yaml").write_text(yaml.safe_dump({"name": "r", "model": "./model", "stages": {"sft": stage}}))
    loaded = load_recipe("recipe.yaml")
    outcomes = []
    for size in SIZES_KB:
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
        try:
            run_quietly(loaded, disk / "runs")
        except EnvironmentFault as error:
            assert re.search(r"needs [\d,]+ bytes.*, [\d,]+ available", str(error)), (size, str(error))
            assert not list((disk / "runs" / "r" / "stages").glob("*"))
            outcomes.append("full")
        else:
            assert artifacts.verify(disk / "runs" / "r" / "stages" / "sft") == []
            outcomes.append("done")
    assert outcomes[0] == "full" and outcomes[-1] == "done" and outcomes == sorted(outcomes, reverse=True), outcomes


def write_with(library: str, path: Path) -> None:
    """Much more than the file system holds."""
    big = np.zeros(1 << 20)
    match library:
        case "safetensors":
            save_file({"x": torch.zeros(1 << 20)}, path)
        case "torch":
            torch.save({"x": torch.zeros(1 << 20)}, path)
        case "numpy":
            np.save(path, big)
        case "tofile":
            big.tofile(path)
        case "pyarrow":
            parquet.write_table(pyarrow.table({"x": np.random.default_rng(0).random(1 << 18)}), path)
        case "json":
            with path.open("w") as handle:
                json.dump(big.tolist(), handle)
        case "sqlite":
            with sqlite3.connect(path) as connection:
                connection.execute("create table t (x blob)")
                connection.execute("insert into t values (zeroblob(4000000))")


@pytest.mark.parametrize("library", ["safetensors", "torch", "numpy", "tofile", "pyarrow", "json", "sqlite"])
def test_every_library_that_meets_a_full_disk(disk: Path, library: str) -> None:
    with (
        pytest.raises(EnvironmentFault, match=r"No space left on device; needs 4,000,000 bytes, [\d,]+ available"),
        files.machine_faults(disk, lambda: 4_000_000),
    ):
        write_with(library, disk / "file")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        OSError("1048576 requested and 507904 written"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError(
            "[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0: file write"
            " failed"
        ),
        sqlite3.OperationalError("database or disk is full"),
    ],
)
def test_what_libraries_say_of_a_full_disk(error: Exception) -> None:
    with pytest.raises(EnvironmentFault, match="available"), files.machine_faults(Path("/tmp")):
        raise error


@pytest.mark.parametrize(
    "error",
    [ValueError("a full row"), InputError("disk full of rows"), OSError(errno.ENOENT, "gone"), KeyError("disk")],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, files.machine_faults(Path("/tmp")):
        raise error
    assert caught.value is error
