"""Can a stage's model be given its first rows: does the chat template take them, and are they short enough?

Said with the encoder and the lengths that the stage itself will use, before any stage runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from align.pipeline.folder import RunFolder
from align.planning.starting_model import origin_of
from align.recipe.load import LoadedRecipe
from align.recipe.schema import Stage

if TYPE_CHECKING:
    from align.data.chat.encoder import Encoder
    from align.data.records import Record

Fits = Callable[["Record"], None]
"""Raises InputError for a record that the chat template refuses, and Unusable for one that the stage will leave out."""


class Encoders:
    """The encoder of each stage's model, loaded once for each model."""

    def __init__(self, loaded: LoadedRecipe, run: RunFolder) -> None:
        self._loaded, self._run = loaded, run
        self._known: dict[str, Encoder] = {}

    def of(self, name: str) -> Encoder | None:
        """The encoder that stage ``name`` reads its data with; None where its model is not on this machine yet.

        Raises :class:`AlignError` as :func:`align.models.load.load_encoder`.
        """
        model = origin_of(self._loaded, name, self._run).local
        if model is None:
            return None
        key = model.model_dump_json()
        if key not in self._known:
            from align.models.load import load_encoder

            self._known[key] = load_encoder(
                model, cache=self._run.cache if (self._run.cache / "gguf").is_dir() else None
            )
        return self._known[key]


def fitting(spec: Stage, key: str, encoder: Encoder) -> Fits | None:
    """What a record of the source at ``key`` has to pass; None where the stage says no limits of it."""
    from align.data.records import Conversation
    from align.data.trees.build import Limits, Unusable, tree_of

    rows = spec.row_limits(key)
    if rows is None:
        return None
    limits, room = Limits(rows.max_length, rows.too_long, rows.train_on), rows.room
    part = key.partition(".")[0]

    def fits(record: Record) -> None:
        if (
            part == "data"
            and room
            and isinstance(record, Conversation)
            and not record.messages[-1].get("content", "").strip()
        ):
            raise Unusable("the answer has no text")  # as the stage leaves it out, before it is encoded
        tree = tree_of(record, encoder, limits, lambda note: None)
        if len(tree.trunk) + room > limits.max_length:
            raise Unusable(f"leaves no room for an answer of {room:,} tokens")

    return fits
