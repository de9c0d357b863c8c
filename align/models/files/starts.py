"""What the folder of a classifier or reward model says of its outputs: which of them make up a score, and whether a
reward stage can start from it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from align.errors import InputError, Problem
from align.models.files.folder import ModelFolder, tensor_shapes

SCORE = "score.weight"
"""The head of transformers' classifiers that are a decoder with one linear layer."""


def is_classifier(folder: ModelFolder) -> bool:
    """Does the configuration name a sequence classifier?"""
    return any(str(name).endswith("ForSequenceClassification") for name in folder.config.get("architectures") or ())


def output_names(folder: ModelFolder) -> list[str] | None:
    """What a classifier's outputs are called, in order; None where neither its configuration nor its weights say how
    many there are."""
    named = folder.config.get("id2label")
    if isinstance(named, dict) and named:
        return [str(named[key]) for key in sorted(named, key=int)]
    shapes = {name: shape for path in folder.weights for name, shape in tensor_shapes(path).items()}
    count = folder.config.get("num_labels") or (shapes[SCORE][0] if SCORE in shapes else None)
    return None if count is None else [f"LABEL_{number}" for number in range(count)]


def output_weights(names: Sequence[str], grades: Mapping[str, float], file: str) -> list[float]:
    """The weight of each output in the score. Raises :class:`InputError` where several are there and none is chosen,
    and for a name in ``grades`` that is none of them.

    Args:
        names: of the outputs, in their order.
        grades: name -> weight, as a recipe says it; empty for the only output.
        file: the model's, for the error.
    """
    listed = ", ".join(names)
    if not grades and len(names) != 1:
        hint = f"say which of them make up the score, each with its weight, such as `grades: {{{names[0]}: 1}}`"
        raise InputError(Problem(f"gives {len(names)} numbers ({listed}), and none is chosen", file=file, hint=hint))
    if unknown := [name for name in grades if name not in names]:
        raise InputError(Problem(f"has no output {unknown[0]}; it has {listed}", file=file))
    return [grades.get(name, 0.0) for name in names] if grades else [1.0]


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
