"""What rounding alone makes is a tie: a policy that equals its reference is right half of the time, however either of
them is computed."""

from __future__ import annotations

import doctest
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.data.tree import Branch, Tree
from align.functional import ties
from align.functional.preference_metrics import evaluate
from align.functional.ties import logprob_noise, relative_error, won
from align.stages.dpo import DpoTrainer
from align.stages.reward import run as reward_stage
from tests.invariants import test_dpo as dpo
from tests.invariants import test_reward as reward
from tests.support.tiny import tiny
from tests.support.trainers import first_step

LAYOUTS = ("tree", "packed", "padded", "stream")
"""``stream``: trees in groups of branches, as those much larger than a micro-batch are computed."""
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"dtype": "bf16"}, "autocast": {"autocast": "bf16"}}


def data(seed: int, longest: int, n: int = 12) -> list[Tree]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        lengths = rng.integers(1, longest + 1, 2 + i % 3)
        made.append(
            Tree(f"p{i}", dpo.ids(rng, int(rng.integers(2, longest))), tuple(dpo.branch(rng, int(k)) for k in lengths))
        )
    return made


def settings(layout: str, precision: str) -> dict[str, Any]:
    how = (
        {"layout": "tree", "microbatch_tokens": 8}
        if layout == "stream"
        else {"layout": layout, "microbatch_tokens": 200}
    )
    return {**how, **PRECISIONS[precision], "batch_size": 3}


def net(family: str, precision: str, **changes: Any) -> Any:
    model = tiny(family, **changes)
    return model.to(torch.bfloat16) if precision == "bf16" else model


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("family", "longest", "loss"),
    [
        ("llama", 8, "sigmoid"),
        ("llama", 60, "sigmoid"),
        ("glm4", 20, "sigmoid"),
        ("gemma3", 20, "ipo"),
        ("llama", 8, "kto_pair"),
    ],
)
def test_a_policy_that_equals_its_reference_ties(
    loss: str, family: str, longest: int, layout: str, precision: str, tmp_path: Path
) -> None:
    """To the last bit one half, whatever layout the reference was computed in, before and in the first step."""
    trees, model = data(longest, longest), net(family, precision)
    for other in LAYOUTS:
        spec = dpo.stage(loss, train=settings(layout, precision))
        ref = dpo.reference(model, trees, dpo.stage(loss, train=settings(other, precision)), tmp_path / other)
        run = dpo.trainer(tmp_path / f"work-{other}", trees, spec, model, ref)
        model.train()  # tiny models have no dropout
        for batches in list(run.steps())[:2]:
            for batch in batches:
                counts = {"dpo": 1.0}
                found = run.forward_backward(batch, counts).metrics["rewards/accuracies"]
                assert found.value == 0.5, (other, found)


def test_what_is_learned_is_no_tie(tmp_path: Path) -> None:
    """After some steps nearly every training pair is ranked, and as the signs of the margins say."""
    trees = data(3, 12)
    spec = dpo.stage(train={"epochs": 30, "learning_rate": 3e-3, **settings("packed", "fp32")})
    run = dpo.trainer(tmp_path / "w", trees, spec, tiny("llama"), None)
    run.fit()
    found: list[float] = []
    for batch in next(iter(DpoTrainer.steps(_again(run)))):
        found.append(run.loss(batch, held_out=False).metrics["rewards/accuracies"].value)
    assert np.mean(found) > 0.95


def _again(run: DpoTrainer) -> DpoTrainer:
    run.progress.step = 0
    run.model.train()
    return run


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_noise_of_rounded_computations_is_within_the_bound(dtype: str) -> None:
    """A model of the arithmetic itself: sums of products rounded step by step through layers that keep a state's size,
    against fp64."""
    rng = np.random.default_rng(0)
    layers, width, vocab, tokens = 8, 64, 50, 30

    def rounded(x: np.ndarray) -> np.ndarray:
        kept = torch.tensor(x, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
        return np.asarray(kept.float().numpy())

    weights = [rng.normal(0, width**-0.5, (width, width)) for _ in range(layers)]
    head, start = rng.normal(0, 2 * width**-0.5, (width, vocab)), rng.normal(0, 1, (tokens, width))

    def sums(order: np.ndarray | None) -> np.ndarray:
        state = start
        for weight in weights:
            state = state @ weight if order is None else _in_steps(state, rounded(weight), order)
            state = state / np.sqrt((state**2).mean(1, keepdims=True))
            state = state if order is None else rounded(state)
        logits = state @ head if order is None else _in_steps(state, rounded(head), order)
        return np.asarray(logits[:, 0] - np.log(np.exp(logits).sum(1)))

    found = [sums(rng.permutation(width)) for _ in range(6)]
    bound = logprob_noise(found[0].sum(), tokens, relative_error(layers, width, dtype))
    assert all(abs(a.sum() - b.sum()) <= bound for a in found for b in found)


def _in_steps(state: np.ndarray, weight: np.ndarray, order: np.ndarray) -> np.ndarray:
    """A product whose terms are added one by one in fp32."""
    total = np.zeros((len(state), weight.shape[1]), dtype=np.float32)
    for k in order:
        total += (state[:, k, None] * weight[k]).astype(np.float32)
    return total


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
def test_equal_answers_score_alike_to_a_reward_model(layout: str, precision: str, tmp_path: Path) -> None:
    """Chosen and rejected are one text, in rows of many lengths: 0.5, by the trainer and in the report of held-out
    pairs."""
    trees = [replace(tree, branches=(tree.branches[0],) * len(tree.branches)) for tree in data(5, 40)]
    model = reward.scalar()
    if precision == "bf16":
        model.backbone.to(torch.bfloat16)
    spec = reward.stage(train={**settings(layout, precision), "layout": layout})
    run = reward.trainer(tmp_path / "w", trees, spec, model, trees)
    values, _ = first_step(run)
    assert values["accuracy"] == 0.5
    run.model.eval()
    run.evaluate()
    scores = run.held_out_scores()
    shaken = {place: score * (1 + 2**-23 * (-1) ** place[1]) for place, score in scores.items()}
    pairs = reward_stage._scored_pairs(trees, shaken, run.noise_now())
    assert evaluate(pairs)["accuracy"]["value"] == 0.5


def test_different_answers_are_ranked_by_a_reward_model(tmp_path: Path) -> None:
    trees = data(7, 20)
    run = reward.trainer(tmp_path / "w", trees, reward.stage(), reward.scalar(), trees)
    run.evaluate()
    pairs = reward_stage._scored_pairs(trees, run.held_out_scores(), run.noise_now())
    assert set(pairs.right.tolist()) == {0.0, 1.0}


def test_the_noise_grows_with_length_size_and_precision() -> None:
    errors = [relative_error(layers, 512, dtype) for layers in (2, 30) for dtype in ("fp32", "bf16")]
    assert errors[0] < errors[2] < errors[1] < errors[3]
    short, long = (logprob_noise(np.array([-2.0 * n]), np.array([n]), 1e-6)[0] for n in (10, 1000))
    assert long == pytest.approx(10 * short)
    assert math.isfinite(logprob_noise(np.array([0.0]), np.array([1]), 1e-6)[0])
    assert won(torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0.5, 2.0, 0.0])).tolist() == [1.0, 0.5, 0.5]
    assert doctest.testmod(ties).failed == 0


def test_equal_branches_are_one_text() -> None:
    """The generator above makes what it says."""
    made = data(5, 40)[0]
    assert isinstance(made.branches[0], Branch) and len(made.branches) >= 2
