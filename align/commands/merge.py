"""``align merge``: merging an adapter into its base, checking that the result computes the same, and writing it to a
new folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align import files
from align.errors import InputError, Problem
from align.models.files.bases import adapter_base
from align.models.files.folder import ADAPTER_CONFIG, ModelFolder, read_folder
from align.pipeline.artifacts import MANIFEST, read_manifest, verify, write_manifest
from align.publish.push import locate
from align.recipe.schema import Model

Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Merged:
    """What was merged and written."""

    source: Path
    base: str
    dtype: Dtype
    difference: str
    """The difference between the merged model and the adapter, in words."""
    template: bool
    """Does it have a chat template?"""


def merge(
    source: str,
    runs_dir: Path,
    out: Path,
    *,
    stage: str | None = None,
    dtype: Dtype | None = None,
    cache: Path | None = None,
) -> Merged:
    """Merge an adapter into its base and write the whole model into the new folder ``out``.

    The merge is PEFT's own, in fp32, and the merged model's logits are compared with the adapter's before anything is
    written. ``out`` appears only when it is complete. For the result of a stage, the manifest's record of how it was
    made is kept, so that the merged model can be pushed.

    Args:
        source: the folder of an adapter, of this package or another tool; the result of a stage; or a run's name.
        stage: stage of the run; when None the last one that made a model.
        dtype: type of the written weights; that of the base when None.
        cache: where dequantised GGUF files are kept.

    Raises:
        InputError: it is not an adapter, or cannot be merged correctly; its base is missing or another one; ``out``
            exists.
        EnvironmentFault: the disk is full or cannot be written.
    """
    if out.exists():
        raise InputError(Problem("exists already", file=str(out), hint="name a new folder with --out"))
    if not out.absolute().parent.is_dir():
        raise InputError(f"there is no folder {out.absolute().parent}")
    folder = _adapter_folder(source, runs_dir, stage)
    model = read_folder(folder, "mergeable")
    if model.adapter is None:
        raise InputError(
            Problem("no adapter: it is a whole model already, so there is nothing to merge", file=str(folder))
        )
    if (folder / MANIFEST).is_file() and (problems := verify(folder)):
        raise InputError(problems)
    chosen = dtype or _stored_dtype(model)
    tmp = files.temporary(out.absolute().parent)
    try:
        with files.machine_faults(out):
            merged = _write(model, tmp, chosen, cache)
            if (folder / MANIFEST).is_file():
                made = read_manifest(folder)
                summary = {**made.summary, "format": "full", "merged_from": folder.name}
                write_manifest(
                    tmp, type=made.type, stage=made.stage, identity=made.identity, encoder=made.encoder, summary=summary
                )
            files.publish_folder(tmp, out.absolute())
    finally:
        files.discard(tmp)
    return merged


def _adapter_folder(source: str, runs_dir: Path, stage: str | None) -> Path:
    path = Path(source).expanduser()
    if (path / ADAPTER_CONFIG).is_file() and stage is None:
        return path
    if path.is_dir() and (path / "config.json").is_file():
        return path
    return locate(source, runs_dir, stage)[0]


def _stored_dtype(folder: ModelFolder) -> Dtype:
    """bf16 if the base's configuration says so, else fp32."""
    base = Path(adapter_base(folder).path).expanduser()
    if not base.is_dir():
        return "fp32"
    config = read_folder(base, None)
    if config.adapter is not None:
        return _stored_dtype(config)
    text = config.config.get("text_config") or {}
    stored = next(
        (part[key] for part in (config.config, text) for key in ("dtype", "torch_dtype") if part.get(key)), None
    )
    return "bf16" if stored == "bfloat16" else "fp32"


def _write(folder: ModelFolder, out: Path, dtype: Dtype, cache: Path | None) -> Merged:
    from align.models.load import load_encoder, load_policy, load_tokenizer
    from align.models.save import origin_of, save_untemplated, write_merged
    from align.models.scalar.heads import load_scalar, score_notes, write_merged_scalar

    model = Model(path=str(folder.path))
    origin = origin_of(model, adapter=True)
    tokenizer: Any = load_tokenizer(model, cache=cache)
    template = tokenizer.chat_template is not None
    if folder.is_reward_model:
        scalar, encoder = load_scalar(model, dtype=dtype, cache=cache, grades=True), load_encoder(model, cache=cache)
        _require_space(out, scalar.backbone, dtype)
        notes = score_notes(model)
        difference = write_merged_scalar(scalar, encoder, out, origin, scores=notes.stats, layout=notes.layout)
        return Merged(folder.path, origin["path"], dtype, f"scores differ by at most {difference:.2g}", template)
    policy = load_policy(model, dtype=dtype, cache=cache, merging=True)
    _require_space(out, policy, dtype)
    if not template:
        roundings = save_untemplated(policy, tokenizer, out)
        return Merged(folder.path, origin["path"], dtype, f"logits differ by {roundings:.2g} roundings", template)
    drift = write_merged(policy, load_encoder(model, cache=cache), out, origin)
    words = f"logits differ by at most {drift['max_abs_logit_diff']:.2g}"
    words += f", {drift['equal_answers']} of {drift['prompts']} greedy answers are equal"
    return Merged(folder.path, origin["path"], dtype, words, template)


def _require_space(out: Path, model: Any, dtype: Dtype) -> None:
    from align.models.placement import size_of

    size = 4 if dtype == "fp32" else 2
    files.free_space_or_raise(out.parent, size * size_of(model) + 64 * 2**20)
