"""The table of an evaluation, from its report. Imports neither models nor data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from align.terminal import fixed


def table(title: str, report: Mapping[str, Any]) -> Table:
    """Every metric of ``report`` (an evaluation's ``report.json``) for every policy, with intervals."""
    prompts = f"{report['prompts']:,} held-out prompts, " if "prompts" in report else ""
    shown = Table(title=f"{title}: {prompts}means with 95 % intervals", title_justify="left", show_lines=True)
    who, baseline = "policy", report["baseline"]
    if report.get("scorers"):
        who, baseline = ("policy or scorer", "the first one") if report["policies"] else ("scorer", baseline)
    for header in ("", who, "mean", f"difference to {baseline}", "items"):
        shown.add_column(header, justify="right" if header == "items" else "left", overflow="fold")
    for name, policies in report["metrics"].items():
        words = report["words"].get(name, name)
        for place, (policy, entry) in enumerate(policies.items()):
            difference = entry.get("difference")
            cells = (
                Text(words if place == 0 else ""),
                Text(policy),
                _interval(entry),
                _interval(difference) if difference else Text(),
            )
            shown.add_row(*cells, f"{entry['count']:,}" if entry.get("count") is not None else "")
    return shown


def _interval(entry: Mapping[str, Any]) -> Text:
    mean = entry["mean"]
    low = entry.get("low")
    high = entry.get("high")
    if low is None or high is None:  # too few items, or another program's number without one
        return Text(fixed(mean, 3))
    return Text(f"{fixed(mean, 3)} [{fixed(low, 3)}, {fixed(high, 3)}]")
