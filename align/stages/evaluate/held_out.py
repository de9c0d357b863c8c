"""Held-out data of an evaluation: prompts, targets if the data have them, and every policy's samples and log-probs.

Every policy's log-probs are computed for the target (the data's answer) and for the baseline's samples, which are drawn
once. The margin between the two is what preference training from such samples is meant to widen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from align.batching.tree import Layout, pack
from align.data.answer_file import TARGET, AnswerRow
from align.data.chat.encoder import Encoder
from align.data.records import Prompt
from align.data.report import DataReport
from align.data.sources.contents import wanted_of
from align.data.tree import Branch, Tree
from align.data.trees.prompts import EncodedPrompt, load_prompts
from align.errors import InputError, Interrupted, Problem
from align.evaluation.compare import Values
from align.evaluation.metrics import PolicyMeasures
from align.evaluation.metrics import Targets as MeasuredTargets
from align.functional.segments import segment_sum
from align.models.canary import require_own_logprobs
from align.models.compute.forward import batch_logprobs
from align.models.load import load_policy
from align.recipe.schema import EvaluateStage, Model
from align.rollout.engine import Sampling, sample_seed
from align.scoring.embeddings import SentenceEmbedder, Vectors, embed_all
from align.scoring.scorer import Answer
from align.scoring.text_metrics import distinct_n, mixed_share
from align.signals import stop_requested
from align.stages.context import StageContext
from align.stages.shared.known_answers import NO_ROOM, KnownAnswer, read_targets
from align.stages.shared.policy_samples import answer_row, sample_policy
from align.training.launch import Ranks

_TOKENS = 2048
"""Tokens of a forward pass."""


@dataclass(frozen=True)
class Policy:
    """One of the policies that are compared."""

    name: str
    """The policy's name in the recipe."""
    model: Model
    encoder: Encoder


@dataclass(frozen=True)
class Question:
    """A prompt, and the data's answer if there is one."""

    prompts: tuple[EncodedPrompt, ...]
    """The prompt as encoded for each policy, in the order of the policies."""
    target: KnownAnswer | None = None

    @property
    def record(self) -> Prompt:
        """The prompt, as a record of the data."""
        return self.prompts[0].record

    def own_answer(self) -> Answer:
        """The data's answer, in the form that scorers take."""
        assert self.target is not None
        return Answer(self.record.prompt, self.target.text, target=self.target.text, fields=self.record.fields)


Samples = list[list[list[Answer]]]
"""[policy][prompt][sample]"""


def say(ctx: StageContext, text: str) -> None:
    """Print one line for the user."""
    ctx.console.print(f"{ctx.name}  {text}", highlight=False, markup=False, soft_wrap=True)


def read_questions(
    spec: EvaluateStage, ctx: StageContext, policies: Sequence[Policy], group: Ranks
) -> tuple[list[Question], DataReport]:
    """The prompts of ``spec.data``, with targets when all its sources have them.

    Raises :class:`InputError` for bad rows, when no prompt is left, and when the policies' log-probs of targets cannot
    be compared because their tokens differ.
    """
    assert spec.data is not None
    encoder = policies[0].encoder
    rejects = ctx.out / "rejects.jsonl" if group.first else None
    if all(wanted_of(source, ctx.resolve(source.path)) != "prompt" for source in spec.data):
        targets, report = read_targets(
            spec.data, ctx, encoder, max_length=spec.max_length, max_new_tokens=spec.max_new_tokens, rejects=rejects
        )
        _require_same_tokens(policies, targets)
        return [Question((target.prompt,) * len(policies), target) for target in targets], report
    room = spec.max_length - spec.max_new_tokens
    reading: dict[str, Any] = {"resolve": ctx.resolve, "encoder": encoder, "seed": ctx.seed, "rejects": rejects}
    prompts, report = load_prompts(spec.data, max_length=room, limit="max_length - max_new_tokens", **reading)
    questions = []
    for one in prompts:
        record = one.record
        others = (tuple(policy.encoder.encode_prompt(record.prompt, record.tools).tolist()) for policy in policies[1:])
        ids = (one.ids, *others)
        if max(map(len, ids)) > room:
            report.drop(NO_ROOM, record.origin)
        else:
            questions.append(Question(tuple(EncodedPrompt(record, own) for own in ids)))
    if not questions:
        raise InputError(Problem(f"0 prompts left: {NO_ROOM}", file=", ".join(source.path for source in spec.data)))
    return questions, report


def _require_same_tokens(policies: Sequence[Policy], targets: Sequence[KnownAnswer]) -> None:
    """Raise InputError unless all policies encode the same text as the same tokens: the log-probs of one policy's
    samples are computed under the others, token by token."""
    first = policies[0]
    for policy in policies[1:]:
        other = policy.encoder
        same = (
            other.tokenizer.get_vocab() == first.encoder.tokenizer.get_vocab()
            and other.stop_ids == first.encoder.stop_ids
        )
        for target in targets if same and other.digest != first.encoder.digest else ():
            record = target.prompt.record
            trunk, answers = other.encode_answers(record.prompt, [[target.answer]], record.tools)
            answer = answers[0].ids[answers[0].mask]
            same = (
                same
                and np.array_equal(trunk, target.tree.trunk)
                and np.array_equal(answer, target.tree.branches[0].ids)
            )
        if not same:
            message = (
                f"{policy.name} has another tokenizer or chat template than {first.name}: their log-probs cannot be"
                " compared"
            )
            raise InputError(message, hint="prompts without targets can be")


def sample_questions(
    spec: EvaluateStage, ctx: StageContext, policies: Sequence[Policy], questions: Sequence[Question], group: Ranks
) -> Samples:
    """Samples of every policy, all drawn from the same seed."""
    sampling = Sampling(
        spec.max_new_tokens, n=spec.samples_per_prompt, temperature=spec.temperature, seed=sample_seed(ctx.seed, 0)
    )
    targets = [q.target.text for q in questions if q.target is not None] or None
    found = []
    for k, policy in enumerate(policies):
        name = f"{ctx.name}  samples of {policy.name}"
        made = sample_policy(
            spec.rollout,
            policy.model,
            policy.encoder,
            [question.prompts[k] for question in questions],
            sampling,
            ctx,
            group,
            max_length=spec.max_length,
            name=name,
            targets=targets,
        )
        found.append(made)
    return found


def answer_rows(
    policies: Sequence[Policy], questions: Sequence[Question], samples: Samples, by_scorer: Mapping[str, Any]
) -> Iterator[AnswerRow]:
    """Rows of ``answers.jsonl``: for each prompt the data's answer, if there is one, and every policy's samples, with
    their scores."""
    for p, question in enumerate(questions):
        record, target = question.record, question.target
        if target is not None:
            scores = {name: float(targets[p, 0]) for name, (_, targets) in by_scorer.items()}
            tokens = len(target.tree.branches[0].ids)
            yield AnswerRow(
                "data", record.id, record.prompt, TARGET, 0, target.text, tokens, finished=True, scores=scores
            )
        for policy, of_prompts in zip(policies, samples, strict=True):
            for number, answer in enumerate(of_prompts[p]):
                scores = {name: float(values[policy.name][p, number]) for name, (values, _) in by_scorer.items()}
                yield answer_row("data", record.id, policy.name, number, answer, scores)


def measure(
    ctx: StageContext,
    policies: Sequence[Policy],
    questions: Sequence[Question],
    samples: Samples,
    logprobs: Sequence[Values] | None,
) -> list[PolicyMeasures]:
    """The measures of every policy, except similarities."""
    found = []
    for k in range(len(policies)):
        own = samples[k]
        texts = [[sample.text for sample in group] for group in own]
        found.append(
            PolicyMeasures(
                lengths=np.array([[len(sample.ids) for sample in group] for group in own], dtype=np.float64),
                finished=np.array([[sample.finished for sample in group] for group in own], dtype=np.float64),
                distinct=np.array([[distinct_n(group, n) for n in (1, 2)] for group in texts]),
                mixed=np.array([[mixed_share([text]) for text in group] for group in texts]),
                targets=None if logprobs is None else _targets(questions, logprobs[k]),
            )
        )
    return found


def _targets(questions: Sequence[Question], logprobs: Values) -> MeasuredTargets:
    tokens = np.array([len(q.target.tree.branches[0].ids) if q.target else 0 for q in questions], dtype=np.float64)
    return MeasuredTargets(logprobs[:, 0], tokens, logprobs[:, 1:], None)


# Log-probs


@torch.no_grad()
def logprobs_of(
    ctx: StageContext, policy: Policy, questions: Sequence[Question], samples: Sequence[Sequence[Answer]], group: Ranks
) -> Values:
    """Log-probs of each target and of its prompt's ``samples`` under ``policy``, [P, 1 + n]. In fp32 on a CPU, in bf16
    on a GPU."""
    if (signum := stop_requested()) is not None:
        raise Interrupted(
            signum, f"{ctx.name}: stopped before the log-probs; the samples are kept and the same command continues"
        )
    cuda = group.device.type == "cuda"
    model = load_policy(policy.model, dtype="bf16" if cuda else "fp32", device=group.device, cache=ctx.cache)
    trees = [
        _tree(question.target, own)
        for question, own in zip(questions, samples, strict=True)
        if question.target is not None
    ]
    layout = _layout(model, trees[0], ctx, policy.model.path)
    mine = range(group.rank, len(trees), group.world)
    # All rows have one length on a GPU, where the attention kernel is compiled for each length
    padded = _TOKENS if cuda and layout != "padded" else 1
    values = np.full((len(trees), len(trees[0].branches)), np.nan)
    pad = policy.encoder.pad_id
    for cpu_batch in pack(
        [trees[i] for i in mine], microbatch_tokens=_TOKENS, layout=layout, pad_id=pad, multiple_of=padded
    ):
        batch = cpu_batch.to(group.device)
        sums = segment_sum(
            batch_logprobs(model, batch, own_attention=layout == "padded"), batch.branch, batch.num_branches
        )
        places = [mine[cpu_batch.tree_index[tree]] for tree in cpu_batch.branch_tree.tolist()]
        values[places, cpu_batch.branch_slot.numpy()] = sums.cpu().numpy()
    for part in group.gather(values):
        values = np.where(np.isnan(values), part, values)
    return values


def _tree(target: KnownAnswer, samples: Sequence[Answer]) -> Tree:
    """The prompt with the target and with samples as they were drawn, token by token."""
    drawn = (
        Branch(np.array(sample.ids, dtype=np.int32), np.ones(len(sample.ids), dtype=np.bool_)) for sample in samples
    )
    branches = (target.tree.branches[0], *drawn)
    return Tree(target.id, target.tree.trunk, branches)


def _layout(model: nn.Module, tree: Tree, ctx: StageContext, name: str) -> Layout:
    """Layout ``tree``, or ``padded`` if the model cannot use tree attention."""
    ids = [*tree.trunk, *tree.branches[0].ids, *tree.trunk][:12]
    try:
        require_own_logprobs(model, ids, "tree")
    except InputError as error:
        say(ctx, f"{name}: padded rows ({error.problems[0].message})")
        require_own_logprobs(model, ids, "padded")
        return "padded"
    return "tree"


# Similarity


def similarities(
    ctx: StageContext, embedder: SentenceEmbedder, questions: Sequence[Question], samples: Samples
) -> tuple[list[Values], float]:
    """Cosine similarities of each policy's samples with the targets, [P, n] each, and the share of texts that were cut
    because they were too long for the embedder."""
    texts = [question.target.text for question in questions if question.target is not None]
    texts += [sample.text for policy in samples for own in policy for sample in own]
    vectors, cut = embed_all(
        embedder, texts, folder=ctx.work / "embeddings", console=ctx.console, name=f"{ctx.name}  embeddings"
    )
    wanted: Vectors = vectors[: len(questions)]
    drawn = vectors[len(questions) :].reshape(len(samples), len(questions), -1, vectors.shape[1])
    return [np.einsum("pd,pnd->pn", wanted, policy).astype(np.float64) for policy in drawn], round(cut / len(texts), 4)
