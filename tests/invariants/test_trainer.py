"""The common training loop: what it promises, whatever the split, the process count, or the interruption."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from align.batching.batch import Batch
from align.batching.loader import Loader, plan_steps
from align.batching.tree import pack
from align.data.tree import Branch, Tree
from align.errors import EnvironmentFault, InputError, TrainingFault
from align.functional.losses import sequence_nll
from align.models.adapters import add_lora
from align.models.compute.forward import batch_logprobs
from align.recipe.schema import Lora, Train
from align.stages.sft import SftTrainer
from align.training.checkpoint import newest_checkpoint, save_checkpoint
from align.training.launch import Ranks, ranks
from align.training.optim import build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors
from align.training.precision import computes_in
from align.training.progress import BestMetric, Progress
from align.training.trainer import LossOutput, TrainerArguments
from tests.support.root import ROOT

VOCAB = 61


def model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
    )


def trees(n: int, seed: int = 0) -> list[Tree]:
    """Conversations of very unequal length and very unequal numbers of targets."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        length = int(rng.integers(1, 40))
        mask = rng.random(length) < rng.random()
        mask[-1] = True
        trunk = rng.integers(0, VOCAB, int(rng.integers(1, 12))).astype(np.int32)
        made.append(Tree(f"t{i}", trunk, (Branch(rng.integers(0, VOCAB, length).astype(np.int32), mask),)))
    return made


def trainer(
    work: Path,
    data: list[Tree],
    *,
    net: torch.nn.Module | None = None,
    group: Ranks | None = None,
    loss: str = "token_mean",
    **options: object,
) -> SftTrainer:
    group = group or Ranks()
    train = Train(**{"learning_rate": 1e-3, "batch_size": 8, "microbatch_tokens": 64, "warmup_ratio": 0.0, **options})
    plan = plan_steps(
        [t.size for t in data], seed=3, epochs=train.epochs, batch_size=train.batch_size, max_steps=train.max_steps
    )
    work.mkdir(parents=True, exist_ok=True)
    held_out = pack(trees(9, seed=9), microbatch_tokens=train.microbatch_tokens)
    loader = Loader(data.__getitem__, plan, train.microbatch_tokens, train.layout, rank=group.rank, world=group.world)
    arguments = TrainerArguments(
        model=model() if net is None else net,
        train=train,
        work=work,
        name="sft",
        seed=5,
        console=Console(quiet=True),
        ranks=group,
    )
    return SftTrainer(arguments, loader, [b for i, b in enumerate(held_out) if i % group.world == group.rank], loss)


def weights(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def log(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def losses(work: Path) -> list[float]:
    return [row["loss"] for row in log(work) if "loss" in row]


@pytest.mark.parametrize("loss", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_accumulation_does_not_change_the_step(tmp_path: Path, loss: str, layout: str) -> None:
    """One micro-batch of 8, 2-4 of a few, or 8 of one give the same 20-step curve, without a one-sided drift."""
    data = trees(40)
    curves = []
    for budget in (10_000, 100, 1):
        work = tmp_path / f"{budget}"
        run = trainer(work, data, loss=loss, layout=layout, microbatch_tokens=budget, epochs=4)
        assert {10_000: 1, 1: 8}.get(budget, 3) <= len(run.loader.step(0)) <= {10_000: 1, 1: 8}.get(budget, 6)
        run.fit()
        curves.append(losses(work))
    for other in curves[1:]:
        difference = np.array(other) - np.array(curves[0])
        assert np.abs(difference).max() < 1e-5
        assert abs(difference.mean()) < 2e-6
    assert len(curves[0]) == 20


@torch.no_grad()
def test_sequence_mean_is_longaligns_weighted_packing(tmp_path: Path) -> None:
    """METHODS 4.2: (1/K) sum over K packs of sum over tokens of K / (N_i M) * nll, the released form, is our
    per-conversation mean."""
    data = trees(12)
    net = model()
    packs = pack(data, microbatch_tokens=60)
    assert len(packs) > 2
    m, k = len(data), len(packs)
    released = 0.0
    for batch in packs:
        logprobs = batch_logprobs(net, batch)
        n_i = torch.bincount(batch.branch, minlength=batch.num_branches)[batch.branch]
        released = released + (-(logprobs) * k / (n_i * m)).sum() / k
    whole = pack(data, microbatch_tokens=10_000)[0]
    ours = sequence_nll(batch_logprobs(net, whole), whole.branch, whole.num_branches).mean()
    torch.testing.assert_close(ours, released, atol=1e-6, rtol=0)
    # and it is not the token mean, or this test could not tell them apart
    assert abs(float(ours + batch_logprobs(net, whole).mean())) > 1e-3


def test_loss_that_is_logged_is_the_loss_of_the_data(tmp_path: Path) -> None:
    """The first logged loss is the token mean over the first step's rows, computed one row at a time by transformers
    itself."""
    data = trees(8)
    run = trainer(tmp_path, data, max_steps=1)
    reference = model()
    total, count = 0.0, 0
    for tree in data:
        ids = torch.tensor(np.concatenate([tree.trunk, tree.branches[0].ids]))[None].long()
        logits = reference(ids).logits[0].log_softmax(-1).detach()
        for t in range(len(tree.trunk), ids.shape[1]):
            if tree.branches[0].mask[t - len(tree.trunk)]:
                total -= float(logits[t - 1, ids[0, t]])
                count += 1
    run.fit()
    assert losses(tmp_path)[0] == pytest.approx(total / count, abs=1e-5)


def test_first_adam_step_by_hand(tmp_path: Path) -> None:
    """With bias correction, AdamW's first step moves each weight by lr * g / (|g| + eps), eps as configured."""
    data = trees(8)
    run = trainer(tmp_path, data, max_steps=1, max_grad_norm=None, weight_decay=0.1)
    before = weights(run.model)
    gradients = {}
    step = run.optimizer.step
    run.optimizer.step = lambda: (gradients.update({n: p.grad.clone() for n, p in run.parameters.items()}), step())[1]  # type: ignore[method-assign]
    run.fit()
    for name, after in weights(run.model).items():
        g = gradients[name].double()
        decay = 0.1 if after.ndim >= 2 else 0.0  # norms are not decayed
        expected = before[name].double() * (1 - 1e-3 * decay) - 1e-3 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(after.double(), expected, atol=2e-7, rtol=1e-5)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("stop", [1, 3, 5, 7])
def test_resumed_equals_uninterrupted(tmp_path: Path, stop: int, adapters: bool) -> None:
    """Stopped inside the first epoch (3), at its boundary (5), inside the second (7): the rest is bit-equal,
    dropout included."""
    data = trees(40)

    def net() -> torch.nn.Module:
        base = model()
        torch.manual_seed(1)
        return add_lora(base, Lora(rank=2, dropout=0.2)) if adapters else base

    whole = trainer(tmp_path / "whole", data, net=net(), epochs=2)
    whole.fit()
    part = trainer(tmp_path / "part", data, net=net(), epochs=2, save_steps=1)
    part.after_step = lambda metrics: _stop_after(part, stop)  # type: ignore[method-assign]
    with pytest.raises(_Stopped):
        part.fit()
    rest = trainer(tmp_path / "part", data, net=net(), epochs=2, save_steps=1)
    rest.fit()
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(rest.model)[name]), name
    assert losses(tmp_path / "whole") == losses(tmp_path / "part")
    assert [r["step"] for r in log(tmp_path / "part") if "loss" in r] == list(range(1, 11))
    assert [r for r in log(tmp_path / "part") if "eval/loss" in r] == [
        r for r in log(tmp_path / "whole") if "eval/loss" in r
    ]


@dataclass(frozen=True)
class _OneOfTwo(Ranks):
    """A process that speaks for the other as well, to test what each does without starting both."""

    def gather(self, value: Any) -> list[Any]:
        return [value, value]

    def broadcast_object(self, value: Any) -> Any:
        return "what the first sent" if value is None else value


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_says_that_the_run_continues(tmp_path: Path, rank: int) -> None:
    """And from where; the others are silent, and take the random state that was theirs."""
    part = trainer(tmp_path, trees(40), group=_OneOfTwo(), save_steps=1)
    part.after_step = lambda metrics: _stop_after(part, 2)  # type: ignore[method-assign]
    with pytest.raises(_Stopped):
        part.fit()
    rest = trainer(tmp_path, trees(40), group=_OneOfTwo(rank=rank), save_steps=1)
    rest.console = Console(file=io.StringIO(), width=200)
    rest.resume()
    assert rest.progress.step == 2
    said = rest.console.file.getvalue()
    assert said == ("sft  continues from step 2 of 5\n" if rank == 0 else "")


def test_the_bar_is_closed_whatever_happens(tmp_path: Path) -> None:
    """On a terminal its live display would otherwise go on over what is printed next, and the cursor would stay
    hidden."""
    for fails in (False, True):
        run = trainer(tmp_path / str(fails), trees(16))
        run.console = Console(file=(text := io.StringIO()), force_terminal=True)
        if fails:
            run.after_step = lambda metrics, run=run: _stop_after(run, 0)  # type: ignore[misc]
        with pytest.raises(_Stopped) if fails else nullcontext():
            run.fit()
        hidden, shown = "\x1b[?25l", "\x1b[?25h"
        assert 0 <= text.getvalue().rfind(hidden) < text.getvalue().rfind(shown)


class _Stopped(Exception):
    pass


def _stop_after(run: SftTrainer, step: int) -> None:
    # progress.step counts finished steps; this step's checkpoint is not written yet, so the one before is resumed from
    if run.progress.step == step + 1:
        raise _Stopped


def _saved(tmp_path: Path) -> Path:
    run = trainer(tmp_path, trees(40), epochs=2, save_steps=2)
    run.after_step = lambda metrics: _stop_after(run, 6)  # type: ignore[method-assign]
    with pytest.raises(_Stopped):
        run.fit()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    return tmp_path / "checkpoints"


def test_missing_optimizer_file_is_never_accepted(tmp_path: Path) -> None:
    """Without the optimiser's state a checkpoint is skipped; when none is whole, it is an error, not a silent
    new start."""
    root = _saved(tmp_path)
    (root / "step-00000006" / "optimizer.safetensors").unlink()
    found = newest_checkpoint(root, ["weights", "optimizer", "rng-0"])
    assert found is not None and found.step == 4
    (root / "step-00000004" / "optimizer.safetensors").unlink()
    with pytest.raises(InputError, match=r"optimizer\.safetensors: missing"):
        trainer(tmp_path, trees(40), epochs=2).fit()
    with pytest.raises(InputError, match=r"rng-1\.safetensors: checkpoint has no such state; remove the checkpoint"):
        found.tensors("rng-1")


def test_optimizer_missing_from_files_and_manifest(tmp_path: Path) -> None:
    """A manifest that never mentions the optimiser does not make the checkpoint whole."""
    root = _saved(tmp_path)
    for folder in root.iterdir():
        (folder / "optimizer.safetensors").unlink()
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["optimizer.safetensors"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="not in the manifest"):
        trainer(tmp_path, trees(40), epochs=2).fit()


@pytest.mark.parametrize("damage", ["flip", "truncate", "zeros", "no manifest"])
def test_damaged_checkpoint_is_skipped(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """A flipped byte, a truncated or zero-filled file, or a missing manifest: the older checkpoint is used,
    and it is said."""
    root = _saved(tmp_path)
    path = root / "step-00000006" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
    elif damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "zeros":
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    else:
        (root / "step-00000006" / "manifest.json").unlink()
    path.write_bytes(bytes(content))
    found = newest_checkpoint(root, ["weights"])
    assert found is not None and found.step == 4
    assert "step-00000006" in caplog.text


def test_not_finite_stops_before_the_optimiser(tmp_path: Path) -> None:
    """An infinite weight makes the loss NaN: nothing moves, the examples are named, and the checkpoint before
    survives."""
    run = trainer(tmp_path, trees(16), epochs=4, save_steps=1)

    def poison(metrics: object) -> None:
        if run.progress.step == 3:
            with torch.no_grad():
                run.model.model.norm.weight[0] = math.inf  # type: ignore[union-attr]

    run.after_step = poison  # type: ignore[method-assign]
    with pytest.raises(TrainingFault, match="step 4") as caught:
        run.fit()
    assert caught.value.exit_code == 1
    moments = [run.optimizer.state[p]["exp_avg"] for p in run.parameters.values()]
    assert all(m.isfinite().all() for m in moments)
    report = json.loads((tmp_path / "nan.json").read_text())
    assert report["step"] == 4 and len(report["examples"]) == 8
    assert newest_checkpoint(tmp_path / "checkpoints", ["weights", "optimizer"]) is not None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_the_optimiser(tmp_path: Path, value: float) -> None:
    """The loss is a number and the gradient is none, as behind a root of zero or an overflow in the backward
    pass."""
    run = trainer(tmp_path, trees(16), epochs=4)

    def poison(metrics: object) -> None:
        if run.progress.step == 2:
            next(iter(run.parameters.values())).register_hook(lambda gradient: gradient * value)

    run.after_step = poison  # type: ignore[method-assign]
    with pytest.raises(TrainingFault, match=r"grad_norm not finite at step 3 .*the optimiser has not moved"):
        run.fit()
    assert all(p.isfinite().all() for p in run.parameters.values())
    assert all(run.optimizer.state[p]["exp_avg"].isfinite().all() for p in run.parameters.values())
    report = json.loads((tmp_path / "nan.json").read_text())
    assert report["step"] == 3 and math.isfinite(float(report["metrics"]["loss"])) and len(report["examples"]) == 8


def test_every_process_draws_dropout_of_its_own(tmp_path: Path) -> None:
    """Two processes that drew the same masks would halve the noise that a step averages over. Here both see the same
    examples, so that nothing but their dropout can differ; a process that runs again draws the same."""

    def losses_of(rank: int, name: str) -> list[float]:
        base = model()
        torch.manual_seed(1)
        run = trainer(
            tmp_path / name,
            trees(24),
            net=add_lora(base, Lora(rank=2, dropout=0.5)),
            group=Ranks(rank=rank),
            learning_rate=0.1,
        )
        run.loader = replace(run.loader, rank=0)
        seen: list[float] = []
        run.after_step = lambda metrics: seen.append(metrics["loss"])  # type: ignore[method-assign]
        run.fit()
        return seen

    first, second, again = losses_of(0, "first"), losses_of(1, "second"), losses_of(1, "again")
    assert first[0] == pytest.approx(second[0], abs=1e-5), "an adapter without effect yet hides its dropout"
    assert all(abs(one - other) > 1e-4 for one, other in zip(first[1:], second[1:], strict=True)) and len(first) == 3
    assert second == again


def test_the_best_metric_has_a_direction() -> None:
    """The first evaluation is the best so far; an equal one is no improvement."""
    for better, good, bad in (("lower", 1.0, 3.0), ("higher", 3.0, 1.0)):
        metric = BestMetric("x", better)
        assert metric.improved({"x": bad}, None)
        assert metric.improved({"x": good}, {"x": 2.0}) and not metric.improved({"x": bad}, {"x": 2.0})
        assert not metric.improved({"x": 2.0}, {"x": 2.0})


def test_progress_of_an_earlier_version_is_read() -> None:
    """Its checkpoints also have the best loss apart from the evaluation that it is of."""
    now = Progress(step=3, best_eval={"reward": 0.5}, best_step=2)
    assert Progress.of({**asdict(now), "best_loss": -0.5}) == now


@pytest.mark.parametrize("held_out", [False, True])
def test_memory_that_runs_out_is_told_with_the_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: bool
) -> None:
    """The size of what did not fit, in training and on held-out data."""
    run = trainer(tmp_path, trees(8), microbatch_tokens=10_000)
    full = run.eval_batches()[0] if held_out else run.loader.step(0)[0]
    loss = run.loss

    def out_of_memory(batch: Batch, *, held_out: bool) -> LossOutput:
        if len(batch.tree_ids) == len(full.tree_ids):
            raise MemoryError
        return loss(batch, held_out=held_out)

    monkeypatch.setattr(run, "loss", out_of_memory)
    with pytest.raises(MemoryError) as caught:
        run.fit()
    longest = max(t.trunk + max(t.branches) for row in full.rows for t in row)
    size = (
        f"{full.num_tokens} tokens (examples: {len(full.tree_ids)}, rows: 1, tokens of the longest prompt with its"
        f" answer: {longest})"
    )
    assert caught.value.__notes__ == [f"on a micro-batch of {size}"]


def test_held_out_loss_does_not_depend_on_the_batching(tmp_path: Path) -> None:
    """The same held-out loss for one row at a time, a few, or all at once."""
    values = []
    for budget in (1, 70, 10_000):
        run = trainer(tmp_path / str(budget), trees(8), microbatch_tokens=budget)
        values.append(run.evaluate()["loss"])
    assert max(values) - min(values) < 1e-6


def test_best_and_early_stopping(tmp_path: Path) -> None:
    """A learning rate that destroys the model: stops after two evaluations without improvement and ends with the best
    weights, which may be those that it started with, and with their evaluation."""
    run = trainer(
        tmp_path,
        trees(40),
        epochs=10,
        learning_rate=0.5,
        eval_steps=1,
        load_best_model=True,
        early_stopping_patience=2,
        lr_scheduler_type="constant",
    )
    untrained = run.evaluate()["loss"]
    progress = run.fit()
    evals = {row["step"]: row["eval/loss"] for row in log(tmp_path) if "eval/loss" in row}
    assert progress.step < run.total_steps
    first_best = min(evals, key=lambda step: (evals[step], step))
    assert len([step for step in evals if step > first_best]) == 2, "as soon as the patience is over"
    assert list(evals.values())[-1] >= min(evals.values()) and evals[0] == pytest.approx(untrained)
    assert progress.best_eval is not None and progress.best_eval["loss"] == min(evals.values())
    assert run.evaluate()["loss"] == pytest.approx(min(evals.values()), abs=1e-6)
    assert progress.last_eval == progress.best_eval


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("wanted", [True, False])
def test_the_best_weights_are_kept_once_and_only_where_they_are_wanted(tmp_path: Path, rank: int, wanted: bool) -> None:
    """By the first process; a run that ends with its last weights spends no disk on them."""
    run = trainer(tmp_path, trees(8), group=_OneOfTwo(rank, 2), load_best_model=wanted, eval_steps=1)
    run.held_out = pack(trees(3), microbatch_tokens=64)
    run._evaluate(None)
    assert run.progress.best_eval is not None and (tmp_path / "best").exists() == (wanted and rank == 0)


def test_a_checkpoint_that_nobody_asked_for_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it cannot be written, that is said and the run goes on; one that was asked for ends it."""

    def full(*arguments: object, **options: object) -> None:
        raise EnvironmentFault("the disk is full")

    monkeypatch.setattr("align.training.trainer.save_checkpoint", full)
    run = trainer(tmp_path, trees(8))
    run.console = Console(file=(text := io.StringIO()), width=200)
    run.save(None, asked=False)
    assert text.getvalue() == "sft  note: no checkpoint at step 0: the disk is full\n"
    with pytest.raises(EnvironmentFault, match="the disk is full"):
        run.save(None, asked=True)


def test_the_precision_is_the_coarsest_of_a_forward_pass() -> None:
    """What ties are measured by."""
    settings: list[tuple[dict[str, Any], str]] = [
        ({}, "fp32"),
        ({"dtype": "bf16"}, "bf16"),
        ({"autocast": "bf16"}, "bf16"),
        ({"dtype": "bf16", "autocast": "bf16"}, "bf16"),
    ]
    for options, wanted in settings:
        assert computes_in(Train(learning_rate=1.0, **options)) == wanted


def test_the_optimisers_state_is_that_of_the_parameters(tmp_path: Path) -> None:
    """One whose state is missing, or state of one that is not there: an error, and nothing is taken over."""
    run = trainer(tmp_path, trees(8), max_steps=1)
    run.fit()
    state = optimizer_tensors(run.optimizer, run.parameters)
    for name in list(run.parameters)[:2]:
        fewer = {key: value for key, value in state.items() if key.rpartition("/")[0] != name}
        more = {**state, "unknown/exp_avg": torch.ones(1)}
        others = {other: parameter for other, parameter in run.parameters.items() if other != name}
        for parameters, tensors in ((run.parameters, fewer), (run.parameters, more), (others, state)):
            fresh = build_optimizer(run.groups, run.train)
            with pytest.raises(KeyError, match="optimizer state does not match the parameters"):
                load_optimizer_tensors(fresh, parameters, tensors)
            assert not fresh.state


def test_learning_rate_shape() -> None:
    """A rise that wastes no step, the peak, and the floor where the schedule ends; the same at any
    accumulation."""
    train = Train(learning_rate=2.0, warmup_ratio=0.2, min_lr_ratio=0.1, lr_scheduler_type="linear")
    rates = [learning_rate(train, s, 10) for s in range(11)]
    assert rates[:2] == [1.0, 2.0]
    assert rates[2] == 2.0
    assert rates[10] == pytest.approx(0.2)
    assert rates[6] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    part = Train(learning_rate=3.0, warmup_ratio=0.25, lr_scheduler_type="constant")  # 2.5 of 10 steps: three
    assert [learning_rate(part, s, 10) for s in range(4)] == [1.0, 2.0, 3.0, 3.0]
    cosine = Train(learning_rate=2.0, warmup_ratio=0.0, lr_scheduler_type="cosine")
    assert learning_rate(cosine, 5, 10) == pytest.approx(1.0)
    assert learning_rate(cosine, 10, 10) == pytest.approx(0.0)


WORKER = """
import sys, torch
from pathlib import Path
from tests.invariants.test_trainer import trainer, trees, weights
from align.training.launch import leave, ranks
from safetensors.torch import save_file
torch.set_num_threads(1)
work = Path(sys.argv[1])
group = ranks()
run = trainer(work, trees(37), group=group, loss=sys.argv[2], epochs=2, save_steps=3)
run.fit()
held_out = run.evaluate()
if group.first:
    save_file(weights(run.model), work / "final.safetensors")
    (work / "eval.txt").write_text(repr(held_out["loss"]))
leave()
"""


def _processes(work: Path, loss: str, world: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-c", WORKER, str(work), loss]
    children = [subprocess.Popen(command, env={**env, "RANK": str(r)}, cwd=ROOT) for r in range(world)]
    assert [child.wait(timeout=120) for child in children] == [0] * world


@pytest.mark.parametrize("loss", ["token_mean", "sequence_mean"])
def test_two_processes_equal_one(tmp_path: Path, loss: str) -> None:
    """Two gloo processes with very unequal rows give the losses, rates, weights and held-out loss of one.

    Nine held-out rows do not divide by two, and with one row a micro-batch some steps leave a process without work.
    """
    single = trainer(tmp_path / "one", trees(37), loss=loss, epochs=2)
    single.fit()
    (tmp_path / "two").mkdir()
    _processes(tmp_path / "two", loss, world=2)
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "eval/loss", "learning_rate", "grad_norm", "tokens"):
            if key in a:
                assert a[key] == pytest.approx(b[key], abs=2e-5), (a["step"], key)
    final = load_file(tmp_path / "two" / "final.safetensors")
    for name, value in weights(single.model).items():
        torch.testing.assert_close(value, final[name], atol=2e-5, rtol=0)
    assert float((tmp_path / "two" / "eval.txt").read_text()) == pytest.approx(single.evaluate()["loss"], abs=2e-5)


INTERRUPTED = """
import sys, time, torch
from pathlib import Path
from tests.invariants.test_trainer import trainer, trees
from align.errors import AlignError
from align.signals import StopFlag
run = trainer(Path(sys.argv[1]), trees(40), epochs=2)
run.after_step = lambda metrics: (print("step", flush=True), time.sleep(0.2))
try:
    with StopFlag():
        run.fit()
except AlignError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_the_same_command_continues(tmp_path: Path, signum: signal.Signals, code: int) -> None:
    """The first Ctrl-C or SIGTERM finishes the step, saves and exits 130 / 143; running again ends bit-equal to a
    clean run."""
    whole = trainer(tmp_path / "whole", trees(40), epochs=2)
    whole.fit()
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "part")]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(3):
        assert child.stdout.readline() == "step\n"
    child.send_signal(signum)
    rest, _ = child.communicate(timeout=120)
    assert child.returncode == code
    assert "saved" in rest
    again = trainer(tmp_path / "part", trees(40), epochs=2)
    again.fit()
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(again.model)[name]), name


def test_another_number_of_processes_resumes_and_says_so(tmp_path: Path) -> None:
    """A checkpoint of two processes is continued by one, from its step on, with the same losses (nothing is drawn at
    random here). What is drawn from then on is neither what the first process drew before nor what it would draw."""
    whole = trainer(tmp_path / "whole", trees(40), epochs=2)
    whole.fit()
    root = _saved(tmp_path)
    for folder in root.iterdir():
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**state, "world": 2}))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["state.json"] = hashlib.sha256((folder / "state.json").read_bytes()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(manifest))
    again = trainer(tmp_path, trees(40), epochs=2)
    again.console = Console(file=(text := io.StringIO()), width=200)
    assert again.resume() is not None
    assert text.getvalue() == (
        "sft  continues from step 6 of 10, saved by 2 processes: with 1 the same up to rounding and dropout\n"
    )
    drawn = torch.rand(3)
    for known in (again.seed * 1009, again.seed * 1009 + 1):
        torch.manual_seed(known)
        assert not torch.equal(drawn, torch.rand(3))
    again.fit()
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_a_micro_batch_is_computed_where_its_process_computes(tmp_path: Path) -> None:
    """Not where it was packed. The meta device stands in for a GPU."""

    class Elsewhere(Ranks):
        device = torch.device("meta")

    run = trainer(tmp_path, trees(8), group=Elsewhere())
    seen: list[Batch] = []
    run.loss = lambda batch, held_out: seen.append(batch) or LossOutput({})  # type: ignore[method-assign, func-returns-value]
    run.forward_backward(run.loader.step(0)[0], {})
    assert [batch.input_ids.device.type for batch in seen] == ["meta"]


def test_freed_memory_is_kept_where_it_is_the_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has an allocator of its own. With gradient checkpointing freed memory is returned."""

    class OnGpu(Ranks):
        device = torch.device("cuda")

    done: list[str] = []
    for name in ("keep", "return"):
        monkeypatch.setattr(f"align.training.trainer.{name}_freed_memory", partial(done.append, name))
    trainer(tmp_path / "gpu", trees(8), group=OnGpu())
    assert not done
    trainer(tmp_path / "cpu", trees(8))
    assert done == ["keep"]
    trainer(tmp_path / "checkpointed", trees(8), gradient_checkpointing=True)
    assert done == ["keep", "return"]


def test_single_process_never_touches_torch_distributed() -> None:
    """The group of one is the identity."""
    assert ranks() == Ranks(0, 1)
    assert Ranks().gather({"a": 1}) == [{"a": 1}]
    assert not torch.distributed.is_initialized()


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safetensors wraps a full disk in an error of its own; exit code 3, nothing half-written, older ones stay."""
    root = _saved(tmp_path)

    def full(*args: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("align.training.checkpoint.save_file", full)
    with pytest.raises(EnvironmentFault, match="No space left") as caught:
        save_checkpoint(root, 8, {"weights": {"a": torch.zeros(2)}}, {}, keep=1)
    assert caught.value.exit_code == 3
    assert sorted(p.name for p in root.iterdir()) == ["step-00000004", "step-00000006"]
