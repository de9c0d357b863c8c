"""The implicit reward of a policy trained on preferences, as a scorer.

With pi the policy and pi_ref the one that it was trained from, an answer y to a prompt x has the reward

    r(x, y) = beta * sum_t [log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)]

over the tokens that a policy has to generate, the end token included (Rafailov et al., 2023, arXiv 2305.18290).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from align.batching.tree import Layout, pack, row_multiple
from align.data.chat.encoder import Encoder
from align.data.tree import Tree
from align.errors import InputError
from align.functional.segments import segment_sum
from align.models.canary import require_own_logprobs
from align.models.compute.forward import batch_logprobs
from align.models.load import load_encoder, load_policy
from align.recipe.schema import Model
from align.scoring.encoded import encoded, limit_of, require_room, trees_of
from align.scoring.scorer import Answer, require_scores


class ImplicitRewardScorer:
    """Scores answers by ``policy`` relative to ``reference``. Both read the same tokens, made by the policy's tokenizer
    and template as in its training.

    Answers of a policy with the same encoder (``ids_from`` is its ``Encoder.digest``) are scored by their ids; all
    others by their text.

    Args:
        ids_from: digest of the encoder that made the answers' ids; None when there are no ids, or they are of another
            tokenizer.
        microbatch_tokens: tokens of one forward pass; affects memory, not scores.

    Raises:
        InputError: a model cannot be used, or the two have different tokens.
    """

    def __init__(
        self,
        policy: Model,
        reference: Model,
        *,
        beta: float,
        ids_from: str | None = None,
        microbatch_tokens: int = 2048,
        dtype: Literal["fp32", "bf16"] = "fp32",
        device: torch.device | str = "cpu",
        cache: Path | None = None,
    ) -> None:
        self.name = f"{Path(policy.path).name} over {Path(reference.path).name}"
        self.encoder: Encoder = load_encoder(policy, cache=cache)
        _require_same_tokens(self.encoder, load_encoder(reference, cache=cache), policy.path, reference.path)
        self._same_ids = ids_from == self.encoder.digest
        self._models = [load_policy(model, dtype=dtype, device=device, cache=cache) for model in (policy, reference)]
        for model in self._models:
            model.train(False)
        self._beta, self._tokens, self._device = beta, microbatch_tokens, torch.device(device)
        self._layout: Layout | None = None

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """The reward of each answer, in nats times beta, in order. Raises InputError for one that is longer than a
        model's positions."""
        trees = trees_of(encoded(self.encoder, answer, same_ids=self._same_ids) for answer in answers)
        if not trees:
            return []
        for model in self._models:
            require_room(self.name, max(tree.longest_path for tree in trees), limit_of(model.config))
        self._layout = self._layout or _layout_of(self._models, trees[0])
        policy, reference = (self._sums(model, trees, self._layout) for model in self._models)
        return require_scores(self.name, (self._beta * (policy - reference)).tolist(), len(answers))

    @torch.no_grad()
    def _sums(self, model: nn.Module, trees: Sequence[Tree], layout: Layout) -> np.ndarray:
        """Log-probs of all answers under one model, in order."""
        first = torch.tensor([0, *(len(tree.branches) for tree in trees)]).cumsum(0)
        sums = torch.full((int(first[-1]),), torch.nan, dtype=torch.float64)
        settings = {
            "microbatch_tokens": self._tokens,
            "multiple_of": row_multiple(layout, self._tokens, self._device.type),
        }
        for cpu_batch in pack(trees, layout=layout, pad_id=self.encoder.pad_id, **settings):
            batch = cpu_batch.to(self._device)
            logprobs = batch_logprobs(model, batch, own_attention=layout == "padded")
            places = first[torch.tensor(cpu_batch.tree_index)[cpu_batch.branch_tree]] + cpu_batch.branch_slot
            sums[places] = segment_sum(logprobs, batch.branch, batch.num_branches).cpu().double()
        return sums.numpy()


def _require_same_tokens(ours: Encoder, theirs: Encoder, policy: str, reference: str) -> None:
    if ours.tokenizer.get_vocab() != theirs.tokenizer.get_vocab() or ours.stop_ids != theirs.stop_ids:
        message = f"{policy} and {reference} have different tokenizers: one's log-probs are not beyond the other's"
        raise InputError(message, hint="`reference` is the policy that `policy` was trained from")


def _layout_of(models: Sequence[nn.Module], tree: Tree) -> Layout:
    """Layout ``tree``, or ``padded`` if one of the models cannot use tree attention."""
    ids = [*tree.trunk.tolist(), *tree.branches[0].ids.tolist(), *tree.trunk.tolist()][:12]
    for layout in ("tree", "padded"):
        try:
            for model in models:
                require_own_logprobs(model, ids, layout)
        except InputError:
            if layout == "padded":
                raise
        else:
            return layout
    raise AssertionError("one of the two was taken or refused")
