"""How far what a model computes may be off by rounding alone."""

from __future__ import annotations

from torch import nn

from align.functional.ties import relative_error
from align.models.compute.forward import causal_lm
from align.models.placement import parameters_of


def rounding_error(model: nn.Module, dtype: str) -> float:
    """How far a hidden state of ``model`` may be off, relative to its size
    (:func:`align.functional.ties.relative_error`).

    Args:
        dtype: what it computes in, "fp32" or "bf16".
    """
    lm = causal_lm(model)
    layers = lm.config.get_text_config().num_hidden_layers
    longest = max(parameter.shape[-1] for parameter in parameters_of(lm).values() if parameter.ndim == 2)
    return relative_error(layers, longest, dtype)
