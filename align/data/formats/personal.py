"""Columns about persons, which some public data sets have. They are never copied into records, and so not into samples
or reports."""

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
    """``value`` without the entries of such names."""
    if isinstance(value, dict):
        return {key: impersonal(item) for key, item in value.items() if str(key).lower() not in PERSONAL}
    if isinstance(value, list):
        return [impersonal(item) for item in value]
    return value
