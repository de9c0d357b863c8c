"""What the training stages share: reading the data, loading the model, training, saving, and showing what changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from rich.table import Table
from torch import nn

from align import files, sealed
from align.batching.batch import Batch
from align.batching.loader import Loader, StepPlan
from align.batching.tree import row_multiple
from align.data.answer_file import AnswerRow, pairs_of, said, write_answers
from align.data.chat.encoder import Encoder
from align.data.tree import Tree
from align.data.trees.balance import BalancedTrees
from align.data.trees.store import TreeStore
from align.models.adapters import adapted, add_lora, is_lora
from align.models.canary import require_own_logprobs, require_own_states
from align.models.compute.forward import causal_lm
from align.models.compute.stream import group_count
from align.models.files.positions import positions, require_positions
from align.models.generate import answer
from align.models.load import LoadModel, load_encoder, load_policy
from align.models.merging import merged_copy
from align.models.placement import in_step
from align.models.save import save_policy
from align.models.scalar.heads import ScalarModel
from align.recipe.schema import Lora, Model, Train
from align.stages.context import StageContext
from align.stages.shared.training_data import StageData, TrainsOnRows, read_data
from align.terminal import byte_size, fixed, plain
from align.training.launch import Ranks, ranks
from align.training.memory import peak_memory_bytes
from align.training.trainer import Trainer, TrainerArguments


@dataclass(frozen=True)
class TrainingRun:
    """Data, model and context of a training stage that is ready to train."""

    spec: TrainsOnRows
    ctx: StageContext
    group: Ranks
    base: Model
    encoder: Encoder
    read: StageData
    model: nn.Module
    plan: StepPlan
    leaked: int = 0
    """Number of held-out prompts that are trained on as well."""

    @property
    def data(self) -> TreeStore:
        """All training data."""
        return self.read.trees

    @property
    def held_out(self) -> TreeStore | None:
        """All held-out data, if there are any."""
        return self.read.held_out

    def training_loader(self) -> Loader:
        """The loader of the planned steps."""
        return self.loader(self.read.examples)

    def loader(self, trees: TreeStore | BalancedTrees) -> Loader:
        """Micro-batches of trees for this process."""
        return make_loader(self.spec.train, self.encoder, self.group, trees.__getitem__, self.plan)

    def all_of(self, store: TreeStore | None) -> list[Batch]:
        """This process's micro-batches of a whole data set; empty without one."""
        return [] if store is None else self.loader(store).batches(range(len(store)))

    @property
    def trainer_arguments(self) -> TrainerArguments:
        """The arguments that all trainers share."""
        return trainer_arguments(self.model, self.spec.train, self.ctx, self.group)

    def train_and_save(self, trainer: Trainer, samples: int) -> None:
        """Train, save the policy, and report held-out metrics and the answers to some prompts, before and after."""
        shown = self.held_out if self.held_out is not None else self.data
        prompts = [shown[i] for i in range(min(samples, len(shown)))]
        before = remembered(self.ctx, "answers-before", lambda: self._answers(prompts), self.group)
        trainer.fit()
        merged = self.spec.lora is not None and self.spec.lora.save_merged
        saved = save_policy(
            self.model, self.encoder, self.ctx.out, base=self.base, save_merged=merged, writes=self.group.first
        )
        versions = {0: before, kept_step(trainer): self._answers(prompts)}
        if self.group.first:
            asked = [(tree.id, tree.trunk.tolist()) for tree in prompts]
            self.report(trainer, saved, answers=greedy_answers(self.ctx.name, self.encoder, asked, versions))

    def report(
        self, trainer: Trainer, outcome: Mapping[str, Any], *, answers: Sequence[AnswerRow] = (), **more: Any
    ) -> None:
        """Write ``report.json``, the metrics and the answers before and after, note the headline numbers, and show all
        of it; on the first process.

        ``outcome`` are headline numbers besides those of the training; ``more`` is only written into the report.
        """
        keep_logs(self.ctx, "trackers")
        outcome = {**headlines(trainer), **outcome}
        if self.read.held_out_report is not None:
            more |= {"held_out_data": self.read.held_out_report.as_json(), "held_out_leaked": self.leaked}
        if answers:
            write_answers(self.ctx.out, answers)
        files.write_json(self.ctx.out / "report.json", {**outcome, "data": self.read.report.as_json(), **more})
        self.ctx.note(outcome)
        _show(self.ctx, outcome, answers)

    def _answers(self, trees: Sequence[Tree], max_new_tokens: int = 64) -> list[list[int]]:
        """Greedy answers of the policy as it is now, as token ids; none on a process that is not needed for them."""
        if not (self.group.first or in_step(self.model)):
            return []
        return answer(self.model, self.encoder, [tree.trunk.tolist() for tree in trees], max_new_tokens=max_new_tokens)


def kept_step(trainer: Trainer) -> int:
    """The optimiser step whose weights were kept."""
    progress = trainer.progress
    return progress.best_step if trainer.train.load_best_model and progress.best_eval else progress.step


def greedy_answers(
    policy: str,
    encoder: Encoder,
    prompts: Sequence[tuple[str, Sequence[int]]],
    versions: Mapping[int, Sequence[Sequence[int]]],
) -> list[AnswerRow]:
    """Rows with the answers to each prompt before and after training, next to each other.

    Args:
        prompts: id and tokens of each.
        versions: number of optimiser steps -> the ids of the answer to each prompt after that many.
    """
    rows = []
    for place, (prompt_id, prompt) in enumerate(prompts):
        for version, answers in versions.items():
            ids = answers[place]
            finished = bool(ids) and ids[-1] in encoder.stop_ids
            text = encoder.answer_text(ids, finished=finished)
            asked = encoder.decode(prompt)
            rows.append(AnswerRow("held-out", prompt_id, asked, policy, 0, text, len(ids), finished, version=version))
    return rows


def make_loader(train: Train, encoder: Encoder, group: Ranks, tree: Callable[[int], Tree], plan: StepPlan) -> Loader:
    """Micro-batches of trees, by number, for this process; as many on every process where the model is divided among
    them."""
    return Loader(
        tree,
        plan,
        microbatch_tokens=train.microbatch_tokens,
        layout=train.layout,
        pad_id=encoder.pad_id,
        rank=group.rank,
        world=group.world,
        row_multiple=row_multiple(train.layout, train.microbatch_tokens, group.device.type),
        groups=partial(group_count, tokens=train.microbatch_tokens) if train.sharding != "none" else None,
    )


def trainer_arguments(model: nn.Module, train: Train, ctx: StageContext, group: Ranks) -> TrainerArguments:
    """The arguments that all trainers share, for one stage run."""
    return TrainerArguments(
        model=model,
        train=train,
        work=ctx.work,
        name=ctx.name,
        seed=ctx.seed,
        console=ctx.console,
        ranks=group,
        placement=group.placement_for(train.sharding),
    )


def keep_logs(ctx: StageContext, *folders: str) -> None:
    """Copy the metrics, and the ``folders`` of the work folder that exist, into the result."""
    files.atomic_write(ctx.out / "metrics.jsonl", (ctx.work / "metrics.jsonl").read_bytes())
    for name in folders:
        if (ctx.work / name).exists():
            shutil.copytree(ctx.work / name, ctx.out / name)


def headlines(trainer: Trainer) -> dict[str, Any]:
    """Numbers about the training, for the manifest and the report."""
    progress = trainer.progress
    return {
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9), 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "trainable_parameters": sum(p.numel() for p in trainer.parameters.values()),
        "eval_before": progress.first_eval,
        "eval_after": progress.last_eval,
        "best_step": progress.best_step,
    }


def prepare(
    spec: TrainsOnRows,
    ctx: StageContext,
    build: Callable[[Any, Lora | None, int], nn.Module],
    load: LoadModel = load_policy,
) -> TrainingRun:
    """Read and encode the data, plan the steps, and load the model; print what was read and what was left out.

    Args:
        build: makes the module to train from the loaded model, the recipe's ``lora`` and the seed. The result must be
            the same in every process.
        load: loads the model; has the arguments of :func:`load_policy`, and may also return a reward model.
    """
    group = ranks()
    base = ctx.policy(spec.starting_model)
    encoder = load_encoder(base, cache=ctx.cache)
    ctx.encoder_digest = encoder.digest
    rejects = ctx.out / "rejects.jsonl" if group.first else None
    read = read_data(spec, resolve=ctx.resolve, encoder=encoder, cache=ctx.cache, seed=ctx.seed, rejects=rejects)
    leaked: list[str] = []
    if group.first:
        for line in read.lines():
            ctx.console.print(line, highlight=False, markup=False, soft_wrap=True)
        leaked = read.leaked()
        if leaked:
            ctx.warn(_leak(leaked, len(read.held_out or ())))
    train, lora, first = spec.train, spec.lora, read.trees[0]
    start: Any = load(
        base, dtype=train.dtype, device=group.device, cache=ctx.cache, quantize=lora.quantize if lora else None
    )
    canary, inner = (
        [*first.trunk, *first.branches[0].ids, *first.trunk][:12],
        start.backbone if isinstance(start, ScalarModel) else None,
    )
    if inner is None:
        require_own_logprobs(start, canary, train.layout)
    else:
        require_own_states(inner, canary, train.layout)
    if group.first and (note := _beyond(start if inner is None else inner, read.trees)):
        ctx.warn(note)
    own_adapter = is_lora(start if inner is None else inner)
    model = build(start, lora, ctx.seed)
    if group.first:
        say_adapters(ctx, model, new=lora is not None, own=own_adapter)
    return TrainingRun(spec, ctx, group, base, encoder, read, model, read.plan(train, ctx.seed), len(leaked))


def _beyond(policy: Any, trees: TreeStore) -> str | None:
    """A note about rows that are longer than the maximum length of the model. Raises InputError if the model fails on
    them."""
    limit, longest = positions(causal_lm(policy).config.to_dict()), int(trees.path_lengths.max())
    hint = "lower max_length, or use a model that reads longer texts"
    if (note := require_positions(limit, longest, "the longest row", hint)) is None or limit is None:
        return None
    rows = int((trees.path_lengths > limit.limit).sum())
    return f"{note}; {rows:,} of {len(trees):,} rows are trained at positions that it has never seen"


def _leak(ids: Sequence[str], held_out: int) -> str:
    shown = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
    return (
        f"{len(ids):,} of {held_out:,} held-out prompts are in the training data too ({shown}): the held-out numbers"
        " are too good"
    )


def trained(model: Any, lora: Lora | None, seed: int) -> nn.Module:
    """Prepare a model for training: all its weights, or with ``lora`` new adapters on frozen weights."""
    if lora is not None:
        torch.manual_seed(seed)  # every process draws the same adapters
        model = add_lora(model, lora)
    elif is_lora(model):
        model = merged_copy(model)  # all weights are trained, so the policy's own adapter is merged into them
    whole: nn.Module = model
    return whole


def say_adapters(ctx: StageContext, model: nn.Module, *, new: bool, own: bool) -> None:
    """Print a line if adapters are trained (``new``), or if the policy had its ``own`` adapter, which is merged now."""
    if new:
        line = adapted(cast(nn.Module, getattr(model, "backbone", model)))
    elif own:
        line = "the policy's adapter is merged into its base, and all weights are trained"
    else:
        return
    ctx.console.print(f"{ctx.name}  {line}", highlight=False, markup=False, soft_wrap=True)


def remembered(ctx: StageContext, name: str, make: Callable[[], Any], group: Ranks) -> Any:
    """The value of ``make`` in the first process, computed once in this stage run and kept for when it resumes after an
    interruption. All processes call ``make`` then."""
    path = ctx.work / f"{name}.json"
    if not group.broadcast_object(group.first and sealed.find(path) is not None):
        value = make()
        if group.first:
            sealed.keep(path, files.dump_json(value).encode())
    return group.broadcast_object(json.loads(path.read_bytes()) if group.first else None)


def before_and_after(
    ctx: StageContext,
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    answers: Sequence[AnswerRow],
) -> None:
    """Print tables of held-out numbers and of answers to the same prompts before and after a stage; nothing when there
    are neither."""
    table = Table(title=f"{ctx.name}: before and after", title_justify="left", show_lines=True)
    for header in ("", "before", "after"):
        table.add_column(header, overflow="fold")
    for key in before or ():
        if before and after and key in after:
            table.add_row(f"held-out {key}", fixed(before[key], 4), fixed(after[key], 4))
    for first, last in pairs_of(answers):
        table.add_row(*map(plain, (str(first.prompt), said(first), said(last))))
    if table.row_count:
        ctx.console.print(table)


def _show(ctx: StageContext, outcome: Mapping[str, Any], answers: Sequence[AnswerRow]) -> None:
    """Print what changed, and the time and memory it took."""
    before_and_after(ctx, outcome["eval_before"], outcome["eval_after"], answers)
    ctx.console.print(
        f"{ctx.name}  {outcome['steps']} steps, {outcome['tokens']} tokens, {outcome['seconds']} s, "
        f"{outcome['tokens_per_second']:.0f} tokens/s, peak memory {byte_size(outcome['peak_memory_bytes'])}",
        highlight=False,
    )
