"""Sharded sampling: the same bytes in one attempt, in many, and by several processes."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align.data.chat.encoder import Encoder
from align.errors import InputError, Interrupted
from align.rollout import samples as sharding
from align.rollout.engine import Sample, Sampling
from align.rollout.samples import Samples, sample_shards
from align.rollout.scripted import ScriptedEngine
from tests.support import tokenizers

SAMPLING = Sampling(12, n=3, seed=7)


class Counting(ScriptedEngine):
    """Counts what it is asked for, gives log-probs, and dies after ``calls``."""

    def __init__(self, *arguments: Any, calls: int = 99) -> None:
        super().__init__(*arguments)
        self.asked: list[tuple[int, int]] = []
        self._calls = calls

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Sample]]:
        if len(self.asked) == self._calls:
            raise RuntimeError("killed")
        self.asked.append((len(prompts), sampling.seed))
        made = super().generate(prompts, sampling)
        return [[Sample(c.ids, tuple(-0.1 * i for i in c.ids), c.finish_reason, 5) for c in group] for group in made]


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(tokenizers.chatml())


@pytest.fixture
def engine(tmp_path: Path, encoder: Encoder) -> Any:
    path = tmp_path / "script.jsonl"
    path.write_text(
        "".join(json.dumps({"completion": f"answer {i} of many, some long"[: 6 + i]}) + "\n" for i in range(20))
    )
    return lambda calls=99: Counting(path, encoder, calls=calls)


@contextmanager
def opened(engine: Counting, log: list[str] | None = None) -> Iterator[Counting]:
    if log is not None:
        log.append("opened")
    yield engine


def prompts(encoder: Encoder, count: int = 10) -> list[list[int]]:
    return [encoder.encode_prompt([{"role": "user", "content": f"number {i}"}]).tolist() for i in range(count)]


def shards(engine: Any, asked: list[list[int]], folder: Path, **changes: Any) -> Samples:
    settings: dict[str, Any] = {
        "key": {"weights": "w"},
        "console": Console(file=io.StringIO()),
        "name": "test",
        "shard_prompts": 3,
    }
    settings |= {"folder": folder, **changes}
    sampling = settings.pop("sampling", SAMPLING)
    return sample_shards(engine, asked, sampling, **settings)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_hold_what_the_engine_gave(engine: Any, encoder: Encoder, tmp_path: Path) -> None:
    """Ids, log-probs, finish reason and version come back; each shard has a seed of its own."""
    counting = engine()
    made = list(shards(opened(counting), prompts(encoder), tmp_path / "a"))
    assert [size for size, _ in counting.asked] == [3, 3, 3, 1]
    assert len({seed for _, seed in counting.asked}) == 4 and SAMPLING.seed not in dict(counting.asked).values()
    assert len(made) == 10 and all(len(group) == 3 for group in made)
    for group in made:
        for one in group:
            assert one.version == 5
            assert one.logprobs == pytest.approx([-0.1 * i for i in one.ids], rel=1e-6)
            assert one.finished == (one.ids[-1] == encoder.stop_ids[0])
    assert {one.finish_reason for group in made for one in group} == {"stop", "length"}
    assert made[0] != made[3], "the first prompts of two shards do not get the same answers"


def test_an_engine_without_logprobs(tmp_path: Path, encoder: Encoder, engine: Any) -> None:
    plain = ScriptedEngine(tmp_path / "script.jsonl", encoder)
    assert all(
        one.logprobs is None for group in shards(opened(plain), prompts(encoder), tmp_path / "a") for one in group
    )  # type: ignore[arg-type]


def test_killed_after_each_shard_the_bytes_are_the_same(engine: Any, encoder: Encoder, tmp_path: Path) -> None:
    """The heart of it: whatever was done before the kill is kept, and only the rest is made."""
    shards(opened(engine()), prompts(encoder), tmp_path / "whole")
    expected = content(tmp_path / "whole")
    for done in range(5):
        folder = tmp_path / f"killed-{done}"
        if done < 4:
            with pytest.raises(RuntimeError, match="killed"):
                shards(opened(engine(calls=done)), prompts(encoder), folder)
        again = engine()
        shards(opened(again), prompts(encoder), folder)
        assert len(again.asked) == 4 - (done if done < 4 else 0)
        assert content(folder) == expected


def test_several_processes_make_the_same_shards(engine: Any, encoder: Encoder, tmp_path: Path) -> None:
    """One or three workers, identical bytes."""
    shards(opened(engine()), prompts(encoder), tmp_path / "one")
    for rank in (2, 0, 1):
        made = shards(opened(engine()), prompts(encoder), tmp_path / "three", rank=rank, world=3)
    assert content(tmp_path / "three") == content(tmp_path / "one")
    assert len(list(made)) == 10


def test_a_finished_work_opens_no_engine(engine: Any, encoder: Encoder, tmp_path: Path) -> None:
    log: list[str] = []
    for _ in range(2):
        shards(opened(engine(), log), prompts(encoder), tmp_path / "a")
    assert log == ["opened"]


@pytest.mark.parametrize("damage", ["content", "cut", "note"])
def test_a_damaged_shard_is_made_again(engine: Any, encoder: Encoder, tmp_path: Path, damage: str) -> None:
    made = shards(opened(engine()), prompts(encoder), tmp_path / "a")
    expected = content(tmp_path / "a")
    path = tmp_path / "a" / "samples-00001.parquet"
    data = path.read_bytes()
    match damage:
        case "content":
            path.write_bytes(data[:99] + bytes([data[99] ^ 1]) + data[100:])
        case "cut":
            path.write_bytes(data[:-1])
        case _:
            path.with_name(f"{path.name}.note.json").unlink()
    with pytest.raises(InputError, match=r"samples-00001\.parquet: is missing or damaged"):
        list(made)
    again = engine()
    shards(opened(again), prompts(encoder), tmp_path / "a")
    assert len(again.asked) == 1
    assert content(tmp_path / "a") == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"key": {"weights": "other"}},
        {"sampling": Sampling(12, n=3, seed=8)},
        {"sampling": Sampling(12, n=3, seed=7, temperature=0.5)},
    ],
    ids=["weights", "seed", "temperature"],
)
def test_shards_of_other_settings_are_not_used(
    engine: Any, encoder: Encoder, tmp_path: Path, changes: dict[str, Any]
) -> None:
    shards(opened(engine()), prompts(encoder), tmp_path / "a")
    again = engine()
    shards(opened(again), prompts(encoder), tmp_path / "a", **changes)
    assert len(again.asked) == 4
    other = engine()
    shards(opened(other), prompts(encoder, 9), tmp_path / "a", **changes)
    assert len(other.asked) == 3, "other prompts"


def test_a_signal_stops_between_shards(
    engine: Any, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done is kept, the exit code is the signal's, and the next call goes on."""
    first = engine()
    monkeypatch.setattr(sharding, "stop_requested", lambda: signal.SIGTERM if len(first.asked) == 2 else None)
    with pytest.raises(Interrupted, match="2 shards to go; the same command continues") as caught:
        shards(opened(first), prompts(encoder), tmp_path / "a")
    assert caught.value.exit_code == 143
    monkeypatch.undo()
    second = engine()
    shards(opened(second), prompts(encoder), tmp_path / "a")
    assert len(second.asked) == 2


def test_progress_is_told(engine: Any, encoder: Encoder, tmp_path: Path) -> None:
    text = io.StringIO()
    shards(opened(engine()), prompts(encoder), tmp_path / "a", console=Console(file=text, width=120), name="mine")
    lines = text.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("mine  30/30 samples  ") and lines[-1].endswith(" samples/s  0 s left")


def test_shards_have_about_512_samples(engine: Any, encoder: Encoder, tmp_path: Path) -> None:
    counting = engine()
    shards(opened(counting), prompts(encoder), tmp_path / "a", shard_prompts=None, sampling=Sampling(4, n=100))
    assert [size for size, _ in counting.asked] == [6, 4]


def test_long_answers_make_smaller_shards(engine: Any, encoder: Encoder, tmp_path: Path) -> None:
    """Of 1,280 tokens 128 make a shard, of 256 tokens 256."""
    for tokens, sizes in ((1280, [4, 4, 2]), (256, [8, 2])):
        counting = engine()
        shards(
            opened(counting),
            prompts(encoder),
            tmp_path / str(tokens),
            shard_prompts=None,
            sampling=Sampling(tokens, n=32),
        )
        assert [size for size, _ in counting.asked] == sizes


def test_no_prompts_no_shards(engine: Any, tmp_path: Path) -> None:
    assert list(shards(opened(engine()), [], tmp_path / "a")) == []
