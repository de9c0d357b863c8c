"""Switching dropout off while a model is in use here, and restoring the rates of its configuration when it is saved."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from align.models.compute.forward import causal_lm

_REMEMBERED = "rates_before_align"
"""Attribute of a model that keeps the rates its configuration had, for the configuration itself and for its text
part."""


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0, in the modules and in the configuration.

    With dropout two passes over the same tokens differ: the reference would differ from the policy that it is a copy
    of, and gradients would depend on how a step is split. Adapters have their own rate, set when they are added.
    :func:`input_config` gives the configuration as it was.
    """
    lm = causal_lm(model)
    rates = [
        {name: value for name, value in vars(part).items() if _is_dropout(name, value)} for part in _parts(lm.config)
    ]
    for part, saved in zip(_parts(lm.config), rates, strict=True):
        for name in saved:
            setattr(part, name, 0.0)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_dropout(name, value):
                setattr(module, name, 0.0)
        if isinstance(module, PreTrainedModel) and _REMEMBERED not in vars(module):
            setattr(module, _REMEMBERED, rates)


def input_config(lm: PreTrainedModel) -> PreTrainedConfig:
    """A copy of the model's configuration with the dropout rates that it was loaded with, for saving."""
    config = copy.deepcopy(lm.config)
    rates: Any = vars(lm).get(_REMEMBERED)
    for part, saved in zip(_parts(config), rates or (), strict=False):
        for name, value in saved.items():
            setattr(part, name, value)
    return config


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    text = config.get_text_config()
    if text is not config:
        yield text


def _is_dropout(name: str, value: Any) -> bool:
    return isinstance(value, float) and re.search(r"dropout|_pdrop|drop_rate|layerdrop", name) is not None
