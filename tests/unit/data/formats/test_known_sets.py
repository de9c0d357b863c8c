"""What is known of a source by where it comes from: test sets are named, and what a card says of its licence is
repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.formats.known_sets import TEST_SET, TEST_SETS, is_test_set, licence_of
from align.data.sources.mixture import read_records
from align.errors import InputError
from align.recipe.schema import DataSource


def source(path: str, **keys: Any) -> DataSource:
    return DataSource.model_validate({"path": path, **keys})


@pytest.mark.parametrize("id", TEST_SETS)
def test_every_test_set_is_known_by_its_id_and_in_the_hubs_cache(id: str) -> None:
    splits = TEST_SETS[id]
    keys = {"split": splits[0]} if splits else {}
    assert is_test_set(source(id, **keys), id)
    assert is_test_set(source("x", **keys), Path(f"/cache/datasets--{id.replace('/', '--')}/snapshots/abc/data"))
    assert is_test_set(source(id), id) is not bool(splits)  # the train split of a set that has one


@pytest.mark.parametrize(
    ("path", "keys", "known"),
    [
        ("gsm8k/main/test-00000-of-00001.parquet", {}, True),
        ("gsm8k/main/train-00000-of-00001.parquet", {}, False),
        ("RM-Bench/total_dataset.json", {}, True),
        ("judgebench.jsonl", {}, True),
        ("my-rewards/bench.jsonl", {}, False),
    ],
)
def test_files_by_the_names_of_their_folders(path: str, keys: dict[str, Any], known: bool, tmp_path: Path) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")
    assert is_test_set(source(str(file), **keys), file) is known


def test_a_test_set_is_named_in_the_report_once(tmp_path: Path) -> None:
    row = {"question": "2+2?", "response_A": "4", "response_B": "5", "label": "A>B"}
    for name, times in (("mine.jsonl", 1), ("JudgeBench.jsonl", 1)):
        path = tmp_path / name
        path.write_text(json.dumps(row) + "\n")
        records = read_records([source(str(path))], [path], "preference", seed=0, rejects=None)
        assert len(list(records)) == 1
        assert records.report.lines()[0].count(TEST_SET) == times
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n")
    records = read_records([source(str(other))], [other], "preference", seed=0, rejects=None)
    list(records)
    assert TEST_SET not in records.report.lines()[0]


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("license: mit", "licence mit"),
        ("license: [cc-by-nc-4.0, mit]", "licence cc-by-nc-4.0, mit (not for commercial use)"),
        (
            "license: other\nlicense_name: own-terms\nextra_gated_prompt: You agree.",
            "licence own-terms, gated: its card asks readers to agree to terms before they use it",
        ),
        ("tags: [x]", None),
    ],
)
def test_what_a_card_says_of_its_licence(head: str, said: str | None, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# A data set\n")
    assert licence_of(source(str(tmp_path)), tmp_path) == said
    records = read_records([source(str(tmp_path))], [tmp_path], "conversation", seed=0, rejects=None)
    list(records)
    assert (f"{tmp_path}: {said}" in records.report.lines()) is (said is not None)
    assert records.report.as_json()["sources"][0]["licence"] == said


@pytest.mark.parametrize("head", ["license: [", "- a list"])
def test_a_card_with_a_broken_head_is_an_error_of_the_file(head: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# A data set\n")
    assert licence_of(source(str(tmp_path)), tmp_path) is None
    with pytest.raises(InputError, match=r"README\.md: its header is not what the hub understands"):
        list(read_records([source(str(tmp_path))], [tmp_path], "conversation", seed=0, rejects=None))


def test_the_card_of_a_hub_data_set_is_looked_for_in_the_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    folder = tmp_path / "datasets--some--set"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    assert licence_of(source("some/set"), "some/set") is None
    (folder / "snapshots" / commit / "README.md").write_text("---\nlicense: odc-by\n---\n")
    assert licence_of(source("some/set"), "some/set") == "licence odc-by"
