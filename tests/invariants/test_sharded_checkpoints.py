"""Checkpoints of processes that each hold a part of the model: any number of processes goes on from them, and from
those of one process that holds it whole. One that is not complete does not exist."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from align.errors import InputError
from align.training.checkpoint import checkpoints, newest_checkpoint
from align.training.launch import respawn
from tests.support import sharded_checkpoints
from tests.support.sharded_checkpoints import STEPS, Job

STOP = 5
"""The step after which runs are ended; their newest checkpoint is that of step 4."""
FILES = ["weights", "optimizer", "rng-0"]


def carry_out(folder: Path, nproc: int, jobs: Sequence[Job], of_machine: int | None = None) -> None:
    code = f"import os\nos.environ['LOCAL_WORLD_SIZE'] = '{of_machine or nproc}'\nfrom pathlib import Path\n"
    code += f"from tests.support.sharded_checkpoints import Job, carry_out\ncarry_out(Path({str(folder)!r}), {jobs!r})"
    assert respawn(nproc, [sys.executable, "-c", code]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that were never stopped, and those of one and of two processes that were, continued by one, two and
    three."""
    root = tmp_path_factory.mktemp("runs")
    sharded_checkpoints.carry_out(root, [Job("whole-1", "none"), Job("by-1", "none", STOP)])
    carry_out(
        root,
        2,
        [
            *(Job("whole-2", "full"), Job("by-2", "full", STOP)),
            *(Job("whole-adapters", "full", adapters=True), Job("by-adapters", "full", STOP, adapters=True)),
        ],
    )
    for work in ("by-1", "by-2"):
        for number in (1, 2, 3):
            shutil.copytree(root / work, root / f"{work}-on-{number}")
    sharded_checkpoints.carry_out(root, [Job("by-2-on-1", "none")])
    carry_out(root, 2, [Job("by-1-on-2", "full"), Job("by-2-on-2", "full"), Job("by-adapters", "full", adapters=True)])
    carry_out(root, 3, [Job("by-1-on-3", "full"), Job("by-2-on-3", "full")])
    return root


def losses(folder: Path, work: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / work / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss", "eval/loss") if name in row]


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_each_process_saves_its_part_and_nothing_twice(folder: Path) -> None:
    """The files of two processes together are as large as those of one, and no process's file has more than half of
    the rows of a matrix."""
    one, two = (folder / work / "checkpoints" / "step-00000004" for work in ("by-1", "by-2"))
    names = sorted(path.name for path in two.glob("*.safetensors"))
    assert names == [
        *(f"optimizer-0000{part}-of-00002.safetensors" for part in (0, 1)),
        *("rng-0.safetensors", "rng-1.safetensors"),
        *(f"weights-0000{part}-of-00002.safetensors" for part in (0, 1)),
    ]
    whole = load_file(one / "weights.safetensors")
    for part in (0, 1):
        with safe_open(two / f"weights-0000{part}-of-00002.safetensors", "pt") as saved:
            for name, tensor in whole.items():
                rows = saved.get_slice(name).get_shape()[0]
                assert rows <= -(-tensor.shape[0] // 2)
    sizes = [sum(path.stat().st_size for path in at.glob("[ow]*.safetensors")) for at in (one, two)]
    assert abs(sizes[1] / sizes[0] - 1) < 0.1


@pytest.mark.parametrize("work", ["by-1-on-2", "by-1-on-3", "by-2-on-1", "by-2-on-2", "by-2-on-3"])
def test_weights_and_moments_are_those_that_were_saved(folder: Path, work: str) -> None:
    """To the last bit, put together from whatever parts by whatever processes."""
    (found,) = (load_file(path) for path in folder.glob(f"{work}-resumed-*.safetensors"))
    at = folder / work.rpartition("-on-")[0] / "checkpoints" / "step-00000004"
    saved: dict[str, list[Tensor]] = {}
    for path in sorted(at.glob("[ow]*.safetensors")):
        for name, part in load_file(path).items():
            saved.setdefault(name, []).append(part)
    assert found.keys() == saved.keys() and len(found) > 20
    for name, parts in saved.items():
        assert torch.equal(found[name], torch.cat(parts) if parts[0].ndim else parts[0]), name


@pytest.mark.parametrize(("work", "whole"), [("by-2-on-2", "whole-2"), ("by-adapters", "whole-adapters")])
def test_the_same_number_of_processes_goes_on_to_the_last_bit(folder: Path, work: str, whole: str) -> None:
    """With dropout too."""
    assert losses(folder, work) == losses(folder, whole)
    found, wanted = (load_file(folder / f"{name}-ended-2.safetensors") for name in (work, whole))
    assert apart(found, wanted) == 0


@pytest.mark.parametrize("work", ["by-1-on-2", "by-1-on-3", "by-2-on-1", "by-2-on-3"])
def test_another_number_of_processes_goes_on_up_to_rounding(folder: Path, work: str) -> None:
    """Losses and weights of one process that was never stopped."""
    found, wanted = losses(folder, work), losses(folder, "whole-1")
    assert len(found) == len(wanted) > STEPS
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 1e-4
    (ended,) = (load_file(path) for path in folder.glob(f"{work}-ended-*.safetensors"))
    assert apart(ended, load_file(folder / "whole-1-ended-1.safetensors")) < 1e-4


@pytest.mark.parametrize("how", ["damaged", "missing"])
@pytest.mark.parametrize("part", [0, 1])
def test_a_part_that_is_damaged_or_missing(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, part: int
) -> None:
    """One line that names the file, and the checkpoint before; when that has a fault too, an error, and no run."""
    root = tmp_path / "checkpoints"
    shutil.copytree(folder / "by-2" / "checkpoints", root)
    newest, older = (found.folder / f"weights-0000{part}-of-00002.safetensors" for found in checkpoints(root))

    def spoil(path: Path) -> None:
        if how == "missing":
            path.unlink()
        else:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    spoil(newest)
    with caplog.at_level(logging.WARNING, "align"):
        found = newest_checkpoint(root, FILES)
    assert found is not None and found.step == 2
    (line,) = caplog.messages
    told = "missing" if how == "missing" else "manifest says"
    assert line.startswith(f"skipped a damaged checkpoint: {newest}") and told in line
    spoil(older)
    with pytest.raises(InputError, match="no checkpoint verifies"):
        newest_checkpoint(root, FILES)


def test_a_part_that_was_never_noted(folder: Path, tmp_path: Path) -> None:
    """Neither in the folder nor in its manifest: the names of the others say how many there must be."""
    root = tmp_path / "checkpoints"
    shutil.copytree(folder / "by-2" / "checkpoints", root)
    for found in checkpoints(root):
        name = "optimizer-00001-of-00002.safetensors"
        (found.folder / name).unlink()
        manifest = json.loads((found.folder / "manifest.json").read_text())
        del manifest[name]
        (found.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"optimizer-00001-of-00002.safetensors: not in the manifest"):
        newest_checkpoint(root, FILES)


FULL = """
import errno, os
from pathlib import Path
from align.errors import EnvironmentFault
from align.training import checkpoint
from align.training.launch import ranks
from tests.support.sharded_checkpoints import Job, saving
group = ranks()
folder = Path({folder!r})
run = saving(folder, Job("by-2", "full"), group)
run.resume()
run.progress.step += 1
if group.rank == {rank}:
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    checkpoint.save_file = full
try:
    run.save(None, asked=True)
except EnvironmentFault as fault:
    (folder / f"told-{{group.rank}}").write_text(str(fault))
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_cannot_write_its_part(folder: Path, tmp_path: Path, rank: int) -> None:
    """No checkpoint appears, nothing is left behind, the others know why, and the one before is as it was."""
    shutil.copytree(folder / "by-2", tmp_path / "by-2")
    before = sorted(path.name for path in (tmp_path / "by-2" / "checkpoints").iterdir())
    assert respawn(2, [sys.executable, "-c", FULL.format(folder=str(tmp_path), rank=rank)]) == 0
    told = {(tmp_path / f"told-{number}").read_text() for number in (0, 1)}
    assert len(told) == 1 and "No space left on device" in told.pop()
    assert sorted(path.name for path in (tmp_path / "by-2" / "checkpoints").iterdir()) == before
    found = newest_checkpoint(tmp_path / "by-2" / "checkpoints", FILES)
    assert found is not None and found.step == 4


def test_a_copy_on_each_machine_is_saved_once(folder: Path, tmp_path: Path) -> None:
    """Four processes on two machines save two parts; they go on from them, and so does one process."""
    carry_out(tmp_path, 4, [Job("by-4", "hybrid", STOP)], of_machine=2)
    saved = tmp_path / "by-4" / "checkpoints" / "step-00000004"
    names = sorted(path.name for path in saved.glob("weights*"))
    assert names == [f"weights-0000{part}-of-00002.safetensors" for part in (0, 1)]
    shutil.copytree(tmp_path / "by-4", tmp_path / "by-4-on-1")
    carry_out(tmp_path, 4, [Job("by-4", "hybrid")], of_machine=2)
    sharded_checkpoints.carry_out(tmp_path, [Job("by-4-on-1", "none")])
    resumed = [load_file(tmp_path / f"{work}.safetensors") for work in ("by-4-resumed-4", "by-4-on-1-resumed-1")]
    assert apart(*resumed) == 0
    for work in ("by-4", "by-4-on-1"):
        found, wanted = losses(tmp_path, work), losses(folder, "whole-1")
        assert len(found) == len(wanted)
        assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 1e-4
