"""PPO on the common loop: what must hold in every run, whatever the interruption, the packing or the number of
processes."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from align import files
from align.batching.batch import Batch
from align.data.tree import Branch, Tree
from align.errors import InputError
from align.models.compute.forward import batch_logprobs
from align.models.scalar.heads import ScalarModel
from align.rollout.engine import Sample, Sampling
from align.scoring.scorer import Answer
from align.stages.ppo import collect
from align.stages.ppo.experience import Experience, PolicyBatch, ValueBatch, adapted, folder_of, minibatch_plan
from align.stages.ppo.rollouts import read_parquet
from align.stages.ppo.trainer import PpoTrainer
from align.training.launch import Ranks
from tests.support.rollouts import STOP, VOCAB, ExactEngine, ends_early, policy, prompts, stage, trainer
from tests.support.root import ROOT
from tests.support.tiny import tiny


def log(work: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (work / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def conversations(count: int = 5) -> list[Tree]:
    rng = np.random.default_rng(0)
    return [
        Tree(
            f"c{i}",
            rng.integers(5, 200, 3, dtype=np.int32),
            (Branch(rng.integers(5, 200, 4, dtype=np.int32), np.ones(4, bool)),),
        )
        for i in range(count)
    ]


# The ratio


@pytest.mark.parametrize("lora", [None, {"rank": 3}], ids=["full", "lora"])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_where_nothing_moves_the_ratio_is_one(tmp_path: Path, layout: str, lora: Any) -> None:
    """At a learning rate that moves nothing and temperature .7, over two passes in two minibatches: the
    ratio is 1 to 1e-4 for every token of every minibatch, nothing is held, the KL from the reference is 0, and the
    engine's importance ratio is 1."""
    still = {"learning_rate": 1e-30, "layout": layout}
    options: dict[str, Any] = {
        "ppo_epochs": 2,
        "minibatches": 2,
        "samples_per_prompt": 2,
        "temperature": 0.7,
        "value_learning_rate": 1e-30,
    }
    run = trainer(tmp_path, stage(train=still, lora=lora, **options))
    before = weights(run.model)
    run.fit()
    rows = log(tmp_path)
    assert len(rows) == 12
    assert [step for step, row in enumerate(rows) if "rollout/score" in row] == [0, 4, 8], (
        "an iteration's numbers are with its first step"
    )
    for row in rows:
        assert row["ratio/largest_log"] < 1e-4 and abs(row["ratio"] - 1) < 1e-4
        assert row["clip_fraction"] == 0 and row["value_clip_fraction"] == 0 and abs(row["kl_from_old"]) < 1e-6
    for summary in run.history:
        assert abs(summary["kl"]) < 1e-5 and abs(summary["kl_k3"]) < 1e-6
        assert summary["mismatch_max"] < 1e-4 and summary["importance"] == pytest.approx(1, abs=0.01)
    assert not {"first_ratio", "mismatch"} & run.unhealthy.keys()
    after = weights(run.model)
    assert all(float((after[name] - value).abs().max()) < 1e-20 for name, value in before.items())


def test_another_temperature_is_noticed(tmp_path: Path) -> None:
    """An engine that samples at another temperature than the trainer's: its log-probs are off, and it is said."""

    class Hot(ExactEngine):
        def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Sample]]:
            return super().generate(prompts, replace(sampling, temperature=1.0))

    spec = stage(temperature=0.5, health={"mismatch": 0.05}, iterations=1)
    net = policy(spec, initializer_range=0.3)
    run = trainer(tmp_path, spec, net=net, engine=Hot(net))
    run.fit()
    assert run.history[0]["mismatch"] > 0.05 and "mismatch" in run.unhealthy
    assert run.history[0]["kl"] == pytest.approx(0, abs=1e-5), "the old log-probs are the trainer's all the same"


# What moves and what does not


def test_only_what_is_declared_moves(tmp_path: Path) -> None:
    """After some steps the reference is byte-identical, and so is the model that scores; the optimiser has exactly
    what is trained; policy and value model are clipped apart and have rates of their own."""
    scoring = ScalarModel(tiny("llama", vocab_size=64).base_model)
    spec = stage(sft_data="unused.jsonl", sft_weight=0.1, train={"max_grad_norm": 0.01}, value_learning_rate=5e-4)
    value = ScalarModel(tiny("llama", vocab_size=VOCAB).base_model)
    copied = copy.deepcopy(value)
    run = trainer(tmp_path, spec, value=value, sft=conversations())
    assert run.parts.reference is not None
    frozen = weights(run.parts.reference) | {f"scoring.{name}": p for name, p in weights(scoring).items()}
    start = weights(run.model)
    declared = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert (
        declared
        == {id(p) for p in run.model.parameters() if p.requires_grad}
        == {id(p) for p in run.parameters.values()}
    )
    rates = {group["rate"] for group in run.optimizer.param_groups}
    assert rates == {1.0, 0.5}
    run.fit()
    after = weights(run.parts.reference) | {f"scoring.{name}": p for name, p in weights(scoring).items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    assert {group["lr"] for group in run.optimizer.param_groups} == {1e-3, 5e-4}
    moved = weights(run.model)
    assert any(not torch.equal(moved[name], start[name]) for name in start if name.startswith("policy."))
    assert any(not torch.equal(moved[name], start[name]) for name in start if name.startswith("value."))
    assert not torch.equal(copied.head.weight, run.models.value.head.weight)  # type: ignore[union-attr]
    for row in log(tmp_path):
        assert row["grad_norm"] == pytest.approx(np.hypot(row["grad_norm/policy"], row["grad_norm/value"]))


def test_each_group_is_clipped_to_the_norm_alone(tmp_path: Path) -> None:
    """A huge value gradient does not shrink the policy's."""
    norms = []
    for scale in (1.0, 1000.0):
        spec = stage(train={"max_grad_norm": 1e-3}, iterations=1)
        run = trainer(
            tmp_path / str(scale),
            spec,
            score=lambda answer, scale=scale: scale * ends_early(answer),
            baselines=torch.zeros(8),
        )
        step = run.optimizer.step
        seen: dict[str, float] = {}

        def spy(run: PpoTrainer = run, seen: dict[str, float] = seen, step: Any = step) -> None:
            for group in run.groups:
                seen[group.name] = float(
                    torch.stack([p.grad.norm() for p in group.parameters.values() if p.grad is not None]).norm()
                )
            step()

        run.optimizer.step = spy  # type: ignore[method-assign]
        run.fit()
        norms.append(seen)
    for seen in norms:
        assert seen["policy"] == pytest.approx(1e-3, rel=1e-3) and seen["value"] == pytest.approx(1e-3, rel=1e-3)


def test_what_follows_the_end_is_not_trained(tmp_path: Path) -> None:
    """An engine that goes on after the end token: experience and every weight are those of one that stops."""

    class GoesOn(ExactEngine):
        def _completion(self, ids: list[int], logprobs: list[float]) -> Sample:
            clean = super()._completion(ids, logprobs)
            return (
                replace(clean, ids=(*clean.ids, 99, 98), logprobs=(*(clean.logprobs or ()), -1.0, -2.0))
                if clean.finished
                else clean
            )

    results = []
    for kind in (ExactEngine, GoesOn):
        spec = stage(iterations=2, samples_per_prompt=2)
        net = policy(spec)
        run = trainer(tmp_path / kind.__name__, spec, net=net, engine=kind(net), proved=False)
        run.fit()
        assert run.history[0]["finished"] > 0.1
        results.append((weights(run.model), run.history))
    (one, history), (other, again) = results
    assert history == again and all(torch.equal(other[name], value) for name, value in one.items())


def test_samples_share_their_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of L tokens with its n answers costs L once, for the policy, the reference and the value model, when the
    answers are valued and when they are trained; the conversations come on top."""
    seen: list[int] = []

    def counted(model: nn.Module, batch: Batch, **options: Any) -> Tensor:
        seen.append(batch.num_tokens)
        return batch_logprobs(model, batch, **options)

    monkeypatch.setattr(collect, "batch_logprobs", counted)
    spec = stage(samples_per_prompt=3, sft_data="unused.jsonl", train={"microbatch_tokens": 10_000})
    run = trainer(tmp_path, spec, sft=conversations())
    run.model.train()
    batches = next(iter(run.steps()))
    answers = Experience.load(folder_of(tmp_path, 0)).answers
    unique = sum(len(prompt) for prompt in answers.prompts) + len(answers.ids)
    assert [batch.num_tokens for batch in batches] == [unique, unique, 14] and seen == [unique, unique]
    assert isinstance(batches[0], PolicyBatch) and isinstance(batches[1], ValueBatch)


def test_the_padded_layout_never_attends_by_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is for models that cannot: not for the policy, the reference, the value model, the entropy or the
    conversations."""
    used, plain = set(), PreTrainedModel.set_attn_implementation

    def noted(self: PreTrainedModel, name: str) -> None:
        used.add(name)
        plain(self, name)

    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", noted)
    for weight in (0.0, 0.1):
        spec = stage(
            iterations=1, entropy_weight=0.01, sft_weight=weight, sft_data="unused.jsonl", train={"layout": "padded"}
        )
        trainer(tmp_path / str(weight), spec, sft=conversations(), proved=False).fit()
    assert used == {"sdpa"}


def test_packing_changes_nothing(tmp_path: Path) -> None:
    """One micro-batch or one prompt at a time, tree or padded rows: the same losses over a whole run,
    whitening included."""
    curves = []
    for budget, layout in ((10_000, "tree"), (1, "tree"), (40, "padded")):
        work = tmp_path / f"{budget}-{layout}"
        spec = stage(
            whiten_advantages=True,
            whiten_rewards=True,
            samples_per_prompt=2,
            train={"microbatch_tokens": budget, "layout": layout},
        )
        trainer(work, spec, engine=None).fit()
        curves.append([row["loss"] for row in log(work)])
    for other in curves[1:]:
        assert np.abs(np.array(other) - np.array(curves[0])).max() < 2e-5


# Interrupted


class _Stopped(Exception):
    pass


def stopped_after(run: PpoTrainer, step: int) -> None:
    after = run._finish_step

    def finish(metrics: Any, log: Any, bar: Any) -> None:
        after(metrics, log, bar)
        if run.progress.step >= step:
            raise _Stopped

    run._finish_step = finish  # type: ignore[method-assign]


RESUMED: dict[str, Any] = {
    "iterations": 3,
    "ppo_epochs": 2,
    "minibatches": 2,
    "samples_per_prompt": 2,
    "kl_target": 0.05,
    "sft_data": "unused.jsonl",
    "sft_weight": 0.2,
    "temperature": 0.8,
}


def interrupted(work: Path, step: int, **options: Any) -> PpoTrainer:
    """A run that is stopped right after step ``step`` was saved, and started again as a new program would."""
    spec = stage(**{**RESUMED, **options}, train={"save_steps": 1, "lr_scheduler_type": "cosine"})
    first = trainer(work, spec, sft=conversations(), held_out=prompts(2))
    stopped_after(first, step)
    with pytest.raises(_Stopped):
        first.fit()
    rest = trainer(work, spec, sft=conversations(), held_out=prompts(2))
    rest.fit()
    return rest


def same_run(one: PpoTrainer, other: PpoTrainer) -> None:
    for name, value in weights(one.model).items():
        assert torch.equal(weights(other.model)[name], value), name
    for mine, theirs in zip(one.parameters.values(), other.parameters.values(), strict=True):
        for key, value in one.optimizer.state[mine].items():
            assert torch.equal(other.optimizer.state[theirs][key], value)
    assert (
        other.history == one.history
        and other.coefficient == one.coefficient
        and other.sft_losses[-1] == one.sft_losses[-1]
    )
    ours, theirs_ = ([row["loss"] for row in log(run.work)] for run in (one, other))
    assert ours == theirs_


@pytest.mark.parametrize("lora", [None, {"rank": 3}], ids=["full", "lora"])
def test_resumed_equals_uninterrupted(tmp_path: Path, lora: Any) -> None:
    """Stopped after every single step, at the boundaries of iterations and inside them: weights, optimiser states
    of policy and value model, KL coefficient, history, SFT rows and logged losses are bit-equal to a run that was never
    stopped."""
    spec = stage(**RESUMED, lora=lora, train={"save_steps": 1, "lr_scheduler_type": "cosine"})
    whole = trainer(tmp_path / "whole", spec, sft=conversations(), held_out=prompts(2))
    whole.fit()
    assert len({summary["kl_coefficient"] for summary in whole.history}) == 3, (
        "an adaptive coefficient is part of the state"
    )
    for step in range(1, 12) if lora is None else (2, 4, 7):
        same_run(whole, interrupted(tmp_path / f"at-{step}", step, lora=lora))


def test_killed_between_checkpoints(tmp_path: Path) -> None:
    """Killed in iteration 2 with a checkpoint from iteration 1: what was kept of later iterations is made again,
    not trusted."""
    spec = stage(**RESUMED, train={"save_steps": 5})
    whole = trainer(tmp_path / "whole", spec, sft=conversations())
    whole.fit()
    part = trainer(tmp_path / "part", spec, sft=conversations())
    stopped_after(part, 9)
    with pytest.raises(_Stopped):
        part.fit()
    later = folder_of(tmp_path / "part", 2)
    kept = Experience.load(later)
    replace(kept, advantages=-9 * kept.advantages).save(later)
    rest = trainer(tmp_path / "part", spec, sft=conversations())
    rest.fit()
    same_run(whole, rest)


class _Killed(BaseException):
    """Nothing in the package catches it."""


def _die_at(patch: pytest.MonkeyPatch, place: int | None) -> list[str]:
    """Die right before the n-th time that something is written, appended, renamed or removed; gives what was, without
    numbers. What is written inside a folder that is not there yet does not count."""
    touched: list[str] = []

    def fault(operation: str, path: Path) -> None:
        if operation == "fsync" or path.parent.name.startswith(".tmp-"):
            return
        folder = path.parent.name if path.name != "metrics.jsonl" else ""
        touched.append(f"{operation} {folder}/{re.sub(r'[0-9a-f-]*[0-9][0-9a-f-]*', '*', path.name)}")
        if len(touched) - 1 == place:
            raise _Killed

    patch.setattr(files, "fault", fault)
    return touched


KILLED: dict[str, dict[str, Any]] = {
    "every step saved": {"train": {"save_steps": 1, "save_total_limit": 1, "eval_steps": 1, "load_best_model": True}},
    "some steps saved": {"train": {"save_steps": 3}, "kl_target": 0.05},
}


@pytest.mark.parametrize("name", KILLED)
def test_killed_at_every_place_where_something_is_written(tmp_path: Path, name: str) -> None:
    """Answers, experience, metrics, checkpoints, best weights, each the first time and the last: the same command ends
    with the bytes of a run that nothing disturbed."""
    spec = stage(
        **{
            "iterations": 2,
            "minibatches": 2,
            "eval_prompts": "unused.jsonl",
            "sft_data": "unused.jsonl",
            "sft_weight": 0.2,
            **KILLED[name],
        }
    )

    def build(work: Path) -> PpoTrainer:
        return trainer(work, spec, sft=conversations(), held_out=prompts(2))

    with pytest.MonkeyPatch.context() as patch:
        places = _die_at(patch, None)
        whole = build(tmp_path / "whole")
        whole.fit()
    assert {"metrics.jsonl", "rollouts", "experience"} <= {
        part for place in places for part in place.split(" ")[1].split("/")
    }
    first_and_last = [i for i, one in enumerate(places) if one not in places[:i] or one not in places[i + 1 :]]
    kept = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "rollouts").iterdir()}
    for place in first_and_last:
        work = tmp_path / str(place)
        with pytest.MonkeyPatch.context() as patch:
            _die_at(patch, place)
            with pytest.raises(_Killed):
                build(work).fit()
        again = build(work)
        again.fit()
        same_run(whole, again)
        assert {path.name: path.read_bytes() for path in (work / "rollouts").iterdir()} == kept, places[place]
        shutil.rmtree(work)


def test_experience_is_kept_only_while_it_is_needed(tmp_path: Path) -> None:
    """One folder for the iteration at work and one for each checkpoint; gone or damaged inside an iteration is an
    error, not a guess."""
    work = tmp_path / "run"
    spec = stage(**{**RESUMED, "iterations": 5}, train={"save_steps": 3, "save_total_limit": 1})
    run = trainer(work, spec, sft=conversations())
    stopped_after(run, 18)
    with pytest.raises(_Stopped):
        run.fit()
    assert [folder.name for folder in sorted((work / "experience").iterdir())] == [
        "iteration-000003",
        "iteration-000004",
    ]
    shutil.copytree(work, tmp_path / "gone")
    shutil.rmtree(folder_of(tmp_path / "gone", 4))
    with pytest.raises(InputError, match=r"iteration-000004/manifest.json: not readable\n.*no checkpoint verifies"):
        trainer(tmp_path / "gone", spec, sft=conversations()).fit()
    path = folder_of(work, 4) / "experience.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match="sha256"):
        trainer(work, spec, sft=conversations()).fit()


def test_answers_that_were_damaged_are_let_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the first process alone: people do without them, and those that are whole stay."""
    run = trainer(tmp_path, stage(iterations=2))
    run.fit()
    state, (damaged, whole) = run.state_dict(), sorted((tmp_path / "rollouts").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    trainer(tmp_path, stage(iterations=2), group=Ranks(1, 2)).load_state_dict(state)
    assert damaged.exists() and not caplog.text
    trainer(tmp_path, stage(iterations=2)).load_state_dict(state)
    assert whole.exists() and not damaged.exists()
    assert (
        f"{damaged} is damaged or missing: the report does without these answers" in caplog.text
        and str(whole) not in caplog.text
    )


def test_target_kl_ends_an_iteration(tmp_path: Path) -> None:
    """The rest of an iteration is skipped once the policy is too far from the one that sampled; the next begins where
    it always does, and a run that was interrupted in between is bit-equal."""
    options: dict[str, Any] = {**RESUMED, "ppo_epochs": 4, "minibatches": 1, "target_kl": 2e-3, "kl_target": None}
    whole = trainer(
        tmp_path / "whole", stage(**options, train={"save_steps": 1}), sft=conversations(), held_out=prompts(2)
    )
    whole.fit()
    steps = [row["step"] for row in log(tmp_path / "whole")]
    assert 3 < len(steps) < 12 and {4, 8, 12} <= set(steps), "some steps were skipped, to the iterations' ends"
    assert whole.progress.step == 12 and whole.progress.last_eval is not None
    assert [row["rollout/reward"] for row in log(tmp_path / "whole") if "rollout/reward" in row] == [
        s["reward"] for s in whole.history
    ]
    part = trainer(
        tmp_path / "part", stage(**options, train={"save_steps": 1}), sft=conversations(), held_out=prompts(2)
    )
    stopped_after(part, 4)
    with pytest.raises(_Stopped):
        part.fit()
    rest = trainer(
        tmp_path / "part", stage(**options, train={"save_steps": 1}), sft=conversations(), held_out=prompts(2)
    )
    rest.fit()
    same_run(whole, rest)


# Parts


def test_minibatches_cover_every_prompt_once_a_pass() -> None:
    """Seven prompts in three minibatches, two passes: each pass has each prompt once, in another order, in parts of 3,
    2 and 2."""
    plan = minibatch_plan(7, stage(ppo_epochs=2, minibatches=3), seed=1, iteration=4)
    assert len(plan) == 6 and [len(plan.examples(i)) for i in range(6)] == [3, 2, 2, 3, 2, 2]
    first, second = plan.order[:7].tolist(), plan.order[7:].tolist()
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    assert minibatch_plan(7, stage(), seed=1, iteration=5).order.tolist() != first


def test_the_controller_by_hand() -> None:
    """Ziegler's: error (KL - target) / target held to +-.2, times .1: at most 2 % a time."""
    assert adapted(0.1, 9.0, None) == 0.1
    assert adapted(0.1, 6.6, 6.0) == pytest.approx(0.1 * 1.01)
    assert adapted(0.1, 60.0, 6.0) == pytest.approx(0.102) and adapted(0.1, 0.0, 6.0) == pytest.approx(0.098)


def test_the_engine_gets_the_weights_of_every_iteration(tmp_path: Path) -> None:
    """Before each iteration's answers, with a version that grows; once for an evaluation and the iteration after
    it."""
    spec = stage(iterations=3, eval_prompts="held_out.jsonl", train={"eval_steps": 1})
    net = policy(spec)
    engine = ExactEngine(net)
    trainer(tmp_path, spec, net=net, engine=engine, held_out=prompts(2)).fit()
    assert engine.pushed == [1, 2, 3, 4], "before the first, and after each of three steps"


def test_the_weights_with_the_highest_reward_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = stage(iterations=3, eval_prompts="held_out.jsonl", train={"eval_steps": 1, "load_best_model": True})
    run = trainer(tmp_path, spec, held_out=prompts(2))
    rewards = iter([0.1, -0.5, 0.7, 0.2])
    monkeypatch.setattr(run, "evaluate", lambda: {"reward": next(rewards)})
    run.fit()
    assert run.progress.best_step == 2 and run.progress.last_eval == {"reward": 0.7}


def test_held_out_prompts_are_answered_greedily(tmp_path: Path) -> None:
    """Before the first and after the last step; the same policy gives the same answers."""
    spec = stage(iterations=1, train={"learning_rate": 1e-30}, value_learning_rate=1e-30)
    run = trainer(tmp_path, spec, held_out=prompts(4))
    run.fit()
    before, after = run.progress.first_eval, run.progress.last_eval
    assert before is not None and before == after and "loss" not in before
    files = sorted((tmp_path / "rollouts").glob("held-out-*"))
    assert [path.name for path in files] == ["held-out-00000000.parquet", "held-out-00000001.parquet"]
    one, other = (read_parquet(path) for path in files)
    assert [row["answer"] for row in one] == [row["answer"] for row in other]
    for value, column in (("reward", "score"), ("length", "length"), ("finished", "finished")):
        assert before[value] == pytest.approx(np.mean([row[column] for row in one]), abs=1e-6), "means over the prompts"


def test_conversations_are_watched_without_being_trained(tmp_path: Path) -> None:
    """`sft_data` without a weight: its loss is reported, and no weight depends on it."""
    results = []
    for data in ({}, {"sft_data": "unused.jsonl"}):
        run = trainer(tmp_path / str(len(data)), stage(**data), sft=conversations() if data else ())
        run.fit()
        results.append(run)
    plain, watched = results
    assert not plain.sft_losses and len(watched.sft_losses) == 3
    assert all("loss/sft" not in row and row["sft_loss"] > 0 for row in log(watched.work))
    same = weights(plain.model)
    assert all(torch.equal(value, same[name]) for name, value in weights(watched.model).items())


# Does it learn?


LONGEST = 5


def even_share(answer: Answer) -> float:
    """Even tokens, as a share of how many there could have been: an end, though even, is worth nothing."""
    return sum(token % 2 == 0 and token != STOP for token in answer.ids) / LONGEST


def learn(work: Path, estimator: str, seed: int, reward: Any) -> list[float]:
    """The mean share of even tokens in each of 14 iterations' answers, while ``reward`` is learned."""
    spec = stage(
        estimator=estimator,
        iterations=14,
        samples_per_prompt=4,
        kl_coefficient=0.01,
        max_new_tokens=LONGEST,
        train={"learning_rate": 1e-2, "batch_size": 12, "microbatch_tokens": 1200},
        **({"value_learning_rate": 1e-2} if estimator == "gae" else {}),
    )
    shares: list[float] = []

    def scored(answer: Answer) -> float:
        shares.append(even_share(answer))
        return float(reward(answer))

    baselines = torch.full((12,), 0.5) if spec.uses_baseline else None
    run = trainer(work, spec, score=scored, data=prompts(12, length=4), baselines=baselines, proved=False, seed=seed)
    run.fit()
    return np.array(shares).reshape(14, -1).mean(1).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("estimator", ["gae", "rloo", "group", "reinforce"])
def test_a_known_answer_is_learned(tmp_path: Path, estimator: str) -> None:
    """Reward: the share of even tokens. Over three seeds its mean rises by more than three times what it varies from
    step to step."""
    for seed in (1, 2, 3):
        curve = learn(tmp_path / str(seed), estimator, seed, even_share)
        noise = statistics.stdev(b - a for a, b in itertools.pairwise(curve)) / 2**0.5
        rise = statistics.mean(curve[-3:]) - statistics.mean(curve[:3])
        assert rise > 3 * noise and rise > 0.1, (seed, curve)


def test_a_constant_reward_teaches_nothing(tmp_path: Path) -> None:
    """The same task, rewarded whatever is said: what is measured does not rise."""
    for seed in (1, 2, 3):
        curve = learn(tmp_path / str(seed), "gae", seed, lambda answer: 0.5)
        noise = statistics.stdev(b - a for a, b in itertools.pairwise(curve)) / 2**0.5
        rise = statistics.mean(curve[-3:]) - statistics.mean(curve[:3])
        assert rise < 3 * noise, (seed, curve)


# Several processes


WORKER = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from align.training.launch import leave, ranks
from tests.invariants.test_ppo import two_process_run, weights
torch.set_num_threads(1)
work = Path(sys.argv[1])
run = two_process_run(work, ranks())
run.fit()
save_file(weights(run.model), work / f"final-{run.ranks.rank}.safetensors")
leave()
"""


def two_process_run(work: Path, group: Any) -> PpoTrainer:
    return trainer(
        work,
        stage(iterations=2, minibatches=2, samples_per_prompt=2, whiten_advantages=True),
        group=group,
        held_out=prompts(3),
    )


def test_two_processes_train_on_one_experience(tmp_path: Path) -> None:
    """Two processes that go on from the experience of one take its steps: whitening, counts and gradients are
    of the whole step. In the next iteration each samples for half of the prompts, other answers than the other's; and
    both end with the same weights."""
    single = two_process_run(tmp_path / "one", None)
    stopped_after(single, 2)
    with pytest.raises(_Stopped):
        single.fit()
    work = tmp_path / "two"
    work.mkdir()
    shutil.copytree(tmp_path / "one" / "experience", work / "experience")
    _processes(work)
    first, second = (load_file(work / f"final-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    for one, two in zip(log(tmp_path / "one"), log(work)[:2], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5) and one["grad_norm"] == pytest.approx(
            two["grad_norm"], rel=1e-4
        )
    rows = read_parquet(work / "rollouts" / "iteration-000001.parquet")
    assert [row["prompt_id"] for row in rows[::2]] == [f"p{number}" for number in single.parts.plan.examples(1)]
    assert len({row["answer"] for row in rows}) > len(rows) // 2


def _processes(work: Path) -> None:
    port = 20000 + (os.getpid() * 7 + len(str(work))) % 20000
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-c", WORKER, str(work)]
    children = [subprocess.Popen(command, env={**env, "RANK": str(r)}, cwd=ROOT) for r in range(2)]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
