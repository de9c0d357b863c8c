"""Can a stage's model be given its first rows: does the chat template take them, and are they short enough?

Said with the encoder and the lengths that the stage itself will use, before any stage runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.pipeline.folder import RunFolder
from align.planning.starting_model import origin_of
from align.recipe import reference_syntax
from align.recipe.kinds.sampling import SamplingStage
from align.recipe.load import LoadedRecipe
from align.recipe.schema import EvaluateStage, Model, PpoStage, SelfContrastStage, SftStage, Stage, TrlStage

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
        model = self._model(name)
        if model is None:
            return None
        key = model.model_dump_json()
        if key not in self._known:
            from align.models.load import load_encoder

            self._known[key] = load_encoder(
                model, cache=self._run.cache if (self._run.cache / "gguf").is_dir() else None
            )
        return self._known[key]

    def _model(self, name: str) -> Model | None:
        spec = self._loaded.recipe.stages[name]
        if isinstance(spec, EvaluateStage):  # its first policy is the baseline, whose tokens are asked
            ref = reference_syntax.parse(spec.policies[0], self._loaded.root)
            if not isinstance(ref, reference_syntax.StageRef):
                location = reference_syntax.resolve(spec.policies[0], self._loaded.root)
                return Model(path=str(location)) if isinstance(location, Path) else None
            name = ref.name
        return origin_of(self._loaded, name, self._run).local


def fitting(spec: Stage, key: str, encoder: Encoder) -> Fits | None:
    """What a record of the source at ``key`` has to pass; None where a stage makes its prompts of more than one row."""
    from align.data.records import Conversation
    from align.data.trees.build import Limits, Unusable, tree_of

    of: Any = spec
    part, room = key.partition(".")[0], 0
    if isinstance(spec, SftStage):
        limits = Limits(spec.max_length, spec.too_long, spec.train_on)
    elif isinstance(spec, PpoStage) and part in ("prompts", "eval_prompts"):
        limits = Limits(spec.max_prompt_length, "drop", "last")
    elif isinstance(spec, PpoStage):
        limits = Limits(spec.max_prompt_length + spec.max_new_tokens, "drop", "all")
    elif isinstance(spec, (SamplingStage, EvaluateStage, SelfContrastStage)):
        if part == "tasks":
            return None
        limits, room = Limits(spec.max_length, "drop", "last"), spec.max_new_tokens
    elif isinstance(spec, TrlStage) and spec.method.rows == "prompts":
        limits, room = Limits(spec.max_length, "drop", "last"), spec.longest_answer or 0
    else:  # preferences, and answers with a label
        limits = Limits(of.max_length, of.too_long, "last")

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
