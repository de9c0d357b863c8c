"""GGUF files, such as the quickstart's model: dequantised to plain fp32 weights that can be trained.

Dequantising takes a quarter of a minute for a model of 135M parameters, so the result is kept as an ordinary model
folder, keyed by the file's content and checked by sha256 whenever it is used.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from align import files, sealed
from align.errors import EnvironmentFault, InputError, Problem
from align.models.files.folder import NOTES
from align.models.files.quiet import no_progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger("align")
_LAYOUT = 2
"""Version of what this module writes into the cache. Raise it when that changes: old entries are then not used."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

DIGIT_SPLITTERS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""Pre-tokenizers that split off every digit and then split as GPT-2 does (llama.cpp's table). transformers does not
split off the digits, which changes the ids of line breaks and spaces before a digit, as in a numbered list."""
_GPT2_SPLITTERS = {"gpt-2", "default", None}


def header(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); the value of an array is
    its length.

    Raises:
        InputError: no such file, not a GGUF file, or cut off.
    """
    if not path.is_file():
        raise InputError(Problem("no such file", file=str(path)))
    try:
        with path.open("rb") as handle:
            if handle.read(4) != b"GGUF":
                raise InputError(Problem("not a GGUF file", file=str(path)))
            version = _scalar(handle, "<I")
            if version not in (2, 3):
                raise InputError(Problem(f"GGUF version {version}; 2 and 3 are supported", file=str(path)))
            _scalar(handle, "<Q")  # number of tensors
            return {_string(handle): _value(handle, _scalar(handle, "<I")) for _ in range(_scalar(handle, "<Q"))}
    except (struct.error, KeyError, UnicodeDecodeError) as error:
        raise InputError(Problem("damaged or cut off", file=str(path))) from error


def _scalar(handle: BinaryIO, layout: str) -> Any:
    return struct.unpack(layout, handle.read(struct.calcsize(layout)))[0]


def _string(handle: BinaryIO) -> str:
    length = _scalar(handle, "<Q")
    if length > os.fstat(handle.fileno()).st_size - handle.tell():
        raise struct.error("cut off")
    return handle.read(length).decode("utf-8")


def _value(handle: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(handle)
    if kind != _ARRAY:
        return _scalar(handle, _SCALARS[kind])
    inner, length = _scalar(handle, "<I"), _scalar(handle, "<Q")
    if inner in (_STRING, _ARRAY):
        for _ in range(length):
            _value(handle, inner)
    else:
        handle.seek(length * struct.calcsize(_SCALARS[inner]), 1)
    return length


def quantisation(path: Path) -> str:
    """How most of the file's weights are stored, such as ``Q4_1``. Raises :class:`InputError`, and
    :class:`EnvironmentFault`."""
    kind = header(path).get("general.file_type")
    if kind is None:
        return "an unnamed format"
    _require_package()
    from gguf import LlamaFileType

    return str(LlamaFileType(kind).name).removeprefix("MOSTLY_").removeprefix("ALL_")


def _require_package() -> None:
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise EnvironmentFault(
            "reading a .gguf model needs the package gguf", hint="pip install 'alignkit[quickstart]'"
        )


@contextmanager
def _alone_in_a_folder(path: Path) -> Iterator[Path]:
    """A folder with only a link to the file, so that other files beside it do not affect what is loaded."""
    with tempfile.TemporaryDirectory(prefix="align-gguf-") as folder:
        Path(folder, path.name).symlink_to(path.resolve())
        yield Path(folder)


def read_model(path: Path) -> PreTrainedModel:
    """The dequantised model, fp32, on the CPU.

    Raises:
        InputError: damaged, or of an architecture that transformers cannot dequantise.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    header(path)
    _require_package()
    with _alone_in_a_folder(path) as folder, _damaged(path), no_progress_bars():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
        )
    model.config.name_or_path = str(path)
    if hasattr(model.config, "_model_name_or_path"):  # the title in the file, which is not a path
        del model.config._model_name_or_path
    return model


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the file, splitting text as the model's original does.

    Raises:
        InputError: damaged, or it splits text in a way that transformers does not know, so that token ids would be
            wrong.
    """
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    meta = header(path)
    _require_package()
    splitter = meta.get("tokenizer.ggml.pre")
    if meta.get("tokenizer.ggml.model") == "gpt2" and splitter not in {
        *DIGIT_SPLITTERS,
        *_GPT2_SPLITTERS,
        *GGUF_PRE_TOKENIZER_SPLITS,
    }:
        raise InputError(Problem(f"splits text by {splitter!r}, which transformers does not know", file=str(path)))
    with _alone_in_a_folder(path) as folder, _damaged(path):
        # AutoTokenizer would use this class as well, but reads the whole file once more to find the architecture.
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
            folder, gguf_file=path.name, local_files_only=True
        )
    if splitter in DIGIT_SPLITTERS:
        backend: Any = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    tokenizer.model_max_length = meta.get(
        f"{meta.get('general.architecture')}.context_length", tokenizer.model_max_length
    )
    return tokenizer


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, KeyError, RuntimeError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(Problem(f"cannot be read: {reason[:160] or type(error).__name__}", file=str(path))) from error


# The cache


def dequantised(path: Path, cache: Path, *, weights: bool = True) -> Path:
    """The folder with the file's model and tokenizer in plain formats, made if it is not in ``cache`` yet.

    All files that will be read are checked by sha256 first; with ``weights`` False, only those of the tokenizer. A
    damaged entry is made anew, with a warning. Processes that want the same entry at once wait for the first one.
    """
    import transformers

    source = {"file": path.name, "sha256": files.sha256_file(_existing(path)), "quantisation": quantisation(path)}
    key = files.digest_json({"sha256": source["sha256"], "layout": _LAYOUT, "transformers": transformers.__version__})[
        :24
    ]
    parent = files.make_folder(cache / "gguf")
    final = parent / key
    with _lock(parent / f"{key}.lock"):
        if final.exists():
            damage = sealed.damage(final, only=lambda name: weights or not name.endswith(".safetensors"))
            if not damage:
                return final
            _log.warning("%s is damaged: made again", damage[0])
        files.clean_stale(parent)
        _build(path, final, source)
    return final


def _existing(path: Path) -> Path:
    header(path)
    return path


def _build(path: Path, final: Path, source: dict[str, Any]) -> None:
    model, tokenizer = read_model(path), read_tokenizer(path)
    files.free_space_or_raise(final.parent, 4 * model.num_parameters() + 64 * 2**20)
    tmp = files.temporary(final.parent)
    try:
        with files.machine_faults(tmp), no_progress_bars():
            model.save_pretrained(tmp)
            tokenizer.save_pretrained(tmp)
        files.write_json(tmp / NOTES, {"dequantised_from": source})
        sealed.seal(tmp)
        files.publish_folder(tmp, final)
    finally:
        files.discard(tmp)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
