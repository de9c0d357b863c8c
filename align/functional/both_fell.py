"""Whether training on preferences made both answers of a pair less likely, and the sentence that reports it."""

from __future__ import annotations

from collections.abc import Mapping

_A_FALL = 0.1
"""A mean log-prob counts as lower once it fell by this many nats."""


def both_fell(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> str | None:
    """A sentence for the user when training made the held-out chosen answers less likely, and the rejected ones too;
    None otherwise, and when their log-probs were not measured."""
    names = ("logps/chosen", "logps/rejected")
    if not before or not after or any(name not in before or name not in after for name in names):
        return None
    if any(after[name] > before[name] - _A_FALL for name in names):
        return None
    change = f"{before['logps/chosen']:.1f} to {after['logps/chosen']:.1f} nats"
    return (
        f"held-out chosen answers became less likely too ({change}). "
        "DPO allows that; sft_weight, a larger beta or fewer steps work against it."
    )
