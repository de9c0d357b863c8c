"""Self-Contrast end to end on a tiny model, a scripted engine and a tiny embedder: from conversations to a policy
trained by DPO."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from align.data.chat.encoder import Encoder
from align.data.sources.mixture import read_records
from align.data.trees.build import Limits, tree_of
from align.errors import InputError
from align.functional.selection import normalised
from align.pipeline.runner import RunResult, run_recipe
from align.pipeline.selection import Selection
from align.recipe.load import load_recipe
from align.recipe.schema import DataSource
from align.rollout import samples as sharding
from align.scoring import embeddings
from align.stages.shared import policy_samples
from tests.support.embedder import save_embedder
from tests.support.readme import every_file_is_explained
from tests.support.report_run import reported
from tests.support.root import ROOT
from tests.support.saved import save_tiny
from tests.support.scripted import Dying, open_scripted, write_script
from tests.support.tokenizers import chatml

WORDS = ("tea", "rain", "sun", "snow", "wind", "fog")
COMPLETIONS = [
    *(
        "Tea it is.",
        "tea it is",
        " I like the rain and the snow.",
        "The dog sleeps.",
        "Paris.",
        "The fox runs away, and so do I, and so on and on.",
    ),
    *(
        "What is the capital?",
        "今天天气很好。",
        "12 + 34 = 46",
        "",
        "Answer in one short sentence.",
        "You are a helpful assistant.",
    ),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "model", max_position_embeddings=512)
    save_embedder(folder / "embedder")
    return folder


@pytest.fixture
def folder(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder: a model, an embedder, a script, and six conversations, one of two turns."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "embedder"):
        (tmp_path / name).symlink_to(models / name)
    rows = [
        {"id": f"talk-{word}", "lang": "en", "messages": turn(f"Say {word}.", f"{word.title()} it is.")}
        for word in WORDS
    ]
    rows[1]["messages"] = [*turn("Hello.", "Hi."), *rows[1]["messages"]]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_script(tmp_path, COMPLETIONS)
    monkeypatch.setattr(policy_samples, "open_engine", open_scripted)
    monkeypatch.setattr(Dying, "calls", 0)
    monkeypatch.setattr(Dying, "dies_at", -1)
    yield tmp_path


def turn(asked: str, said: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def contrast(**options: Any) -> dict[str, Any]:
    common = {
        "kind": "self_contrast",
        "data": "talk.jsonl",
        "samples_per_prompt": 20,
        "negatives": 4,
        "max_new_tokens": 16,
        "max_length": 200,
    }
    engine = {"rollout": {"engine": "scripted", "script": "script.jsonl"}}
    return {**common, "embedder": "./embedder", **engine, **options}


DPO = {
    "kind": "dpo",
    "data": "stage:contrast",
    "train": {"learning_rate": 3e-3, "batch_size": 3, "microbatch_tokens": 512, "epochs": 2},
}


def run(stages: dict[str, Any], text: io.StringIO | None = None, *, runs: str = "runs") -> RunResult:
    recipe = {"name": "r", "seed": 5, "model": "./model", "stages": stages}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    result = run_recipe(
        load_recipe("recipe.yaml"),
        console=Console(file=text or io.StringIO(), width=140),
        runs_dir=Path(runs),
        selection=Selection(replace=True),
    )
    every_file_is_explained(result.folder)
    return result


def rows_of(result: RunResult) -> list[dict[str, Any]]:
    lines = (result.folder / "stages" / "contrast" / "data.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def made(result: RunResult, *names: str) -> dict[str, bytes]:
    return {
        name: (result.folder / "stages" / "contrast" / name).read_bytes()
        for name in names or ("data.jsonl", "report.json")
    }


def test_from_conversations_to_a_trained_policy(folder: Path) -> None:
    """The rows are preferences as `dpo` reads them, with the data's ids; DPO starts at ln 2 and learns from them."""
    text = io.StringIO()
    result = run({"contrast": contrast(), "dpo": DPO}, text)
    rows, report = rows_of(result), json.loads(made(result)["report.json"])
    summary = result.summaries["contrast"]
    assert [row["id"] for row in rows] == [f"talk-{word}" for word in WORDS]
    assert (summary["prompts"], summary["kept"], summary["dropped"], summary["samples"]) == (6, 6, 0, 120)
    assert sum(summary["samples_by_reason"].values()) == 120 and summary["samples_by_reason"]["negative"] == 24
    assert summary["samples_by_reason"]["duplicate"] > 0 and summary["samples_by_reason"]["empty"] > 0
    for row, word in zip(rows, WORDS, strict=True):
        assert row["lang"] == "en" and row["prompt"][-1] == {"role": "user", "content": f"Say {word}."}
        assert row["chosen"] == [{"role": "assistant", "content": f"{word.title()} it is."}]
        assert len(row["rejected"]) == len(row["similarities"]) == len(row["sample_ids"]) == 4
        said = [normalised(answer[0]["content"]) for answer in row["rejected"]]
        assert len(set(said)) == 4 and normalised(row["chosen"][0]["content"]) not in said
        assert {id.partition("#")[0] for id in row["sample_ids"]} == {row["id"]}
    assert len(rows[1]["prompt"]) == 3, "only the last turn is a target"
    assert (
        sum(bin["samples"] for bin in report["histogram"]) == 120
        and sum(bin["negatives"] for bin in report["histogram"]) == 24
    )
    assert reported(result.folder)["contrast"]["prompts in, preferences out"].cells == ("6", "6", "")
    shown = text.getvalue()
    for words in (
        "prompts in",
        "copies of the target",
        "too similar to the target",
        "seconds, sampling",
        "texts cut by the embedder",
    ):
        assert words in shown
    dpo = result.summaries["dpo"]
    metrics = [
        json.loads(line) for line in (result.folder / "stages" / "dpo" / "metrics.jsonl").read_text().splitlines()
    ]
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert dpo["steps"] == 4 and metrics[-1]["rewards/margins"] > 0.05
    assert run({"contrast": contrast(), "dpo": DPO}).ran == ()


def test_choosing_differently_samples_nothing_anew(folder: Path) -> None:
    """Samples follow from the policy, the prompts and how they are drawn, not from what is made of them."""
    few = rows_of(run({"contrast": contrast(negatives=2)}))
    calls = Dying.calls
    many = rows_of(run({"contrast": contrast(negatives=4)}))
    assert Dying.calls == calls > 0
    for one, other in zip(few, many, strict=True):
        assert set(one["sample_ids"]) < set(other["sample_ids"])
    write_script(folder, [*COMPLETIONS, "Another one."])
    run({"contrast": contrast(negatives=4)})
    assert Dying.calls > calls, "another script gives other samples"


def test_the_filter_is_on_the_embedders_cosines(folder: Path) -> None:
    """The scores are the embedder's, computed here again, and the most similar of all that the script can say is
    no negative."""
    result = run({"contrast": contrast(negatives=2)})
    embedder = embeddings.SentenceEmbedder(folder / "embedder")
    encoder = Encoder(chatml())
    engine = Dying(folder / "script.jsonl", encoder)
    for row in rows_of(result):
        target = row["chosen"][0]["content"]
        vectors = embedder.embed([target, *(answer[0]["content"] for answer in row["rejected"])])
        np.testing.assert_allclose(row["similarities"], vectors[1:] @ vectors[0], atol=1e-5)
        # All that this prompt could be answered with, cut where the sampling was.
        usable = {encoder.decode(ids[:16]).lstrip() for ids in engine._answers[None]}
        usable = {text for text in usable if normalised(text) not in ("", normalised(target))}
        assert max(row["similarities"]) < max((embedder.embed(sorted(usable)) @ vectors[0]).tolist()) + 1e-6


def test_unfinished_samples_are_trained_without_an_end(folder: Path) -> None:
    """A sample cut at max_new_tokens is marked, its tree has no end token, and `unfinished: drop` leaves it
    out."""
    result = run({"contrast": contrast(max_new_tokens=8, samples_per_prompt=30)})
    path = result.folder / "stages" / "contrast"
    records = list(read_records([DataSource(path=str(path))], [path], "preference", seed=0, rejects=None))
    encoder = Encoder(chatml())
    marked = 0
    for record in records:
        tree: Any = tree_of(record, encoder, Limits(200, "drop", "last"), lambda what: None)
        rejected: Any = record.rejected  # type: ignore[union-attr]
        for answer, branch in zip(rejected, tree.branches[1:], strict=True):
            cut = answer[0].get("finished") is False
            marked += cut
            assert (branch.ids[-1] in encoder.stop_ids) is not cut
            assert len(branch.ids) <= 8 + (not cut) or "今" in answer[0]["content"]
    assert marked > 3
    without = run({"contrast": contrast(max_new_tokens=8, samples_per_prompt=30, unfinished="drop", negatives=1)})
    assert all("finished" not in answer[0] for row in rows_of(without) for answer in row["rejected"])
    assert without.summaries["contrast"]["samples_by_reason"]["unfinished"] > 0


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three shards of two prompts, and eight blocks of sixteen texts."""
    monkeypatch.setattr(sharding, "SHARD_SAMPLES", 40)
    monkeypatch.setattr(embeddings, "BLOCK_TEXTS", 16)


@pytest.mark.parametrize("shard", range(3))
def test_killed_while_sampling_it_ends_with_the_same_bytes(
    folder: Path, small_parts: None, shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = made(run({"contrast": contrast()}, runs="whole"))
    Dying.calls, Dying.dies_at = 0, shard
    with pytest.raises(KeyboardInterrupt):
        run({"contrast": contrast()})
    again = run({"contrast": contrast()})
    assert Dying.calls == 1 + 3, "no shard was made twice"
    assert made(again) == expected
    assert again.ran == ("contrast",)


def test_killed_while_embedding_it_ends_with_the_same_bytes(
    folder: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sample is drawn again, and only the blocks that were missing are embedded."""
    expected = made(run({"contrast": contrast()}, runs="whole"))
    Dying.calls = 0
    embed = embeddings.SentenceEmbedder.embed
    blocks: list[int] = []

    def dying(self: Any, texts: Any) -> Any:
        if len(blocks) == 4:
            raise KeyboardInterrupt
        blocks.append(len(texts))
        return embed(self, texts)

    monkeypatch.setattr(embeddings.SentenceEmbedder, "embed", dying)
    with pytest.raises(KeyboardInterrupt):
        run({"contrast": contrast()})
    left = blocks.copy()
    blocks[:] = [-99] * 5
    again = run({"contrast": contrast()})
    assert Dying.calls == 3 and len(left) == 4 and len(blocks) - 5 == 8 - 4
    assert made(again) == expected


def test_a_damaged_shard_is_sampled_again(folder: Path, small_parts: None) -> None:
    expected = made(run({"contrast": contrast()}, runs="whole"))
    Dying.calls, Dying.dies_at = 0, 2
    with pytest.raises(KeyboardInterrupt):
        run({"contrast": contrast()})
    (shard,) = Path("runs").rglob("samples-00000.parquet")
    shard.write_bytes(shard.read_bytes()[:-1])
    again = run({"contrast": contrast()})
    assert Dying.calls == 3 + 2
    assert made(again) == expected


PROGRAM = """
import io, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from rich.console import Console
from align.pipeline.runner import run_recipe
from align.recipe.load import load_recipe
from align.rollout import samples
from align.scoring import embeddings
from align.stages.shared import policy_samples
from align.training.launch import leave
from tests.support.scripted import open_scripted
policy_samples.open_engine = open_scripted
samples.SHARD_SAMPLES, embeddings.BLOCK_TEXTS = {shard}, {block}
run_recipe(load_recipe("recipe.yaml"), console=Console(file=io.StringIO()), runs_dir=Path(sys.argv[1]))
leave()
"""


@pytest.mark.slow
def test_two_processes_with_other_hash_seeds_write_identical_bytes(folder: Path) -> None:
    """This one, and one with another order of sets."""
    mine = made(run({"contrast": contrast()}))
    environment = {**os.environ, "PYTHONHASHSEED": "999"}
    command = [sys.executable, "-c", PROGRAM.format(root=str(ROOT), shard=512, block=1024), "other"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert mine == {name: Path("other", "r", "stages", "contrast", name).read_bytes() for name in mine}


@pytest.mark.slow
def test_several_processes_share_the_work(folder: Path, small_parts: None) -> None:
    """Two processes with a shard more for one of them, then log-probs of three prompts each: the bytes of a single
    process."""
    (folder / "copy").symlink_to(folder / "model")
    talks = {
        "data": "talk.jsonl",
        "samples_per_prompt": 20,
        "max_new_tokens": 16,
        "max_length": 200,
        "embedder": "./embedder",
    }
    evaluate = {"kind": "evaluate", "policies": ["./model", "./copy"], **talks, "rollout": contrast()["rollout"]}
    one = run({"contrast": contrast(), "compare": evaluate})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-c", PROGRAM.format(root=str(ROOT), shard=40, block=16), "two"]
    second = subprocess.Popen(command, env={**shared, "RANK": "1", "LOCAL_RANK": "0"}, stderr=subprocess.DEVNULL)
    try:
        first = subprocess.run(
            command, env={**shared, "RANK": "0", "LOCAL_RANK": "0"}, capture_output=True, text=True, timeout=240
        )
        assert first.returncode == 0, first.stderr
        assert second.wait(60) == 0
    finally:
        second.kill()
        second.wait()
    two = Path("two", "r", "stages")
    assert made(one) == {name: (two / "contrast" / name).read_bytes() for name in ("data.jsonl", "report.json")}
    mine, theirs = (
        json.loads((path / "compare" / "report.json").read_text())["metrics"] for path in (one.folder / "stages", two)
    )
    for name, policies in mine.items():
        for policy, entry in policies.items():
            assert theirs[name][policy]["mean"] == pytest.approx(entry["mean"], abs=1e-4)


def test_what_decides_the_result(folder: Path) -> None:
    """Another K reuses the samples' seed, so its negatives contain the smaller draw; another seed has others."""
    four, two = rows_of(run({"contrast": contrast()})), rows_of(run({"contrast": contrast(negatives=2)}))
    assert all(set(b["sample_ids"]) < set(a["sample_ids"]) for a, b in zip(four, two, strict=True))
    other = rows_of(run({"contrast": contrast(negatives=2, seed=6)}))
    assert [row["rejected"] for row in other] != [row["rejected"] for row in two]


# Baselines, by configuration alone


def test_no_filter_and_no_deduplication(folder: Path) -> None:
    result = run({"contrast": contrast(keep_least_similar=1, dedup=False, negatives=20, too_few="keep")})
    counts = Counter(result.summaries["contrast"]["samples_by_reason"])
    assert counts["filtered"] == counts["duplicate"] == counts["not drawn"] == 0
    assert counts["negative"] + counts["empty"] + counts["target"] == 120
    assert all(len(row["rejected"]) > 4 for row in rows_of(result))


def test_spin_is_one_sample_without_filter(folder: Path) -> None:
    """N = 1 is one answer, not its characters."""
    result = run({"contrast": contrast(samples_per_prompt=1, negatives=1, keep_least_similar=1)})
    rows = rows_of(result)
    assert len(rows) + result.summaries["contrast"]["dropped"] == 6 and len(rows) >= 3
    assert all(len(row["rejected"]) == 1 and row["sample_ids"] == [f"{row['id']}#0"] for row in rows)
    assert all(len(row["rejected"][0][0]["content"]) > 3 for row in rows)


def test_negatives_from_other_prompts(folder: Path) -> None:
    result = run({"contrast": contrast(source="other_prompts", keep_least_similar=1)})
    origins = Counter(id.partition("#")[0] == row["id"] for row in rows_of(result) for id in row["sample_ids"])
    assert origins == {False: 24}
    assert len({id.partition("#")[0] for row in rows_of(result) for id in row["sample_ids"]}) == 6
    Path("talk.jsonl").write_text(Path("talk.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(InputError, match="needs two prompts at least"):
        run({"contrast": contrast(source="other_prompts")})


def test_too_few_drops_or_keeps_and_counts(folder: Path) -> None:
    """Ids in are ids out and drops."""
    write_script(folder, ["Tea it is.", "Rain it is!", "Paris.", "The dog."])
    drop = run({"contrast": contrast(negatives=3, keep_least_similar=1)})
    kept = [row["id"] for row in rows_of(drop)]
    assert drop.summaries["contrast"]["kept"] == len(kept) and drop.summaries["contrast"]["dropped"] == 6 - len(kept)
    keep = run({"contrast": contrast(negatives=4, keep_least_similar=1, too_few="keep")})
    assert [row["id"] for row in rows_of(keep)] == [f"talk-{word}" for word in WORDS]
    assert {len(row["rejected"]) for row in rows_of(keep)} <= {1, 2, 3, 4} and len(rows_of(keep)[0]["rejected"]) == 3


def test_no_preference_at_all_is_an_error(folder: Path) -> None:
    """A stage that would write nothing says why, and leaves nothing."""
    write_script(folder, ["Always the same."])
    with pytest.raises(
        InputError, match=r"none of 6 prompts has 4 negatives: 120 samples, 114 copies of another sample, 6 too similar"
    ):
        run({"contrast": contrast()})
    assert not Path("runs/r/stages/contrast").exists()


def test_rows_that_cannot_be_used_are_counted_with_their_lines(folder: Path) -> None:
    """Too long, no text, not trained; each with its line in the rejects."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    bad = [
        {"messages": turn("x " * 200, "long")},
        {"messages": turn("x " * 40, "no room")},
        {"messages": [turn("?", "")[0], call]},
        {"messages": [turn("?", "")[0], {"role": "assistant", "content": "not me", "train": False}]},
    ]
    with Path("talk.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in bad))
    text = io.StringIO()
    result = run({"contrast": contrast(max_length=130, max_new_tokens=64)}, text)
    rejects = [json.loads(line) for line in made(result, "rejects.jsonl")["rejects.jsonl"].decode().splitlines()]
    assert [row["line"] for row in rejects] == [7, 8, 9, 10]
    assert [row["reason"].split()[0] for row in rejects] == ["longer", "the", "the", "nothing"]
    assert result.summaries["contrast"]["prompts"] == 6
    assert "dropped, the answer has no text: 1" in text.getvalue()
