"""Saving a policy so that transformers, vLLM and TRL load it without this package, with the template and stop ids that
it was trained with."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from align import files
from align.data.chat.encoder import Encoder
from align.models.adapters import adapter_to_save, is_lora, unwrap
from align.models.compute.dropout import input_config
from align.models.compute.forward import causal_lm
from align.models.files import gguf
from align.models.files.bases import adapter_base, relative_to
from align.models.files.folder import ADAPTER_WEIGHTS, MERGED, NOTES, read_folder
from align.models.files.hub import cached_commit
from align.models.files.identity import is_gguf, is_local, model_digest
from align.models.files.quiet import no_progress_bars
from align.models.generate import answer, embedding_rows, generating
from align.models.intake import LEFT_OUT
from align.models.load import require_rows
from align.models.merging import merged_copy, require_same
from align.models.placement import WHOLE, in_step, parameters_of, size_of
from align.recipe.schema import Model

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
FILE_BYTES = 4 * 10**9
"""A file of a model that is written tensor by tensor holds about this much, and so does the memory of the process that
writes it."""
SUBJECTS = (
    *("rain", "bread", "glass", "the moon", "a river", "salt", "a bridge", "snow", "a clock", "wool"),
    *("iron", "tea", "a violin", "sand", "the sea", "paper", "a candle", "honey", "chess", "a shadow"),
)


def save_policy(
    model: nn.Module, encoder: Encoder, out: Path, *, base: Model, save_merged: bool = False, writes: bool = True
) -> dict[str, Any]:
    """Write a policy into the folder ``out``: the whole model, or its adapter when that is what was trained.

    ``base`` is the model that the stage started from (resolved): its digest is saved with an adapter, which then loads
    onto no other base. ``save_merged`` adds the folder ``merged`` with the adapter merged in. Files are written into
    ``out`` one after another; making the finished folder visible at once is up to the caller. The model is left as it
    was. Where each process has a part of the model, all must call this, and one ``writes``.

    Returns:
        For the stage's report (empty for a process that does not write): format, dtype, parameters, stop ids, base
        (with ``dequantised_from``), generation flags left out, and for a merged copy the largest difference of a logit
        from the adapter's and how many of 20 greedy answers are equal.

    Raises:
        InputError: the tokenizer has ids beyond the model's embeddings.
        EnvironmentFault: the disk is full or cannot be written.
    """
    if not writes:
        take_part(model)
        return {}
    lm = causal_lm(unwrap(model))
    require_rows(encoder.tokenizer, embedding_rows(lm), out)
    origin = origin_of(base, adapter=is_lora(model))
    report: dict[str, Any] = {
        "format": "lora" if is_lora(model) else "full",
        "dtype": str(lm.dtype).removeprefix("torch."),
        "parameters": size_of(lm),
        "stop_ids": list(encoder.stop_ids),
        "base": origin,
    }
    if line := getattr(lm, LEFT_OUT, None):
        report["left_out"] = line
    with files.machine_faults(out), no_progress_bars():
        out.mkdir(parents=True, exist_ok=True)
        if is_lora(model):
            report["adapter_parameters"] = save_adapter(model, out, origin)
            report["generation_flags_left_out"] = _generation(lm, encoder)[1]
            if save_merged:
                report["merged"] = write_merged(model, encoder, out / MERGED, origin)
        else:
            report["generation_flags_left_out"] = _save_whole(lm, encoder, out)
        save_tokenizer(encoder, out)
    save_notes(encoder, out, origin)
    return report


def write_merged(model: nn.Module, encoder: Encoder, out: Path, origin: dict[str, Any]) -> dict[str, float | int]:
    """Write a policy into the folder ``out`` with its adapters merged in; returns how far the merged policy is from the
    adapter, see :func:`drift`.

    Raises:
        InputError: the merged model does not compute the same as the one with adapters.
        EnvironmentFault: the disk is full or cannot be written.
    """
    plain = merged_copy(model)
    cost = drift(model, plain, encoder)
    with files.machine_faults(out), no_progress_bars():
        _save_whole(plain, encoder, out)
        save_tokenizer(encoder, out)
        save_notes(encoder, out, origin)
    return cost


def save_untemplated(model: nn.Module, tokenizer: PreTrainedTokenizerBase, out: Path) -> float:
    """Write a policy without chat template into the folder ``out`` with its adapters merged in; returns the difference
    between the two in units of rounding.

    Raises as :func:`write_merged`.
    """
    plain = merged_copy(model)
    with files.machine_faults(out), no_progress_bars():
        save_weights(plain, out, config=input_config(plain))
        tokenizer.save_pretrained(out)
    return require_same(model, plain)


# The parts


def _save_whole(lm: PreTrainedModel, encoder: Encoder, out: Path) -> list[str]:
    generation, left_out = _generation(lm, encoder)
    save_weights(lm, out, config=_config(lm, encoder), generation_config=generation)
    return left_out


def save_backbone(backbone: PreTrainedModel, encoder: Encoder, out: Path) -> None:
    """Write a model without LM head, for ``AutoModel``."""
    save_weights(backbone, out, config=_config(backbone, encoder))


def take_part(model: nn.Module) -> None:
    """What the other processes do while one saves a policy or a backbone (its adapter, if that was trained): they hand
    over their parts of it."""
    if not in_step(model):
        return
    if is_lora(model):
        adapter_to_save(model)
    else:
        for _ in _saved(causal_lm(unwrap(model))):
            pass


def save_weights(model: PreTrainedModel, out: Path, **lent: Any) -> None:
    """Write weights and configuration; ``lent`` are attributes that the model has only while it is saved
    (``config=...``).

    Of a model that other processes hold parts of, one tensor after another is put together and written, while they are
    in :func:`take_part`.
    """
    files.free_space_or_raise(out, sum(p.numel() * p.element_size() for p in parameters_of(model).values()))
    before = {name: getattr(model, name) for name in lent}
    try:
        for name, value in lent.items():
            setattr(model, name, value)
        if in_step(model):
            model.save_pretrained(out, state_dict={})  # the configuration alone
            _write(_saved(model), out)
        else:
            model.save_pretrained(out, state_dict=WHOLE.full_state(model))
    finally:
        for name, value in before.items():
            setattr(model, name, value)
    for weights in out.glob("*.safetensors"):
        weights.chmod((out / "config.json").stat().st_mode)  # safetensors ignores the umask


def _saved(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """What transformers saves of a model, by its names in files, one tensor at a time. Where tensors in files are
    others than in memory (experts that are one tensor in memory), those of a layer come together."""
    tensors = WHOLE.saved(model, getattr(model, "all_tied_weights_keys", None) or ())
    left_out = set(model._keys_to_ignore_on_save or ())
    kept = ((name, tensor) for name, tensor in tensors if name not in left_out)
    nothing: dict[str, Tensor] = {}
    if revert_weight_conversion(model, nothing) is nothing:  # there is nothing to convert
        yield from kept
        return
    for _, of_layer in groupby(kept, lambda item: _layer(item[0])):
        yield from revert_weight_conversion(model, dict(of_layer)).items()


def _layer(name: str) -> str:
    """The part of a parameter's name up to the layer's number; empty outside of layers."""
    return (re.match(r".*?\.\d+\.", name) or [""])[0]


def _write(tensors: Iterable[tuple[str, Tensor]], out: Path) -> None:
    """Write tensors as they come, in files of :data:`FILE_BYTES` at most (or one larger tensor), as transformers names
    them and lists them in an index. No more than one file and one tensor are in memory."""
    files_of: list[dict[str, int]] = []
    part: dict[str, Tensor] = {}

    def write() -> None:
        save_file(part, out / f"part-{len(files_of)}", metadata={"format": "pt"})
        files_of.append({name: tensor.nbytes for name, tensor in part.items()})
        part.clear()

    for name, tensor in tensors:
        if part and sum(other.nbytes for other in part.values()) + tensor.nbytes > FILE_BYTES:
            write()
        part[name] = tensor.cpu().contiguous()
        del tensor
    write()
    if len(files_of) == 1:
        (out / "part-0").rename(out / SAFE_WEIGHTS_NAME)
        return
    stem, _, ending = SAFE_WEIGHTS_NAME.rpartition(".")
    place: dict[str, str] = {}
    for number, sizes in enumerate(files_of):
        name = f"{stem}-{number + 1:05d}-of-{len(files_of):05d}.{ending}"
        (out / f"part-{number}").rename(out / name)
        place |= dict.fromkeys(sizes, name)
    total = sum(size for sizes in files_of for size in sizes.values())
    files.write_json(out / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": place})


def _config(lm: PreTrainedModel, encoder: Encoder) -> PreTrainedConfig:
    config = input_config(lm)
    config.eos_token_id = list(encoder.stop_ids) if len(encoder.stop_ids) > 1 else encoder.stop_ids[0]
    config.pad_token_id = encoder.pad_id
    config.use_cache = True  # it is off while training; saved like that, generation would be slow
    # They described the folder it was loaded from, and are wrong for this one
    for name in ("auto_map", "quantization_config"):
        if hasattr(config, name):
            delattr(config, name)
    return config


def _generation(lm: PreTrainedModel, encoder: Encoder) -> tuple[GenerationConfig, list[str]]:
    """The model's own generation settings with all stop ids; and the names of settings that were left out because they
    contradict others."""
    own = lm.generation_config if lm.generation_config is not None else GenerationConfig()
    stops = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    special = {
        "bos_token_id": own.bos_token_id,
        "eos_token_id": list(dict.fromkeys([*encoder.stop_ids, *(int(i) for i in stops if i is not None)])),
        "pad_token_id": encoder.pad_id,
    }
    settings = {
        name: value for name, value in own.to_diff_dict().items() if name not in special and not name.startswith("_")
    }
    settings.pop("transformers_version", None)
    left_out = [] if own.do_sample else [name for name in _SAMPLING if settings.pop(name, None) is not None]
    try:
        generation = GenerationConfig(**settings, **special)  # type: ignore[no-untyped-call]
        generation.validate(strict=True)
    except ValueError:  # transformers loads contradictory settings, but refuses to save them
        left_out += sorted(settings)
        generation = GenerationConfig(**special)  # type: ignore[no-untyped-call]
    return generation, left_out


def save_tokenizer(encoder: Encoder, out: Path, changed: PreTrainedTokenizerBase | None = None) -> None:
    """Write the tokenizer (or a ``changed`` one) with the template of training, or with all its named templates, under
    a class name that transformers 4 knows as well."""
    tokenizer = copy.copy(changed or encoder.tokenizer)
    tokenizer.chat_template = encoder.chat_template
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_bytes())
    for name in ("auto_map", "is_local", "local_files_only"):
        settings.pop(name, None)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the same class
    files.write_json(path, settings)


def save_adapter(model: nn.Module, out: Path, origin: dict[str, Any]) -> int:
    """Write the model's adapters as one adapter on the base that ``origin`` names; returns its number of parameters."""
    state, config = adapter_to_save(model)
    lm = causal_lm(unwrap(model))
    config.base_model_name_or_path = lm.name_or_path
    config.revision = origin["revision"]
    config.inference_mode = True
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # a set, whose order would differ from process to process
    files.free_space_or_raise(out, sum(tensor.numel() * tensor.element_size() for tensor in state.values()))
    save_file(state, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(out)
    (out / ADAPTER_WEIGHTS).chmod((out / "adapter_config.json").stat().st_mode)
    return sum(tensor.numel() for tensor in state.values())


def save_notes(encoder: Encoder, out: Path, origin: dict[str, Any], **more: Any) -> None:
    """Write ``align.json``, which this package reads when it loads the folder again."""
    notes = {
        "base": origin,
        "base_from_here": relative_to(out, origin["path"]),
        "chat_template_kwargs": encoder.template_kwargs,
        "chat_template_date": encoder.chat_template_date,
        "encoder": encoder.digest,
        "stop_ids": list(encoder.stop_ids),
    }
    files.write_json(out / NOTES, notes | more)


# Origin


def origin_of(base: Model, *, adapter: bool) -> dict[str, Any]:
    """Path or hub id, revision and digest of the base of the saved weights, and the format they were dequantised from,
    if any.

    An adapter on top of an adapter is saved as one adapter of the first one's base.
    """
    if not is_local(base.path):
        commit = cached_commit(base.path, base.revision) or base.revision
        return {
            "path": base.path,
            "revision": commit,
            "digest": model_digest(base.path, commit),
            "dequantised_from": None,
        }
    path = Path(base.path).expanduser().absolute()
    notes: dict[str, Any] = {}
    if not is_gguf(path):
        folder = read_folder(path, None)
        notes = folder.notes.get("base") or {}
        if adapter and folder.adapter is not None:
            under = Model(path=folder.adapter["base_model_name_or_path"], revision=folder.adapter.get("revision"))
            # The base has moved since and was found at its new place
            if notes and is_local(notes["path"]) and not Path(notes["path"]).exists():
                return notes | {"path": str(Path(adapter_base(folder).path).expanduser().absolute())}
            return notes or origin_of(under, adapter=True)
    format = gguf.quantisation(path) if is_gguf(path) else notes.get("dequantised_from")
    return {"path": str(path), "revision": None, "digest": model_digest(path), "dequantised_from": format}


# Differences after merging


@torch.no_grad()
def drift(model: nn.Module, merged: PreTrainedModel, encoder: Encoder) -> dict[str, float | int]:
    """How far a merged copy is from the model with adapters on 20 fixed prompts: the largest difference of a logit, and
    the number of equal greedy answers (8 tokens each)."""
    prompts = [
        encoder.encode_prompt([{"role": "user", "content": f"Write one sentence about {it}."}]).tolist()
        for it in SUBJECTS
    ]
    widest = 0.0
    with generating(model) as one, generating(merged) as other:
        for prompt in prompts:
            ids = torch.tensor([prompt], device=one.device)
            difference = one(ids, use_cache=False).logits.float() - other(ids, use_cache=False).logits.float()
            widest = max(widest, difference.abs().max().item())
    first = answer(model, encoder, prompts, max_new_tokens=8)
    second = answer(merged, encoder, prompts, max_new_tokens=8)
    same = sum(a == b for a, b in zip(first, second, strict=True))
    return {"max_abs_logit_diff": widest, "equal_answers": same, "prompts": len(prompts)}
