"""The plan's memory formula against what autograd really keeps, tensor by tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from align.batching.tree import build
from align.data.tree import Branch, Tree
from align.models.adapters import add_lora
from align.models.compute.forward import batch_logprobs
from align.recipe.schema import Lora, Train
from align.sizing.moments import layer_of, saved_bytes
from align.sizing.shapes import from_config
from tests.support.tiny import tiny

LAYERS, TOKENS = 4, 64


def kept_bytes(model: torch.nn.Module, autocast: bool) -> int:
    """Bytes of all storages that one forward pass saves for its backward pass, parameters and their bf16 copies left
    out."""
    ids = np.arange(3, 3 + TOKENS // 4, dtype=np.int32)
    # Two in a row, as usual: alone, attention saves a copy
    tree = Tree("a", ids, (Branch(ids, np.ones(len(ids), dtype=np.bool_)),))
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        copy = autocast and (
            tuple(tensor.shape) in shapes or tuple(tensor.t().shape if tensor.ndim == 2 else ()) in shapes
        )
        if tensor.untyped_storage().data_ptr() not in owned and not copy:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        batch_logprobs(model, build([tree, tree], [0, 1], layout="tree"))
    return sum(saved.values())


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"dtype": "bf16"}, {"autocast": "bf16"}, {"dtype": "bf16", "autocast": "bf16"}],
    ids=["fp32", "bf16", "autocast", "both"],
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "glm4"])
def test_one_layer_keeps_what_the_formula_says(family: str, settings: dict[str, Any], lora: Lora | None) -> None:
    """Per layer, from models of one and of five layers, so that embeddings and the head cancel."""
    train = Train(**settings)
    measured = {}
    for layers in (1, 1 + LAYERS):
        model: torch.nn.Module = tiny(
            family, num_hidden_layers=layers, hidden_size=96, intermediate_size=160, head_dim=24, vocab_size=300
        )
        shape = from_config(model.config.to_dict())  # type: ignore[operator, union-attr]
        assert shape is not None
        if train.dtype == "bf16":
            model = model.to(torch.bfloat16)
        model = model if lora is None else add_lora(model, lora)  # type: ignore[arg-type]
        measured[layers] = kept_bytes(model.train(), train.autocast is not None)
    per_token = (measured[1 + LAYERS] - measured[1]) / LAYERS / TOKENS
    assert 0.97 * per_token <= layer_of(shape, train, lora).kept <= 1.06 * per_token


def test_checkpointing_keeps_the_inputs_of_the_layers() -> None:
    model = tiny("llama", num_hidden_layers=4, hidden_size=96, intermediate_size=160)
    shape = from_config(model.config.to_dict())
    assert shape is not None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kept = kept_bytes(model.train(), False)
    layer = layer_of(shape, Train(), None).kept
    formula = saved_bytes(shape, Train(gradient_checkpointing=True), None)
    assert formula * TOKENS == 4 * 96 * 4 * TOKENS
    assert formula * TOKENS <= kept <= (formula + 0.3 * layer) * TOKENS
