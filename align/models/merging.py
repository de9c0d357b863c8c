"""Merging adapters into their base with PEFT, and checking that the merged model computes the same.

Each layer is merged in fp32 and rounded to the base's dtype once. A merged copy is used only after its logits were
compared with those of the model with adapters.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.errors import InputError
from align.models.adapters import is_lora, is_lora_layer, lora_layers, unwrap
from align.models.compute.forward import causal_lm, own_attention_name
from align.models.generate import embedding_rows
from align.models.intake import keep_heads_apart
from align.models.placement import WHOLE

_ROUNDINGS = 64
"""Largest relative difference between the logits of a merged model and those of the model with adapters, in units of
the dtype's rounding. Measured on models of 2 to 30 layers: at most 10, in fp32 and in bf16. Leaving an adapter out
changes an fp32 model by far more."""
_ORDINARY_IDS = 20_000
"""The check uses ids below this: vocabularies begin with ordinary tokens, and tokens that stand for images come
later."""


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """The weight of a PEFT layer with all its active adapters merged in, fp32, in the shape of the base's weight. The
    layer itself is not changed.

    Raises:
        InputError: an adapter holds numbers that are not finite.
    """
    base = layer.get_base_layer()
    if not base.weight.is_floating_point():  # 4-bit weights cannot hold the sum, so they are dequantised first
        from peft.utils.integrations import dequantize_module_weight

        weight: Tensor = dequantize_module_weight(base).float()
        for name in layer.active_adapters:
            if name in layer.lora_A:
                weight = weight + layer.get_delta_weight(name).float()
        return weight
    twin = WHOLE.whole_copy(layer)
    _merge(twin)
    merged: Tensor = twin.get_base_layer().weight.detach()
    return merged


def _merge(layer: Any, dtype: torch.dtype = torch.float32) -> None:
    """Merge a layer's active adapters in fp32; afterwards its parameters have ``dtype``."""
    base = layer.get_base_layer()
    own = [
        p
        for name in ("weight", "bias")
        if isinstance(p := getattr(base, name, None), nn.Parameter) and p.is_floating_point()
    ]
    for parameter in own:
        parameter.data = parameter.data.float()
    try:
        layer.merge(safe_merge=True, adapter_names=list(layer.active_adapters))
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the adapter cannot be merged: {str(error).splitlines()[0][:200]}") from error
    for parameter in own:
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def merged_copy(model: nn.Module) -> PreTrainedModel:
    """A copy of ``model`` with its active adapters merged in, after checking that it has the same logits; ``model``
    itself is not changed.

    Merged in fp32, then stored in the dtype of the base: exact to about 1e-5 in the logits of an fp32 model, to
    rounding in bf16. All parameters of the copy require gradients.

    Raises:
        ValueError: the base is kept in 4 bits, which cannot hold the sum.
        InputError: the merged model's logits are not the adapters', or an adapter holds numbers that are not finite.
    """
    wrapped: Any = unwrap(model)
    if not is_lora(wrapped):
        raise TypeError(f"expected a model with adapters, got {type(wrapped).__name__}")
    twin = WHOLE.whole_copy(wrapped)
    outer: Any = causal_lm(twin).get_output_embeddings()  # type: ignore[no-untyped-call]
    head = outer.get_base_layer() if outer is not None and is_lora_layer(outer) else None
    for layer in lora_layers(twin).values():
        weight = layer.get_base_layer().weight
        if not weight.is_floating_point():
            raise ValueError("the base is quantised: load the saved adapter on the full model and merge it there")
        if isinstance(layer.get_base_layer(), nn.Embedding) or layer.get_base_layer() is head:
            # A tied weight gets a copy, so that merging into one module does not change the other
            layer.get_base_layer().weight = nn.Parameter(weight.data.clone())
        _merge(layer, weight.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="All adapters are already merged|Already following adapters were merged"
        )
        # Each has its own weight, as intended
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        # Modules that are not LoRA layers, such as embeddings with single trained rows
        plain: PreTrainedModel = twin.merge_and_unload(safe_merge=True)
    keep_heads_apart(plain)
    require_same(wrapped, plain)
    return plain.requires_grad_(True)


@torch.no_grad()
def require_same(model: nn.Module, merged: nn.Module) -> float:
    """Compare the outputs of a merged model on a few tokens with those of the model with adapters; returns the
    difference in units of rounding.

    Logits are compared, or hidden states where there is no LM head: the root mean square of the differences, over that
    of the values.

    Raises:
        InputError: they differ by more than rounding.
    """
    rows = _trained_rows(model)
    one, other = _computed(model, rows), _computed(merged, rows)
    centred = one - one.mean(-1, keepdim=True)
    roundings = float((one - other).square().mean().sqrt() / centred.square().mean().sqrt().clamp(min=1e-30))
    roundings /= torch.finfo(causal_lm(unwrap(merged)).dtype).eps
    if not roundings <= _ROUNDINGS:
        raise InputError(
            f"the merged model is another one than its adapter: they differ by {roundings:.3g} roundings, {_ROUNDINGS}"
            " would be explained",
            hint="merge the adapter into its base with the tool that made it, and name the merged model",
        )
    return roundings


@torch.no_grad()
def _computed(model: nn.Module, rows: list[int]) -> Tensor:
    """Logits, or the last hidden states, of a few fixed tokens and of ``rows``, fp32 [2, n, V or H]."""
    outer = unwrap(model)
    lm: Any = causal_lm(outer)
    training, attention = outer.training, lm.config._attn_implementation
    outer.eval()
    lm.set_attn_implementation(own_attention_name(lm))
    try:
        fixed = torch.arange(24).mul(7919).add(13).remainder(min(embedding_rows(lm), _ORDINARY_IDS)).reshape(2, 12)
        ids = torch.cat([torch.tensor([rows, rows], dtype=fixed.dtype), fixed], dim=1).to(lm.device)
        output: Any = lm(ids, use_cache=False)
    finally:
        if attention is not None:
            lm.set_attn_implementation(attention)
        outer.train(training)
    values: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return values.float()


def _trained_rows(model: nn.Module) -> list[int]:
    """Up to 24 token ids whose embedding rows were trained by themselves. Only these tokens show whether such rows were
    merged."""
    wrapped: Any = unwrap(model)
    if not is_lora(wrapped):
        return []
    ids: list[int] = []
    for config in wrapped.peft_config.values():
        rows = config.trainable_token_indices or []
        ids += [row for part in (rows.values() if isinstance(rows, dict) else [rows]) for row in part]
    return sorted(set(ids))[:24]
