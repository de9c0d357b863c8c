"""Reading and checking a model's folder before anything is loaded from it. Imports no torch, and runs no code of the
folder.

Only safetensors are accepted: every other weight format is pickle, which runs code when it is loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from align.errors import InputError, Problem
from align.models.files.adapter_features import refusals

NOTES = "align.json"
"""File in which this package notes what it knows about a folder it saved: an adapter's base, template settings, where
the weights come from."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "reward_head.safetensors"
"""File with the scalar head, beside a backbone or its adapter. A folder that has it is a reward model of this
package."""

MERGED = "merged"
"""Folder beside an adapter that contains the merged model, if the recipe asked for it."""

Wanted = Literal["policy", "reward_model", "classifier", "mergeable"]

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder in which all files that loading needs were found."""

    path: Path
    config: dict[str, Any]
    """Content of ``config.json``; empty for an adapter, which has the architecture of its base."""
    adapter: dict[str, Any] | None = None
    """``adapter_config.json``, when the folder is a LoRA adapter."""
    notes: dict[str, Any] = field(default_factory=dict)
    """``align.json``, when this package saved the folder."""

    @property
    def weights(self) -> list[Path]:
        """The model's safetensors files, sorted by name."""
        if self.adapter is not None:
            return [self.path / ADAPTER_WEIGHTS]
        return [self.path / name for name in _weight_names(self.path)]

    @property
    def is_reward_model(self) -> bool:
        """Does it have a scalar head of this package?"""
        return (self.path / HEAD).is_file()

    @property
    def positions(self) -> int | None:
        """The model's maximum length in tokens, or None when the configuration does not say."""
        names = ("max_position_embeddings", "n_positions")
        sizes = [part.get(name) for part in (self.config, self.config.get("text_config") or {}) for name in names]
        return next((size for size in sizes if isinstance(size, int)), None)

    @property
    def vocabulary(self) -> int | None:
        """Number of rows of the embedding, or None when the configuration does not say."""
        size = self.config.get("vocab_size", self.config.get("text_config", {}).get("vocab_size"))
        return size if isinstance(size, int) else None


def read_folder(path: Path, wanted: Wanted | None = "policy") -> ModelFolder:
    """Read the configuration of a model's folder, or of a LoRA adapter's, and check that the weights are there.

    ``wanted`` says what the folder must be: a language model, a reward model of this package, a sequence classifier, an
    adapter that PEFT can merge, or (None) any model.

    Raises:
        InputError: not a folder, or a file is missing, damaged, pickled, or of another kind of model. Names every such
            file.
    """
    if not path.exists():
        raise InputError(Problem("no such file or folder", file=str(path)))
    if not path.is_dir():
        raise InputError(Problem("not a model: expected a folder or a .gguf file", file=str(path)))
    notes = json_object(path / NOTES) if (path / NOTES).is_file() else {}
    if (path / ADAPTER_CONFIG).is_file():
        folder = ModelFolder(path, {}, json_object(path / ADAPTER_CONFIG), notes)
        problems = _adapter_problems(folder, wanted)
    elif (path / "config.json").is_file():
        folder = ModelFolder(path, json_object(path / "config.json"), None, notes)
        problems = _config_problems(folder, wanted) + _weight_problems(path)
        problems = problems or _head_problems(folder, wanted)
    else:
        others = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        problems = [Problem(f"no config.json, so this is not a model (found: {others})"[:200], file=str(path))]
    if problems:
        raise InputError(problems)
    return folder


def require_tokenizer(path: Path) -> None:
    """Raises :class:`InputError` when the folder has no tokenizer."""
    if not any((path / name).is_file() for name in (*_VOCABULARIES, "tokenizer_config.json")) and not any(
        path.glob("*.tiktoken")
    ):
        raise InputError(Problem("no tokenizer: expected tokenizer.json", file=str(path)))


def json_object(path: Path) -> dict[str, Any]:
    """One of a model's JSON files. Raises :class:`InputError` when it is damaged."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(Problem(f"damaged: {error}"[:200], file=str(path))) from error
    if not isinstance(value, dict):
        raise InputError(Problem("damaged: expected a JSON object", file=str(path)))
    return value


def _head_problems(folder: ModelFolder, wanted: Wanted | None) -> list[Problem]:
    """Problem: a reward model where a language model is wanted, or the other way round. A missing head must never be
    replaced by a random one."""
    if wanted == "policy" and folder.is_reward_model:
        return [Problem("a reward model; a language model is wanted here", file=str(folder.path))]
    if wanted == "reward_model" and not folder.is_reward_model:
        hint = "a stage of kind reward makes one"
        return [Problem(f"no {HEAD}, so this is not a reward model", file=str(folder.path), hint=hint)]
    return []


def _config_problems(folder: ModelFolder, wanted: Wanted | None) -> list[Problem]:
    """Problem: a classifier or a quantised model where a plain one is wanted."""
    problems = []
    what = "a reward model of this package" if wanted == "reward_model" else "a language model"
    architectures = [str(name) for name in folder.config.get("architectures") or ()]
    classifiers = [name for name in architectures if name.endswith("Classification")]
    # For example OpenRLHF's: under another name it is a transformer with one linear layer
    own_class = any("RewardModel" in name for name in architectures)
    if wanted == "classifier" and architectures and not classifiers and not own_class:
        problems.append(Problem(f"{architectures[0]} is no reward model: it gives no score", file=str(folder.path)))
    if classifiers and wanted not in ("classifier", None):
        problem = f"{classifiers[0]} is a classifier or reward model, {what} is wanted here"
        problems.append(Problem(problem, file=str(folder.path)))
    if folder.config.get("quantization_config"):
        method = folder.config["quantization_config"].get("quant_method", "an unnamed method")
        hint = "name the model's unquantised weights instead"
        problems.append(
            Problem(f"the weights are quantised ({method}), which cannot be trained", file=str(folder.path), hint=hint)
        )
    return problems


def _weight_names(path: Path) -> list[str]:
    if (path / INDEX).is_file():
        shards = json_object(path / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise InputError(Problem("damaged: no weight_map", file=str(path / INDEX)))
        names = {str(name) for name in shards.values()}
        outside = sorted(name for name in names if Path(name).name != name)
        if outside:
            raise InputError(Problem(f"leads out of the folder: {outside[0][:80]!r}", file=str(path / INDEX)))
        return sorted(names)
    return ["model.safetensors"]


def _weight_problems(path: Path) -> list[Problem]:
    names = _weight_names(path)
    missing = [name for name in names if not (path / name).is_file()]
    if not missing:
        return []
    if (path / INDEX).is_file():
        return [Problem(f"missing, though {INDEX} lists it", file=str(path / name)) for name in missing]
    return [_no_weights(path, "model.safetensors")]


def _no_weights(path: Path, wanted: str) -> Problem:
    pickles = sorted(entry.name for entry in path.iterdir() if entry.suffix in _PICKLES)
    if pickles:
        hint = f"convert it to {wanted} with a tool you trust"
        return Problem(
            f"refused: weights in pickle or another unsafe format, no {wanted}", file=str(path / pickles[0]), hint=hint
        )
    return Problem(f"no weights: expected {wanted}", file=str(path))


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file, from its header alone.

    Raises:
        InputError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(Problem(f"cannot be loaded: {reason[:160]}", file=str(path))) from error


def _adapter_problems(folder: ModelFolder, wanted: Wanted | None) -> list[Problem]:
    adapter, problems = folder.adapter or {}, _head_problems(folder, wanted)
    where = str(folder.path / ADAPTER_CONFIG)
    if wanted == "classifier":
        problems.append(
            Problem("an adapter; a whole classifier is wanted here", file=where, hint="merge it into its base first")
        )
    if adapter.get("peft_type") != "LORA":
        hint = "merge it into its base with the tool that made it, and name the merged model"
        problems.append(Problem(f"a {adapter.get('peft_type')} adapter; only LORA is supported", file=where, hint=hint))
    elif adapter.get("task_type") not in (("FEATURE_EXTRACTION",) if folder.is_reward_model else ("CAUSAL_LM", None)):
        problems.append(
            Problem(f"an adapter for {adapter['task_type']}, a language model's is wanted here", file=where)
        )
    if not (folder.path / ADAPTER_WEIGHTS).is_file():
        problems.append(_no_weights(folder.path, ADAPTER_WEIGHTS))
    if not adapter.get("base_model_name_or_path") and not folder.notes.get("base"):
        problems.append(Problem("an adapter without a base: base_model_name_or_path is empty", file=where))
    return problems or _feature_problems(folder, wanted)


def _feature_problems(folder: ModelFolder, wanted: Wanted | None) -> list[Problem]:
    """Problems: what the adapter does beyond adding low-rank updates to linear layers."""
    if wanted not in ("policy", "reward_model", "mergeable"):
        return []
    tensors = tensor_shapes(folder.path / ADAPTER_WEIGHTS)
    problems = []
    for key, why, helps in refusals(folder.adapter or {}, tensors, merging=wanted == "mergeable"):
        hint = "merge it into its base with the tool that made it, and name the merged model"
        if helps:
            hint = (
                f"`align merge {folder.path} --out DIR` makes a plain model of it where that is possible; then name DIR"
            )
        file = folder.path / (ADAPTER_WEIGHTS if key in tensors else ADAPTER_CONFIG)
        problems.append(Problem(f"not supported: {why}", file=str(file), key=key, hint=hint))
    return problems
