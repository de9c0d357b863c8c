"""``align generate``: sampling completions for a file of prompts, without a recipe.

A hidden folder beside the output contains the settings, and the shards until the output is complete. A call that was
killed therefore resumes, and an output made with other settings is refused.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from align import files
from align.data.chat.encoder import Encoder
from align.data.records import Prompt
from align.data.report import SHOWN
from align.data.sources.mixture import read_records
from align.data.trees.prompts import EncodedPrompt
from align.errors import InputError, Problem
from align.models.files.folder import read_folder
from align.models.files.identity import model_digest
from align.models.load import load_encoder, whole_folder
from align.recipe.reference_syntax import resolve
from align.recipe.schema import DataSource, Model, Rollout
from align.rollout.engine import Sampling
from align.rollout.engines import open_engine
from align.rollout.samples import Samples, sample_shards
from align.scoring.scorer import Answer
from align.signals import StopFlag

_SETTINGS = "settings.json"


def generate(
    model: str,
    prompts: Path | str,
    sampling: Sampling,
    rollout: Rollout,
    *,
    source: DataSource | None = None,
    out: Path | None,
    cache: Path,
    console: Console,
    show: Callable[[str], None],
) -> None:
    """Sample ``sampling.n`` completions of every prompt; Writes a JSON line for each prompt: ``id``, ``prompt``, and
    ``completions`` with their ``text``, ``tokens`` and ``finished``.

    Args:
        model: resolved: a folder, a .gguf file or a hub id.
        prompts: a file or folder of prompts, or a hub data set; conversations and preferences are accepted too.
        out: the file to write; without one, lines go to ``show`` and nothing is kept.
        cache: where dequantised weights are kept.
        console: for progress.

    Raises:
        InputError: bad prompts, or ``out`` exists and came from other settings.
        Interrupted: a signal asked to stop; the same call resumes.
        EnvironmentFault: the disk is full or cannot be written, or the engine does not start.
    """
    policy = Model(path=model)
    encoder = load_encoder(policy, cache=cache)
    records = _read(source or DataSource(path=str(prompts)), prompts)
    encoded = [EncodedPrompt(record, tuple(_encode(record, encoder))) for record in records]
    ids = [list(prompt.ids) for prompt in encoded]
    _require_room(records, ids, sampling, read_folder(whole_folder(policy, cache)).positions)
    settings = {
        "model": model_digest(policy.path),
        "encoder": encoder.digest,
        "prompts": files.digest_json([[record.id, ids[i]] for i, record in enumerate(records)]),
        "sampling": asdict(sampling),
        **rollout.identity(),
    }
    if out is not None and out.exists():
        _require_same(out, settings)
        console.print(f"{out}: up to date", highlight=False, markup=False, soft_wrap=True)
        return
    longest = max(map(len, ids)) + sampling.max_new_tokens
    engine = open_engine(
        rollout, policy, encoder, max_length=longest, cache=cache, resolve=partial(resolve, root=Path.cwd())
    )
    with _work(out, settings) as folder, StopFlag():
        samples = sample_shards(engine, ids, sampling, folder=folder, key=settings, console=console, name="generate")
        if out is None:
            for line in _lines(encoded, samples, encoder):
                show(json.dumps(line, ensure_ascii=False))
        else:
            with files.atomic_lines(out) as write:
                for line in _lines(encoded, samples, encoder):
                    write(line)


def _read(source: DataSource, location: Path | str) -> list[Prompt]:
    prompts = []
    for record in read_records([source], [location], "prompt", seed=0, rejects=None):
        assert isinstance(record, Prompt)
        prompts.append(record)
    return prompts


def _encode(record: Prompt, encoder: Encoder) -> list[int]:
    try:
        ids: list[int] = encoder.encode_prompt(record.prompt, record.tools).tolist()
    except InputError as error:
        raise InputError(record.origin.blamed(error.problems[0])) from error
    return ids


def _require_room(records: list[Prompt], ids: list[list[int]], sampling: Sampling, positions: int | None) -> None:
    """Raises InputError, before anything is sampled, that names the prompts too long for the model to leave room for an
    answer."""
    room = None if positions is None else positions - sampling.max_new_tokens
    long = [
        (record, len(own)) for record, own in zip(records, ids, strict=True) if room is not None and len(own) > room
    ]
    if not long:
        return
    origins = [(record.origin, length) for record, length in long[:SHOWN]]
    problems = [
        Problem(
            f"{length:,} tokens leave no room for {sampling.max_new_tokens:,} more: the model holds {positions:,}",
            one.source,
            one.line,
        )
        for one, length in origins
    ]
    raise InputError(
        [
            *problems,
            Problem(f"{len(long):,} such prompts in all", hint="shorten or remove them, or lower --max-new-tokens"),
        ]
    )


def _lines(prompts: list[EncodedPrompt], samples: Samples, encoder: Encoder) -> Iterator[dict[str, Any]]:
    for prompt, of_prompt in zip(prompts, samples, strict=True):
        made = [_entry(Answer.sampled(prompt, sample.ids, encoder)) for sample in of_prompt]
        yield {"id": prompt.record.id, "prompt": list(prompt.record.prompt), "completions": made}


def _entry(answer: Answer) -> dict[str, Any]:
    return {"text": answer.text, "tokens": len(answer.ids), "finished": answer.finished}


# The hidden folder beside the output


def _folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.samples")


@contextmanager
def _work(out: Path | None, settings: dict[str, Any]) -> Iterator[Path]:
    """The folder for shards. They are removed once the output is complete; the settings are kept."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="align-generate-") as scratch:
            yield Path(scratch)
        return
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent}")
    folder = files.make_folder(_folder(out))
    files.write_json(folder / _SETTINGS, settings)
    yield folder / "shards"
    files.remove_folder(folder / "shards")


def _require_same(out: Path, settings: dict[str, Any]) -> None:
    """Raises InputError unless ``out`` was made from ``settings``."""
    hint = "remove it, or write to another file with --out"
    try:
        known = json.loads((_folder(out) / _SETTINGS).read_bytes())
    except (FileNotFoundError, ValueError):
        raise InputError(Problem("exists, and what it was made from is not known", file=str(out), hint=hint)) from None
    changed = [key for key in settings if known.get(key) != settings[key]]
    if changed:
        raise InputError(Problem(f"exists, and was made from another {', '.join(changed)}", file=str(out), hint=hint))
    files.remove_folder(_folder(out) / "shards")
