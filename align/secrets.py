"""Hiding secrets in texts that are shown or saved. They are recognised by their form."""

from __future__ import annotations

import hashlib
import re

_USER = r"(?<=://)(?!<redacted )(?:[^\s/?#]+|[^\s/:@]+:[^\s@]+)(?=@)"
"""``user:password`` of an address. A password may hold ``@`` and, in an address that is none, ``/``."""
_QUERY = (
    r"(?<=[?&;])(?P<name>[\w.-]*(?:token|key|secret|passw(?:or)?d|signature|credential|sig)[\w.-]*)"
    r"=(?!<redacted )(?P<value>[^&;#\s'\"]+)"
)
"""``?token=...`` of an address."""
_KNOWN = (
    r"\b(?:hf_[A-Za-z0-9]{12,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
    r"|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,})"
)
"""Keys of services, recognised by their beginnings."""

_IN_ADDRESS = re.compile(rf"{_USER}|{_QUERY}", re.IGNORECASE)
_IN_TEXT = re.compile(rf"{_USER}|{_QUERY}|(?-i:{_KNOWN})", re.IGNORECASE)


def hide(text: str) -> str:
    """``text`` with the password or user of an address, tokens in its query, and keys of a known form hidden.

    Each is replaced by the beginning of its digest, so that a change can still be seen.

    >>> hide("https://me:pass@host/x?token=abc").count("<redacted")
    2
    """
    return _IN_TEXT.sub(_hidden, text)


def redacted(secret: str) -> str:
    """The replacement of a secret."""
    return f"<redacted {hashlib.sha256(secret.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}>"


def in_address(text: str) -> bool:
    """Does an address in ``text`` contain a user, a password or a token?"""
    return "://" in text and _IN_ADDRESS.search(text) is not None


def _hidden(match: re.Match[str]) -> str:
    name = match["name"]
    return redacted(match[0]) if name is None else f"{name}={redacted(match['value'])}"
