"""Folders: by split, as a downloaded repository, as `datasets` saved them; and keys that mean nothing for a source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from align.data.rows import Told
from align.data.sources.readers import BadRow, read_rows
from align.data.trees.load import _identity
from align.errors import InputError
from align.recipe.checks import source_keys
from align.recipe.load import load_recipe
from align.recipe.schema import DataSource

Make = Callable[..., Path]
SHARD = "00000-of-00001.parquet"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Files whose one row says their own name."""

    def write(*names: str, **texts: str) -> Path:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                datasets.Dataset.from_list([{"name": name}]).to_parquet(path)
            else:
                path.write_text(f'{{"name": "{name}"}}\n')
        for name, text in texts.items():
            (tmp_path / f"{name}.md").write_text(text)
        return tmp_path

    return write


def read(location: Path, **keys: Any) -> tuple[list[Any], Told]:
    bad: list[BadRow] = []
    told = Told()
    rows = [
        row.value.get("name", row.value)
        for row in read_rows(DataSource(path=str(location), **keys), location, bad.append, told)
    ]
    assert bad == []
    return rows, told


def failure(location: Path, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(location, **keys)
    return str(caught.value)


def test_a_downloaded_repository_is_read_by_split(make: Make) -> None:
    """`train` when nothing is said, as on the hub, and what is left aside is told: a test set never slips in."""
    folder = make(f"data/train-{SHARD}", f"data/test-{SHARD}", README="# A data set\n")
    rows, told = read(folder)
    assert rows == [f"data/train-{SHARD}"]
    assert told.notes == [f"{folder}: split train, 1 file; not read: test"]
    assert told.keys == {"split": "train"}
    assert read(folder, split="test")[0] == [f"data/test-{SHARD}"]
    assert failure(folder, split="dev").endswith("split: no split dev; set `split` to one of train, test")
    assert "a part of one is taken with `limit`" in failure(folder, split="train[:10]")


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train.jsonl", "test.jsonl"], None, ["train.jsonl"]),
        (["train.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
        (["train/a.jsonl", "train/b.jsonl", "val/c.jsonl"], None, ["train/a.jsonl", "train/b.jsonl"]),
        (["train/a.jsonl", "val/c.jsonl"], "validation", ["val/c.jsonl"]),
        ([f"data/train_sft-{SHARD}", f"data/test_sft-{SHARD}"], "test_sft", [f"data/test_sft-{SHARD}"]),
        (["train.jsonl"], "train", ["train.jsonl"]),
        (["b.jsonl", "a.jsonl"], None, ["a.jsonl", "b.jsonl"]),
        (["train-1.jsonl", "a.jsonl"], None, ["a.jsonl", "train-1.jsonl"]),
        (["deep/er/rows.jsonl"], None, ["deep/er/rows.jsonl"]),
    ],
)
def test_splits_by_the_names_of_files(make: Make, names: list[str], split: str | None, expected: list[str]) -> None:
    assert read(make(*names), **({"split": split} if split else {}))[0] == expected


def test_splits_without_train_must_be_chosen(make: Make) -> None:
    folder = make(f"data/train_sft-{SHARD}", f"data/test_sft-{SHARD}")
    assert failure(folder).endswith("split: has no split train; set `split` to one of test_sft, train_sft")


CARD = """---
configs:
- config_name: helpful
  data_files:
  - {split: train, path: helpful/*.jsonl}
  - {split: test, path: held/helpful.jsonl}
- config_name: harmless
  data_files: harmless/*.jsonl
---
"""


def test_subsets_that_a_readme_declares(make: Make) -> None:
    folder = make("helpful/a.jsonl", "held/helpful.jsonl", "harmless/b.jsonl", "other.jsonl", README=CARD)
    assert read(folder, subset="helpful")[0] == ["helpful/a.jsonl"]
    assert read(folder, subset="helpful", split="test")[0] == ["held/helpful.jsonl"]
    assert read(folder, subset="harmless")[0] == ["harmless/b.jsonl"]
    assert failure(folder).endswith("subset: has several subsets; set `subset` to one of helpful, harmless")
    assert failure(folder, subset="x").endswith("subset: no subset x; set `subset` to one of helpful, harmless")


def test_what_datasets_saved(tmp_path: Path) -> None:
    """Through their files, so that a row has a file and a number; shards in their order."""
    rows = datasets.Dataset.from_list([{"name": f"row {i}"} for i in range(5)])
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    location = tmp_path / "one"
    found = list(read_rows(DataSource(path=str(location)), location, lambda row: None))
    assert [row.value["name"] for row in found] == [f"row {i}" for i in range(5)]
    assert [f"{Path(row.origin.source).name}:{row.origin.line}" for row in found][2:4] == [
        "data-00000-of-00002.arrow:3",
        "data-00001-of-00002.arrow:1",
    ]
    datasets.DatasetDict({"train": rows, "test": rows.select([4, 1])}).save_to_disk(tmp_path / "both")
    assert len(read(tmp_path / "both")[0]) == 5
    assert read(tmp_path / "both")[1].notes == [f"{tmp_path / 'both'}: split train; not read: test"]
    assert read(tmp_path / "both", split="test")[0] == ["row 4", "row 1"]
    assert failure(tmp_path / "both", split="dev").endswith("split: no split dev; set `split` to one of train, test")
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    assert "names files that are not beside it" in failure(tmp_path / "one")


# Keys without effect


def test_what_is_cached_depends_on_every_key(make: Make) -> None:
    """Encoded data are kept under a digest of these settings. A key that was missing from them could change without the
    data being encoded again."""
    location = make("a.jsonl") / "a.jsonl"
    known = _identity(DataSource(path=str(location)), location)
    assert DataSource.model_fields.keys() - {"path"} <= known.keys()
    for key, value in (
        ("where", {"a": {"min": 1}}),
        ("unique", "prompt"),
        ("explode", "a"),
        ("ignore", ["b"]),
        ("encoding", "cp1252"),
    ):
        assert _identity(DataSource(path=str(location), **{key: value}), location) != known


def test_every_key_has_taken_a_stand() -> None:
    """A new key of a data source must say for which kinds of source it means something."""
    known = source_keys.EVERYWHERE | source_keys.ONLY.keys()
    assert DataSource.model_fields.keys() <= known


VALUES: dict[str, Any] = {
    "split": "train",
    "subset": "main",
    "revision": "abc",
    "encoding": "utf-8",
    "separator": ",",
    "rows": "data",
}
PLACES = {
    "x.jsonl": {"encoding"},
    "x.ndjson.gz": {"encoding"},
    "x.json": {"encoding", "rows"},
    "x.csv": {"encoding", "separator"},
    "x.tsv": {"encoding", "separator"},
    "x.txt": {"encoding", "separator"},
    "x.parquet": set(),
    "x.arrow": set(),
    "org/name": {"split", "subset", "revision"},
}


@pytest.mark.parametrize("key", sorted(source_keys.ONLY))
@pytest.mark.parametrize("name", PLACES)
def test_a_key_without_effect_is_an_error(tmp_path: Path, name: str, key: str) -> None:
    """Every key that is not for all sources, at every kind of source; also by the default's own value."""
    location = name if name == "org/name" else tmp_path / name
    found = source_keys.idle(DataSource(path=name, **{key: VALUES[key]}), location)
    assert (key in found) == (key not in PLACES[name])


@pytest.mark.parametrize("key", ["split", "subset", "revision", "separator", "rows"])
def test_the_reader_refuses_it_too(make: Make, key: str) -> None:
    folder = make("a.jsonl", "b.jsonl")
    for location in (folder / "a.jsonl", folder):
        assert key in failure(location, **{key: VALUES[key]})


RECIPE = """name: r
model: models/x
stages:
  sft:
    kind: sft
    data:
      - path: rows.jsonl
        limit: 3
        split: train
      - {path: org/name, revision: abc, separator: ","}
    train: {max_steps: 1}
  dpo:
    kind: dpo
    data: {path: rows.jsonl, revision: abc}
    train: {max_steps: 1}
"""


def test_a_recipe_names_the_line_of_a_key_without_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("{}\n")
    Path("models/x").mkdir(parents=True)
    Path("models/x/config.json").write_text("{}")
    Path("r.yaml").write_text(RECIPE)
    with pytest.raises(InputError) as caught:
        load_recipe("r.yaml")
    assert [str(problem) for problem in caught.value.problems] == [
        "r.yaml:9:9 stages.sft.data.0.split: has no effect here: it is for a hub data set or a folder by splits",
        "r.yaml:10:41 stages.sft.data.1.separator: has no effect here: it is for a text table",
        "r.yaml:14:30 stages.dpo.data.revision: has no effect here: it is for a hub data set",
    ]
