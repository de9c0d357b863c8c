"""Whether a folder is something that a reward stage can start from: a language model, a reward model of this package,
or a sequence classifier with one label. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from align.errors import InputError, Problem
from align.models.files.folder import ModelFolder, tensor_shapes

SCORE = "score.weight"
"""The head of transformers' classifiers that are a decoder with one linear layer."""


def is_classifier(folder: ModelFolder) -> bool:
    """Does the configuration name a sequence classifier?"""
    return any(str(name).endswith("ForSequenceClassification") for name in folder.config.get("architectures") or ())


def require_start(folder: ModelFolder, grades: Mapping[str, float]) -> None:
    """Raises :class:`InputError` for a reward model or classifier whose head cannot be kept by a stage that learns
    ``grades`` (empty: a stage that learns to rank)."""
    if folder.is_reward_model:
        learned = folder.notes.get("grades") or {}
        if list(learned) != list(grades):
            message = (
                f"a reward model that learned {_listed(learned)}, and the stage learns {_listed(grades)}: its head"
                " cannot be kept"
            )
            raise InputError(
                Problem(
                    message,
                    file=str(folder.path),
                    hint="start from the policy, or learn the same grades in their order",
                )
            )
    elif is_classifier(folder):
        outputs = _head(folder)
        if outputs != 1:
            raise InputError(
                Problem(
                    f"gives {outputs} numbers; a reward model that another starts from gives one", file=str(folder.path)
                )
            )
        if grades:
            message = f"a classifier with one label, and the stage learns {_listed(grades)}: its head cannot be kept"
            raise InputError(Problem(message, file=str(folder.path), hint="start from a language model"))


def _head(folder: ModelFolder) -> int:
    """The number of outputs of the head. Raises InputError unless it is one linear layer without bias called
    ``score``."""
    shapes = {name: shape for path in folder.weights for name, shape in tensor_shapes(path).items()}
    others = sorted(name for name in shapes if name.startswith("score.") and name != SCORE)
    if SCORE not in shapes or others:
        difference = f"it has {', '.join(others)}" if others else f"it has no {SCORE}"
        message = (
            f"a classifier with another head than one linear layer without bias ({difference}), which cannot be kept"
        )
        raise InputError(Problem(message, file=str(folder.path), hint="start from a language model"))
    return shapes[SCORE][0]


def _listed(grades: Mapping[str, float]) -> str:
    return f"the grades {', '.join(grades)}" if grades else "to rank"
