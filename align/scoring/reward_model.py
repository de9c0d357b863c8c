"""A reward model of this package as a scorer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from align.data.chat.encoder import Encoder
from align.data.tree import Branch
from align.errors import InputError, TrainingFault
from align.models.load import load_encoder
from align.models.scalar.heads import load_scalar, score_notes, score_trees
from align.recipe.schema import Model
from align.scoring.encoded import encoded, limit_of, require_room, trees_of
from align.scoring.scorer import Answer


class RewardModelScorer:
    """Scores answers with a reward model that a reward stage saved.

    Answers of a policy with the reward model's own tokenizer and template (``ids_from`` is that policy's
    ``Encoder.digest``) are scored by their ids, unchanged. Other answers are scored by their text, encoded as the
    training data were. An unfinished answer is scored without an end token. Successive answers to the same prompt share
    its tokens.

    Args:
        ids_from: digest of the encoder that made the answers' ids; None when there are no ids, or they are of another
            tokenizer.
        normalise: return (score - mean) / std, with the statistics on training answers that are saved with the model.
        microbatch_tokens: tokens of one forward pass; affects memory, not scores.

    Raises:
        InputError: it is not a reward model of this package, is damaged, or has another tokenizer or template than in
            its training.
    """

    def __init__(
        self,
        model: Model,
        *,
        ids_from: str | None = None,
        normalise: bool = False,
        microbatch_tokens: int = 2048,
        dtype: Literal["fp32", "bf16"] = "fp32",
        device: torch.device | str = "cpu",
        cache: Path | None = None,
    ) -> None:
        self.name = Path(model.path).name
        self.notes = score_notes(model)
        self.encoder: Encoder = load_encoder(model, cache=cache)
        if self.encoder.digest != self.notes.encoder:
            raise InputError(f"{model.path}: its tokenizer or chat template is not the one that it was trained with")
        self._same_ids = ids_from == self.encoder.digest
        self._model = load_scalar(model, dtype=dtype, device=device, cache=cache)
        self._limit = limit_of(self._model.backbone.config)
        self._normalise, self._microbatch_tokens = normalise, microbatch_tokens

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """The score of each answer, in order. Raises InputError for one that is longer than the model's positions."""
        pairs = (encoded(self.encoder, answer, same_ids=self._same_ids) for answer in answers)
        trees = trees_of(
            (trunk, Branch(branch.ids, np.arange(len(branch.ids)) == len(branch.ids) - 1)) for trunk, branch in pairs
        )
        require_room(self.name, max((tree.longest_path for tree in trees), default=0), self._limit)
        settings = {"microbatch_tokens": self._microbatch_tokens, "pad_id": self.encoder.pad_id}
        scores = [
            score for tree in score_trees(self._model, trees, layout=self.notes.layout, **settings) for score in tree
        ]
        if not all(map(math.isfinite, scores)):
            raise TrainingFault(
                f"{self.name}: a score is not finite", hint="the reward model is broken; train it with a lower rate"
            )
        return [self.notes.stats.normalise(score) for score in scores] if self._normalise else scores
