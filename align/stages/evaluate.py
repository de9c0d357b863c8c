"""``kind: evaluate``: policies compared with the first of them, the baseline, on held-out conversations.

The baseline's samples are drawn once, and every policy says how likely it finds them beside the data's answer, the target: the margin
between the two is what preference training from such samples is meant to widen. Besides, every policy draws samples of its own, from the
same seed. All numbers are means over prompts with bootstrap intervals; differences to the baseline are taken prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from torch import nn

from align import files
from align.batching.tree import Layout, pack
from align.data.encode import Encoder
from align.data.trees import Branch, Tree
from align.errors import InputError, Interrupted
from align.functional.bootstrap import bootstrap_mean
from align.functional.segments import segment_sum
from align.models.canary import require_own_logprobs
from align.models.forward import batch_logprobs
from align.models.load import load_encoder, load_policy
from align.recipe.schema import EvaluateStage, Model
from align.rollout.engine import Sampling, sample_seed
from align.scoring.embeddings import SentenceEmbedder, Vectors, embed_all, find_embedder
from align.signals import stop_requested
from align.stages.context import StageContext
from align.stages.metrics import METRICS, Measured, Values
from align.stages.sampling import Sample, as_samples, sample_policy
from align.stages.targets import Target, read_targets
from align.training.launch import Ranks, ranks

_TOKENS = 2048
"""Of a forward pass."""


def run(spec: EvaluateStage, ctx: StageContext) -> None:
    """Sample from every policy, score the baseline's samples and the targets with every policy, compare."""
    group = ranks()
    policies = [ctx.policy(reference) for reference in spec.policies]
    encoders = [load_encoder(policy, cache=ctx.cache) for policy in policies]
    ctx.encoder_digest = encoders[0].digest
    embedder = find_embedder(ctx.resolve(spec.embedder)) if group.first else None
    lengths: dict[str, Any] = {"max_length": spec.max_length, "max_new_tokens": spec.max_new_tokens}
    targets, report = read_targets(spec.data, ctx, encoders[0], rejects=ctx.out / "rejects.jsonl" if group.first else None, **lengths)
    for line in report.lines():
        ctx.console.print(line, highlight=False, markup=False, soft_wrap=True)
    _require_same_tokens(spec.policies, encoders, targets)
    samples = [_samples(spec, ctx, k, policies[k], encoders[k], targets, group) for k in range(len(policies))]
    logprobs = [_logprobs(ctx, policy, encoders[0], targets, samples[0], group) for policy in policies]
    if embedder is None:  # the first process does the rest
        return
    vectors = SentenceEmbedder(embedder, device=group.device)
    similarities, cut = _similarities(ctx, vectors, targets, samples)
    measured = [_measured(logprobs[k], similarities[k], samples[k]) for k in range(len(policies))]
    result = {
        "prompts": len(targets),
        "samples_per_prompt": spec.samples_per_prompt,
        "baseline": spec.policies[0],
        "texts_cut_by_embedder": cut,
        "metrics": compare(dict(zip(spec.policies, measured, strict=True)), seed=ctx.seed),
    }
    files.write_json(ctx.out / "report.json", {**result, "embedder_max_tokens": vectors.max_tokens, "data": report.as_json()})
    _write_prompts(spec, ctx, targets, samples, measured)
    ctx.note(result)
    _show(ctx, spec.policies, result)


def compare(measured: dict[str, Measured], *, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """``{metric: {policy: {mean, low, high, count}}}``; all but the first policy have a ``difference`` to it as well, of the same form."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    baseline = next(iter(measured.values()))
    for name, metric in METRICS.items():
        found[name] = {}
        for policy, values in measured.items():
            found[name][policy] = asdict(bootstrap_mean(metric.of(values), seed=seed))
            if values is not baseline:
                found[name][policy]["difference"] = asdict(bootstrap_mean(metric.of(values) - metric.of(baseline), seed=seed))
    return found


def _require_same_tokens(names: Sequence[str], encoders: Sequence[Encoder], targets: Sequence[Target]) -> None:
    """One policy's samples are scored by another one token by token, so the same text must be the same tokens to both."""
    first = encoders[0]
    for name, other in zip(names[1:], encoders[1:], strict=True):
        same = other.tokenizer.get_vocab() == first.tokenizer.get_vocab() and other.stop_ids == first.stop_ids
        for target in targets if same and other.digest != first.digest else ():
            trunk, answers = other.encode_answers(target.prompt, [[target.answer]], target.tools)
            answer = answers[0].ids[answers[0].mask]
            same = same and np.array_equal(trunk, target.tree.trunk) and np.array_equal(answer, target.tree.branches[0].ids)
        if not same:
            raise InputError(f"{name} has another tokenizer or chat template than {names[0]}: their log-probs cannot be compared")


def _samples(
    spec: EvaluateStage, ctx: StageContext, k: int, policy: Model, encoder: Encoder, targets: Sequence[Target], group: Ranks
) -> list[list[Sample]]:
    """Own samples of policy ``k``."""
    sampling = Sampling(spec.max_new_tokens, n=spec.samples_per_prompt, temperature=spec.temperature, seed=sample_seed(ctx.seed, 0))
    prompts = [target.prompt_ids for target in targets]
    name = f"{ctx.name}  samples of {spec.policies[k]}"
    made = sample_policy(spec.rollout, policy, encoder, prompts, sampling, ctx, group, max_length=spec.max_length, name=name)
    return as_samples([target.id for target in targets], made, encoder)


# Log-probs


@torch.no_grad()
def _logprobs(
    ctx: StageContext, policy: Model, encoder: Encoder, targets: Sequence[Target], samples: Sequence[Sequence[Sample]], group: Ranks
) -> Values:
    """Log-probs of each target and of its prompt's ``samples`` under ``policy``, [P, 1 + n]. In fp32 on a CPU, in bf16 on a GPU."""
    if (signum := stop_requested()) is not None:
        raise Interrupted(signum, f"{ctx.name}: stopped before the log-probs; the samples are kept and the same command continues")
    cuda = group.device.type == "cuda"
    model = load_policy(policy, dtype="bf16" if cuda else "fp32", device=group.device, cache=ctx.cache)
    trees = [_tree(target, own) for target, own in zip(targets, samples, strict=True)]
    layout = _layout(model, trees[0], ctx, policy.path)
    mine = range(group.rank, len(trees), group.world)
    padded = _TOKENS if cuda and layout != "padded" else 1  # one row length on a GPU, whose attention kernel is compiled for each
    values = np.full((len(trees), len(trees[0].branches)), np.nan)
    for cpu_batch in pack([trees[i] for i in mine], microbatch_tokens=_TOKENS, layout=layout, pad_id=encoder.pad_id, multiple_of=padded):
        batch = cpu_batch.to(group.device)
        sums = segment_sum(batch_logprobs(model, batch, own_attention=layout == "padded"), batch.branch, batch.num_branches)
        places = [mine[cpu_batch.tree_index[tree]] for tree in cpu_batch.branch_tree.tolist()]
        values[places, cpu_batch.branch_slot.numpy()] = sums.cpu().numpy()
    for part in group.gather(values):
        values = np.where(np.isnan(values), part, values)
    return values


def _tree(target: Target, samples: Sequence[Sample]) -> Tree:
    """The prompt with the target and with samples as they were drawn, token by token."""
    drawn = (Branch(sample.ids, np.ones(len(sample.ids), dtype=np.bool_)) for sample in samples)
    branches = (target.tree.branches[0], *drawn)
    return Tree(target.id, target.tree.trunk, branches)


def _layout(model: nn.Module, tree: Tree, ctx: StageContext, name: str) -> Layout:
    """Trees, unless the model's layers cannot keep them apart."""
    ids = [*tree.trunk, *tree.branches[0].ids, *tree.trunk][:12]
    try:
        require_own_logprobs(model, ids, "tree")
    except InputError as error:
        ctx.console.print(f"{ctx.name}  {name}: padded rows ({error.problems[0].message})", highlight=False, markup=False, soft_wrap=True)
        require_own_logprobs(model, ids, "padded")
        return "padded"
    return "tree"


# What is made of it


def _similarities(
    ctx: StageContext, embedder: SentenceEmbedder, targets: Sequence[Target], samples: Sequence[Sequence[Sequence[Sample]]]
) -> tuple[list[Values], float]:
    """Cosines of each policy's samples with the targets, [P, n] each, and the share of texts that the embedder cut."""
    texts = [target.text for target in targets]
    texts += [sample.text for policy in samples for own in policy for sample in own]
    vectors, cut = embed_all(embedder, texts, folder=ctx.work / "embeddings", console=ctx.console, name=f"{ctx.name}  embeddings")
    wanted: Vectors = vectors[: len(targets)]
    drawn = vectors[len(targets) :].reshape(len(samples), len(targets), -1, vectors.shape[1])
    return [np.einsum("pd,pnd->pn", wanted, policy).astype(np.float64) for policy in drawn], round(cut / len(texts), 4)


def _measured(logprobs: Values, similarities: Values, samples: Sequence[Sequence[Sample]]) -> Measured:
    lengths = np.array([[len(sample.ids) for sample in own] for own in samples], dtype=np.float64)
    finished = np.array([[sample.finished for sample in own] for own in samples], dtype=np.float64)
    return Measured(logprobs[:, 0], logprobs[:, 1:], similarities, lengths, finished)


def _write_prompts(
    spec: EvaluateStage,
    ctx: StageContext,
    targets: Sequence[Target],
    samples: Sequence[Sequence[Sequence[Sample]]],
    measured: list[Measured],
) -> None:
    """``data.jsonl``: each prompt with every policy's numbers and samples, to look at or to compute with."""
    columns = [{name: metric.of(m).tolist() for name, metric in METRICS.items()} for m in measured]
    with files.atomic_lines(ctx.out / "data.jsonl") as write:
        for p, target in enumerate(targets):
            of: dict[str, Any] = {}
            for k, name in enumerate(spec.policies):
                numbers = {metric: round(values[p], 6) for metric, values in columns[k].items()}
                of[name] = {**numbers, "samples": [sample.text for sample in samples[k][p]]}
            write({"id": target.id, "prompt": list(target.prompt), "target": target.text, "policies": of})


def _show(ctx: StageContext, policies: Sequence[str], result: dict[str, Any]) -> None:
    table = Table(
        title=f"{ctx.name}: {result['prompts']} held-out prompts, means with 95 % intervals", title_justify="left", show_lines=True
    )
    for header in ("", "policy", "mean", f"difference to {policies[0]}"):
        table.add_column(header)
    for name, metric in METRICS.items():
        for k, policy in enumerate(policies):
            entry = result["metrics"][name][policy]
            table.add_row(metric.words if k == 0 else "", Text(policy), _words(entry), _words(entry["difference"]) if k else Text())
    ctx.console.print(table)


def _words(entry: dict[str, Any]) -> Text:
    return Text(f"{entry['mean']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]")
