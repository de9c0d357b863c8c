"""What the training stages share: read the data, build the policy, train, save, and show what changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.table import Table
from rich.text import Text
from torch import nn

from align import files
from align.batching.batch import Batch
from align.batching.loader import Loader, StepPlan, plan_steps
from align.data.datasets import load_trees
from align.data.encode import Encoder
from align.data.report import DataReport
from align.data.store import TreeStore
from align.data.trees import Tree
from align.models.adapters import add_lora, is_lora, merged_copy
from align.models.canary import require_own_logprobs
from align.models.generate import answer
from align.models.load import load_encoder, load_policy
from align.models.save import save_policy
from align.recipe.schema import DpoStage, Lora, Model, SftStage, Train
from align.stages.context import StageContext
from align.training.launch import Ranks, ranks
from align.training.trainer import Trainer, peak_memory_bytes


@dataclass(frozen=True)
class TrainingRun:
    """Everything that a training stage starts from."""

    spec: SftStage | DpoStage
    ctx: StageContext
    group: Ranks
    base: Model
    encoder: Encoder
    data: TreeStore
    held_out: TreeStore | None
    report: DataReport
    model: nn.Module
    plan: StepPlan

    def loader(self, store: TreeStore, plan: StepPlan) -> Loader:
        """Micro-batches of a data set for this process."""
        train = self.spec.train
        return Loader(
            store.__getitem__,
            plan,
            microbatch_tokens=train.microbatch_tokens,
            layout=train.layout,
            pad_id=self.encoder.pad_id,
            rank=self.group.rank,
            world=self.group.world,
            # One row length on a GPU, whose attention kernel is compiled for each.
            row_multiple=train.microbatch_tokens if self.group.device.type == "cuda" and train.layout != "padded" else 1,
        )

    def all_of(self, store: TreeStore | None) -> list[Batch]:
        """This process's micro-batches of a whole data set; empty without one."""
        return [] if store is None else self.loader(store, self.plan).batches(range(len(store)))

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """What every trainer takes."""
        return {
            "model": self.model,
            "train": self.spec.train,
            "work": self.ctx.work,
            "name": self.ctx.name,
            "seed": self.ctx.seed,
            "console": self.ctx.console,
            "ranks": self.group,
        }

    def train_and_save(self, trainer: Trainer) -> None:
        """Train, save the policy, and report held-out metrics and answers before and after."""
        shown = self.held_out if self.held_out is not None else self.data
        prompts = [shown[i] for i in range(min(self.spec.samples, len(shown)))]
        before = _remembered(self.ctx, "samples-before", lambda: self._answers(prompts)) if self.group.first else []
        progress = trainer.fit()
        if not self.group.first:
            return
        merged = self.spec.lora is not None and self.spec.lora.save_merged
        saved = save_policy(self.model, self.encoder, self.ctx.out, base=self.base, save_merged=merged)
        after = self._answers(prompts)
        samples = [
            {"prompt": self.encoder.decode(tree.trunk), "before": b, "after": a} for tree, b, a in zip(prompts, before, after, strict=True)
        ]
        files.atomic_write(self.ctx.out / "metrics.jsonl", (self.ctx.work / "metrics.jsonl").read_bytes())
        if (self.ctx.work / "trackers").exists():
            shutil.copytree(self.ctx.work / "trackers", self.ctx.out / "trackers")
        outcome = {
            "steps": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 1),
            "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9), 1),
            "peak_memory_bytes": peak_memory_bytes(),
            "trainable_parameters": sum(p.numel() for p in trainer.parameters.values()),
            "eval_before": progress.first_eval,
            "eval_after": progress.last_eval,
            "best_step": progress.best_step,
            **saved,
        }
        files.write_json(self.ctx.out / "report.json", {**outcome, "samples": samples, "data": self.report.as_json()})
        self.ctx.note(outcome)
        _show(self.ctx, outcome, samples)

    def _answers(self, trees: Sequence[Tree], max_new_tokens: int = 64) -> list[str]:
        """Greedy answers of the policy as it is now."""
        trunks = [tree.trunk.tolist() for tree in trees]
        return [self.encoder.decode(ids).strip() for ids in answer(self.model, self.encoder, trunks, max_new_tokens=max_new_tokens)]


def prepare(spec: SftStage | DpoStage, ctx: StageContext, want: Literal["conversation", "preference"]) -> TrainingRun:
    """Read and encode the data, build the policy, plan the steps; says what was read and what was left out."""
    group = ranks()
    base = ctx.policy(spec.policy)
    encoder = load_encoder(base, cache=ctx.cache)
    ctx.encoder_digest = encoder.digest
    reading: dict[str, Any] = {"resolve": ctx.resolve, "encoder": encoder, "max_length": spec.max_length, "too_long": spec.too_long}
    reading |= {"cache": ctx.cache, "seed": ctx.seed, "train_on": spec.train_on if isinstance(spec, SftStage) else "last"}
    data, report = load_trees(want, spec.data, rejects=ctx.out / "rejects.jsonl" if group.first else None, **reading)
    held_out, held_out_report = load_trees(want, spec.eval_data, rejects=None, **reading) if spec.eval_data else (None, None)
    if group.first:
        for line in [*report.lines(), *(f"held out: {line}" for line in (held_out_report.lines() if held_out_report else []))]:
            ctx.console.print(line, highlight=False, markup=False, soft_wrap=True)
    train = spec.train
    plan = plan_steps(
        data.sizes,
        seed=ctx.seed,
        epochs=train.epochs,
        batch_size=train.batch_size,
        tokens_per_step=train.tokens_per_step,
        max_steps=train.max_steps,
    )
    model = _build_policy(base, spec.lora, train, ctx, group)
    require_own_logprobs(model, [*data[0].trunk, *data[0].branches[0].ids, *data[0].trunk][:12], train.layout)
    return TrainingRun(spec, ctx, group, base, encoder, data, held_out, report, model, plan)


def _build_policy(base: Model, lora: Lora | None, train: Train, ctx: StageContext, group: Ranks) -> nn.Module:
    """The model to train, on its device: all its weights, or new adapters on the frozen rest."""
    model: nn.Module = load_policy(base, dtype=train.dtype, device=group.device, cache=ctx.cache, quantize=lora.quantize if lora else None)
    if lora is not None:
        torch.manual_seed(ctx.seed)  # every process draws the same adapters
        model = add_lora(model, lora)
    elif is_lora(model):
        model = merged_copy(model)  # all weights are trained, so the policy's own adapter becomes part of them
    return model


def _remembered(ctx: StageContext, name: str, make: Callable[[], Any]) -> Any:
    """A value made once in this stage run, and found again when it continues after an interruption."""
    path = ctx.work / f"{name}.json"
    if not path.exists():
        files.write_json(path, make())
    return json.loads(path.read_text())


def _show(ctx: StageContext, outcome: Mapping[str, Any], samples: Sequence[Mapping[str, str]]) -> None:
    """The before/after table."""
    table = Table(title=f"{ctx.name}: before and after", title_justify="left", show_lines=True)
    for header in ("", "before", "after"):
        table.add_column(header, overflow="fold")
    if outcome["eval_before"] and outcome["eval_after"]:
        for key, value in outcome["eval_before"].items():
            table.add_row(f"held-out {key}", f"{value:.4f}", f"{outcome['eval_after'][key]:.4f}")
    for sample in samples:
        table.add_row(*(_plain(sample[part]) for part in ("prompt", "before", "after")))
    ctx.console.print(table)
    ctx.console.print(
        f"{ctx.name}  {outcome['steps']} steps, {outcome['tokens']} tokens, {outcome['seconds']} s, "
        f"{outcome['tokens_per_second']:.0f} tokens/s, peak memory {outcome['peak_memory_bytes'] / 2**30:.1f} GiB",
        highlight=False,
    )


def _plain(text: str) -> Text:
    """Model text for a terminal: no markup, no control characters."""
    return Text("".join(c if c.isprintable() or c == "\n" else "?" for c in text))
