"""``kind: self_contrast``: preferences from a policy and the data it was tuned on (https://arxiv.org/abs/2404.00604).

For each conversation the policy samples many answers to the prompt. The samples and the data's answer, the target, are
embedded without the prompt. Negatives are drawn from the samples least similar to the target, because the most similar
ones are likely good answers too. A prompt with its target (chosen) and its negatives (rejected) is one preference;
``dpo`` learns from all its pairs at once.

Samples are saved shard by shard, embeddings block by block. A run that was killed resumes from them and ends with the
same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from align import files
from align.data.answer_file import TARGET, AnswerRow, write_answers
from align.errors import InputError
from align.functional.selection import NegativeSelection, select_negatives
from align.models.load import load_encoder
from align.recipe.schema import SelfContrastStage
from align.rollout.engine import Sampling, sample_seed
from align.scoring.embeddings import SentenceEmbedder, Vectors, embed_all, find_embedder
from align.scoring.scorer import Answer
from align.stages.context import StageContext
from align.stages.self_contrast.report import SelectionReport, show
from align.stages.shared.clock import Clock
from align.stages.shared.known_answers import KnownAnswer, read_targets
from align.stages.shared.policy_samples import AsSampled, answer_row, sample_policy
from align.training.launch import Ranks, ranks

_NOT_FIELDS = frozenset(
    {
        "id",
        "prompt",
        "messages",
        "chosen",
        "rejected",
        "margin",
        "votes",
        "grades",
        "tools",
        "system",
        "similarities",
        "sample_ids",
    }
)
"""Columns of the data that are not copied, since they would have another meaning in a preference."""


def run(spec: SelfContrastStage, ctx: StageContext) -> None:
    """Sample, embed, choose negatives, and write preferences."""
    group, clock = ranks(), Clock()
    policy = ctx.policy(spec.policy)
    encoder = load_encoder(policy, cache=ctx.cache)
    ctx.encoder_digest = encoder.digest
    embedder = find_embedder(ctx.resolve(spec.embedder)) if group.first else None
    lengths: dict[str, Any] = {"max_length": spec.max_length, "max_new_tokens": spec.max_new_tokens}
    targets, report = read_targets(
        spec.data, ctx, encoder, rejects=ctx.out / "rejects.jsonl" if group.first else None, **lengths
    )
    for line in report.lines():
        ctx.console.print(line, highlight=False, markup=False, soft_wrap=True)
    if spec.source == "other_prompts" and len(targets) < 2:
        raise InputError("source: other_prompts needs two prompts at least")
    sampling = Sampling(
        spec.max_new_tokens,
        n=spec.samples_per_prompt,
        temperature=spec.temperature,
        top_p=spec.top_p,
        seed=sample_seed(ctx.seed, 0),
    )
    prompts = [target.prompt for target in targets]
    with clock("sampling"):
        places: dict[str, Any] = {"max_length": spec.max_length, "name": f"{ctx.name}  samples"}
        samples = sample_policy(spec.rollout, policy, encoder, prompts, sampling, ctx, group, **places)
    if embedder is None:  # the first process does the rest
        return
    ids = [[f"{target.id}#{k}" for k in range(spec.samples_per_prompt)] for target in targets]
    if spec.source == "other_prompts":
        samples, ids = _of_others(samples, ids, ctx.seed)
    with clock("embedding"):
        similarities, cut = _similarities(spec, ctx, embedder, targets, samples, group)
    with clock("selection"):
        counts = SelectionReport(spec.samples_per_prompt, spec.negatives, report.as_json(), cut)
        as_sampled = AsSampled(encoder)
        _write(spec, ctx, targets, samples, ids, similarities, counts, as_sampled)
    seconds = {phase: round(spent, 2) for phase, spent in clock.lap.items()}
    ctx.note({**counts.headline(), "answers_with_ids": as_sampled.with_ids, "seconds": seconds})
    show(ctx.console, ctx.name, counts, seconds)
    if (kept := as_sampled.line(ctx.name)) is not None:
        ctx.console.print(kept, highlight=False, soft_wrap=True)


def _of_others(
    samples: Sequence[Sequence[Answer]], ids: Sequence[Sequence[str]], seed: int
) -> tuple[list[list[Answer]], list[list[str]]]:
    """Replace the k-th sample of each prompt by the k-th sample of another prompt, drawn at random for each k. Also
    returns the ids of the prompts that the samples were drawn for."""
    count = len(samples)
    drawn = [
        [((p + 1 + sample_seed(seed, 1, p, k) % (count - 1)) % count, k) for k in range(len(own))]
        for p, own in enumerate(samples)
    ]
    moved = [
        [replace(samples[p][k], prompt=own[0].prompt, prompt_ids=own[0].prompt_ids) for p, k in places]
        for own, places in zip(samples, drawn, strict=True)
    ]
    return moved, [[ids[p][k] for p, k in places] for places in drawn]


def _similarities(
    spec: SelfContrastStage,
    ctx: StageContext,
    folder: Path,
    targets: Sequence[KnownAnswer],
    samples: Sequence[Sequence[Answer]],
    group: Ranks,
) -> tuple[list[list[float]], dict[str, Any]]:
    """Cosine similarities of each prompt's samples with its target, rounded to six decimals (smaller differences depend
    on the batch), and how many texts were too long for the embedder."""
    embedder = SentenceEmbedder(folder, device=group.device)
    texts = [
        text for target, own in zip(targets, samples, strict=True) for text in (target.text, *(s.text for s in own))
    ]
    vectors, cut = embed_all(
        embedder, texts, folder=ctx.work / "embeddings", console=ctx.console, name=f"{ctx.name}  embeddings"
    )
    grouped: Vectors = vectors.reshape(len(targets), 1 + spec.samples_per_prompt, -1)
    cosines = np.einsum("pd,pnd->pn", grouped[:, 0], grouped[:, 1:])
    limit = {"embedder": spec.embedder, "max_tokens": embedder.max_tokens, "texts": len(texts), "cut": cut}
    return [[round(float(value), 6) for value in row] for row in cosines], limit


def _write(
    spec: SelfContrastStage,
    ctx: StageContext,
    targets: Sequence[KnownAnswer],
    samples: Sequence[Sequence[Answer]],
    ids: Sequence[Sequence[str]],
    similarities: Sequence[Sequence[float]],
    counts: SelectionReport,
    as_sampled: AsSampled,
) -> None:
    """Choose the negatives of every prompt and write the preferences and the report; raises InputError when there is
    none."""
    enough = spec.negatives if spec.too_few == "drop" else 1
    answers: list[AnswerRow] = []
    with files.atomic_lines(ctx.out / "data.jsonl") as write:
        for target, own, named, scores in zip(targets, samples, ids, similarities, strict=True):
            chosen = _select(spec, ctx.seed, target, own, scores)
            kept = len(chosen.indices) >= enough
            answers += _answer_rows(spec.policy or ctx.model.path, target, own, scores, chosen)
            counts.add(chosen, scores, [len(sample.ids) for sample in own], len(target.tree.branches[0].ids), kept=kept)
            if kept:
                write(_row(target, own, named, scores, chosen, as_sampled))
    if not counts.kept:
        what = f"none of {counts.prompts:,} prompts has {enough} negatives: {counts.words()}"
        raise InputError(what, hint="sample more answers, or ask for fewer negatives")
    write_answers(ctx.out, answers)
    files.write_json(ctx.out / "report.json", counts.as_json())


def _select(
    spec: SelfContrastStage, seed: int, target: KnownAnswer, own: Sequence[Answer], scores: Sequence[float]
) -> NegativeSelection:
    return select_negatives(
        target.text,
        [sample.text for sample in own],
        scores,
        keep_least_similar=spec.keep_least_similar,
        negatives=spec.negatives,
        dedup=spec.dedup,
        seed=seed,
        id=target.id,
        unfinished={i for i, sample in enumerate(own) if not sample.finished} if spec.unfinished == "drop" else (),
    )


def _answer_rows(
    policy: str, target: KnownAnswer, own: Sequence[Answer], scores: Sequence[float], chosen: NegativeSelection
) -> Iterator[AnswerRow]:
    """Rows of ``answers.jsonl``: the data's answer and all samples; samples that are not negatives have the reason."""
    prompt, tokens = target.prompt.record.prompt, len(target.tree.branches[0].ids)
    yield AnswerRow("prompts", target.id, prompt, TARGET, 0, target.text, tokens, finished=True)
    for number, (answer, score, reason) in enumerate(zip(own, scores, chosen.reasons, strict=True)):
        left_out = None if reason == "negative" else reason
        yield answer_row("prompts", target.id, policy, number, answer, {"similarity": score}, left_out=left_out)


def _row(
    target: KnownAnswer,
    own: Sequence[Answer],
    ids: Sequence[str],
    scores: Sequence[float],
    chosen: NegativeSelection,
    as_sampled: AsSampled,
) -> dict[str, Any]:
    """A row of a preference file: the target as chosen answer, the negatives as rejected ones, and where they come
    from."""
    record = target.prompt.record
    row: dict[str, Any] = {key: value for key, value in record.fields.items() if key not in _NOT_FIELDS}
    row |= {"id": target.id, "prompt": list(record.prompt)}
    if record.tools:
        row["tools"] = list(record.tools)
    row["chosen"] = [target.answer]
    row["rejected"] = [[as_sampled.message(own[i], record.tools)] for i in chosen.indices]
    row["similarities"] = [scores[i] for i in chosen.indices]
    row["sample_ids"] = [ids[i] for i in chosen.indices]
    return row
