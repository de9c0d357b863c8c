"""One optimiser step of PPO, from sampled ids to the gradient of every parameter, against a second implementation in
float64.

That one knows nothing of trees, packing or flat tokens: it runs transformers' own forward on one prompt with one answer
at a time, and its rewards, advantages and losses are loops over numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from align.data.tree import Branch, Tree
from align.models.adapters import adapter_off
from align.models.compute.forward import causal_lm
from align.models.scalar.critic import ActorCritic
from align.recipe.schema import PpoStage
from align.rollout.engine import Sample
from align.stages.ppo.trainer import PpoTrainer
from tests.support.rollouts import ExactEngine, policy, stage, trainer

BASE: dict[str, Any] = {
    "samples_per_prompt": 2,
    "temperature": 0.7,
    "kl_coefficient": 0.3,
    "sft_data": "unused.jsonl",
    "sft_weight": 0.4,
    "entropy_weight": 0.05,
    "unfinished_penalty": 0.5,
}
CASES: dict[str, dict[str, Any]] = {
    "gae": {"lam": 0.9, "gamma": 0.97},
    "gae whitened": {"whiten_rewards": True, "whiten_advantages": True, "value_clip": None},
    "rloo": {"estimator": "rloo"},
    "group": {"estimator": "group"},
    "reinforce": {"estimator": "reinforce", "importance_cap": 1.02},
}


def noise(token: int) -> float:
    """By how much the engine below is wrong about a token."""
    return 0.1 * math.sin(token)


class Off(ExactEngine):
    """Samples as it should, and gives log-probs that are a little wrong."""

    def _completion(self, ids: list[int], logprobs: list[float]) -> Sample:
        exact = super()._completion(ids, logprobs)
        assert exact.logprobs is not None
        return replace(
            exact, logprobs=tuple(value + noise(token) for value, token in zip(exact.logprobs, exact.ids, strict=True))
        )


def move(models: nn.Module, seed: int, scale: float) -> None:
    """Change what is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in models.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def conversations() -> list[Tree]:
    rng = np.random.default_rng(0)
    mask = np.array([True, False, True, True])
    return [
        Tree(f"c{i}", rng.integers(5, 200, 4, dtype=np.int32), (Branch(rng.integers(5, 200, 4, dtype=np.int32), mask),))
        for i in range(4)
    ]


# The second implementation


@dataclass(frozen=True)
class Said:
    """A prompt with one answer."""

    prompt: int
    tokens: Tensor
    begin: int
    score: float
    baseline: float

    def answer(self) -> list[int]:
        return self.tokens[self.begin :].tolist()  # type: ignore[no-any-return]


def logs(policy: nn.Module, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probs of everything after every token."""
    lm: Any = causal_lm(policy)
    lm.set_attn_implementation("sdpa")
    return (lm(tokens[None], use_cache=False).logits[0] / temperature).log_softmax(-1)


def values(models: ActorCritic, path: Said) -> Tensor:
    """Of the state before each token of the answer."""
    assert models.value is not None
    models.use("value")
    lm: Any = causal_lm(models.value.backbone)
    lm.set_attn_implementation("sdpa")
    states = lm.base_model(path.tokens[None], use_cache=False).last_hidden_state[0]
    models.use("policy")
    return (states @ models.value.head.weight[0])[path.begin - 1 : -1]


def chosen(policy: nn.Module, path: Said, temperature: float) -> Tensor:
    """Log-prob of each token of the answer."""
    everything = logs(policy, path.tokens, temperature)
    return torch.stack([everything[i - 1, path.tokens[i]] for i in range(path.begin, len(path.tokens))])


def whitened(rows: list[list[float]], shift: bool) -> list[list[float]]:
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat) + 1e-8)
    return [[(x - mean) / deviation + (0 if shift else mean) for x in row] for row in rows]


def gae(rewards: list[float], guesses: list[float], gamma: float, lam: float) -> list[float]:
    found, tail, following = [], 0.0, 0.0
    for reward, guess in zip(reversed(rewards), reversed(guesses), strict=True):
        tail = reward + gamma * following - guess + gamma * lam * tail
        following = guess
        found.append(tail)
    return found[::-1]


def of_answers(spec: PpoStage, paths: Sequence[Said], totals: list[float]) -> list[float]:
    found = []
    for path, total in zip(paths, totals, strict=True):
        group = [other for p, other in zip(paths, totals, strict=True) if p.prompt == path.prompt]
        if spec.estimator == "rloo":
            found.append(total - (sum(group) - total) / (len(group) - 1))
        elif spec.estimator == "group":
            found.append((total - float(np.mean(group))) / (float(np.std(group)) + 1e-6))
        else:
            found.append(total - path.baseline)
    return found


def expected_loss(
    spec: PpoStage, start: ActorCritic, frozen: list[Tensor], now: ActorCritic, paths: list[Said], sft: list[Tree]
) -> Tensor:
    """The step's loss; ``start`` sampled, ``frozen`` are log-probs under the reference, ``now`` gets the gradients."""
    t, has_values = spec.temperature, spec.estimator == "gae"
    with torch.no_grad():
        old = [chosen(start.policy, path, t).tolist() for path in paths]
        guesses = [values(start, path).tolist() for path in paths] if has_values else []
    rewards = []
    for path, before, reference in zip(paths, old, frozen, strict=True):
        rewards.append([-spec.kl_coefficient * (o - r) for o, r in zip(before, reference.tolist(), strict=True)])
        rewards[-1][-1] += path.score - (path.baseline if has_values else 0.0)
    if spec.whiten_rewards:
        rewards = whitened(rewards, shift=False)
    if has_values:
        advantages = [gae(reward, guess, spec.gamma, spec.lam) for reward, guess in zip(rewards, guesses, strict=True)]
    else:
        totals = of_answers(spec, paths, [sum(row) for row in rewards])
        advantages = [[total] * len(row) for total, row in zip(totals, rewards, strict=True)]
    targets = [[a + v for a, v in zip(*pair, strict=True)] for pair in zip(advantages, guesses, strict=False)]
    if spec.whiten_advantages:
        advantages = whitened(advantages, shift=True)
    losses: list[Tensor] = []
    entropies: list[Tensor] = []
    for path, before, worth in zip(paths, old, advantages, strict=True):
        everything = logs(now.policy, path.tokens, t)[path.begin - 1 : -1]
        entropies += [-(row.exp() * row).sum() for row in everything]
        for row, token, o, a in zip(everything, path.answer(), before, worth, strict=True):
            ratio = (row[token] - o).exp()
            term = torch.minimum(ratio * a, ratio.clamp(1 - spec.clip, 1 + spec.clip) * a)
            losses.append(
                -term * (1.0 if spec.importance_cap is None else min(math.exp(-noise(token)), spec.importance_cap))
            )
    nll = []
    for tree in sft:
        tokens, begin = torch.tensor([*tree.trunk.tolist(), *tree.branches[0].ids.tolist()]), len(tree.trunk)
        everything = logs(now.policy, tokens, 1.0)
        nll += [-everything[begin + i - 1, tokens[begin + i]] for i in np.flatnonzero(tree.branches[0].mask).tolist()]
    loss = (
        torch.stack(losses).mean()
        - spec.entropy_weight * torch.stack(entropies).mean()
        + spec.sft_weight * torch.stack(nll).mean()
    )
    if not has_values:
        return loss
    errors = []
    for path, guess, target in zip(paths, guesses, targets, strict=True):
        for v, o, r in zip(values(now, path), guess, target, strict=True):
            error = (v - r) ** 2
            if spec.value_clip is not None:
                error = torch.maximum(error, (v.clamp(o - spec.value_clip, o + spec.value_clip) - r) ** 2)
            errors.append(error / 2)
    return loss + torch.stack(errors).mean()


def paths_of(run: PpoTrainer) -> list[Said]:
    """What was sampled for the first iteration, as the scorer saw it, with the score written down here."""
    parts = run.parts
    numbers = [number for number in parts.plan.examples(0).tolist() for _ in range(run.spec.samples_per_prompt)]
    found = []
    for number, answer in zip(numbers, parts.rollouts.scorer.seen, strict=True):  # type: ignore[attr-defined]
        assert answer.prompt_ids == parts.prompts[number].ids
        score = 1.0 - 0.1 * len(answer.ids) - (0.0 if answer.finished else run.spec.unfinished_penalty)
        baseline = 0.0 if parts.baselines is None else float(parts.baselines[number])
        found.append(
            Said(number, torch.tensor([*answer.prompt_ids, *answer.ids]), len(answer.prompt_ids), score, baseline)
        )
    return found


@pytest.mark.parametrize(
    ("case", "layout", "lora"),
    [
        *((case, "tree", None) for case in CASES),
        ("gae", "packed", None),
        ("gae", "padded", None),
        ("gae", "tree", {"rank": 3}),
    ],
)
def test_step_equals_the_second_implementation(tmp_path: Path, case: str, layout: str, lora: Any) -> None:
    """Loss and all gradients of a step cut into many micro-batches, with a policy and a
    value model that have moved since they sampled, so that the clips are at work, and an SFT term over its own tokens;
    on one base with adapters as well."""
    spec = stage(train={"layout": layout, "microbatch_tokens": 16}, lora=lora, **BASE, **CASES[case])
    net, sft = policy(spec), conversations()
    run = trainer(tmp_path, spec, net=net, sft=sft, engine=Off(net), proved=False)
    move(run.models, 1, 0.05)  # away from the reference, and values away from 0
    run.model.train()
    start = copy.deepcopy(run.models).double()
    batches = next(iter(run.steps()))
    assert len(batches) > 3
    paths = paths_of(run)
    with torch.no_grad():
        if run.parts.reference is not None:
            frozen = [chosen(copy.deepcopy(run.parts.reference).double(), path, spec.temperature) for path in paths]
        else:
            with adapter_off(start.policy):
                frozen = [chosen(start.policy, path, spec.temperature) for path in paths]
    move(run.models, 2, 0.02)
    now = copy.deepcopy(run.models).double()
    used = [sft[i] for i in run.parts.sft.plan.examples(0).tolist()]  # type: ignore[union-attr]
    expected = expected_loss(spec, start, frozen, now, paths, used)
    expected.backward()

    gradients: dict[str, Tensor] = {}
    run.optimizer.step = lambda: gradients.update(  # type: ignore[method-assign]
        {name: p.grad.clone() for name, p in run.parameters.items() if p.grad is not None}
    )
    metrics = run.optimizer_step(batches)
    assert metrics["loss"] == pytest.approx(float(expected.detach()), abs=1e-5)
    assert 0 < metrics["clip_fraction"] < 1 and abs(run.history[0]["kl"]) > 1e-3, "or the step is too easy"
    assert gradients.keys() == run.parameters.keys()
    exact = dict(now.named_parameters())
    for name, gradient in gradients.items():
        wanted = exact[name].grad
        assert wanted is not None, name
        scale = max(1.0, float(wanted.abs().max()))
        assert_close(gradient.double() / scale, wanted / scale, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
