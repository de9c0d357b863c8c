"""Preference training on trees: against formulas in fp64 with transformers' own logits, and against itself where two
roads must agree."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from align.batching.loader import Loader, plan_steps
from align.data.tree import Branch, Tree
from align.functional.both_fell import both_fell
from align.models.adapters import START, add_lora
from align.recipe.schema import DpoStage, Lora
from align.stages.dpo import DpoTrainer
from align.training.launch import Ranks
from align.training.precision import autocast
from align.training.reference_logprobs import ReferenceLogprobs, reference_for, weights_digest
from tests.support.tiny import tiny
from tests.support.trainers import arguments, first_step, loaders

VOCAB = 97
MARKED = {"offset": 0.6, "soft_labels": True, "label_smoothing": None}
"""Options of `sigmoid` that use what the data say of each pair."""
LOSSES = {
    "sigmoid": {"label_smoothing": 0.1},
    "ipo": {},
    "hinge": {},
    "kto_pair": {},
    "simpo": {"beta": 2.0, "gamma": 0.7},
}


def ids(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(0, VOCAB, n).astype(np.int32)


def branch(rng: np.random.Generator, n: int) -> Branch:
    return Branch(ids(rng, n), np.ones(n, dtype=bool))


def preferences(n: int, seed: int = 0, rejected: tuple[int, ...] = (1, 2, 4)) -> list[Tree]:
    """Trees with chosen answer 0 and one, two or four rejected ones, all of different lengths."""
    rng = np.random.default_rng(seed)
    return [
        Tree(
            f"p{i}",
            ids(rng, int(rng.integers(2, 9))),
            tuple(branch(rng, int(rng.integers(1, 12))) for _ in range(1 + rejected[i % len(rejected)])),
        )
        for i in range(n)
    ]


def stage(loss: str = "sigmoid", train: dict[str, Any] | None = None, **options: Any) -> DpoStage:
    defaults = {
        "learning_rate": 1e-3,
        "batch_size": 6,
        "microbatch_tokens": 64,
        "warmup_ratio": 0.0,
        "max_grad_norm": None,
    }
    return DpoStage.model_validate(
        {
            "kind": "dpo",
            "data": "unused.jsonl",
            "loss": loss,
            **LOSSES[loss],
            **options,
            "train": {**defaults, **(train or {})},
        }
    )


def reference(net: nn.Module, data: list[Tree], spec: DpoStage, cache: Path, key: str = "key") -> ReferenceLogprobs:
    loader = Loader(
        data.__getitem__, plan_steps([t.size for t in data], seed=0), spec.train.microbatch_tokens, spec.train.layout
    )
    return reference_for(
        net,
        loader.batches(range(len(data))),
        [len(t.branches) for t in data],
        key=key,
        cache=cache,
        ranks=Ranks(),
        autocast=autocast(spec.train, torch.device("cpu")),
        own_attention=spec.train.layout == "padded",
        microbatch_tokens=spec.train.microbatch_tokens,
    )


def trainer(
    work: Path, data: list[Tree], spec: DpoStage, net: nn.Module, ref: ReferenceLogprobs | None = None
) -> DpoTrainer:
    held_out = preferences(5, seed=99)
    references: tuple[ReferenceLogprobs | None, ReferenceLogprobs | None] = (None, None)
    if spec.pair_loss.needs_reference:
        references = (ref or reference(net, data, spec, work / "r"), reference(net, held_out, spec, work / "h"))
    loader, batches = loaders(data, held_out, spec.train)
    return DpoTrainer(arguments(net, spec.train, work, "dpo"), loader, batches, spec, *references)


def moved(net: nn.Module, seed: int = 7, scale: float = 0.05) -> nn.Module:
    """Change a model in memory."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return net


def path_logprobs(net: nn.Module, tree: Tree, b: int) -> torch.Tensor:
    """Log-probs of one answer's tokens by a plain forward of its own: no packing, no trees, no shared code."""
    tokens = torch.tensor(np.concatenate([tree.trunk, tree.branches[b].ids])).long()[None]
    net.set_attn_implementation("sdpa")  # type: ignore[operator]
    logits = net(tokens, use_cache=False).logits[0].log_softmax(-1)
    start = len(tree.trunk)
    return torch.stack([logits[t - 1, tokens[0, t]] for t in range(start, tokens.shape[1])])


def expected_loss(net: nn.Module, ref: nn.Module, data: list[Tree], spec: DpoStage) -> torch.Tensor:
    """The step's loss from the papers' formulas, in fp64, pair by pair."""
    beta = spec.beta
    log_sigmoid = nn.functional.logsigmoid
    e = spec.label_smoothing or 0.0
    ratio: list[list[torch.Tensor]] = []
    mean: list[list[torch.Tensor]] = []
    own: list[list[torch.Tensor]] = []
    for tree in data:
        policy = [path_logprobs(net, tree, b) for b in range(len(tree.branches))]
        with torch.no_grad():
            frozen = [path_logprobs(ref, tree, b) for b in range(len(tree.branches))]
        ratio.append([p.sum() - r.sum() for p, r in zip(policy, frozen, strict=True)])
        mean.append([(p - r).mean() for p, r in zip(policy, frozen, strict=True)])
        own.append([p.mean() for p in policy])
    kl_chosen = max(0.0, float(np.mean([float(r[0].detach()) for r in ratio])))
    kl_rejected = max(0.0, float(np.mean([float(x.detach()) for r in ratio for x in r[1:]])))
    prompts = []
    for tree, r, m, o in zip(data, ratio, mean, own, strict=True):
        pairs = []
        for k in range(1, len(r)):
            d = r[0] - r[k] - spec.offset * tree.branches[k].margin / beta
            if spec.soft_labels:
                e = 1 - tree.branches[k].share
            pairs.append(
                {
                    "sigmoid": lambda d=d, e=e: -(1 - e) * log_sigmoid(beta * d) - e * log_sigmoid(-beta * d),
                    "hinge": lambda d=d: torch.clamp(1 - beta * d, min=0),
                    "ipo": lambda m=m, k=k: (m[0] - m[k] - 1 / (2 * beta)) ** 2,
                    "simpo": lambda o=o, k=k: -log_sigmoid(beta * (o[0] - o[k]) - (spec.gamma or 0.0)),
                    "kto_pair": lambda r=r, k=k: (
                        (1 - torch.sigmoid(beta * (r[0] - kl_rejected)) + 1 - torch.sigmoid(beta * (kl_chosen - r[k])))
                        / 2
                    ),
                }[spec.loss.name]()
            )
        prompts.append(torch.stack(pairs).mean())
    loss = torch.stack(prompts).mean()
    if spec.sft_weight:
        chosen = torch.cat([path_logprobs(net, tree, 0) for tree in data])
        loss = loss - spec.sft_weight * chosen.mean()
    return loss


@pytest.mark.parametrize("loss", LOSSES)
def test_rewards_are_those_of_the_loss(tmp_path: Path, loss: str) -> None:
    """beta times an answer's log-ratio, summed over its tokens; for SimPO beta times its mean log-prob. A prompt's
    rejected answers are averaged first."""
    data = preferences(6)
    start, policy = tiny("llama"), moved(tiny("llama"))
    spec = stage(loss)
    metrics, _ = first_step(
        trainer(
            tmp_path, data, spec, policy, None if loss == "simpo" else reference(start, data, spec, tmp_path / "ref")
        )
    )
    rewards = []
    with torch.no_grad():
        for tree in data:
            own, frozen = ([path_logprobs(net, tree, b) for b in range(len(tree.branches))] for net in (policy, start))
            each = [
                spec.beta * float(p.mean() if loss == "simpo" else (p - r).sum())
                for p, r in zip(own, frozen, strict=True)
            ]
            rewards.append((each[0], np.mean(each[1:])))
    chosen, rejected = np.mean(rewards, axis=0)
    found = [metrics[f"rewards/{name}"] for name in ("chosen", "rejected", "margins")]
    assert found == pytest.approx([chosen, rejected, chosen - rejected], abs=1e-5)


def assert_equals_formula(
    metrics: dict[str, float],
    gradients: dict[str, torch.Tensor],
    start: nn.Module,
    policy: nn.Module,
    data: list[Tree],
    spec: DpoStage,
) -> None:
    """Loss and every gradient of a step of ``policy`` against :func:`expected_loss` with ``start`` as reference, in
    fp64."""
    exact = tiny("llama").double()
    exact.load_state_dict(policy.state_dict())
    expected = expected_loss(exact, start.double(), data, spec)
    expected.backward()
    assert metrics["loss"] == pytest.approx(float(expected.detach()), abs=1e-5)
    for name, parameter in exact.named_parameters():
        assert parameter.grad is not None
        # fp32 is exact relative to the size of a gradient, and those of IPO (squares) and SimPO (a large beta) are
        # large
        scale = max(1.0, float(parameter.grad.abs().max())) if spec.loss.reads == "mean" else 1.0
        torch.testing.assert_close(
            gradients[name].double() / scale,
            parameter.grad / scale,
            atol=1e-5,
            rtol=0,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
@pytest.mark.parametrize("loss", LOSSES)
def test_step_equals_the_formula(tmp_path: Path, loss: str, layout: str) -> None:
    """Loss and every gradient of a step cut into many micro-batches equal the papers' formulas in fp64,
    and the SFT term is divided by chosen tokens."""
    data = preferences(6)
    start, policy = tiny("llama"), moved(tiny("llama"))
    spec = stage(loss, sft_weight=0.3, train={"layout": layout, "microbatch_tokens": 40})
    ref = None if loss == "simpo" else reference(start, data, spec, tmp_path / "ref")
    run = trainer(tmp_path, data, spec, policy, ref)
    metrics, gradients = first_step(run)
    assert_equals_formula(metrics, gradients, start, policy, data, spec)


def marked(data: list[Tree], seed: int = 3) -> list[Tree]:
    """With a margin and a share of votes for every rejected answer, all different."""
    rng = np.random.default_rng(seed)

    def own(branch: Branch) -> Branch:
        return replace(branch, margin=float(rng.uniform(0.2, 3)), share=float(rng.random()))

    return [replace(tree, branches=(tree.branches[0], *map(own, tree.branches[1:]))) for tree in data]


@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
@pytest.mark.parametrize(
    "options", [MARKED, {**MARKED, "offset": 0.0}, {"offset": 0.6}], ids=["both", "votes", "offset"]
)
def test_a_step_with_offsets_and_votes_equals_the_formula(tmp_path: Path, options: dict[str, Any], layout: str) -> None:
    """Each pair has its own offset and share of votes, in every layout: loss and every gradient of a step, in fp64."""
    data = marked(preferences(6))
    start, policy = tiny("llama"), moved(tiny("llama"))
    spec = stage("sigmoid", train={"layout": layout, "microbatch_tokens": 40}, **options)
    metrics, gradients = first_step(
        trainer(tmp_path, data, spec, policy, reference(start, data, spec, tmp_path / "ref"))
    )
    assert_equals_formula(metrics, gradients, start, policy, data, spec)


def test_margins_and_votes_do_nothing_unless_asked(tmp_path: Path) -> None:
    """The same step to the last bit with and without them in the data; and where no judge contradicts, the votes change
    nothing."""
    plain, spec = preferences(6), stage("sigmoid", label_smoothing=None)
    agreed = [replace(tree, branches=tuple(replace(b, share=1.0) for b in tree.branches)) for tree in marked(plain)]
    found = []
    for i, (data, own) in enumerate(
        ((plain, spec), (marked(plain), spec), (agreed, stage("sigmoid", label_smoothing=None, soft_labels=True)))
    ):
        policy = moved(tiny("llama"))
        ref = reference(tiny("llama"), plain, spec, tmp_path / f"ref{i}")
        found.append(first_step(trainer(tmp_path / str(i), data, own, policy, ref)))
    for metrics, gradients in found[1:]:
        assert metrics["loss"] == found[0][0]["loss"]
        assert all(torch.equal(gradients[name], gradient) for name, gradient in found[0][1].items())


@pytest.mark.parametrize("kind", ["full", "lora", "lora after lora", "changed in memory"])
def test_starts_at_ln_2(tmp_path: Path, kind: str) -> None:
    """The reference is the stage's own starting policy, whatever that is: ln 2 and zero rewards at the first
    step."""
    net: Any = tiny("llama")
    if kind != "full":
        net = moved(net)
    if kind == "lora after lora":
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"])
        # A first stage's trained adapter, as a policy is loaded
        net = moved(get_peft_model(net, config, adapter_name=START))
        net.requires_grad_(False)
    if kind.startswith("lora"):
        net = add_lora(net, Lora(rank=3))
    net.eval()
    metrics, _ = first_step(trainer(tmp_path, preferences(6), stage("sigmoid", label_smoothing=0.0), net))
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert metrics[name] == pytest.approx(0, abs=1e-5)
    assert 0 <= metrics["rewards/accuracies"] <= 1


def test_reference_stays_while_the_policy_trains(tmp_path: Path) -> None:
    """After five steps the reference log-probs are what they were, and those of a fresh copy of the starting
    policy."""
    data = preferences(12)
    spec = stage(train={"batch_size": 3, "epochs": 2})
    net = tiny("llama")
    run = trainer(tmp_path, data, spec, net)
    first = run.loader.step(0)[0]
    before = run.reference(first)  # type: ignore[misc]
    run.fit()
    assert torch.equal(run.reference(first), before)  # type: ignore[misc]
    again = reference(tiny("llama"), data, spec, tmp_path / "fresh")
    torch.testing.assert_close(again(first), before, atol=1e-5, rtol=0)
    assert run.evaluate()["loss"] != pytest.approx(math.log(2), abs=1e-4)


def test_many_rejected_in_one_tree_equal_separate_pairs(tmp_path: Path) -> None:
    """K rejected answers of a prompt in one tree give the loss and gradient of K pairs, each 1 / K of a prompt."""
    one = preferences(1, rejected=(4,))[0]
    pairs = [Tree(f"k{k}", one.trunk, (one.branches[0], one.branches[k])) for k in range(1, 5)]
    start = tiny("llama")
    results = []
    for i, data in enumerate(([one], pairs)):
        spec = stage(sft_weight=0.5, train={"batch_size": 8})
        ref = reference(start, data, spec, tmp_path / f"r{i}")
        results.append(first_step(trainer(tmp_path / str(i), data, spec, moved(tiny("llama")), ref)))
    (tree_metrics, tree_gradients), (pair_metrics, pair_gradients) = results
    for key in ("loss", "rewards/margins", "rewards/accuracies", "logps/rejected"):
        assert tree_metrics[key] == pytest.approx(pair_metrics[key], abs=1e-5)
    for name, gradient in tree_gradients.items():
        torch.testing.assert_close(gradient, pair_gradients[name], atol=1e-6, rtol=1e-4)


def test_a_prompt_weighs_the_same_however_many_rejected(tmp_path: Path) -> None:
    """Copying a prompt's single rejected answer four times changes nothing in the loss of the step."""
    rng = np.random.default_rng(4)
    a = Tree("a", ids(rng, 4), (branch(rng, 5), branch(rng, 7)))
    b = Tree("b", ids(rng, 3), (branch(rng, 6), branch(rng, 2)))
    copied = Tree("a", a.trunk, (a.branches[0], *[a.branches[1]] * 4))
    values = []
    for i, data in enumerate(([a, b], [copied, b])):
        spec = stage()
        ref = reference(tiny("llama"), data, spec, tmp_path / f"r{i}")
        values.append(first_step(trainer(tmp_path / str(i), data, spec, moved(tiny("llama")), ref))[0]["loss"])
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_swapping_chosen_and_rejected_flips_everything(tmp_path: Path) -> None:
    """Accuracy a becomes 1 - a, margins change sign, the loss follows."""
    data = preferences(8, rejected=(1,))
    swapped = [Tree(t.id, t.trunk, t.branches[::-1]) for t in data]
    results = []
    for i, rows in enumerate((data, swapped)):
        spec = stage(label_smoothing=0.0, train={"batch_size": 8})
        ref = reference(tiny("llama"), rows, spec, tmp_path / f"r{i}")
        results.append(first_step(trainer(tmp_path / str(i), rows, spec, moved(tiny("llama")), ref))[0])
    assert 0 < results[0]["rewards/accuracies"] < 1
    assert results[0]["rewards/accuracies"] == pytest.approx(1 - results[1]["rewards/accuracies"])
    assert results[0]["rewards/margins"] == pytest.approx(-results[1]["rewards/margins"], abs=1e-6)
    assert results[0]["loss"] != pytest.approx(results[1]["loss"], abs=1e-3)
    # and by hand: loss = mean softplus(-beta * margin)
    assert results[0]["rewards/chosen"] - results[0]["rewards/rejected"] == pytest.approx(
        results[0]["rewards/margins"], abs=1e-6
    )


def test_training_prefers_the_chosen(tmp_path: Path) -> None:
    """A separable toy set: chosen answers are made of low tokens, rejected ones of high tokens. Accuracy 1 and a
    positive margin."""
    rng = np.random.default_rng(5)

    def answer(low: int, high: int) -> Branch:
        return Branch(rng.integers(low, high, 6).astype(np.int32), np.ones(6, dtype=bool))

    data = [Tree(f"t{i}", ids(rng, 4), (answer(0, 40), answer(50, 90), answer(50, 90))) for i in range(24)]
    run = trainer(
        tmp_path, data, stage(beta=0.5, label_smoothing=0.0, train={"epochs": 8, "learning_rate": 3e-3}), tiny("llama")
    )
    run.fit()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "loss" in row][-1]
    assert last["rewards/accuracies"] == 1.0 and last["rewards/margins"] > 1


def test_accumulation_does_not_change_the_step(tmp_path: Path) -> None:
    """One micro-batch, or one prompt at a time: the same curve, for a loss with step-wide reference points too."""
    for loss in ("sigmoid", "kto_pair"):
        curves = []
        for budget in (10_000, 1):
            work = tmp_path / f"{loss}{budget}"
            run = trainer(
                work, preferences(18), stage(loss, train={"microbatch_tokens": budget, "epochs": 2}), tiny("llama")
            )
            run.fit()
            rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
            curves.append([row["loss"] for row in rows if "loss" in row])
        difference = np.array(curves[0]) - np.array(curves[1])
        assert len(difference) == 6
        assert np.abs(difference).max() < 1e-5 and abs(difference.mean()) < 3e-6


def test_what_a_term_is_averaged_over(tmp_path: Path) -> None:
    """Prompts; and, only where there is such a term, the tokens of chosen answers."""
    data = preferences(6)
    for weight in (0.0, 0.3):
        run = trainer(tmp_path / str(weight), data, stage(sft_weight=weight), tiny("llama"))
        batches = run.loader.batches(range(6))
        counted = [dict(run.counts(batch)) for batch in batches]
        assert sum(one.pop("dpo") for one in counted) == 6
        chosen = sum(int(tree.branches[0].mask.sum()) for tree in data)
        assert (
            [sum(one.values()) for one in counted] == [0] * len(counted)
            if not weight
            else sum(one["sft"] for one in counted) == chosen
        )


@pytest.mark.parametrize("training", [True, False])
def test_scoring_the_reference_leaves_the_mode(tmp_path: Path, training: bool) -> None:
    """It is scored without dropout, and training goes on with it."""
    net = add_lora(tiny("llama"), Lora(rank=4, dropout=0.5)).train(training)
    moved(net)
    scored = [reference(net, preferences(4), stage(), tmp_path / str(k))._sums for k in range(2)]
    assert torch.equal(*scored)
    assert all(module.training == training for module in net.modules())


def test_a_tree_that_is_in_no_batch_is_noticed(tmp_path: Path) -> None:
    """It would be compared with nothing. Nothing is kept then, either."""
    data = preferences(4)
    batches = Loader(data.__getitem__, plan_steps([1] * 4, seed=0), 10_000).batches([0, 1, 3])
    settings: dict[str, Any] = {
        "key": "key",
        "cache": tmp_path,
        "ranks": Ranks(),
        "own_attention": False,
        "microbatch_tokens": 10_000,
    }
    settings["autocast"] = autocast(stage().train, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="a tree was in no batch"):
        reference_for(tiny("llama"), batches, [len(t.branches) for t in data], **settings)
    assert list(tmp_path.iterdir()) == []


def test_the_digest_is_of_names_and_content() -> None:
    """Not of the order in which parameters were registered; every name, type and value counts."""

    def net(*names: str, value: float = 1.0, dtype: torch.dtype = torch.float32) -> nn.Module:
        made = nn.Module()
        for name in names:
            made.register_parameter(name, nn.Parameter(torch.full((2, 3), value, dtype=dtype)))
        return made

    assert weights_digest(net("a", "b")) == weights_digest(net("b", "a"))
    others = [net("a", "c"), net("a"), net("a", "b", value=2.0), net("a", "b", dtype=torch.bfloat16)]
    assert len({weights_digest(other) for other in [net("a", "b"), *others]}) == 5


def test_the_reference_cache(tmp_path: Path) -> None:
    """A cached reference equals a live one; weights, adapters and dtype are part of what names it."""
    data, spec = preferences(6), stage()
    net = tiny("llama")
    batch = Loader(data.__getitem__, plan_steps([1] * 6, seed=0), 10_000).batches(range(6))[0]
    live = reference(net, data, spec, tmp_path / "c", key="a")(batch)
    moved(net)
    cached = reference(net, data, spec, tmp_path / "c", key="a")(batch)
    assert torch.equal(live, cached), "the key decides, not the model"
    assert not torch.allclose(reference(net, data, spec, tmp_path / "c", key="b")(batch), live)
    digests = {
        weights_digest(tiny("llama")),
        weights_digest(moved(tiny("llama"), scale=1e-4)),
        weights_digest(tiny("llama").to(torch.bfloat16)),
        weights_digest(add_lora(tiny("llama"), Lora(rank=2))),
    }
    assert len(digests) == 4
    assert weights_digest(tiny("llama")) == weights_digest(tiny("llama"))


def test_both_falling_is_said_in_words() -> None:
    """Not a bug, but the reader must know; nothing is said when the chosen answers rose."""
    before = {"logps/chosen": -50.0, "logps/rejected": -60.0}
    fell = both_fell(before, {"logps/chosen": -55.5, "logps/rejected": -80.0})
    assert fell is not None and "-50.0 to -55.5" in fell
    assert both_fell(before, {"logps/chosen": -49.0, "logps/rejected": -80.0}) is None
    assert both_fell(before, {name: value - 0.05 for name, value in before.items()}) is None, "too little to tell of"
    assert both_fell(None, None) is None
