"""Sentence embeddings by any sentence-transformers model from a folder or the hub; texts are embedded block by block.

No code of a model's folder is run and no pickle is opened, as with language models.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from safetensors import SafetensorError

from align import files
from align.errors import EnvironmentFault, InputError, Interrupted, Problem
from align.models.files.hub import local_snapshot
from align.models.files.identity import is_local
from align.models.files.quiet import no_progress_bars
from align.rollout.progress import CountBar
from align.sealed import PartStore
from align.signals import stop_requested

Vectors = npt.NDArray[np.float32]

BLOCK_TEXTS = 1024
"""Number of texts that are embedded and saved together."""
_BATCH = 32
_OWN_CLASSES = "sentence_transformers."


class Embedder(Protocol):
    """Turns texts into vectors whose inner product is their similarity."""

    digest: str
    """Digest of everything but the text that the vectors depend on."""
    max_tokens: int | None
    """Maximum length of a text, in the embedder's tokens with its control tokens; longer texts are cut. None: no
    limit."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors of length 1, fp32 [n, d]. Up to 1e-6, a vector does not depend on which texts are embedded with
        it."""
        ...

    def num_cut(self, texts: Sequence[str]) -> int:
        """How many of ``texts`` are longer than ``max_tokens``."""
        ...


class SentenceEmbedder:
    """The sentence-transformers model in ``folder`` (from :func:`find_embedder`) on ``device``, in fp32.

    Raises InputError for a folder that the library cannot load.
    """

    def __init__(self, folder: Path, *, device: torch.device | str = "cpu") -> None:
        self.digest = files.digest_path(folder)
        self._model = _load(folder, device)
        limit = self._model.max_seq_length
        # transformers writes 1e30 for no limit
        self.max_tokens: int | None = limit if limit is not None and limit < 10**6 else None

    def embed(self, texts: Sequence[str]) -> Vectors:
        """See :class:`Embedder`. Raises InputError when a vector is not finite."""
        if not texts:
            return np.zeros((0, self._model.get_embedding_dimension()), dtype=np.float32)
        vectors: Vectors = self._model.encode(
            list(texts), batch_size=_BATCH, show_progress_bar=False, normalize_embeddings=True, convert_to_numpy=True
        )
        if not np.isfinite(vectors).all():
            raise InputError("the embedder gives vectors that are not finite")
        return vectors.astype(np.float32, copy=False)

    def num_cut(self, texts: Sequence[str]) -> int:
        """See :class:`Embedder`."""
        if self.max_tokens is None or not texts:
            return 0
        ids = self._model.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return sum(len(tokens) > self.max_tokens for tokens in ids)


def embed_all(
    embedder: Embedder, texts: Sequence[str], *, folder: Path, console: Console, name: str
) -> tuple[Vectors, int]:
    """Vectors of all ``texts``, fp32 [n, d], and how many texts were cut. Blocks that are already saved in ``folder``
    are not embedded again.

    Raises:
        Interrupted: a signal asked to stop; the same call resumes.
    """
    blocks: list[Vectors] = []
    cut = 0
    with CountBar(console, name, "texts", len(texts)) as bar:
        for number, start in enumerate(range(0, len(texts), BLOCK_TEXTS)):
            block = texts[start : start + BLOCK_TEXTS]
            cut += embedder.num_cut(block)
            kept = PartStore(folder, "vectors", "npy", {"embedder": embedder.digest, "texts": list(block)})
            path = kept.find(number)
            if path is not None:
                bar.found(len(block))
            else:
                if (signum := stop_requested()) is not None:
                    raise Interrupted(
                        signum, f"{name}: stopped after {start} of {len(texts)} texts; the same command continues"
                    )
                path = kept.keep(number, _bytes(embedder.embed(block)))
                bar.advance(len(block))
            blocks.append(np.load(path, allow_pickle=False))
    return (np.concatenate(blocks) if blocks else embedder.embed([])), cut


def _bytes(vectors: Vectors) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, vectors, allow_pickle=False)
    return buffer.getvalue()


# The model's folder


def find_embedder(location: Path | str) -> Path:
    """The folder of a sentence-transformers model, checked without loading it. This is quick, so a stage can begin with
    it.

    Args:
        location: a folder, or a hub id as text, which is downloaded if it is not on this machine.

    Raises:
        InputError: it is not such a model, it needs Python code from its folder, or its weights are pickled only.
        EnvironmentFault: sentence-transformers is not installed; a hub model is not here and cannot be fetched.
    """
    if find_spec("sentence_transformers") is None:
        raise EnvironmentFault(
            "embeddings need the Python package sentence-transformers", hint="pip install sentence-transformers"
        )
    if isinstance(location, Path) or is_local(location):
        folder = Path(location).expanduser()
    else:
        folder = local_snapshot(location, None, unwanted=("onnx/*", "openvino/*", "consolidated*"), complete=_complete)
    _check(folder)
    return folder


def _modules(folder: Path) -> list[dict[str, Any]]:
    """The modules that ``modules.json`` lists; empty for a plain transformer, whose token vectors are then averaged."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    try:
        modules = json.loads(path.read_bytes())
        return [{"type": str(module["type"]), "path": str(module["path"])} for module in modules]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(Problem(f"damaged: {type(error).__name__}", file=str(path))) from error


def _complete(snapshot: Path) -> bool:
    """Does the folder have the files of all modules? A normalisation has none."""
    try:
        modules = _modules(snapshot) or [{"type": "Transformer", "path": ""}]
    except InputError:
        return False
    return all(
        (snapshot / part["path"]).is_dir() for part in modules if not part["type"].endswith("Normalize")
    ) and any(snapshot.glob("**/*.safetensors"))


def _check(folder: Path) -> None:
    """Refuse a folder that would run code when loaded: one with classes that are not the library's own, or with pickled
    weights only."""
    if not folder.is_dir():
        raise InputError(Problem("not a sentence-transformers model: expected a folder", file=str(folder)))
    for module in _modules(folder):
        path = files.inside(folder, folder / module["path"])
        if not module["type"].startswith(_OWN_CLASSES):
            problem = f"wants code of its own to be run ({module['type'][:60]}), which align never does"
            raise InputError(
                Problem(
                    problem, file=str(folder / "modules.json"), hint="use a model of sentence-transformers' own modules"
                )
            )
        _refuse_pickle(path)
    _refuse_pickle(folder)


def _refuse_pickle(folder: Path) -> None:
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        problem = "refused: weights in pickle, no safetensors"
        raise InputError(
            Problem(problem, file=str(folder), hint="convert them to model.safetensors with a tool you trust")
        )


def _load(folder: Path, device: torch.device | str) -> Any:
    from sentence_transformers import SentenceTransformer

    try:
        with no_progress_bars():
            return SentenceTransformer(
                str(folder),
                device=str(device),
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True, "dtype": torch.float32},
            )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        ImportError,
        AttributeError,
        SafetensorError,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(Problem(f"cannot be loaded as an embedder: {reason[:200]}", file=str(folder))) from error
