"""Loading what a reward stage starts from: a language model, which gets a new head, or a reward model, whose head is
kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from align.models.files.folder import ModelFolder, read_folder, tensor_shapes
from align.models.files.identity import is_gguf
from align.models.files.starts import SCORE, is_classifier, require_start
from align.models.load import load_backbone, load_policy, locate, readable
from align.models.scalar.heads import ScalarModel, load_scalar, with_head
from align.recipe.schema import Model


def load_start(model: Model, *, grades: Mapping[str, float], **loading: Any) -> PreTrainedModel | ScalarModel:
    """Load the language model at ``model.path``, or the reward model with its head: one of this package, or a
    transformers classifier with one label whose head is one linear layer without bias.

    Args:
        grades: the grades that the stage learns, with their weights; empty if it learns to rank.
        loading: as for :func:`~align.models.load.load_policy`.

    Raises:
        InputError: as load_policy; or the head is of another kind and cannot be kept.
        EnvironmentFault: as load_policy.
    """
    location = locate(model)
    if is_gguf(location):
        return load_policy(model, **loading)
    folder = read_folder(location, None)
    require_start(folder, grades)
    if folder.is_reward_model:
        start = load_scalar(model, grades=True, **loading)
        start.grades = dict(grades)  # the same grades, with the stage's weights
        return start
    if is_classifier(folder):
        return with_head(ScalarModel(load_backbone(model, **loading)), _head(folder)).eval()
    return load_policy(model, **loading)


def _head(folder: ModelFolder) -> Tensor:
    """A classifier's head [1, d], in the type it is stored in."""
    path = next(path for path in folder.weights if SCORE in tensor_shapes(path))
    with readable(path), safe_open(path, framework="pt") as opened:
        weight: Tensor = opened.get_tensor(SCORE)
    return weight
