"""What the report shows of reinforcement learning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from align.report.estimates import Change, ReportedNumber
from align.report.views.view import HELD_OUT_REWARD, KNOWN, Bars, Panel, View
from align.runs.record import StageRecord
from align.runs.values import count, mapping, number, percent, text


class PpoView(View):
    """The reward on held-out prompts and of the sampled answers, and how far KL and entropy moved."""

    measures = tuple(KNOWN[key] for key in ("reward", "sft_loss", "finished", "length"))
    panels = (
        Panel(
            "Reward",
            "sampled answers",
            (("rollout/reward", "reward"), ("rollout/score", "score"), ("rollout/baseline", "baseline")),
        ),
        Panel("Reward on held-out prompts", "greedy answers", (("reward", "reward"),)),
        Panel(
            "KL",
            "nats per token",
            (("rollout/kl", "from the reference"), ("kl_from_old", "from the policy that sampled")),
        ),
        Panel(
            "Clip fraction", "share of tokens", (("clip_fraction", "policy"), ("value_clip_fraction", "value model"))
        ),
        Panel("Entropy", "nats per token", (("rollout/entropy", "entropy"),)),
        Panel(
            "Explained variance",
            "of the returns, by the value model",
            (("rollout/explained_variance", "explained variance"),),
        ),
        Panel("Loss on conversations", "nats per token", (("sft_loss", "SFT loss"),)),
        Panel("Length of answers", "tokens", (("rollout/length", "sampled"), ("length", "length"))),
        Panel("Answers that end", "share", (("rollout/finished", "sampled"), ("finished", "finished"))),
        Panel("Engine and trainer apart", "nats per token", (("rollout/mismatch", "mean"),)),
        Panel("Losses", "", (("loss/policy", "policy"), ("loss/value", "value model"))),
    )
    held_out_key = "eval_prompts"
    best = "highest held-out reward"
    all_numbers = False

    def changes(self, stage: StageRecord) -> Iterator[Change | None]:
        """See :meth:`View.changes`. The held-out reward has the interval of its change, prompt by prompt."""
        changed = mapping(stage.report, "held_out_change")
        interval = changed.get("interval")
        low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
        mean, prompts = number(changed, "mean"), count(changed, "prompts")
        for key, change in self.measured(stage):
            if change and change.difference and key == HELD_OUT_REWARD.key and mean is not None:
                change = replace(
                    change,
                    difference=ReportedNumber(mean, number(low), number(high)),
                    items=prompts or None,
                    note=f"{prompts:,} prompts, greedy answers",
                )
            yield change
        for key, words in (
            ("reward", "reward of sampled answers"),
            ("kl", "KL from the reference, nats per token"),
            ("entropy", "entropy"),
        ):
            values = [value for row in stage.metrics if (value := number(row, f"rollout/{key}")) is not None]
            if values:
                # Means over several iterations, since the prompts of a single one may be easy or hard
                quarter = max(1, len(values) // 4)
                first, last = (sum(part) / quarter for part in (values[:quarter], values[-quarter:]))
                note = f"first and last {quarter} of {len(values)} iterations"
                yield Change.between(stage.name, words, first, ReportedNumber(last), note=note)

    def bars(self, stage: StageRecord) -> Iterator[Bars]:
        """Time by phase."""
        phases = {
            name: value
            for name in mapping(stage.report, "phase_seconds")
            if (value := number(stage.report, "phase_seconds", name))
        }
        total = sum(phases.values())
        made = [(name, [value], f"{value:,.1f} s, {percent(value, total)}") for name, value in phases.items()]
        yield Bars("Time by phase", made, [("seconds", 0)])

    def notes(self, stage: StageRecord) -> Iterator[str]:
        """What the health checks found."""
        for kind, finding in mapping(stage.report, "unhealthy").items():
            times = count(finding, "times")
            yield (
                f"{text(finding, 'message') or kind} (first at step {count(finding, 'step')}, {times}"
                f" time{'s' if times != 1 else ''})"
            )
