"""A tree larger than a micro-batch goes through in groups of its branches: the same loss and gradients, nothing held as
a whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from align.batching.tree import build
from align.models.adapters import add_lora
from align.models.compute import stream
from align.models.compute.forward import batch_logprobs
from align.models.compute.stream import Stream, logprobs_in_groups, split
from align.recipe.schema import Lora
from tests.invariants.test_dpo import LOSSES, MARKED, first_step, marked, moved, preferences, reference, stage, trainer
from tests.support.tiny import FAMILIES, nested_tree, tiny


@pytest.fixture(autouse=True)
def cut_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups as soon as a tree is larger than a micro-batch, so that small trees are cut."""
    monkeypatch.setattr(stream, "WHOLE", 1)


def step(
    folder: Path,
    net: nn.Module,
    microbatch_tokens: int,
    loss: str = "sigmoid",
    options: Mapping[str, Any] = MappingProxyType({}),
    **train: Any,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The first step on prompts with one, three and six rejected answers, the policy away from its reference."""
    data = marked(preferences(6, rejected=(1, 3, 6)))
    spec = stage(loss, sft_weight=0.3, train={"microbatch_tokens": microbatch_tokens, **train}, **options)
    ref = None if loss == "simpo" else reference(tiny("llama"), data, spec, folder / f"r{microbatch_tokens}", key=loss)
    return first_step(trainer(folder / str(microbatch_tokens), data, spec, net, ref))


def require_equal(
    one: tuple[dict[str, float], dict[str, Tensor]], other: tuple[dict[str, float], dict[str, Tensor]]
) -> None:
    for name, value in one[0].items():
        # Of values above 1 (IPO's gradient has a norm of 128), as of the gradients below, rounding is a share
        if "second" not in name:
            assert other[0][name] == pytest.approx(value, abs=2e-5 * max(1.0, abs(value))), name
    for name, gradient in one[1].items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(
            other[1][name] / scale, gradient / scale, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("loss", LOSSES)
def test_groups_of_answers_give_the_whole_trees_step(
    tmp_path: Path, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every loss, with the SFT term; micro-batches of 4 tokens put every rejected answer in a group of its own, 40 some
    together."""
    whole = step(tmp_path, moved(tiny("llama")), 10_000, loss)
    for tokens in (4, 40):
        streamed = []
        monkeypatch.setattr("align.stages.dpo.Stream", lambda *a, s=streamed: s.append(1) or Stream(*a))
        require_equal(whole, step(tmp_path, moved(tiny("llama")), tokens, loss))
        assert len(streamed) >= 2


def test_groups_of_answers_keep_their_offsets_and_votes(tmp_path: Path) -> None:
    """A margin and a share of votes for each rejected answer, which are in groups of their own."""
    whole = step(tmp_path, moved(tiny("llama")), 10_000, options=MARKED)
    require_equal(whole, step(tmp_path, moved(tiny("llama")), 4, options=MARKED))
    require_equal(whole, step(tmp_path, moved(tiny("llama")), 40, options=MARKED))


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_of_every_family(family: str) -> None:
    """Positions, windows (longer and shorter than the path) and biases survive the cut between trunk and branches."""
    tree = preferences(3, rejected=(5,), seed=4)[2]
    weights = torch.linspace(-1, 1, sum(len(b.ids) for b in tree.branches))
    whole = build([tree], [0], layout="tree")
    net = tiny(family)
    logprobs = batch_logprobs(net, whole)
    (logprobs * weights).sum().backward()
    expected = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    parts = split(whole, 24)
    assert parts is not None and len(parts.groups) > 1
    run, found, at = Stream(net, parts), [], len(tree.branches[0].ids)
    for number in range(len(parts.groups)):
        part = run.branches(number)
        (part * weights[at : at + len(part)]).sum().backward()
        found, at = [*found, part.detach()], at + len(part)
    run.backward((run.logprobs * weights[: len(tree.branches[0].ids)]).sum())
    torch.testing.assert_close(torch.cat([run.logprobs.detach(), *found]), logprobs.detach(), atol=1e-5, rtol=0)
    for name, parameter in net.named_parameters():
        if name in expected:
            scale = max(1.0, float(expected[name].abs().max()))
            torch.testing.assert_close(
                parameter.grad / scale, expected[name] / scale, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_and_gradient_checkpointing(tmp_path: Path, checkpointing: bool) -> None:
    """The trunk's keys and values come out of layers that are computed anew in the backward pass."""

    def net() -> nn.Module:
        torch.manual_seed(3)
        return moved(add_lora(tiny("llama"), Lora(rank=4)), scale=0.02)

    whole = step(tmp_path, net(), 10_000)
    require_equal(whole, step(tmp_path, net(), 20, gradient_checkpointing=checkpointing))


def test_what_fits_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch within the limit, of several trees, or of one branch goes through whole; the limit is two
    micro-batches."""
    trees = preferences(2, rejected=(2,))
    assert split(build(trees, [0, 1], layout="tree"), 4) is None
    assert split(build(trees, [0], layout="tree"), trees[0].size) is None
    assert split(build(trees, [0], layout="tree"), trees[0].size - 1) is not None
    monkeypatch.undo()
    assert split(build(trees, [0], layout="tree"), -(-trees[0].size // 2)) is None
    assert split(build(trees, [0], layout="tree"), (trees[0].size - 1) // 2) is not None


@pytest.mark.parametrize("layout", ["tree", "packed"])
def test_branches_of_branches_are_computed_whole(layout: Any) -> None:
    """Groups see the trunk alone. One path is no trunk with branches either, whatever it is made of."""
    rng = np.random.default_rng(3)
    for parents in ([-1, 0, 0, -1], [-1, 0, 1]):
        batch = build([nested_tree(rng, parents)], [0], layout=layout)
        assert split(batch, 2) is None
        model = tiny("llama")
        with torch.no_grad():
            wanted = batch_logprobs(model, batch)
        assert torch.equal(logprobs_in_groups(model, batch, 2, own_attention=False), wanted)


@pytest.mark.parametrize("tokens", [8, 32, 56])
def test_no_group_holds_more_than_the_limit(tokens: int) -> None:
    """A group of branches stays within a quarter of a micro-batch, unless a single branch is too long for it, and is no
    smaller than it has to be."""
    tree = preferences(1, rejected=(8,), seed=2)[0]
    parts = split(build([tree], [0], layout="tree"), tokens)
    assert parts is not None
    assert parts.trunk.num_tokens == len(tree.trunk) and parts.first.num_tokens == len(tree.branches[0].ids)
    assert tokens < 56 or any(group.num_branches > 1 for group in parts.groups)
    assert [node.length for g in parts.groups for node in g.rows[0][0].nodes] == [len(b.ids) for b in tree.branches[1:]]
    for group, following in zip(parts.groups, [*parts.groups[1:], None], strict=True):
        assert group.num_tokens <= tokens // 4 or group.num_branches == 1
        assert following is None or group.num_tokens + following.rows[0][0].nodes[0].length > tokens // 4


def test_the_first_loss_of_a_large_tree_is_ln_2_to_the_last_bit(tmp_path: Path) -> None:
    """The reference takes the road of training, groups and all, so that not even rounding makes a margin."""
    metrics, _ = first_step(
        trainer(tmp_path, preferences(6, rejected=(6,)), stage(train={"microbatch_tokens": 20}), tiny("llama"))
    )
    assert metrics["rewards/margins"] == 0.0 and metrics["rewards/chosen"] == 0.0
