"""Log-probs with entropy: against full softmaxes in float64, and against the log-prob function that everything else
uses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from align.batching.tree import build
from align.functional.logprobs import token_logprobs, token_logprobs_and_entropy
from align.models.compute.forward import batch_logprobs, batch_logprobs_and_entropy
from tests.support.tiny import random_trees, tiny

N, H, V = 7, 5, 11
PLAIN: dict[str, Any] = {"temperature": 1.0, "logit_scale": 1.0, "logit_softcap": None}
SETTINGS = [PLAIN, PLAIN | {"temperature": 0.7}, {"temperature": 1.3, "logit_scale": 0.5, "logit_softcap": 2.0}]


def exact(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(hidden, weight, bias) * settings["logit_scale"]
    if settings["logit_softcap"] is not None:
        logits = settings["logit_softcap"] * torch.tanh(logits / settings["logit_softcap"])
    logs = (logits / settings["temperature"]).log_softmax(-1)
    return logs[torch.arange(len(targets)), targets], -(logs.exp() * logs).sum(-1)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, N])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_values_and_gradients(settings: dict[str, Any], chunk: int, with_bias: bool) -> None:
    """Entropy is of the same scaled logits as the log-prob. Each target has weights of its own in the sum."""
    rng = torch.Generator().manual_seed(3)
    leaves = [torch.randn(*shape, generator=rng).requires_grad_() for shape in [(N, H), (V, H), (V,)]]
    leaves = leaves if with_bias else leaves[:2]
    targets = torch.randint(V, (N,), generator=rng)
    mix = torch.randn(2, N, generator=rng)
    bias = leaves[2] if with_bias else None
    ours = token_logprobs_and_entropy(leaves[0], leaves[1], targets, bias=bias, chunk_tokens=chunk, **settings)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = exact(doubles[0], doubles[1], doubles[2] if with_bias else None, targets, settings)
    for got, want in zip(ours, wanted, strict=True):
        assert got.dtype == torch.float32
        assert_close(got.double(), want, atol=1e-5, rtol=0)
    got_gradients = torch.autograd.grad((torch.stack(ours) * mix).sum(), leaves)
    want_gradients = torch.autograd.grad((torch.stack(wanted) * mix.double()).sum(), doubles)
    for got, want in zip(got_gradients, want_gradients, strict=True):
        assert want.abs().max() > 0.01
        assert_close(got.double(), want, atol=1e-5, rtol=0)
    plain = token_logprobs(leaves[0], leaves[1], targets, bias=bias, **settings)
    assert_close(ours[0], plain, atol=1e-6, rtol=0)


def test_no_targets_and_no_temperature() -> None:
    empty = token_logprobs_and_entropy(torch.zeros(0, H), torch.zeros(V, H), torch.zeros(0, dtype=torch.long))
    assert [part.shape for part in empty] == [(0,), (0,)]
    with pytest.raises(ValueError, match="temperature must be positive"):
        token_logprobs_and_entropy(
            torch.zeros(1, H), torch.zeros(V, H), torch.zeros(1, dtype=torch.long), temperature=0.0
        )


@pytest.mark.parametrize("family", ["llama", "cohere", "gemma2"])
def test_through_a_model(family: str) -> None:
    """The road through a model, what it does to its logits included."""
    model, trees = tiny(family), random_trees(np.random.default_rng(0), [2, 1, 3])
    batch = build(trees, [0, 1, 2], layout="tree")
    logprobs, entropy = batch_logprobs_and_entropy(model, batch, temperature=0.7)
    assert_close(logprobs, batch_logprobs(model, batch, temperature=0.7), atol=1e-5, rtol=0)
    assert (entropy > 0).all() and (entropy < np.log(97) + 1e-4).all()
