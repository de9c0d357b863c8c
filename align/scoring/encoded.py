"""Encoding an answer as tokens of the model that scores it: the sampled ids, or the text encoded by that model's
encoder."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import numpy as np

from align.data.chat.encoder import Encoder
from align.data.records import Message
from align.data.tree import Branch, Ids, Tree
from align.errors import InputError
from align.models.files.positions import positions
from align.scoring.scorer import Answer


def encoded(encoder: Encoder, answer: Answer, *, same_ids: bool) -> tuple[Ids, Branch]:
    """Prompt and answer, up to the last token that a policy would have to generate: the end token, unless the answer
    was cut off.

    An empty answer consists of its end token. ``same_ids`` says that the answer's ids were made by this encoder, and
    are used unchanged.
    """
    if same_ids and answer.prompt_ids and answer.ids:
        return np.array(answer.prompt_ids, dtype=np.int32), _whole(answer.ids)
    empty = not answer.text.strip()
    message: Message = {"role": "assistant", "content": "." if empty else answer.text}  # templates refuse empty ones
    trunk, (branch,) = encoder.encode_answers(answer.prompt, [[message]])
    last = int(np.flatnonzero(branch.mask)[-1])
    start = last if empty else 0
    end = last + 1 if answer.finished or empty else last
    return trunk, Branch(branch.ids[start:end], branch.mask[start:end])


def _whole(ids: Iterable[int]) -> Branch:
    array = np.array(list(ids), dtype=np.int32)
    return Branch(array, np.ones(len(array), dtype=np.bool_))


def trees_of(pairs: Iterable[tuple[Ids, Branch]]) -> list[Tree]:
    """Trees of the answers; successive answers to the same prompt share a tree."""
    return [
        Tree("", np.frombuffer(trunk, dtype=np.int32), tuple(branch for _, branch in group))
        for trunk, group in groupby(pairs, key=lambda pair: pair[0].tobytes())
    ]


def limit_of(config: Any) -> int | None:
    """The maximum length of a model, from its ``transformers`` configuration; None if that does not say."""
    length = positions(config.to_dict())
    return length.limit if length else None


def require_room(name: str, longest: int, limit: int | None) -> None:
    """Raises InputError when the ``longest`` conversation has more than ``limit`` tokens: a score at positions on which
    the model was not trained means nothing."""
    if limit is not None and longest > limit:
        message = f"the scorer {name} reads {limit:,} of its tokens; an answer with its prompt has {longest:,}"
        raise InputError(
            message, hint="sample shorter answers (max_new_tokens), drop long prompts, or use another reward model"
        )
