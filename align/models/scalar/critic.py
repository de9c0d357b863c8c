"""A policy and its value model. With adapters the value model is one more adapter, and a head, on the policy's own
base.

The base is then in memory once for policy, reference (the policy with its adapter off) and value model. Without
adapters the value model is a separate model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from align.batching.tree import Layout
from align.data.chat.encoder import Encoder
from align.models import adapters
from align.models.adapters import START, VALUE, is_lora, is_lora_layer, trainable_parameters, unwrap
from align.models.compute.forward import causal_lm, transformer_of
from align.models.merging import merged_copy
from align.models.placement import WHOLE
from align.models.scalar.heads import ScalarModel, ScoreStats, save_scalar
from align.recipe.schema import Lora, Model

if TYPE_CHECKING:
    from peft import PeftModel

Part = Literal["policy", "value"]


class ActorCritic(nn.Module):
    """A policy and, if there is one, its value model. Made by :func:`actor_critic`.

    When both share a base, :meth:`use` switches between their adapters. It is not a context manager because gradient
    checkpointing runs layers again in the backward pass, which needs the same adapters as the forward pass.
    """

    def __init__(self, policy: nn.Module, value: ScalarModel | None, *, on_start: bool = False) -> None:
        super().__init__()
        self.policy, self.value = policy, value
        self.shared = value is not None and value.backbone is policy
        """Do both share one base?"""
        self._on_start = on_start
        self._active: dict[str, tuple[str, ...]] = {}
        if self.shared:
            self._active = {
                "policy": adapters.active_adapters(policy),
                "value": (START, VALUE) if on_start else (VALUE,),
            }

    def use(self, part: Part) -> None:
        """Activate the adapters of ``part`` on the shared base; does nothing when there are two models."""
        if self._active:
            adapters.activate(self.policy, self._active[part])

    def trainable(self) -> dict[str, dict[str, nn.Parameter]]:
        """The trained parameters, separately for ``policy`` and ``value``, by their names in this module."""
        parts: dict[str, dict[str, nn.Parameter]] = {"policy": {}}
        for name, parameter in trainable_parameters(self).items():
            of_value = name.startswith("value.") or f".{VALUE}." in name
            parts.setdefault("value" if of_value else "policy", {})[name] = parameter
        return parts

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """Switch gradient checkpointing on in both, as the method of transformers' models does."""
        causal_lm(self.policy).gradient_checkpointing_enable(**settings)
        if self.value is not None and not self.shared:
            causal_lm(self.value.backbone).gradient_checkpointing_enable(**settings)

    def save_value(
        self, encoder: Encoder, out: Path, *, base: Model, scores: ScoreStats, layout: Layout, writes: bool = True
    ) -> dict[str, Any]:
        """Write the value model into ``out`` in the form of a reward model, as which it can be loaded. Returns what
        :func:`~align.models.scalar.heads.save_scalar` returns.

        ``scores`` are the statistics of the values that it was trained on.
        """
        if self.value is None:
            raise ValueError("there is no value model")
        settings: dict[str, Any] = {"base": base, "scores": scores, "layout": layout, "writes": writes}
        if not self.shared:
            return save_scalar(self.value, encoder, out, **settings)
        with adapters.value_in_front(self.policy, on_start=self._on_start), _transformer_alone(self.policy):
            return save_scalar(self.value, encoder, out, **settings)


@contextmanager
def _transformer_alone(policy: nn.Module) -> Iterator[None]:
    """Inside, the adapter wrapper is around the transformer without its LM head, as in a reward model."""
    wrapper: Any = unwrap(policy)
    lm = wrapper.base_model.model
    transformer = transformer_of(lm)
    transformer.name_or_path = lm.name_or_path
    wrapper.base_model.model = transformer
    try:
        yield
    finally:
        wrapper.base_model.model = lm


def actor_critic(policy: nn.Module, start: ScalarModel | None, lora: Lora | None) -> ActorCritic:
    """Give ``policy`` (ready to train) a value model to train.

    Args:
        start: the reward model or earlier value model that the value model starts from; it is taken over, not copied.
            None: the policy itself, with a head that outputs 0.
        lora: the recipe's adapter settings, also used for the value model.

    If ``start`` is a single adapter on exactly the policy's base, it is moved onto the policy. Otherwise it stays a
    separate model.
    """
    if start is None:
        return _from_policy(policy, lora)
    backbone: Any = start.backbone
    start.requires_grad_(False)
    start.head.requires_grad_(True)
    if lora is None:
        start.backbone = merged_copy(backbone) if is_lora(backbone) else backbone.requires_grad_(True)
    elif _fits(policy, backbone):
        _move_adapter(backbone, policy)
        start.backbone = policy
    else:
        start.backbone = adapters.add_lora(backbone, lora)
    return ActorCritic(policy, start)


def _from_policy(policy: nn.Module, lora: Lora | None) -> ActorCritic:
    if lora is None:
        lm: Any = causal_lm(policy)
        backbone = copy.deepcopy(transformer_of(lm))
        backbone.name_or_path = lm.name_or_path
        return ActorCritic(policy, _silent(ScalarModel(backbone)))
    peft = _peft(policy)
    adapters.add_value_adapter(peft, adapters.lora_config(peft, lora))
    return ActorCritic(policy, _silent(ScalarModel(policy)), on_start=START in peft.peft_config)


def _silent(value: ScalarModel) -> ScalarModel:
    """Set the head to output 0, since nothing is known of the rewards yet."""
    nn.init.zeros_(value.head.weight)
    return value


def _peft(model: nn.Module) -> PeftModel:
    peft: Any = unwrap(model)
    assert is_lora(peft), "a model that is trained with adapters has some"
    return peft


# Moving an adapter from one copy of a base to another


def _fits(policy: nn.Module, other: nn.Module) -> bool:
    """Is ``other`` a single plain adapter on the same base weights as the policy's?"""
    peft: Any = unwrap(other)
    if not is_lora(peft) or list(peft.peft_config) != [START]:
        return False
    ours, theirs = _base_weights(policy), _base_weights(other)
    return ours.keys() == theirs.keys() and all(_equal(ours[name], theirs[name]) for name in ours)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The transformer's weights, without adapters and head."""
    lm: Any = causal_lm(unwrap(model))
    weights = WHOLE.full_parameters(transformer_of(lm))
    return {
        name.replace(".base_layer.", "."): p
        for name, p in weights
        if not any(part.startswith("lora_") for part in name.split("."))
    }


def _layers(model: nn.Module) -> Mapping[str, Any]:
    lm: Any = causal_lm(unwrap(model))
    return {name: module for name, module in transformer_of(lm).named_modules() if is_lora_layer(module)}


@torch.no_grad()
def _move_adapter(source: nn.Module, policy: nn.Module) -> None:
    """Move the adapter ``START`` of ``source`` to the policy, as its ``VALUE``."""
    config = copy.deepcopy(_peft(source).peft_config[START])
    config.lora_dropout, config.inference_mode = 0.0, False
    adapters.add_value_adapter(_peft(policy), config)
    ours = _layers(policy)
    for name, layer in _layers(source).items():
        ours[name].lora_A[VALUE].weight.copy_(layer.lora_A[START].weight)
        ours[name].lora_B[VALUE].weight.copy_(layer.lora_B[START].weight)
