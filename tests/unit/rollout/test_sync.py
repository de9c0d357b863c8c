"""From the model in training to an engine: which weights it gets, and how it is proved that it samples from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from align.errors import TrainingFault
from align.models.adapters import add_lora
from align.recipe.schema import Lora
from align.rollout import sync
from align.rollout.engine import Sample, Sampling, WeightSource
from tests.support.rollouts import ExactEngine
from tests.support.tiny import tiny

PROMPTS = [[5, 9, 7, 22], [31, 40], [3, 8, 60, 12, 77, 6]]


def adapted(dropout: float = 0.5) -> nn.Module:
    """A policy with an adapter that has an effect, and dropout in training."""
    torch.manual_seed(4)
    model = add_lora(tiny("llama"), Lora(rank=4, dropout=dropout))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


class Off(ExactEngine):
    """Its log-probs are off by ``by`` at one token of each answer, ``everywhere`` at all."""

    def __init__(self, model: nn.Module, by: float, *, everywhere: bool = False) -> None:
        super().__init__(model, stops=())
        self.by, self.everywhere = by, everywhere
        self.asked: list[tuple[list[list[int]], Sampling]] = []

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Sample]]:
        self.asked.append(([list(prompt) for prompt in prompts], sampling))
        return [
            [replace(one, logprobs=self._off(one.logprobs or ())) for one in answers]
            for answers in super().generate(prompts, sampling)
        ]

    def _off(self, logprobs: Sequence[float]) -> tuple[float, ...]:
        return tuple(value + self.by * (self.everywhere or place == 0) for place, value in enumerate(logprobs))


class Stale(ExactEngine):
    """Forgets what it was given."""

    def load_weights(self, weights: WeightSource) -> None:
        self.pushed.append(weights.version)


def push(engine: ExactEngine, version: int = 3, dtype: str = "fp32") -> sync.Proof:
    return sync.push(engine, engine.model, version=version, canaries=PROMPTS, dtype=dtype)


def test_weights_can_be_taken_more_than_once_each_time_as_they_are_then() -> None:
    """Several engines take them, and one that trains on sends others."""
    model = tiny("llama")
    source = sync.weights_of(model, version=5)
    first, second = dict(source), dict(source)
    assert source.version == 5 and first.keys() == second.keys() == dict(sync.policy_weights(model)).keys()
    kept = {name: tensor.clone() for name, tensor in first.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, kept[name] + 1.0) for name, tensor in source)


def test_an_engine_with_the_weights_is_believed() -> None:
    """On a few tokens of several answers to every canary, drawn from the policy's own distribution."""
    engine = Off(adapted().train(), by=0.0)
    proof = push(engine)
    assert engine.pushed == [3] and proof.version == 3
    ((asked, sampling),) = engine.asked
    assert asked == PROMPTS and sampling.unbiased and sampling.temperature == 1.0
    assert proof.tokens == len(PROMPTS) * sampling.n * sampling.max_new_tokens and sampling.n > 1
    assert proof.mean_difference <= proof.max_difference < 1e-4
    assert engine.model.training, "the policy goes on training"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_log_probs_that_are_off_are_not(dtype: str) -> None:
    """By more than the bound at one token of all, or on average; what is still rounding passes. NaN is not rounding."""
    bound = sync.BOUNDS[dtype]
    inside = push(Off(tiny("llama"), by=0.9 * bound.mean_difference, everywhere=True), dtype=dtype)
    assert inside.mean_difference == pytest.approx(0.9 * bound.mean_difference, rel=0.1)
    assert inside.max_difference == pytest.approx(inside.mean_difference, rel=0.2)
    for by, everywhere in (
        (1.1 * bound.max_difference, False),
        (1.2 * bound.mean_difference, True),
        (-1.2 * bound.mean_difference, True),
    ):
        with pytest.raises(TrainingFault, match="does not sample from the trained weights"):
            push(Off(tiny("llama"), by=by, everywhere=everywhere), dtype=dtype)
    with pytest.raises(TrainingFault, match="nan nats at most"):
        push(Off(tiny("llama"), by=math.nan), dtype=dtype)


def test_weights_of_another_version_are_not() -> None:
    with pytest.raises(TrainingFault, match="sampled from version 0 of the weights, version 3 was pushed"):
        push(Stale(tiny("llama"), stops=()))


def test_an_engine_without_log_probs_proves_nothing() -> None:
    class Silent(ExactEngine):
        def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Sample]]:
            return [[replace(one, logprobs=None) for one in answers] for answers in super().generate(prompts, sampling)]

    with pytest.raises(TrainingFault, match="gives no log-probs"):
        push(Silent(tiny("llama"), stops=()))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("training", [True, False])
def test_log_probs_of_completions(temperature: float, training: bool) -> None:
    """Those that exact sampling has of its own tokens, prompt by prompt, however they are cut into micro-batches;
    without dropout, and the mode stays."""
    model = adapted().train(training)
    sampled = ExactEngine(model, stops=range(30)).generate(
        PROMPTS, Sampling(max_new_tokens=5, n=3, temperature=temperature, seed=1)
    )
    assert len({len(one.ids) for answers in sampled for one in answers}) > 1, "some answers end early"
    wanted = [np.array(one.logprobs) for answers in sampled for one in answers]
    for tokens in (2048, 12):
        found = sync.policy_logprobs(model, PROMPTS, sampled, temperature=temperature, microbatch_tokens=tokens)
        assert [one.shape for one in found] == [one.shape for one in wanted] and {one.dtype for one in found} == {
            np.dtype(np.float32)
        }
        assert all(np.abs(ours - theirs).max() < 1e-5 for ours, theirs in zip(found, wanted, strict=True))
        assert model.training == training


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "glm"])
@pytest.mark.parametrize("adapters", [False, True])
def test_every_tensor_is_sent_under_its_own_name(family: str, adapters: bool) -> None:
    """As the model without adapters calls it, in its type; a tied head as well. Nothing of the adapters' own."""
    plain = tiny(family)
    model = add_lora(tiny(family), Lora(rank=2)) if adapters else plain
    sent = list(sync.policy_weights(model))
    state = plain.state_dict()  # lists a tied head under both of its names
    assert sorted(name for name, _ in sent) == sorted(state)
    for name, tensor in sent:
        assert tensor.dtype == state[name].dtype and not tensor.requires_grad
        torch.testing.assert_close(tensor, state[name], atol=0, rtol=0)  # an adapter in training begins without effect
