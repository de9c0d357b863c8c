"""What a reward model may start from, as its folder says: a language model, a reward model of ours, or a sequence
classifier with one label. Imports no torch."""

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
    """Raises :class:`InputError` for a reward model or classifier whose head a stage that learns ``grades`` (none: to
    rank) cannot keep."""
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
    """How many numbers the head gives. Raises InputError for one that is no linear layer without bias, of that name."""
    shapes = {name: shape for path in folder.weights for name, shape in tensor_shapes(path).items()}
    others = sorted(name for name in shapes if name.startswith("score.") and name != SCORE)
    if SCORE not in shapes or others:
        found = f"it has {', '.join(others)}" if others else f"it has no {SCORE}"
        message = f"a classifier with another head than one linear layer without bias ({found}), which cannot be kept"
        raise InputError(Problem(message, file=str(folder.path), hint="start from a language model"))
    return shapes[SCORE][0]


def _listed(grades: Mapping[str, float]) -> str:
    return f"the grades {', '.join(grades)}" if grades else "to rank"
