"""An iteration's experience: the answers, with log-probs, advantages and returns of their tokens. Made once, and kept
on disk until the iteration's training is done.

Training on the experience changes the policy, so nothing here can be computed again later. A run that was interrupted
inside an iteration resumes from the saved experience.

Shapes: P prompts, B answers, A tokens of all answers, one answer after the other without padding. T of the A tokens
were sampled by the policy. Only these are trained on; tensors [T] have one value for each of them, in their order.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.batching.batch import Batch
from align.batching.loader import StepPlan
from align.batching.tree import Layout
from align.data.tree import Branch, Tree
from align.functional.advantages import gae, k1, token_rewards, whiten
from align.functional.segments import segment_count, segment_sum
from align.recipe.kinds.ppo import PpoStage
from align.rollout.trajectory import Trajectory
from align.sealed import damage
from align.training.checkpoint import save_tensors, verified

_log = logging.getLogger("align")


@dataclass(frozen=True)
class Answers:
    """Answers to an iteration's prompts, as tokens: all that follows the prompt in a trajectory is its answer."""

    names: Sequence[str]  # [P], record ids
    prompts: Sequence[Sequence[int]]  # [P], token ids
    prompt_of: Tensor  # int64 [B], index of the answer's prompt; never falls, every prompt has an answer
    lengths: Tensor  # int64 [B], at least 1
    ids: Tensor  # int32 [A]
    mask: Tensor  # bool [A], true where the policy sampled the token; at least one token of each answer

    @classmethod
    def of(cls, names: Sequence[str], trajectories: Sequence[Sequence[Trajectory]]) -> Answers:
        """From trajectories ``[prompt][sample]``. Those of one prompt begin with the same ids."""
        flat = [one for of_prompt in trajectories for one in of_prompt]
        return cls(
            names,
            [of_prompt[0].prompt for of_prompt in trajectories],
            torch.repeat_interleave(
                torch.arange(len(trajectories)), torch.tensor([len(of_prompt) for of_prompt in trajectories])
            ),
            torch.tensor([len(one.ids) for one in flat]),
            torch.tensor([i for one in flat for i in one.ids], dtype=torch.int32),
            torch.tensor([sampled for one in flat for sampled in one.mask]),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def sampled(self) -> Tensor:
        """Number of sampled tokens of each answer, int64 [B]."""
        answer = torch.repeat_interleave(torch.arange(len(self)), self.lengths)
        return segment_count(answer[self.mask], len(self))

    @property
    def branch(self) -> Tensor:
        """Index of the answer that each sampled token belongs to, int64 [T]."""
        return torch.repeat_interleave(torch.arange(len(self)), self.sampled)

    def pieces(self, tokens: int, layout: Layout) -> Pieces:
        """The answers as trees of at most ``tokens`` tokens, where possible; in other layouts than ``tree`` every
        answer is a tree by itself."""
        ranges: list[range] = []
        size = 0
        for answer, (prompt, length) in enumerate(zip(self.prompt_of.tolist(), self.lengths.tolist(), strict=True)):
            joins = (
                ranges and layout == "tree" and self.prompt_of[ranges[-1].start] == prompt and size + length <= tokens
            )
            if joins:
                ranges[-1] = range(ranges[-1].start, answer + 1)
                size += length
            else:
                ranges.append(range(answer, answer + 1))
                size = len(self.prompts[prompt]) + length
        return Pieces(self, tuple(ranges))


@dataclass(frozen=True)
class Pieces:
    """Answers as trees. A tree contains a prompt and all its answers. If they do not fit a micro-batch, the prompt is
    repeated in several trees: PPO's losses are sums over answers, so that costs time but does not change the result."""

    answers: Answers
    ranges: tuple[range, ...]
    """The indices of the answers in each tree; all of them answer the same prompt."""

    def tree(self, number: int) -> Tree:
        """A tree of a prompt and its answers; the sampled tokens of the answers are targets."""
        answers, members = self.answers, self.ranges[number]
        prompt = int(answers.prompt_of[members.start])
        ends = answers.lengths.cumsum(0)
        branches = []
        for answer in members:
            place = slice(int(ends[answer] - answers.lengths[answer]), int(ends[answer]))
            branches.append(Branch(answers.ids[place].numpy(), answers.mask[place].numpy()))
        return Tree(answers.names[prompt], np.array(answers.prompts[prompt], dtype=np.int32), tuple(branches))

    def places(self, batch: Batch) -> Tensor:
        """Indices of a batch's targets among the sampled tokens of all answers: int64 [N], on the CPU. ``tree_index``
        of the batch are numbers of these trees."""
        first = torch.tensor([members.start for members in self.ranges])
        trees = torch.tensor(batch.tree_index, dtype=torch.int64)[batch.branch_tree.cpu()]
        answer = first[trees] + batch.branch_slot.cpu()
        sampled, branch = self.answers.sampled, batch.branch.cpu()
        counts = segment_count(branch, batch.num_branches)
        inside = torch.arange(len(branch)) - (counts.cumsum(0) - counts)[branch]
        return (sampled.cumsum(0) - sampled)[answer][branch] + inside

    def plan(self, prompts: StepPlan) -> StepPlan:
        """The plan ``prompts``, whose steps are lists of prompts, as a plan whose steps are lists of trees."""
        trees_of: dict[int, list[int]] = {}
        for number, members in enumerate(self.ranges):
            trees_of.setdefault(int(self.answers.prompt_of[members.start]), []).append(number)
        steps = [
            [tree for prompt in prompts.examples(step).tolist() for tree in trees_of[prompt]]
            for step in range(len(prompts))
        ]
        return StepPlan(
            np.array([tree for step in steps for tree in step]),
            np.cumsum([0, *map(len, steps)]),
            prompts.steps_per_epoch,
        )


@dataclass(frozen=True)
class TokenAdvantages:
    """Advantages and returns of tokens; fp32 [T] each."""

    advantages: Tensor
    returns: Tensor | None
    """What the value model is trained to predict; None without one."""


def compute_advantages(
    spec: PpoStage,
    answers: Answers,
    scores: Tensor,
    baselines: Tensor,
    log_ratio: Tensor,
    values: Tensor | None,
    coefficient: float,
) -> TokenAdvantages:
    """Advantages by the recipe's estimator.

    Args:
        scores: fp32 [B], penalties included.
        baselines: fp32 [B], subtracted from the scores; zeros without a baseline.
        log_ratio: fp32 [T], log-probs of the tokens under the policy that sampled them, minus those under the
            reference.
        values: fp32 [T], of the value model; None without one.
        coefficient: weight of the KL penalty.
    """
    branch = answers.branch
    kl = k1(log_ratio)
    if spec.advantages.has_value_model:
        assert values is not None, "a value model gives values"
        rewards = token_rewards(kl, scores - baselines, branch, coefficient)
        if spec.whiten_rewards:
            rewards = whiten(rewards, shift_mean=False)
        advantages = gae(rewards, values, branch, spec.gamma, spec.lam)
        returns: Tensor | None = advantages + values
    else:
        penalised = segment_sum(token_rewards(kl, scores, branch, coefficient), branch, len(answers))
        of_answers = spec.advantages.of_answers(penalised, answers.prompt_of, baselines)
        advantages, returns = of_answers[branch], None
    if spec.whiten_advantages:
        advantages = whiten(advantages)
    return TokenAdvantages(advantages, returns)


def adapted(coefficient: float, kl: float, target: float | None) -> float:
    """The next iteration's KL coefficient: raised or lowered by up to 2 %, depending on how far ``kl`` (nats per
    answer) is from ``target``.

    The proportional controller of https://arxiv.org/abs/1909.08593, section 2.2, with its constants.
    """
    if target is None:
        return coefficient
    return coefficient * (1 + 0.1 * min(max((kl - target) / target, -0.2), 0.2))


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); 0 where the returns do not vary."""
    spread = float(returns.double().var(unbiased=False))
    return 1 - float((returns - values).double().var(unbiased=False)) / spread if spread > 1e-12 else 0.0


def minibatch_plan(prompts: int, spec: PpoStage, seed: int, iteration: int) -> StepPlan:
    """An iteration's optimiser steps: every pass takes the prompts in a new random order, cut into minibatches of sizes
    as equal as possible."""
    passes = [np.random.default_rng([seed, iteration, epoch]).permutation(prompts) for epoch in range(spec.ppo_epochs)]
    parts = [part for order in passes for part in np.array_split(order, spec.minibatches)]
    return StepPlan(np.concatenate(parts), np.cumsum([0, *map(len, parts)]), float(spec.minibatches))


@dataclass(frozen=True)
class Experience:
    """Everything that an iteration trains on. Tensors are fp32 [T] on the CPU."""

    iteration: int
    answers: Answers
    old: Tensor
    """Log-probs of the tokens under the policy that sampled them, as the trainer computes them."""
    advantages: Tensor
    returns: Tensor | None
    values: Tensor | None
    """Outputs of the value model before it trains on this experience; None, like ``returns``, without one."""
    weights: Tensor | None
    """Importance weights, if the recipe asks for them."""
    summary: Mapping[str, float]
    """Means over the iteration, for the progress lines and the health checks."""
    next_coefficient: float
    """KL coefficient of the next iteration."""

    def save(self, folder: Path) -> None:
        """Write the folder, whole or not at all."""
        named = {name: getattr(self, name) for name in ("old", "advantages", "returns", "values", "weights")}
        tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
        tensors |= {name: getattr(self.answers, name) for name in ("prompt_of", "lengths", "ids", "mask")}
        state: dict[str, Any] = {
            "iteration": self.iteration,
            "names": list(self.answers.names),
            "prompts": [list(map(int, prompt)) for prompt in self.answers.prompts],
            "summary": dict(self.summary),
            "next_coefficient": self.next_coefficient,
        }
        save_tensors(folder, {"experience": tensors}, state)

    @classmethod
    def load(cls, folder: Path) -> Experience:
        """Read what :meth:`save` wrote. Raises InputError when it is damaged."""
        kept = verified(folder, ["experience"])
        tensors, state = kept.tensors("experience"), kept.state()
        prompt_of, lengths, ids = (tensors[name] for name in ("prompt_of", "lengths", "ids"))
        # Earlier versions saved no mask, because every token was sampled.
        mask = tensors.get("mask", torch.ones(len(ids), dtype=torch.bool))
        answers = Answers(state["names"], state["prompts"], prompt_of, lengths, ids, mask)
        optional = {name: tensors.get(name) for name in ("returns", "values", "weights")}
        return cls(
            state["iteration"],
            answers,
            tensors["old"],
            tensors["advantages"],
            **optional,
            summary=state["summary"],
            next_coefficient=state["next_coefficient"],
        )


def is_whole(folder: Path) -> bool:
    """Whether ``folder`` has an undamaged experience. Warns about a damaged one."""
    problems = damage(folder) if folder.exists() else []
    if problems:
        _log.warning("%s: made again", problems[0])
    return folder.exists() and not problems


def folder_of(work: Path, iteration: int) -> Path:
    """The folder in which an iteration's experience is kept."""
    return work / "experience" / f"iteration-{iteration:06d}"


@dataclass(frozen=True)
class PolicyBatch(Batch):
    """Answers that the policy trains on."""

    old: Tensor  # fp32 [N]
    advantages: Tensor  # fp32 [N]
    weights: Tensor  # fp32 [N]; ones without importance weights


@dataclass(frozen=True)
class ValueBatch(Batch):
    """Answers that the value model trains on."""

    old: Tensor  # fp32 [N], values
    returns: Tensor  # fp32 [N]


def training_batches(experience: Experience, pieces: Pieces, batches: Sequence[Batch]) -> list[Batch]:
    """The same answers as batches for the policy and, if there is a value model, as batches for it. They are separate
    so that only one model's activations are in memory at a time."""
    made: list[Batch] = []
    for batch in batches:
        at = pieces.places(batch)
        weights = torch.ones(len(at)) if experience.weights is None else experience.weights[at]
        made.append(
            PolicyBatch(**vars(batch), old=experience.old[at], advantages=experience.advantages[at], weights=weights)
        )
    if experience.values is not None and experience.returns is not None:
        for batch in batches:
            at = pieces.places(batch)
            made.append(ValueBatch(**vars(batch), old=experience.values[at], returns=experience.returns[at]))
    return made
