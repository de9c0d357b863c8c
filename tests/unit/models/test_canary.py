"""The check at the start of every training stage: our log-probs are the model's own, or nothing is trained."""

from __future__ import annotations

import pytest
import torch

from align.errors import InputError
from align.models import canary
from align.models.canary import require_own_logprobs
from tests.support.tiny import FAMILIES, tiny

IDS = [5, 9, 7, 22, 31, 40, 3, 8, 60, 12, 77, 6]


@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
@pytest.mark.parametrize("family", [*FAMILIES, "granite", "cohere"])
def test_served_models_pass(family: str, layout: str) -> None:
    """And the model's mode is what it was."""
    model = tiny(family).train()
    require_own_logprobs(model, IDS, layout)  # type: ignore[arg-type]
    assert model.training


def test_logits_that_are_scaled_otherwise_are_found() -> None:
    """HyperCLOVAX multiplies by `logits_scaling`, Granite divides; a Llama that does neither but says so must be
    refused."""
    model = tiny("llama")
    model.config.logits_scaling = 3.0
    with pytest.raises(InputError, match="differ from the model's own"):
        require_own_logprobs(model, IDS, "tree")


def test_a_leak_between_trees_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that lets a branch see its sibling."""
    monkeypatch.setattr("align.models.compute.attention._pieces", lambda span: [(span.end - span.start, ())])
    with pytest.raises(InputError, match="layout: padded"):
        require_own_logprobs(tiny("llama"), IDS, "tree")


def test_rounding_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 weights differ a little between the two roads, and pass; without room for rounding they would not."""
    model = tiny("llama").to(torch.bfloat16)
    require_own_logprobs(model, IDS, "tree")
    monkeypatch.setitem(canary._TOLERANCE, torch.bfloat16, 0.0)
    with pytest.raises(InputError, match="differ from the model's own"):
        require_own_logprobs(model, IDS, "tree")
