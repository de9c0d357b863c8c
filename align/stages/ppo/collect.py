"""Making an iteration's experience: sample answers, score them, and compute the advantage of every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from align import files
from align.batching.batch import Batch
from align.batching.loader import Loader, StepPlan
from align.data.tree import Tree
from align.data.trees.prompts import EncodedPrompt
from align.errors import InputError, TrainingFault
from align.functional.advantages import k3
from align.functional.policy_losses import truncated_importance_weights
from align.functional.segments import segment_sum
from align.models.adapters import adapter_off
from align.models.compute.forward import batch_logprobs
from align.models.scalar.critic import ActorCritic
from align.models.scalar.heads import token_values
from align.recipe.kinds.ppo import PpoStage
from align.rollout.engine import Sampling
from align.stages.ppo.experience import Answers, Experience, adapted, compute_advantages, explained_variance
from align.stages.ppo.rollouts import Rollouts, ScoredAnswer, parquet, rows_of
from align.stages.shared.clock import Clock
from align.training.launch import Ranks
from align.training.precision import autocast


@dataclass(frozen=True)
class PpoContext:
    """What PPO needs besides the arguments that all trainers share."""

    spec: PpoStage
    models: ActorCritic
    reference: nn.Module | None
    """A frozen copy of the starting policy; None when it is the policy with its adapter off."""
    rollouts: Rollouts
    prompts: Sequence[EncodedPrompt]
    baselines: Tensor | None
    """Baseline to subtract from the scores, fp32 [number of prompts]; None without a reference baseline."""
    plan: StepPlan
    """Which prompts each iteration takes."""
    loader: Callable[[Callable[[int], Tree], StepPlan], Loader]
    sft: Loader | None
    """Micro-batches of ``sft_data`` for every step; None without such data."""
    eval_prompts: Sequence[EncodedPrompt]
    eval_sft: Sequence[Batch]
    ranks: Ranks
    clock: Clock


def make_experience(parts: PpoContext, iteration: int, *, step: int, coefficient: float, rollouts: Path) -> Experience:
    """Sample with the policy as it is after ``step`` optimiser steps, and compute the advantages of the answers. Does
    not use torch's random generators.

    Args:
        coefficient: weight of the KL penalty.
        rollouts: folder into which the answers are written as Parquet.

    Raises:
        TrainingFault: the engine's weights are not the policy's, or a log-prob, value or score is not finite.
    """
    spec = parts.spec
    numbers = parts.plan.examples(iteration).tolist()
    prompts = [parts.prompts[number] for number in numbers]
    training = parts.models.training
    parts.models.eval()
    devices = [parts.ranks.device] if parts.ranks.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        parts.rollouts.sync(step)
        samples = parts.rollouts.sample(
            prompts, Sampling(spec.max_new_tokens, spec.samples_per_prompt, spec.temperature), iteration
        )
        answers = Answers.of(
            [prompt.record.id for prompt in prompts],
            [[sample.trajectory for sample in of_prompt] for of_prompt in samples],
        )
        with parts.clock("values"):
            tokens = _token_outputs(parts, answers)
    parts.models.train(training)
    baselines = torch.zeros(len(prompts)) if parts.baselines is None else parts.baselines[numbers]
    flat = [sample for of_prompt in samples for sample in of_prompt]
    experience = build_experience(spec, iteration, answers, flat, tokens, baselines[answers.prompt_of], coefficient)
    if parts.ranks.first:
        kl = segment_sum(tokens.old - tokens.reference, answers.branch, len(answers)).tolist()
        rows = rows_of(parts.rollouts.encoder, prompts, samples, {"iteration": iteration, "step": step})
        for row, nats, prompt in zip(rows, kl, answers.prompt_of.tolist(), strict=True):
            row |= {"baseline": float(baselines[prompt]), "kl": nats}
        files.atomic_write(files.make_folder(rollouts) / f"iteration-{iteration:06d}.parquet", parquet(rows))
    return experience


@dataclass(frozen=True)
class TokenOutputs:
    """What the trainer computes for every sampled token before the iteration's optimiser steps; fp32 [T] each."""

    old: Tensor
    """Log-probs under the policy with which the answers were sampled."""
    reference: Tensor
    """Log-probs under the reference."""
    values: Tensor | None
    """Output of the value model before each token; None without a value model."""


def _token_outputs(parts: PpoContext, answers: Answers) -> TokenOutputs:
    """Computed by the trainer at the sampling temperature; with several processes each computes its share."""
    spec, models = parts.spec, parts.models
    own_attention = spec.train.layout == "padded"
    pieces = answers.pieces(spec.train.microbatch_tokens, spec.train.layout)
    everything = StepPlan(np.arange(len(pieces.ranges)), np.array([0, len(pieces.ranges)]), 1.0)
    batches = parts.loader(pieces.tree, everything).step(0)

    def every(evaluate: Callable[[Batch], Tensor]) -> Tensor:
        numbers = torch.full((len(answers.branch),), torch.nan)
        with torch.no_grad(), autocast(spec.train, parts.ranks.device):
            for batch in batches:
                numbers[pieces.places(batch)] = evaluate(batch.to(parts.ranks.device)).cpu()
        for part in parts.ranks.gather(numbers):
            numbers = torch.where(numbers.isnan(), part, numbers)
        if not bool(numbers.isfinite().all()):
            raise TrainingFault(
                "log-probs or values of the sampled answers are not finite", hint="lower the learning rates"
            )
        return numbers

    def logprobs(model: nn.Module) -> Tensor:
        return every(
            lambda batch: batch_logprobs(model, batch, temperature=spec.temperature, own_attention=own_attention)
        )

    models.use("policy")
    old = logprobs(models.policy)
    with _reference(parts) as model:
        reference = logprobs(model)
    value = models.value
    if value is None:
        return TokenOutputs(old, reference, None)
    models.use("value")
    values = every(lambda batch: token_values(value, batch, own_attention=own_attention))
    models.use("policy")
    return TokenOutputs(old, reference, values)


@contextmanager
def _reference(parts: PpoContext) -> Iterator[nn.Module]:
    if parts.reference is not None:
        yield parts.reference
    else:
        with adapter_off(parts.models.policy):
            yield parts.models.policy


def build_experience(
    spec: PpoStage,
    iteration: int,
    answers: Answers,
    samples: Sequence[ScoredAnswer],
    tokens: TokenOutputs,
    baselines: Tensor,
    coefficient: float,
) -> Experience:
    """The experience made of scored answers. ``samples`` and ``baselines`` have one entry for each answer, [B]."""
    scores = torch.tensor(
        [sample.score - spec.unfinished_penalty * (not sample.trajectory.finished) for sample in samples]
    )
    log_ratio = tokens.old - tokens.reference
    found = compute_advantages(spec, answers, scores, baselines, log_ratio, tokens.values, coefficient)
    summary = {
        "answers": float(len(samples)),
        "score": float(scores.mean()),
        "score_std": float(scores.std(unbiased=False)),
        "baseline": float(baselines.mean()),
        "reward": float((scores - baselines).mean()),
        "kl": float(log_ratio.mean()),
        "kl_k3": float(k3(log_ratio).mean()),
        "kl_of_answer": float(segment_sum(log_ratio, answers.branch, len(answers)).mean()),
        "kl_coefficient": coefficient,
        "entropy": float(-tokens.old.mean()),
        "length": float(answers.sampled.double().mean()),
        "finished": sum(sample.trajectory.finished for sample in samples) / len(samples),
        "distinct": len({sample.trajectory.ids for sample in samples}) / len(samples),
    }
    if tokens.values is not None and found.returns is not None:
        summary |= {
            "explained_variance": explained_variance(tokens.values, found.returns),
            "return": float(found.returns.mean()),
            "return_std": float(found.returns.std(unbiased=False)),
        }
    weights = None
    given = [sample.trajectory.logprobs for sample in samples]
    if None not in given:
        engine = torch.tensor([logprob for of_answer in given for logprob in of_answer or ()])
        summary |= _mismatch(tokens.old, engine)
        if spec.importance_cap is not None:
            weights = truncated_importance_weights(tokens.old, engine, spec.importance_cap)
    elif spec.importance_cap is not None:
        raise InputError(
            "importance_cap compares log-probs with the engine's, and this engine gives none", hint="remove it"
        )
    following = adapted(coefficient, summary["kl_of_answer"], spec.kl_target)
    return Experience(
        iteration, answers, tokens.old, found.advantages, found.returns, tokens.values, weights, summary, following
    )


def _mismatch(trainer: Tensor, engine: Tensor) -> Mapping[str, float]:
    """How far the engine's log-probs are from the trainer's: mean and largest difference in nats, and the mean ratio of
    the probabilities (1 when unbiased)."""
    off = trainer.double() - engine.double()
    return {
        "mismatch": float(off.abs().mean()),
        "mismatch_max": float(off.abs().max()),
        "importance": float(off.exp().mean()),
    }
