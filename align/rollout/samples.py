"""Sampling many prompts, saving the samples shard by shard. After an interruption at any point the same call resumes
and ends with the same bytes.

A shard has the samples of a fixed range of prompts, and its seed follows from the sampling's seed and the shard's
number. The samples therefore do not depend on the number of attempts or processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from align.errors import InputError, Interrupted, Problem
from align.rollout.dispatch import CallPieces, of_piece
from align.rollout.engine import RolloutEngine, Sample, Sampling
from align.rollout.progress import CountBar
from align.sealed import PartStore
from align.signals import stop_requested

SHARD_SAMPLES, LEAST_SAMPLES, SHARD_TOKENS = 512, 128, 2**16
"""A shard has about as many samples as can have ``SHARD_TOKENS`` tokens together, within the other two bounds: enough
to keep an engine busy, and few enough that progress is visible and an interruption loses little if answers are long."""


class Samples:
    """The samples of all prompts: iterating gives the list of each prompt in turn, with one shard in memory at a
    time."""

    def __init__(self, kept: PartStore, sizes: Sequence[int]) -> None:
        self._kept, self._sizes = kept, sizes

    def __len__(self) -> int:
        """Number of prompts."""
        return sum(self._sizes)

    def __iter__(self) -> Iterator[list[Sample]]:
        """Raises InputError when a shard is not there, or not as it was written."""
        for number, size in enumerate(self._sizes):
            path = self._kept.find(number)
            if path is None:
                raise InputError(
                    Problem(
                        "is missing or damaged", file=str(self._kept.path(number)), hint="run the same command again"
                    )
                )
            yield from _read(path, size)


def sample_shards(
    engine: AbstractContextManager[RolloutEngine],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    folder: Path,
    key: Mapping[str, Any],
    console: Console,
    name: str,
    shard_prompts: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Samples:
    """``sampling.n`` completions of every prompt; shards that are already saved in ``folder`` are not made again.

    Args:
        engine: entered only when a shard has to be made, and left once all are made. Use ``nullcontext(engine)`` for an
            engine that stays open.
        prompts: token ids, ending with the generation prompt.
        folder: a folder used by this call only.
        key: JSON values; everything that the samples depend on besides ``prompts`` and ``sampling``: the weights, the
            engine and its precision.
        name: for the progress line and for messages.
        shard_prompts: prompts of a shard; about 512 samples of them when None, fewer where answers may be long. Samples
            depend on it.
        rank, world: this process makes every ``world``-th shard. Wait for the others before reading what is returned.

    Raises:
        Interrupted: a signal asked to stop; the shards made so far are kept, and the same call resumes.
        EnvironmentFault: the disk is full or cannot be written. Also all that the engine raises.
    """
    samples = min(SHARD_SAMPLES, max(LEAST_SAMPLES, SHARD_TOKENS // sampling.max_new_tokens))
    size = shard_prompts or -(-samples // sampling.n)
    pieces = CallPieces(len(prompts), size)
    everything = {**key, "sampling": asdict(sampling), "prompts": prompts_digest(prompts), "shard_prompts": size}
    kept = PartStore(folder, "samples", "parquet", everything)
    mine = pieces.share(rank, world)
    todo = [number for number in mine if kept.find(number) is None]
    if todo:
        lengths = {number: len(pieces[number]) for number in mine}
        with engine as running, CountBar(console, name, "samples", sum(lengths.values()) * sampling.n) as bar:
            bar.found(sum(lengths[number] for number in set(mine) - set(todo)) * sampling.n)
            for place, number in enumerate(todo):
                if (signum := stop_requested()) is not None:
                    raise Interrupted(
                        signum, f"{name}: stopped with {len(todo) - place} shards to go; the same command continues"
                    )
                piece = pieces[number]
                made = running.generate(prompts[piece.start : piece.stop], of_piece(sampling, number))
                kept.keep(number, _content(made, piece.start))
                bar.advance(len(piece) * sampling.n)
    return Samples(kept, [len(piece) for piece in pieces])


def prompts_digest(prompts: Sequence[Sequence[int]]) -> str:
    """Digest of the token ids of all prompts."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(len(prompt).to_bytes(8, "little"))
        digest.update(np.asarray(prompt, dtype="<i4").tobytes())
    return digest.hexdigest()


def _content(made: Sequence[Sequence[Sample]], first: int) -> bytes:
    """A shard as Parquet with one row for each sample; ``first`` is the number of its first prompt."""
    import pyarrow
    from pyarrow import parquet

    rows: list[tuple[int, int, Sample]] = [
        (first + p, s, one) for p, group in enumerate(made) for s, one in enumerate(group)
    ]
    table = pyarrow.table(
        {
            "prompt": pyarrow.array([p for p, _, _ in rows], pyarrow.int64()),
            "sample": pyarrow.array([s for _, s, _ in rows], pyarrow.int32()),
            "ids": pyarrow.array([one.ids for _, _, one in rows], pyarrow.list_(pyarrow.int32())),
            "logprobs": pyarrow.array([one.logprobs for _, _, one in rows], pyarrow.list_(pyarrow.float32())),
            "finish_reason": pyarrow.array([one.finish_reason for _, _, one in rows], pyarrow.string()),
            "version": pyarrow.array([one.version for _, _, one in rows], pyarrow.int64()),
        }
    )
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _read(path: Path, prompts: int) -> list[list[Sample]]:
    from pyarrow import parquet

    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    groups: list[list[Sample]] = [[] for _ in range(prompts)]
    first = rows[0]["prompt"] if rows else 0
    for row in rows:
        logprobs = None if row["logprobs"] is None else tuple(row["logprobs"])
        groups[row["prompt"] - first].append(Sample(tuple(row["ids"]), logprobs, row["finish_reason"], row["version"]))
    return groups
