"""``kind: sft``: supervised fine-tuning. Conversations in, a policy out.

The loss is the negative log-likelihood of the assistant's tokens, the turn-ending token included, averaged per token or per conversation
over the whole optimiser step. Conversations are single-branch trees: everything before the first target is the trunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from align import files
from align.batching.batch import Batch
from align.batching.loader import Loader
from align.data.datasets import load_trees
from align.functional.losses import sequence_nll, token_nll
from align.models.forward import batch_logprobs
from align.models.load import load_encoder
from align.models.save import save_policy
from align.recipe.schema import SftStage
from align.stages.context import StageContext
from align.stages.training import Samples, build_loader, build_policy, eval_batches, remembered, sample_answers, step_plan
from align.training.launch import ranks
from align.training.metrics import Mean
from align.training.trainer import LossOutput, Trainer, peak_memory_bytes


class SftTrainer(Trainer):
    """The sft loss on the common loop."""

    def __init__(self, loader: Loader, held_out: Sequence[Batch], loss: str, **common: Any) -> None:
        super().__init__(total_steps=len(loader.plan), **common)
        self.loader, self.held_out, self.per_sequence = loader, held_out, loss == "sequence_mean"

    def steps(self) -> Iterator[Sequence[Batch]]:
        """The loader's steps from where the run is."""
        return self.loader.from_step(self.progress.step)

    def eval_batches(self) -> Sequence[Batch]:
        """Held-out conversations."""
        return self.held_out

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Trained tokens, or conversations."""
        return {"sft": batch.num_branches if self.per_sequence else batch.num_targets}

    def loss(self, batch: Batch) -> LossOutput:
        """Summed negative log-likelihood: over tokens, or over each conversation's mean."""
        logprobs = batch_logprobs(self.model, batch, own_attention=self.loader.layout == "padded")
        if not self.per_sequence:
            return LossOutput({"sft": token_nll(logprobs).sum()})
        total = sequence_nll(logprobs, batch.branch, batch.num_branches).sum()
        return LossOutput({"sft": total}, {"token_nll": Mean(token_nll(logprobs).detach().sum(), batch.num_targets)})


def run(spec: SftStage, ctx: StageContext) -> None:
    """Load, train, save, and show what changed."""
    group = ranks()
    base = ctx.policy(spec.policy)
    encoder = load_encoder(base, cache=ctx.cache)
    reading: dict[str, Any] = {"resolve": ctx.resolve, "encoder": encoder, "max_length": spec.max_length, "seed": ctx.seed}
    reading |= {"cache": ctx.cache, "train_on": spec.train_on, "too_long": spec.too_long}
    store, report = load_trees("conversation", spec.data, rejects=ctx.out / "rejects.jsonl" if group.first else None, **reading)
    held_out, eval_report = load_trees("conversation", spec.eval_data, rejects=None, **reading) if spec.eval_data else (None, None)
    if group.first:
        for line in [*report.lines(), *([f"held out: {line}" for line in eval_report.lines()] if eval_report else [])]:
            ctx.console.print(line, highlight=False)

    model = build_policy(base, spec.lora, spec.train, ctx, group)
    plan = step_plan(store, spec.train, ctx.seed)
    trainer = SftTrainer(
        build_loader(store, plan, spec.train, encoder, group),
        eval_batches(held_out, spec.train, encoder, group),
        spec.loss,
        model=model,
        train=spec.train,
        work=ctx.work,
        name=ctx.name,
        seed=ctx.seed,
        console=ctx.console,
        ranks=group,
    )
    shown = held_out if held_out is not None else store
    prompts = [shown[i] for i in range(min(spec.samples, len(shown)))]
    before = remembered(ctx, "samples-before", lambda: sample_answers(model, encoder, prompts)) if group.first else []
    progress = trainer.fit()
    if not group.first:
        return

    saved = save_policy(model, encoder, ctx.out, base=base, save_merged=spec.lora is not None and spec.lora.save_merged)
    samples = Samples([encoder.decode(t.trunk) for t in prompts], before, sample_answers(model, encoder, prompts))
    files.atomic_write(ctx.out / "metrics.jsonl", (ctx.work / "metrics.jsonl").read_bytes())
    outcome = {
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9), 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "eval_before": progress.first_eval,
        "eval_after": progress.last_eval,
        "best_step": progress.best_step,
        "trainable_parameters": sum(p.numel() for p in trainer.parameters.values()),
        **saved,
    }
    files.write_json(ctx.out / "report.json", {**outcome, "samples": samples.as_json(), "data": report.as_json()})
    ctx.note(outcome)
    show(ctx, outcome, samples)


def show(ctx: StageContext, outcome: Mapping[str, Any], samples: Samples) -> None:
    """The before/after table."""
    table = Table(title=f"{ctx.name}: before and after", title_justify="left", show_lines=True)
    table.add_column("", overflow="fold")
    table.add_column("before", overflow="fold")
    table.add_column("after", overflow="fold")
    if outcome["eval_before"] and outcome["eval_after"]:
        for key, value in outcome["eval_before"].items():
            table.add_row(f"held-out {key}", f"{value:.4f}", f"{outcome['eval_after'][key]:.4f}")
    for sample in samples.as_json():
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
