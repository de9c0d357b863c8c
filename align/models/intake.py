"""Comparing a checkpoint with the model loaded from it, so that missing, left-over or damaged tensors do not go
unnoticed."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from align.errors import InputError, Problem
from align.models.compute.forward import attention_for
from align.models.files.folder import ModelFolder, tensor_shapes
from align.models.placement import WHOLE

_log = logging.getLogger("align")
_told: set[str] = set()

LEFT_OUT = "left_out_of_checkpoint"
"""Attribute of a model with a line about tensors of its checkpoint that the model does not use, if there are any."""

_COMPUTED = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids|embed_positions)$"
)
"""Buffers that older versions of transformers saved and newer ones compute."""


def attention_of(config: Any, *, backbone: bool = False) -> str:
    """The attention to load a model of this ``config`` with: ``sdpa``, or ``eager`` if transformers' class has no
    other."""
    mapping: Any = MODEL_MAPPING if backbone else MODEL_FOR_CAUSAL_LM_MAPPING
    known = mapping[type(config)]
    classes = known if isinstance(known, (tuple, list)) else (known,)
    return attention_for(classes[0], config)


def take_in(lm: PreTrainedModel, folder: ModelFolder, unexpected: Collection[str]) -> None:
    """Check a model that was just loaded.

    Tensors of the checkpoint that the model does not use are noted on it (``LEFT_OUT``) and reported once. If the
    configuration says that the LM head is the embedding but the checkpoint has a different head, the configuration is
    corrected.

    Raises:
        InputError: a weight is not a finite number; it is named.
    """
    require_finite(lm, str(folder.path))
    if keep_heads_apart(lm):
        _say(
            f"{folder.path}: config.json says that the LM head is the embedding, and the weights hold another head;"
            " they are right, and what is saved says tie_word_embeddings: false"
        )
    if line := _left_out(lm, folder, unexpected):
        setattr(lm, LEFT_OUT, line)
        _say(f"{folder.path}: {line}")


def require_finite(lm: torch.nn.Module, file: str) -> None:
    """Raises :class:`InputError` for the first weight that is not a finite number."""
    for name, parameter in WHOLE.full_parameters(lm):
        # The sum is not finite if any element is not, and needs a single pass; the elements are counted only then.
        if (
            parameter.is_floating_point()
            and parameter.numel()
            and not math.isfinite(float(parameter.sum(dtype=torch.float32)))
        ):
            wrong = int((~torch.isfinite(parameter)).sum())
            if wrong:
                problem = f"{wrong:,} of {parameter.numel():,} numbers of {name} are NaN or infinite"
                raise InputError(
                    Problem(
                        problem, file=file, hint="the file is damaged, or its training diverged; use another checkpoint"
                    )
                )


def keep_heads_apart(lm: PreTrainedModel) -> bool:
    """Correct a model's configuration if it says that the LM head is the embedding and it is not; returns whether it
    was corrected."""
    head: Any = lm.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding: Any = lm.get_input_embeddings()
    says = [part for part in (lm.config, lm.config.get_text_config()) if getattr(part, "tie_word_embeddings", False)]
    weights = [getattr(module, "weight", None) for module in (head, embedding)]
    if not says or weights[0] is None or weights[1] is None or weights[0] is weights[1]:
        return False
    if weights[0].shape == weights[1].shape and weights[0].data_ptr() == weights[1].data_ptr():
        return False
    for part in says:
        part.tie_word_embeddings = False
    return True


def _left_out(lm: PreTrainedModel, folder: ModelFolder, unexpected: Collection[str]) -> str | None:
    shapes = {name: shape for path in folder.weights for name, shape in tensor_shapes(path).items()}
    ignored = [re.compile(pattern) for pattern in getattr(lm, "_keys_to_ignore_on_load_unexpected", None) or ()]
    here = WHOLE.full_state(lm).keys()
    names = {name for name in shapes if name not in here and any(pattern.search(name) for pattern in ignored)} | set(
        unexpected
    )
    names = {name for name in names if not _COMPUTED.search(name)}
    if not names:
        return None
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(_part(name), []).append(name)
    parts = []
    for part, members in groups.items():
        numbers = sum(math.prod(shapes.get(name, ())) for name in members if name in shapes)
        parts.append(f"{part} ({len(members)} tensor{'s' * (len(members) > 1)}, {numbers:,} parameters)")
    shown = ", ".join(parts[:4]) + (f" and {len(parts) - 4} more parts" if len(parts) > 4 else "")
    return f"{type(lm).__name__} does not use {shown}: these are neither trained nor saved"


def _part(name: str) -> str:
    """The part of a model that a tensor belongs to: the first two names of its path, and the number of a layer."""
    path = name.split(".")[:-1]
    number = next((place for place, piece in enumerate(path) if piece.isdigit()), len(path))
    if number < len(path) and path[:number][-1:] == ["layers"] and number <= 2:
        return ".".join(path[: number + 1])  # all tensors of a layer that is left out count as one part
    return ".".join(path[: min(number, 2)]) or name


def _say(line: str) -> None:
    """Print the line once in a process, however often the model is loaded."""
    if line not in _told:
        _told.add(line)
        _log.warning("note: %s", line)
