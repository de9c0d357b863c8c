"""Training a reward model on trees: against the formula in fp64 with the model's own states, and against itself where
two roads must agree."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from align.data.tree import Branch, Tree
from align.functional.losses import bradley_terry, score_l2
from align.models.load import without_lm_head
from align.models.scalar.heads import ScalarModel
from align.recipe.schema import Lora, RewardStage
from align.stages.reward.run import RewardTrainer, build_reward
from tests.invariants.test_dpo import branch, ids, preferences
from tests.support.tiny import tiny
from tests.support.trainers import arguments, first_step, loaders


def with_margins(data: list[Tree]) -> list[Tree]:
    """Another one for each rejected answer."""
    return [marked(t, margin=[0.25 * ((i + b) % 4) for b in range(len(t.branches))]) for i, t in enumerate(data)]


def with_votes(data: list[Tree]) -> list[Tree]:
    """Another share of votes for each rejected answer, some of them below a half."""
    return [
        marked(t, share=[1.0, *(((i + b) % 5) / 4 for b in range(len(t.branches) - 1))]) for i, t in enumerate(data)
    ]


def marked(tree: Tree, **marks: Sequence[Any]) -> Tree:
    """With margins, shares or grades, one for each branch."""
    of_branch = [dict(zip(marks, values, strict=True)) for values in zip(*marks.values(), strict=True)]
    return replace(
        tree, branches=tuple(replace(branch, **own) for branch, own in zip(tree.branches, of_branch, strict=True))
    )


def stage(train: dict[str, Any] | None = None, **options: Any) -> RewardStage:
    defaults = {
        "learning_rate": 1e-3,
        "batch_size": 6,
        "microbatch_tokens": 64,
        "warmup_ratio": 0.0,
        "max_grad_norm": None,
    }
    return RewardStage.model_validate(
        {"kind": "reward", "data": "unused.jsonl", "l2": 0.05, **options, "train": {**defaults, **(train or {})}}
    )


def scalar(family: str = "llama") -> ScalarModel:
    torch.manual_seed(3)
    return ScalarModel(without_lm_head(tiny(family)))


def trainer(
    work: Path, data: list[Tree], spec: RewardStage, net: nn.Module, held_out: list[Tree] | None = None
) -> RewardTrainer:
    held_out = preferences(5, seed=99) if held_out is None else held_out
    loader, batches = loaders(data, held_out, spec.train)
    return RewardTrainer(arguments(net, spec.train, work, "reward"), loader, batches, spec)


def path_score(net: Any, tree: Tree, b: int) -> torch.Tensor:
    """The score of one answer by a plain forward of its own: no packing, no trees, no shared code."""
    tokens = torch.tensor(np.concatenate([tree.trunk, tree.branches[b].ids])).long()[None]
    net.backbone.set_attn_implementation("sdpa")
    state = net.backbone(tokens, use_cache=False).last_hidden_state[0, -1]
    return state @ net.head.weight[0]


def expected_loss(net: nn.Module, data: list[Tree], l2: float) -> torch.Tensor:
    """mean over prompts of mean over pairs of the cross-entropy of d = r_w - r_l - margin to the share of votes + l2
    (r_w^2 + r_l^2)."""
    prompts = []
    for tree in data:
        scores = [path_score(net, tree, b) for b in range(len(tree.branches))]
        pairs = []
        for s, said in zip(scores[1:], tree.branches[1:], strict=True):
            d = scores[0] - s - said.margin
            ranking = said.share * torch.log1p(torch.exp(-d)) + (1 - said.share) * torch.log1p(torch.exp(d))
            pairs.append(ranking + l2 * (scores[0] ** 2 + s**2))
        prompts.append(torch.stack(pairs).mean())
    return torch.stack(prompts).mean()


# The losses by hand


def test_bradley_terry_by_hand() -> None:
    """Equal scores: ln 2. A difference of ln 3: log(1 + 1/3) = log(4/3). With a margin of ln 3, the same difference is
    ln 2 again, and none at all is log(1 + 3); a margin makes the loss larger, never smaller."""
    ln3 = math.log(3)
    chosen, rejected = (
        torch.tensor([1.0, 1.0 + ln3], dtype=torch.float64),
        torch.tensor([1.0, 1.0], dtype=torch.float64),
    )
    assert bradley_terry(chosen, rejected).tolist() == pytest.approx([math.log(2), math.log(4 / 3)])
    margins = torch.tensor([ln3, ln3], dtype=torch.float64)
    assert bradley_terry(chosen, rejected, margins).tolist() == pytest.approx([math.log(4), math.log(2)])


def test_l2_is_on_both_scores() -> None:
    """2^2 + 3^2; scores that cancel in their sum do not in their squares, and each pulls its own score to 0."""
    chosen, rejected = torch.tensor([2.0, 1.0], requires_grad=True), torch.tensor([3.0, -1.0], requires_grad=True)
    values = score_l2(chosen, rejected)
    assert values.tolist() == [13, 2]
    values.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.tolist() == [4, 2] and rejected.grad.tolist() == [6, -2]


# The step


@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
@pytest.mark.parametrize(("family", "votes"), [("llama", False), ("glm4", False), ("llama", True)])
def test_step_equals_the_formula(tmp_path: Path, family: str, votes: bool, layout: str) -> None:
    """With one, two and four rejected answers, margins, votes and l2, cut into many micro-batches: loss
    and every gradient."""
    data = with_margins(preferences(6))
    if votes:
        data = with_votes(data)
    net = scalar(family)
    spec = stage(train={"layout": layout, "microbatch_tokens": 40}, soft_labels=votes)
    metrics, gradients = first_step(trainer(tmp_path, data, spec, net))
    exact = scalar(family).double()
    exact.load_state_dict(net.state_dict())
    expected = expected_loss(exact, data, 0.05)
    expected.backward()
    assert metrics["loss"] == pytest.approx(float(expected.detach()), abs=1e-5)
    assert gradients.keys() == {name for name, _ in net.named_parameters()}
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


def test_metrics_are_the_scores(tmp_path: Path) -> None:
    """Accuracy, margin, mean and spread, averaged over prompts, from scores computed one by one."""
    data = preferences(6)
    metrics, _ = first_step(trainer(tmp_path, data, stage(), scalar()))
    net = scalar()
    scores = [[float(path_score(net, t, b).detach()) for b in range(len(t.branches))] for t in data]
    margins = [np.mean([s[0] - r for r in s[1:]]) for s in scores]
    assert metrics["margin"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert metrics["accuracy"] == pytest.approx(np.mean([np.mean([s[0] > r for r in s[1:]]) for s in scores]))
    chosen, rejected = np.mean([s[0] for s in scores]), np.mean([np.mean(s[1:]) for s in scores])
    assert metrics["scores/mean"] == pytest.approx((chosen + rejected) / 2, abs=1e-5)
    square = np.mean([(s[0] ** 2 + np.mean(np.square(s[1:]))) / 2 for s in scores])
    assert metrics["scores/std"] == pytest.approx(math.sqrt(square - metrics["scores/mean"] ** 2), abs=1e-5)
    assert metrics["loss"] == pytest.approx(metrics["loss/ranking"] + 0.05 * metrics["loss/l2"], abs=1e-6)
    assert "loss/l2" not in first_step(trainer(tmp_path / "0", data, stage(l2=0.0), scalar()))[0]


def test_swapping_chosen_and_rejected_flips_everything(tmp_path: Path) -> None:
    """Accuracy a becomes 1 - a, the margin changes sign, and the loss follows: softplus(-m) becomes softplus(m), m
    larger."""
    data = preferences(12, rejected=(1,))
    swapped = [replace(t, branches=t.branches[::-1]) for t in data]
    results = [
        first_step(trainer(tmp_path / str(i), rows, stage(l2=0.0, train={"batch_size": 12}), scalar()))[0]
        for i, rows in enumerate((data, swapped))
    ]
    assert 0 < results[0]["accuracy"] < 1
    assert results[0]["accuracy"] == pytest.approx(1 - results[1]["accuracy"])
    assert results[0]["margin"] == pytest.approx(-results[1]["margin"], abs=1e-6)
    # Softplus(m) - softplus(-m) = m
    assert results[1]["loss"] - results[0]["loss"] == pytest.approx(results[0]["margin"], abs=1e-5)


def test_votes_do_nothing_unless_asked(tmp_path: Path) -> None:
    """The same first step, to the last bit, on data with votes and without; asked for, they change it."""
    plain = preferences(6)
    found = []
    for i, (data, asked) in enumerate(((plain, False), (with_votes(plain), False), (with_votes(plain), True))):
        found.append(first_step(trainer(tmp_path / str(i), data, stage(soft_labels=asked), scalar())))
    assert found[0][0]["loss"] == found[1][0]["loss"] != found[2][0]["loss"]
    assert all(torch.equal(found[1][1][name], gradient) for name, gradient in found[0][1].items())


def test_margins_push_scores_apart(tmp_path: Path) -> None:
    """The same data with margins of 4: after training the scores differ by more, not by less."""
    data = preferences(12, rejected=(1,))
    found = []
    for i, margin in enumerate((0.0, 4.0)):
        rows = [marked(t, margin=[margin] * len(t.branches)) for t in data]
        run = trainer(tmp_path / str(i), rows, stage(l2=0.0, train={"epochs": 6}), scalar(), held_out=rows)
        run.fit()
        assert run.progress.last_eval is not None
        found.append(run.progress.last_eval["margin"])
    assert found[1] > found[0] + 0.3


def test_l2_holds_the_scores_near_zero(tmp_path: Path) -> None:
    """The same run with l2 0 and with l2 1: smaller scores, still on the right side."""
    data = preferences(12, rejected=(1,))
    evals = []
    for i, l2 in enumerate((0.0, 1.0)):
        run = trainer(tmp_path / str(i), data, stage(l2=l2, train={"epochs": 8}), scalar(), held_out=data)
        run.fit()
        assert run.progress.last_eval is not None
        evals.append(run.progress.last_eval)
    assert evals[1]["scores/std"] < 0.5 * evals[0]["scores/std"]
    assert abs(evals[1]["scores/mean"]) < 0.3 and evals[1]["margin"] > 0.05


def test_many_rejected_in_one_tree_equal_separate_pairs(tmp_path: Path) -> None:
    """K rejected answers of a prompt in one tree give the loss and gradient of K pairs, each 1 / K of a prompt."""
    one = marked(preferences(1, rejected=(4,))[0], margin=[0.3] * 5)
    pairs = [replace(one, id=f"k{k}", branches=(one.branches[0], one.branches[k])) for k in range(1, 5)]
    results = [first_step(trainer(tmp_path / str(i), data, stage(), scalar())) for i, data in enumerate(([one], pairs))]
    (tree_metrics, tree_gradients), (pair_metrics, pair_gradients) = results
    for key in ("loss", "margin", "accuracy", "scores/mean", "scores/std"):
        assert tree_metrics[key] == pytest.approx(pair_metrics[key], abs=1e-5)
    for name, gradient in tree_gradients.items():
        torch.testing.assert_close(gradient, pair_gradients[name], atol=1e-6, rtol=1e-4)


def test_training_prefers_the_chosen(tmp_path: Path) -> None:
    """A separable toy set (low tokens win) is learned, with a positive margin; on new answers it is better than
    chance."""
    rng = np.random.default_rng(5)

    def answer(low: int, high: int) -> Branch:
        return Branch(rng.integers(low, high, 6).astype(np.int32), np.ones(6, dtype=bool))

    def made(n: int) -> list[Tree]:
        return [Tree(f"t{i}", ids(rng, 4), (answer(3, 40), answer(50, 90), answer(50, 90))) for i in range(n)]

    run = trainer(tmp_path, made(24), stage(train={"epochs": 8, "learning_rate": 3e-3}), scalar(), held_out=made(12))
    run.fit()
    assert run.progress.last_eval is not None
    assert run.progress.last_eval["accuracy"] > 0.6 and run.progress.last_eval["margin"] > 0.5
    last = [row for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if "loss" in row][-1]
    assert last["accuracy"] == 1.0 and last["margin"] > 1


def curve(work: Path) -> list[float]:
    return [row["loss"] for row in map(json.loads, (work / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def test_accumulation_does_not_change_the_step(tmp_path: Path) -> None:
    """One micro-batch, or one prompt at a time: the same curve."""
    for budget in (10_000, 1):
        trainer(
            tmp_path / str(budget),
            with_margins(preferences(18)),
            stage(train={"microbatch_tokens": budget, "epochs": 2}),
            scalar(),
        ).fit()
    difference = np.array(curve(tmp_path / "10000")) - np.array(curve(tmp_path / "1"))
    assert len(difference) == 6
    assert np.abs(difference).max() < 1e-5 and abs(difference.mean()) < 3e-6


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["full", "lora"])
def test_resume_is_bit_equal(tmp_path: Path, lora: Lora | None) -> None:
    """Stopped after two of four steps and continued in a new object: the same weights, head included, and the same
    held-out scores."""
    data, spec = preferences(12), stage(train={"batch_size": 3, "save_steps": 2, "dtype": "fp32"})

    def net() -> nn.Module:
        return build_reward(tiny("llama"), lora, seed=4)

    straight = trainer(tmp_path / "a", data, spec, net())
    straight.fit()
    stopped = trainer(tmp_path / "b", data, spec, net())
    stopped._finish_step, stop_at = _stopping(stopped, after=2), 2  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    again = trainer(tmp_path / "b", data, spec, net())
    again.fit()
    assert stop_at == 2 and again.progress.step == 4
    for (name, one), (_, other) in zip(straight.parameters.items(), again.parameters.items(), strict=True):
        assert torch.equal(one, other), name
    assert straight.held_out_scores() == again.held_out_scores()


def _stopping(run: RewardTrainer, after: int) -> Any:
    finish = run._finish_step

    def finish_and_stop(*arguments: Any) -> None:
        finish(*arguments)
        if run.progress.step == after:
            raise KeyboardInterrupt

    return finish_and_stop


def test_held_out_scores_are_of_the_final_weights(tmp_path: Path) -> None:
    """Of the last step, of the best weights where those were kept, and found again after a run that had nothing left to
    do."""
    data, held_out = preferences(12), preferences(5, seed=99)
    for train in ({}, {"eval_steps": 1, "load_best_model": True, "learning_rate": 0.05}):
        work = tmp_path / str(len(train))
        run = trainer(work, data, stage(train={"save_steps": 1, **train}, eval_data="held_out.jsonl"), scalar())
        run.fit()
        found = run.held_out_scores()
        assert not run.model.training
        with torch.no_grad():
            expected = {
                (t, b): float(path_score(run.model, tree, b))
                for t, tree in enumerate(held_out)
                for b in range(len(tree.branches))
            }
        assert found == pytest.approx(expected, abs=1e-5)
    run.save(None, asked=True)
    late = trainer(work, data, stage(train={"save_steps": 1}), scalar())
    late.fit()
    assert late.held_out_scores().keys() == expected.keys()


def test_training_scores_are_all_scored(tmp_path: Path) -> None:
    """What the statistics are taken from: every answer of the trees asked for."""
    data = preferences(7)
    run = trainer(tmp_path, data, stage(), scalar())
    scores = run.scores(run.loader.batches([1, 4]))
    assert scores.keys() == {(t, b) for t in (1, 4) for b in range(len(data[t].branches))}
    with torch.no_grad():
        assert scores[4, 1] == pytest.approx(float(path_score(run.model, data[4], 1)), abs=1e-5)


def test_the_same_seed_makes_the_same_head() -> None:
    """Every process draws the same, whatever was drawn before; another seed another one."""
    heads = []
    for seed in (1, 1, 2):
        torch.randn(3)
        heads.append(build_reward(tiny("llama"), Lora(rank=2), seed).head.weight)  # type: ignore[union-attr]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_branch_alone_is_no_pair() -> None:
    """Guard of the helpers above: every tree has a chosen and a rejected answer."""
    assert all(len(t.branches) > 1 for t in preferences(5)) and len(branch(np.random.default_rng(0), 3).ids) == 3
