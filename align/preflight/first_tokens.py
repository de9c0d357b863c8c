"""Whether the chat template of a stage's model accepts the first rows, and whether they are short enough.

This is checked before any stage runs, with the encoder and the lengths that the stage will use.
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
    """Loads the encoder of each stage's model, once for each model."""

    def __init__(self, loaded: LoadedRecipe, run: RunFolder) -> None:
        self._loaded, self._run = loaded, run
        self._known: dict[str, Encoder] = {}

    def of(self, name: str) -> Encoder | None:
        """The encoder with which stage ``name`` reads its data; None when its model is not on this machine yet.

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
    """The check of records of the source at ``key``; None when the stage sets no limits for it."""
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
            raise Unusable("the answer has no text")  # the stage leaves it out, too, before it encodes it
        tree = tree_of(record, encoder, limits, lambda note: None)
        if len(tree.trunk) + room > limits.max_length:
            raise Unusable(f"leaves no room for an answer of {room:,} tokens")

    return fits
