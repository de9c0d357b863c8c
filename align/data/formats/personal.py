"""Columns about persons, which some public data sets carry: never copied into a record, so never into a sample or a
report."""

from __future__ import annotations

from typing import Any

PERSONAL = frozenset(
    {
        "hashed_ip",
        "ip",
        "ip_address",
        "header",
        "headers",
        "user_agent",
        "user_id",
        "account",
        "country",
        "state",
        "email",
        "phone",
    },
)
"""Names of such columns, at any depth and in any case."""


def impersonal(value: Any) -> Any:
    """``value`` without what stands under such a name."""
    if isinstance(value, dict):
        return {key: impersonal(item) for key, item in value.items() if str(key).lower() not in PERSONAL}
    if isinstance(value, list):
        return [impersonal(item) for item in value]
    return value
