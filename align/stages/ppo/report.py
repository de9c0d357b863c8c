"""What PPO prints and reports: a few lines for each iteration, and at the end the held-out answers before and after and
the time by phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align import files
from align.data.answer_file import AnswerRow, row_of_rollout, write_answers
from align.data.report import DataReport
from align.functional.intervals import mean_of
from align.stages.context import StageContext
from align.stages.ppo.rollouts import read_parquet
from align.stages.shared.training_run import before_and_after, headlines, keep_logs
from align.terminal import byte_size, fixed
from align.training.trainer import Trainer

PHASES = ("sync", "generate", "score", "values", "train")


def iteration_lines(
    iteration: int,
    iterations: int,
    summary: Mapping[str, float],
    lap: Mapping[str, float],
    clip_fraction: float,
    sft_losses: Sequence[float],
) -> Iterator[str]:
    """Lines about an iteration: rewards, KL and loss, and the time by phase.

    Args:
        summary: numbers of its experience.
        lap: seconds by phase.
        sft_losses: mean loss on ``sft_data`` of all iterations so far, this one last; empty without such data.
    """
    parts = [f"reward {summary['reward']:.3f}"]
    if summary["baseline"]:
        parts[0] += f" (score {summary['score']:.3f}, baseline {summary['baseline']:.3f})"
    parts += [
        f"KL {summary['kl']:.4f} nats/token",
        f"length {summary['length']:.0f}",
        f"finished {summary['finished']:.0%}",
    ]
    parts += [f"entropy {summary['entropy']:.2f}", f"clipped {clip_fraction:.1%}"]
    if "explained_variance" in summary:
        parts.append(f"values explain {summary['explained_variance']:.2f}")
    if sft_losses:
        parts.append(f"SFT loss {sft_losses[-1]:.3f}")
    yield f"iteration {iteration + 1}/{iterations}  {', '.join(parts)}"
    parts = [phase_words(lap)]
    if "mismatch" in summary:
        off = f"engine's log-probs off by {summary['mismatch']:.2g} nats (largest {summary['mismatch_max']:.2g})"
        parts.append(f"{off}, importance ratio {summary['importance']:.4f}")
    yield f"iteration {iteration + 1}/{iterations}  {'; '.join(parts)}"


def phase_words(seconds: Mapping[str, float]) -> str:
    """``12.1 s: sync 0.4 (3 %), generate ...``."""
    total = sum(seconds.values())
    shares = [
        f"{phase} {seconds[phase]:.1f} ({seconds[phase] / max(total, 1e-9):.0%})"
        for phase in PHASES
        if phase in seconds
    ]
    return f"{total:.1f} s: {', '.join(shares)}"


def held_out(folder: Path, step: int) -> list[dict[str, Any]]:
    """The answers to the held-out prompts after ``step``; empty when there was no evaluation after it."""
    path = folder / f"held-out-{step:08d}.parquet"
    return read_parquet(path) if path.exists() else []


def change_of(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How the scores of the same prompts changed: the mean difference and its 95 % interval over prompts, [None, None]
    when there are too few prompts for one."""
    changes = [b["score"] - a["score"] for a, b in zip(before, after, strict=True)] if before and after else []
    if not changes:
        return None
    found = mean_of(changes)
    return {"prompts": found.count, "mean": found.mean, "interval": [found.low, found.high]}


def answers_before_and_after(
    policy: str, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> list[AnswerRow]:
    """Rows with the answers to each held-out prompt before and after training, next to each other; empty when one of
    the two evaluations is missing."""
    pairs = zip(before, after, strict=True) if before and after else ()
    return [row_of_rollout("held-out", policy, row) for pair in pairs for row in pair]


def _all_answers(policy: str, folder: Path, held_out: Sequence[AnswerRow]) -> Iterator[AnswerRow]:
    """Rows of ``answers.jsonl``: the answers to held-out prompts, those of the starting policy, and those of every
    iteration."""
    yield from held_out
    for part, pattern in (("reference", "reference.parquet"), ("rollouts", "iteration-*.parquet")):
        for path in sorted(folder.glob(pattern)):
            yield from (row_of_rollout(part, policy, row) for row in read_parquet(path))


def report(
    ctx: StageContext,
    trainer: Trainer,
    data: DataReport,
    answers: Sequence[AnswerRow],
    outcome: Mapping[str, Any],
    change: Any,
    *,
    printed: int,
) -> None:
    """Write metrics, answers and ``report.json`` into the result, set the headline numbers of the manifest, and print
    what changed.

    ``printed`` is the number of held-out prompts whose answers are printed; ``answers.jsonl`` has all of them, and all
    rollouts.
    """
    keep_logs(ctx, "trackers")
    write_answers(ctx.out, _all_answers(ctx.name, ctx.work / "rollouts", answers))
    result = {**headlines(trainer), "held_out_change": change, **outcome}
    files.write_json(ctx.out / "report.json", {**result, "data": data.as_json()})
    ctx.note(result)
    _show(ctx, result, answers[: 2 * printed])


def _show(ctx: StageContext, result: Mapping[str, Any], answers: Sequence[AnswerRow]) -> None:
    """Print the before/after table."""
    before, after, change = (result[name] for name in ("eval_before", "eval_after", "held_out_change"))
    # A stage that an earlier version began has minus the reward, as a loss.
    without_loss = {name: value for name, value in (before or {}).items() if name != "loss"}
    before_and_after(ctx, without_loss, after, answers if before and after else ())
    if change:
        low, high = (bound if bound is None else fixed(bound, 4, signed=True) for bound in change["interval"])
        sure = "too few for an interval" if low is None else f"95 % interval {low} to {high}"
        words = (
            f"the reward on {change['prompts']} held-out prompts changed by {fixed(change['mean'], 4, signed=True)}"
            f" ({sure})"
        )
        ctx.console.print(f"{ctx.name}  {words}", highlight=False, soft_wrap=True)
    words = f"{result['iterations']} iterations, {result['steps']} steps, {phase_words(result['phase_seconds'])}"
    ctx.console.print(
        f"{ctx.name}  {words}, peak memory {byte_size(result['peak_memory_bytes'])}", highlight=False, soft_wrap=True
    )
