"""A policy's weights on their way to engines in other processes: files of bounded size, in memory, once a machine."""

from __future__ import annotations

import logging
import stat
import tempfile
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from align import files
from align.errors import EnvironmentFault
from align.rollout import weight_files as module
from align.rollout.engine import WeightSource
from align.rollout.weight_files import weight_files
from align.rollout.worker import _tensors

HEAD = torch.arange(12.0).view(3, 4)
WEIGHTS = {"embed": HEAD, "one": torch.ones(5), "two": torch.full((2, 3), 2.0), "lm_head": HEAD}


def weights(**more: Any) -> WeightSource:
    return WeightSource(7, lambda: iter(WEIGHTS.items()), **more)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Memory and disk of this test alone, with room."""
    found = {"memory": tmp_path / "shm", "disk": tmp_path / "tmp"}
    for folder in found.values():
        folder.mkdir()
    monkeypatch.setattr(module, "SHARED_MEMORY", found["memory"])
    monkeypatch.setattr(tempfile, "tempdir", str(found["disk"]))
    module._tell_once.cache_clear()
    return found


def room(monkeypatch: pytest.MonkeyPatch, **free: int) -> None:
    """So many bytes are free below folders of these names."""
    usage = namedtuple("usage", "free")

    def disk_usage(path: Path) -> Any:
        return usage(next((free[name] for name in ("shm", "tmp") if name in Path(path).parts and name in free), 10**12))

    monkeypatch.setattr(files.shutil, "disk_usage", disk_usage)


def read(written: list[str]) -> dict[str, Tensor]:
    return {name: tensor for file in written for name, tensor in load_file(file).items()}


def test_all_tensors_arrive_and_nothing_stays(places: dict[str, Path]) -> None:
    """A tied head comes under both of its names; only this user can read the file; the worker reads it one by one."""
    with weight_files(weights()) as written:
        (file,) = map(Path, written)
        assert places["memory"] in file.parents
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        found = read(written)
        assert found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)
        assert {name: tensor.tolist() for name, tensor in _tensors(written)} == {
            name: tensor.tolist() for name, tensor in found.items()
        }
    assert not any(places["memory"].iterdir()) and not any(places["disk"].iterdir())


def test_a_file_is_no_larger_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process holds one file's tensors at a time. A tensor above the limit has a file of its own."""
    monkeypatch.setattr(module, "FILE_BYTES", 45)
    with weight_files(weights()) as written:
        assert [sorted(load_file(file)) for file in written] == [["embed"], ["one", "two"], ["lm_head"]]


def test_little_shared_memory_is_told_once(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A container's 64 MB, so to say: the weights go over the disk, and the note says what to do."""
    room(monkeypatch, shm=100)
    with caplog.at_level(logging.WARNING, "align"):
        for _ in range(2):
            with weight_files(weights()) as written:
                assert all(places["disk"] in Path(file).parents for file in written)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "shm has too little room" in said and "--shm-size" in said and str(places["disk"]) in said


def test_what_fits_goes_through_memory(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the large one takes the slow way."""
    monkeypatch.setattr(module, "FILE_BYTES", 45)
    room(monkeypatch, shm=50)
    with weight_files(weights()) as written:
        where = ["shm" if places["memory"] in Path(file).parents else "tmp" for file in written]
    assert where == ["tmp", "shm", "tmp"]


def test_no_room_at_all_is_one_line(monkeypatch: pytest.MonkeyPatch, places: dict[str, Path]) -> None:
    room(monkeypatch, shm=10, tmp=10)
    with (
        pytest.raises(EnvironmentFault, match="not enough disk space: needs 140 bytes, 10 available"),
        weight_files(weights()),
    ):
        raise AssertionError
    assert not any(places["memory"].iterdir()) and not any(places["disk"].iterdir())


def test_memory_that_fills_up_meanwhile_is_told(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By another process: safetensors says so in words of its own."""

    def full(*_: Any) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(EnvironmentFault, match="No space left"), weight_files(weights()):
        raise AssertionError
    assert not any(places["memory"].iterdir())


class Thread:
    """One of several processes, in a thread."""

    def __init__(self, rank: int, meeting: threading.Barrier, values: dict[int, Any]) -> None:
        self.rank, self._meeting, self._values = rank, meeting, values

    def gather(self, value: Any, /) -> list[Any]:
        self._values[self.rank] = value
        self._meeting.wait(60)
        found = [self._values[rank] for rank in sorted(self._values)]
        self._meeting.wait(60)
        return found

    def barrier(self) -> None:
        self.gather(None)


def test_engines_of_one_machine_read_one_copy(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes on two machines: the first of each writes, all walk through the weights, and the files are there
    until the last engine has read them."""
    local = threading.local()
    monkeypatch.setattr(module, "_machine", lambda: (f"machine {local.rank // 2}", 1))
    meeting, values = threading.Barrier(4), dict[int, Any]()
    walked: list[int] = []
    found: dict[int, tuple[list[str], set[str]]] = {}

    def process(rank: int) -> None:
        local.rank = rank

        def tensors() -> Iterator[tuple[str, Tensor]]:
            walked.append(rank)
            yield from WEIGHTS.items()

        with weight_files(WeightSource(7, tensors, Thread(rank, meeting, values))) as written:
            if rank == 3:
                threading.Event().wait(0.3)  # reads later than the one that wrote
            found[rank] = written, set(read(written))

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert sorted(walked) == [0, 1, 2, 3] and sorted(found) == [0, 1, 2, 3]
    assert found[0][0] == found[1][0] != found[2][0] == found[3][0]
    assert all(names == set(WEIGHTS) for _, names in found.values())
    assert not any(places["memory"].iterdir())


def test_a_machine_is_known_by_its_memory(places: dict[str, Path]) -> None:
    """Two processes here are on one machine, whose shared memory is one file system."""
    assert module._machine() == module._machine()
    assert module._machine()[1] == places["memory"].stat().st_dev
