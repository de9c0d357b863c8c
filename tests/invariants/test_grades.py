"""A reward model that learns grades: its loss and gradients against the formula in fp64, in every layout, and what is
kept of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.data.tree import Tree
from align.functional.losses import squared_errors
from align.models.load import without_lm_head
from align.models.scalar.heads import ScalarModel
from align.recipe.schema import RewardStage
from align.stages.reward.regression import GradesTrainer
from tests.invariants.test_dpo import preferences
from tests.invariants.test_reward import first_step
from tests.support.tiny import tiny
from tests.support.trainers import arguments, loaders

WEIGHTS = {"help": 0.65, "true": 0.8, "long": -0.4}
NAN = math.nan


def graded(n: int, seed: int = 5) -> list[Tree]:
    """Prompts with one answer each; a third of the grades are missing, never all of an answer."""
    rng = np.random.default_rng(seed)
    made = []
    for tree in preferences(n, seed):
        grades = rng.uniform(0, 4, len(WEIGHTS))
        grades[rng.permutation(len(WEIGHTS))[: rng.integers(0, len(WEIGHTS))]] = NAN
        made.append(replace(tree, branches=(replace(tree.branches[0], grades=tuple(grades.tolist())),)))
    return made


def stage(weights: dict[str, float] | None = None, **train: Any) -> RewardStage:
    defaults = {
        "learning_rate": 1e-2,
        "batch_size": 6,
        "microbatch_tokens": 40,
        "warmup_ratio": 0.0,
        "max_grad_norm": None,
    }
    keys = {"kind": "reward", "data": "unused.jsonl", "grades": weights or WEIGHTS, "train": {**defaults, **train}}
    return RewardStage.model_validate(keys)


def model(weights: dict[str, float] | None = None) -> ScalarModel:
    torch.manual_seed(3)
    return ScalarModel(without_lm_head(tiny("llama")), weights or WEIGHTS)


def trainer(work: Path, data: list[Tree], spec: RewardStage, net: ScalarModel) -> GradesTrainer:
    loader, batches = loaders(data, graded(7, seed=9), spec.train)
    return GradesTrainer(arguments(net, spec.train, work, "reward"), loader, batches, spec)


def outputs(net: Any, tree: Tree) -> torch.Tensor:
    """By a plain forward of its own."""
    tokens = torch.tensor(np.concatenate([tree.trunk, tree.branches[0].ids])).long()[None]
    net.backbone.set_attn_implementation("sdpa")
    found: torch.Tensor = net.head.weight @ net.backbone(tokens, use_cache=False).last_hidden_state[0, -1]
    return found


def test_squared_errors_by_hand() -> None:
    """Two grades: (1 + 9) / 2. One of them alone: its own error, and no gradient for the other output, whatever that
    says."""
    scores = torch.tensor([[1.0, 2.0], [1.0, 1e30]], dtype=torch.float64, requires_grad=True)
    values = squared_errors(scores, torch.tensor([[2.0, 5.0], [3.0, NAN]], dtype=torch.float64))
    assert values.tolist() == [5.0, 4.0]
    values.sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == [[-1.0, -3.0], [-4.0, 0.0]]


@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
def test_a_step_equals_the_formula(tmp_path: Path, layout: str) -> None:
    """mean over answers of the mean over their grades of (output - grade)^2, cut into many micro-batches: loss and
    every gradient."""
    data, net = graded(6), model()
    metrics, gradients = first_step(trainer(tmp_path, data, stage(layout=layout), net))
    exact: Any = model().double()
    exact.load_state_dict(net.state_dict())
    losses, errors = [], []
    for tree in data:
        found = outputs(exact, tree)
        given = {i: grade for i, grade in enumerate(tree.branches[0].grades) if not math.isnan(grade)}
        losses.append(torch.stack([(found[i] - grade) ** 2 for i, grade in given.items()]).mean())
        errors.append({i: float((found[i] - grade).detach()) ** 2 for i, grade in given.items()})
    expected = torch.stack(losses).mean()
    expected.backward()
    assert metrics["loss"] == pytest.approx(float(expected.detach()), abs=1e-5)
    for i, name in enumerate(WEIGHTS):
        assert metrics[f"error/{name}"] == pytest.approx(np.mean([own[i] for own in errors if i in own]), abs=1e-5)
    for name, parameter in exact.named_parameters():
        assert parameter.grad is not None
        scale = max(1.0, float(parameter.grad.abs().max()))
        torch.testing.assert_close(
            gradients[name].double() / scale,
            parameter.grad / scale,
            atol=1e-5,
            rtol=0,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_held_out_outputs_are_those_of_a_plain_forward_and_the_score_is_their_weighted_sum(tmp_path: Path) -> None:
    net = model()
    run = trainer(tmp_path, graded(6), stage(), net)
    found = run.held_out_outputs()
    for index, tree in enumerate(graded(7, seed=9)):
        expected = outputs(net, tree)
        assert found[index, 0] == pytest.approx(expected.tolist(), abs=1e-5)
        by_hand = sum(weight * value for weight, value in zip(WEIGHTS.values(), expected.tolist(), strict=True))
        assert float(net.score(expected[None].detach())) == pytest.approx(by_hand, abs=1e-5)


def test_grades_are_learned(tmp_path: Path) -> None:
    """One attribute is the number of low tokens in the answer, another the same turned round: both errors fall far
    below the spread."""
    data = []
    for tree in graded(24, seed=2):
        low = float((tree.branches[0].ids < 48).mean())
        data.append(replace(tree, branches=(replace(tree.branches[0], grades=(2 * low, NAN, -2 * low)),)))
    net = model()
    run = trainer(tmp_path, data, stage(epochs=30, learning_rate=5e-3), net)
    run.fit()
    found = np.array([outputs(net, tree).tolist() for tree in data])
    given = np.array([tree.branches[0].grades for tree in data])
    for i in (0, 2):
        assert ((found[:, i] - given[:, i]) ** 2).mean() < 0.3 * given[:, i].var()
