"""The first step of every kind of training, whole in one process and in parts over several: losses and gradients side
by side. :func:`side_by_side` runs in each process of a group."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from align.batching.batch import Batch
from align.batching.loader import Loader, plan_steps
from align.data.tree import Tree
from align.models.adapters import add_lora
from align.models.compute.stream import group_count
from align.models.placement import Placement, full
from align.models.scalar.heads import ScalarModel
from align.recipe.schema import Lora, Train
from align.stages.dpo import DpoTrainer
from align.stages.ppo.trainer import PpoTrainer
from align.stages.reward.regression import GradesTrainer
from align.stages.reward.run import RewardTrainer
from align.stages.sft import SftTrainer
from align.training.launch import Ranks, leave, ranks
from align.training.reference_logprobs import ReferenceLogprobs
from align.training.trainer import Trainer, TrainerArguments
from tests.invariants import test_dpo, test_grades, test_ppo, test_reward
from tests.support import rollouts
from tests.support.tiny import random_trees, tiny
from tests.support.trainers import first_step

Build = Callable[[Path, Ranks, Placement | None], Trainer]
"""A trainer, whole in one process or as the placement says."""
CASES: dict[str, Build] = {}


def arguments(net: nn.Module, train: Train, work: Path, group: Ranks, placement: Placement | None) -> TrainerArguments:
    work.mkdir(parents=True, exist_ok=True)
    return TrainerArguments(
        model=net,
        train=train,
        work=work,
        name="stage",
        seed=2,
        console=Console(file=io.StringIO()),
        ranks=group,
        placement=placement,
    )


def loaders(
    data: Sequence[Tree], held_out: Sequence[Tree], train: Train, group: Ranks, placement: Placement | None
) -> tuple[Loader, list[Batch]]:
    """Of this process: the training data, and the micro-batches of the held-out data."""
    plan = plan_steps([tree.size for tree in data], seed=3, epochs=train.epochs, batch_size=train.batch_size)
    tokens = train.microbatch_tokens
    groups = None if placement is None else partial(group_count, tokens=tokens)
    place: dict[str, Any] = {"rank": group.rank, "world": group.world, "groups": groups}
    return (
        Loader(data.__getitem__, plan, tokens, train.layout, **place),
        Loader(held_out.__getitem__, plan, tokens, train.layout, **place).batches(range(len(held_out))),
    )


def sft(
    work: Path, group: Ranks, placement: Placement | None, *, net: Callable[[], nn.Module], loss: str, **train: Any
) -> SftTrainer:
    """Thirteen conversations of unequal length."""
    settings = {"learning_rate": 1e-3, "batch_size": 13, "microbatch_tokens": 48, "warmup_ratio": 0.0, "epochs": 4}
    spec = Train.model_validate({**settings, "max_grad_norm": None, **train})
    data = random_trees(np.random.default_rng(1), [1] * 13, longest=20)
    held_out = random_trees(np.random.default_rng(2), [1] * 5, longest=20)
    loader, batches = loaders(data, held_out, spec, group, placement)
    return SftTrainer(arguments(net(), spec, work, group, placement), loader, batches, loss)


def dpo(
    work: Path,
    group: Ranks,
    placement: Placement | None,
    *,
    net: Callable[[], nn.Module],
    rejected: tuple[int, ...] = (1, 2, 4),
    options: dict[str, Any] | None = None,
    **train: Any,
) -> DpoTrainer:
    """Seven prompts; small micro-batches make some of them go through in groups of answers."""
    data, held_out = test_dpo.preferences(7, rejected=rejected), test_dpo.preferences(3, seed=9, rejected=rejected)
    spec = test_dpo.stage(**{"loss": "sigmoid", **(options or {})}, train={"batch_size": 7, "epochs": 3, **train})
    loader, batches = loaders(data, held_out, spec.train, group, placement)
    known = made_up(data), made_up(held_out)
    return DpoTrainer(arguments(net(), spec.train, work, group, placement), loader, batches, spec, *known)


def reward(
    work: Path, group: Ranks, placement: Placement | None, *, net: Callable[[], Any] = test_reward.scalar, **train: Any
) -> RewardTrainer:
    """Seven prompts with two to five answers."""
    data, held_out = test_dpo.preferences(7), test_dpo.preferences(3, seed=9)
    spec = test_reward.stage(train={"batch_size": 7, **train})
    loader, batches = loaders(data, held_out, spec.train, group, placement)
    return RewardTrainer(arguments(net(), spec.train, work, group, placement), loader, batches, spec)


def grades(work: Path, group: Ranks, placement: Placement | None) -> GradesTrainer:
    """Seven prompts with a graded answer."""
    spec = test_grades.stage()
    loader, batches = loaders(test_grades.graded(7), test_grades.graded(3, seed=9), spec.train, group, placement)
    return GradesTrainer(arguments(test_grades.model(), spec.train, work, group, placement), loader, batches, spec)


def ppo(work: Path, group: Ranks, placement: Placement | None, **options: Any) -> PpoTrainer:
    """Two samples of each of four prompts, and two conversations; held-out prompts and conversations."""
    torch.manual_seed(4)
    spec = rollouts.stage(
        **{"iterations": 1, "samples_per_prompt": 2, "sft_weight": 0.2, "entropy_weight": 0.01, **options},
        sft_data="unused.jsonl",
    )
    return rollouts.trainer(
        work, spec, group=group, placement=placement, held_out=rollouts.prompts(3), sft=test_ppo.conversations()
    )


def made_up(data: Sequence[Tree]) -> ReferenceLogprobs:
    """Log-probs of a reference that is no model."""
    counts = [len(tree.branches) for tree in data]
    sums = torch.randn(sum(counts), generator=torch.Generator().manual_seed(0)) - 20
    return ReferenceLogprobs(sums, torch.tensor([0, *counts]).cumsum(0)[:-1])


def lora(net: Any, *, dropout: float = 0.0) -> nn.Module:
    """Adapters that have an effect."""
    torch.manual_seed(5)
    adapted = add_lora(net, Lora(rank=4, dropout=dropout))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


def of(family: str) -> Callable[[], nn.Module]:
    return lambda: tiny(family)


CASES |= {
    "sft, tied head": partial(sft, net=of("llama"), loss="token_mean"),
    "sft, checkpointing": partial(sft, net=of("glm4"), loss="sequence_mean", gradient_checkpointing=True),
    "sft, learned positions": partial(sft, net=of("gpt2"), loss="token_mean"),
    "sft, padded": partial(sft, net=of("glm4"), loss="sequence_mean", layout="padded"),
    "sft, one micro-batch": partial(sft, net=of("glm4"), loss="token_mean", microbatch_tokens=4096),
    "sft, clipped": partial(sft, net=of("glm4"), loss="token_mean", max_grad_norm=0.01),
    "sft, bf16 compute": partial(sft, net=of("glm4"), loss="token_mean", autocast="bf16"),
    "sft, adapters": partial(sft, net=lambda: lora(tiny("glm4")), loss="token_mean"),
    "sft, adapters on bf16": partial(sft, net=lambda: lora(tiny("glm4").to(torch.bfloat16)), loss="token_mean"),
    "dpo, trees": partial(dpo, net=of("glm4")),
    "dpo, reference points": partial(dpo, net=of("llama"), options={"loss": "kto_pair"}),
    "dpo, in groups": partial(
        dpo, net=of("llama"), rejected=(1, 9, 4), microbatch_tokens=16, options={"sft_weight": 0.3}
    ),
    "dpo, in groups, checkpointing": partial(
        dpo, net=of("glm4"), rejected=(8, 1, 5), microbatch_tokens=16, gradient_checkpointing=True
    ),
    "dpo, in groups, adapters": partial(dpo, net=lambda: lora(tiny("glm4")), rejected=(8, 1, 5), microbatch_tokens=16),
    "reward": reward,
    "reward, padded": partial(reward, layout="padded"),
    "reward, adapters on bf16": partial(reward, net=lambda: ScalarModel(lora(tiny("glm4").to(torch.bfloat16).model))),
    "grades": grades,
    "ppo": ppo,
    "ppo, adapters on one base": partial(ppo, lora={"rank": 3}),
    "ppo without value model": partial(ppo, estimator="rloo"),
    "dpo, in groups on one process": partial(
        dpo, net=of("llama"), rejected=(12, 1, 1, 1, 1, 1, 1), microbatch_tokens=32
    ),
}


def outcome(run: Trainer) -> tuple[dict[str, float], dict[str, float], dict[str, Tensor]]:
    """Evaluate on the held-out data, then make one step. Returns the metrics of both, and the gradients of the step."""
    before = run.evaluate()
    metrics, gradients = first_step(run)
    return before, metrics, {name: full(gradient) for name, gradient in gradients.items()}


def side_by_side(folder: Path, names: Sequence[str], sharding: Any = "full") -> None:
    """Each case, whole and in parts; the first process writes how far apart they are to ``FOLDER/found.json``."""
    torch.set_num_threads(1)
    group = ranks()
    found: dict[str, dict[str, float]] = {}
    for name in names:
        build = CASES[name]
        one = outcome(build(folder / f"{name}-one-{group.rank}", Ranks(), None))
        several = outcome(build(folder / f"{name}-several", group, group.placement_for(sharding)))
        found[name] = apart(one, several)
    if group.first:
        (folder / "found.json").write_text(json.dumps(found))
    group.barrier()
    leave()


def apart(one: Any, other: Any) -> dict[str, float]:
    """The largest differences: of a metric, relative to it where it is large; of a gradient, relative to the largest of
    all."""
    times = {"step_seconds", "tokens_per_second"}
    worst = {}
    for which, (a, b) in {"held out": (one[0], other[0]), "metrics": (one[1], other[1])}.items():
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        worst[which] = max((abs(a[key] - b[key]) / max(1.0, abs(a[key])) for key in a.keys() - times), default=0.0)
    a, b = one[2], other[2]
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    scale = max(float(gradient.abs().max()) for gradient in a.values())
    return {**worst, "gradients": max(float((a[key] - b[key]).abs().max()) / scale for key in a)}
