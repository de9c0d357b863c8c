"""Manifests: any damage to an artefact is found, and named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from align import files
from align.errors import AlignError, InputError
from align.pipeline import artifacts
from align.pipeline.artifacts import Identity, Manifest

IDENTITY = Identity(
    kind="sft", config={"train": {"learning_rate": 1e-5}}, seed=17, model={"path": "m"}, inputs={"data.jsonl": "ab"}
)


def make(folder: Path, *, summary: object = None, identity: Identity = IDENTITY) -> Manifest:
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 16)
    (folder / "sub" / "config.json").write_text("{}")
    summary = {} if summary is None else summary
    return artifacts.write_manifest(
        folder, type="policy", stage="sft", identity=identity, encoder="e" * 64, summary=summary
    )  # type: ignore[arg-type]


def test_a_manifest_says_what_was_made_and_from_what(tmp_path: Path) -> None:
    """Inputs, tokenizer and template, and versions are on record, and read back equal."""
    written = make(tmp_path, summary={"loss": 1.5})
    assert artifacts.read_manifest(tmp_path) == written
    value = json.loads((tmp_path / "manifest.json").read_text())
    assert value["identity"] == IDENTITY.digest
    assert value["schema_version"] == artifacts.SCHEMA_VERSION
    assert value["inputs"] == {"data.jsonl": "ab"}
    assert value["encoder"] == "e" * 64
    assert value["summary"] == {"loss": 1.5}
    assert {"python", "torch", "transformers"} <= value["packages"].keys()
    assert sorted(value["files"]) == ["model.safetensors", "sub/config.json"]
    assert value["files"]["sub/config.json"]["bytes"] == 2
    assert artifacts.verify(tmp_path) == []


def test_the_first_version_of_a_kind_adds_nothing_to_the_identity(tmp_path: Path) -> None:
    """Results that were made before kinds had versions stay up to date."""
    written = make(tmp_path)
    assert written.identity.version == 1
    assert "version" not in json.loads((tmp_path / "manifest.json").read_text())
    before = {name: getattr(IDENTITY, name) for name in ("kind", "config", "seed", "model", "inputs", "schema_version")}
    assert IDENTITY.digest == files.digest_json(before)

    second = replace(IDENTITY, version=2)
    assert second.digest != IDENTITY.digest
    make(tmp_path / "second", identity=second)
    assert artifacts.read_manifest(tmp_path / "second").identity == second


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_zeros(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [damage_flip, damage_zeros, damage_cut, Path.unlink])
def test_damage_is_found_and_named(tmp_path: Path, damage: object) -> None:
    """A flipped byte and a zeroed half load without error, so sums must find them; file, expected and actual are
    named."""
    manifest = make(tmp_path)
    damage(tmp_path / "model.safetensors")  # type: ignore[operator]
    [problem] = artifacts.verify(tmp_path)
    assert problem.file == str(tmp_path / "model.safetensors")
    if damage in (damage_flip, damage_zeros):
        assert str(manifest.files["model.safetensors"]["sha256"])[:12] in problem.message
        assert artifacts.verify(tmp_path, deep=False) == []
    else:
        assert problem.message == ("missing" if damage is Path.unlink else "damaged: 4095 bytes, expected 4096")
        assert artifacts.verify(tmp_path, deep=False) == [problem]


def test_every_damaged_byte_of_a_manifest_is_found(tmp_path: Path) -> None:
    """No byte of the manifest can change unseen, but for blanks between its values."""
    make(tmp_path)
    path = tmp_path / "manifest.json"
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        data = bytearray(good)
        data[position] = ord("0") if data[position] != ord("0") else ord("1")
        path.write_bytes(data)
        assert artifacts.verify(tmp_path), f"byte {position}: {good[position - 10 : position + 10]!r}"
    path.write_bytes(good)
    assert artifacts.verify(tmp_path) == []


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"sha256": 1}', "\x00", '{"sha256": "x", "files": {}}'])
def test_what_is_no_manifest_is_no_artefact(tmp_path: Path, text: str) -> None:
    [missing] = artifacts.verify(tmp_path)
    assert "not a finished artefact" in missing.message
    (tmp_path / "manifest.json").write_text(text)
    assert len(artifacts.verify(tmp_path)) == 1
    with pytest.raises(InputError):
        artifacts.artefact_digest(tmp_path)


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    """A downloaded manifest names files; none of them may lie elsewhere."""
    manifest = make(tmp_path / "a")
    (tmp_path / "secret").write_text("x")
    entry = {"sha256": artifacts.files.sha256_file(tmp_path / "secret"), "bytes": 1}
    forged = replace(manifest, files={"../secret": entry})
    artifacts.files.write_json(tmp_path / "a" / "manifest.json", forged.as_json())
    [problem] = artifacts.verify(tmp_path / "a")
    assert "leads out of" in problem.message


def test_the_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    """What depends on an artefact need not run again when it was made anew with the same content."""
    make(tmp_path / "a", summary={"seconds": 1})
    make(tmp_path / "b", summary={"seconds": 2}, identity=replace(IDENTITY, seed=18))
    assert artifacts.artefact_digest(tmp_path / "a") == artifacts.artefact_digest(tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "more").write_text("")
    make(tmp_path / "c")
    assert artifacts.artefact_digest(tmp_path / "a") != artifacts.artefact_digest(tmp_path / "c")


def test_accounts_of_the_making_are_no_content(tmp_path: Path) -> None:
    """A result that comes out as before, with other times in its report, is the same to those who read it; its files
    are verified still."""
    for name in ("a", "b"):
        (tmp_path / name / "rollouts").mkdir(parents=True)
        for file in ("report.json", "metrics.jsonl", "rollouts/iteration-1.parquet"):
            (tmp_path / name / file).write_text(f"made in {name}")
        make(tmp_path / name)
    assert artifacts.artefact_digest(tmp_path / "a") == artifacts.artefact_digest(tmp_path / "b")
    (tmp_path / "a" / "report.json").write_text("made in c")
    assert [problem.file for problem in artifacts.verify(tmp_path / "a")] == [str(tmp_path / "a" / "report.json")]


@pytest.mark.parametrize(
    "change", [{"kind": "dpo"}, {"seed": 18}, {"config": {}}, {"model": None}, {"inputs": {"data.jsonl": "ac"}}]
)
def test_everything_counts_for_the_identity(change: dict[str, object]) -> None:
    assert replace(IDENTITY, **change).digest != IDENTITY.digest  # type: ignore[arg-type]


def test_an_output_must_hold_files_and_no_links(tmp_path: Path) -> None:
    """A stage that wrote nothing has failed; a link's target could change behind the sums."""
    with pytest.raises(AlignError, match="left no output"):
        artifacts.write_manifest(tmp_path, type="policy", stage="sft", identity=IDENTITY, encoder=None, summary={})
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(AlignError, match="left a link in its output: link"):
        make(tmp_path)


def test_numbers_that_json_has_no_form_for_do_not_lose_a_result(tmp_path: Path) -> None:
    """A perplexity that overflowed at the very end must not cost the training run."""

    class Scalar:
        def item(self) -> float:
            return 0.5

    make(tmp_path, summary={"ppl": float("inf"), "loss": [float("nan"), Scalar()]})
    assert artifacts.read_manifest(tmp_path).summary == {"ppl": "inf", "loss": ["nan", 0.5]}


def test_files_that_came_later_are_left_alone(tmp_path: Path) -> None:
    """A note in the folder is no reason to train again."""
    make(tmp_path)
    (tmp_path / "notes.txt").write_text("good one")
    assert artifacts.verify(tmp_path) == []
