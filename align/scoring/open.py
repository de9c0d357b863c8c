"""From what a recipe says of scores to something that gives them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from align.batching.tree import pack
from align.data.trees import Branch, Tree
from align.errors import InputError
from align.models.heads import ScalarModel, branch_scores, load_scalar
from align.recipe.schema import Model
from align.scoring.scorer import Answer, Scorer


def open_scorer(
    spec: str, *, resolve: Callable[[str], Path | str], cache: Path, device: torch.device | str, microbatch_tokens: int = 2048
) -> Scorer:
    """The scorer that ``spec`` names: a reference to a reward model."""
    return RewardModelScorer(load_scalar(Model(path=str(resolve(spec))), dtype="fp32", device=device, cache=cache), microbatch_tokens)


class RewardModelScorer:
    """Scores by a reward model that shares the policy's tokenizer and template."""

    name = "reward"

    def __init__(self, model: ScalarModel, microbatch_tokens: int) -> None:
        self.model, self._microbatch_tokens = model.eval().requires_grad_(False), microbatch_tokens

    @torch.no_grad()
    def score(self, answers: Sequence[Answer]) -> list[float]:
        """See :class:`align.scoring.scorer.Scorer`. Raises InputError for an answer that did not come from a policy."""
        if any(not answer.ids for answer in answers):
            raise InputError("a reward model scores token ids, and there is an answer without any")
        trees = [_tree(list(group)) for _, group in itertools.groupby(answers, key=lambda answer: answer.prompt_ids)]
        first = np.cumsum([0, *(len(tree.branches) for tree in trees)])
        scores = np.zeros(len(answers))
        device = next(self.model.parameters()).device
        for batch in pack(trees, microbatch_tokens=self._microbatch_tokens):
            places = first[np.array(batch.tree_index)[batch.branch_tree.numpy()]] + batch.branch_slot.numpy()
            scores[places] = branch_scores(self.model, batch.to(device)).cpu().numpy()
        found: list[float] = scores.tolist()
        return found


def _tree(answers: Sequence[Answer]) -> Tree:
    """Answers to one prompt share it."""
    branches = [np.array(answer.ids, dtype=np.int32) for answer in answers]
    prompt = np.array(answers[0].prompt_ids, dtype=np.int32)
    return Tree("", prompt, tuple(Branch(ids, np.ones(len(ids), dtype=np.bool_)) for ids in branches))
