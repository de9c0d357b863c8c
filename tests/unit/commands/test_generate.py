"""``align generate``: samples of a model for a file of prompts, kept as they are made."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align.commands import generate as command
from align.commands.generate import generate
from align.errors import InputError
from align.recipe.schema import AutoRollout
from align.rollout import samples as sharding
from align.rollout.engine import Sampling
from tests.support.saved import save_tiny
from tests.support.scripted import Dying, open_scripted, write_script

SAMPLING = Sampling(12, n=3, seed=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model")).path


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Five prompts, two in a shard."""
    monkeypatch.chdir(tmp_path)
    write_script(tmp_path, ["Tea it is.", "Paris.", "The dog sleeps, and the fox runs away, and so on.", "Rain."])
    rows = [{"id": f"p{i}", "prompt": f"Number {i}?"} for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(command, "open_engine", open_scripted)
    monkeypatch.setattr(sharding, "SHARD_SAMPLES", 6)
    monkeypatch.setattr(Dying, "calls", 0)
    monkeypatch.setattr(Dying, "dies_at", -1)
    yield tmp_path


def run(
    model: str, out: str | None = "out.jsonl", sampling: Sampling = SAMPLING, **changes: Any
) -> tuple[list[str], str]:
    """(what was shown, what was said)."""
    shown: list[str] = []
    text = io.StringIO()
    arguments: dict[str, Any] = {
        "cache": Path("cache"),
        "console": Console(file=text, width=120),
        "show": shown.append,
        **changes,
    }
    generate(model, Path("prompts.jsonl"), sampling, AutoRollout(), out=Path(out) if out else None, **arguments)
    return shown, text.getvalue()


def rows(path: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_a_line_for_each_prompt_with_its_samples(model: str) -> None:
    _, said = run(model)
    assert "15/15 samples" in said
    found = rows()
    assert [row["id"] for row in found] == [f"p{i}" for i in range(5)]
    assert found[0]["prompt"] == [{"role": "user", "content": "Number 0?"}]
    assert all(len(row["completions"]) == 3 for row in found)
    entries = [entry for row in found for entry in row["completions"]]
    assert {entry["text"] for entry in entries} >= {"Tea it is.", "Paris.", "Rain."}
    assert all(entry["finished"] == (entry["tokens"] < 12 or entry["text"].endswith(".")) for entry in entries)
    assert {entry["finished"] for entry in entries} == {True, False}


def test_without_out_the_lines_are_shown_and_nothing_is_kept(model: str, folder: Path) -> None:
    run(model)
    before = sorted(folder.rglob("*"))
    shown, _ = run(model, None)
    assert [json.loads(line) for line in shown] == rows()
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("shard", range(3))
def test_killed_it_goes_on_and_ends_with_the_same_bytes(model: str, shard: int, folder: Path) -> None:
    run(model, "whole.jsonl")
    Dying.calls, Dying.dies_at = 0, shard
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert not Path("out.jsonl").exists()
    run(model)
    assert Dying.calls == 1 + 3
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert [path.name for path in (folder / ".out.jsonl.samples").iterdir()] == ["settings.json"]


def test_the_same_command_again_does_nothing(model: str) -> None:
    run(model)
    calls = Dying.calls
    _, said = run(model)
    assert said == "out.jsonl: up to date\n" and Dying.calls == calls


def test_killed_between_the_output_and_the_end_it_is_up_to_date(
    model: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(command.files, "remove_folder", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(model)
    assert "up to date" in run(model)[1]
    assert [path.name for path in (folder / ".out.jsonl.samples").iterdir()] == ["settings.json"]


def test_an_output_of_other_settings_is_never_replaced(model: str) -> None:
    run(model)
    content = Path("out.jsonl").read_bytes()
    for sampling in (Sampling(12, n=3, seed=5), Sampling(12, n=4, seed=4), Sampling(12, n=3, seed=4, temperature=0.5)):
        with pytest.raises(InputError, match=r"out\.jsonl: exists, and was made from another sampling; remove it"):
            run(model, sampling=sampling)
    Path("prompts.jsonl").write_text('{"prompt": "Another?"}\n')
    with pytest.raises(InputError, match="another prompts"):
        run(model)
    assert Path("out.jsonl").read_bytes() == content
    Path("mine.jsonl").write_text("not yours\n")
    with pytest.raises(InputError, match="what it was made from is not known"):
        run(model, "mine.jsonl")
    with pytest.raises(InputError, match="there is no folder"):
        run(model, "none/out.jsonl")


def test_shards_of_other_settings_are_not_used(model: str) -> None:
    run(model, "whole.jsonl")
    Dying.calls, Dying.dies_at = 0, 2
    with pytest.raises(KeyboardInterrupt):
        run(model, sampling=Sampling(12, n=3, seed=5))
    run(model)
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_prompts_that_leave_no_room_in_the_model_are_named_before_anything_is_sampled(
    model: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them at once, whichever engine would sample."""
    positions = json.loads((Path(model) / "config.json").read_text())["max_position_embeddings"]
    long = [{"prompt": "again " * positions}, {"prompt": "Short."}, {"prompt": "and " * positions}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    monkeypatch.setattr(command, "open_engine", lambda *args, **kwargs: pytest.fail("an engine was opened"))
    with pytest.raises(InputError) as caught:
        run(model)
    first, second, total = caught.value.problems
    assert (first.line, second.line) == (1, 3) and str(first.file).endswith("prompts.jsonl")
    assert f"leave no room for 12 more: the model holds {positions}" in first.message.replace(",", "")
    assert "2 such prompts" in total.message and "--max-new-tokens" in str(total.hint)
    assert not Path("out.jsonl").exists()
    with pytest.raises(InputError, match="1 such prompts"):  # without an answer the second one would fit
        (folder / "prompts.jsonl").write_text(json.dumps(long[1]) + "\n")
        run(model, sampling=Sampling(positions, n=1))
