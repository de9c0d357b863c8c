"""Checks of what a stage may need: packages, keys, servers. Each raises when it is missing."""

from __future__ import annotations

import socket
from importlib.util import find_spec
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from align.errors import EnvironmentFault
from align.recipe.kinds.judge import Judge

CONNECT_S = 3.0
"""Seconds to wait for a judge's server to accept a connection."""


def require_package(name: str, needed: str, hint: str) -> None:
    """Raises EnvironmentFault when a Python package is not installed."""
    if find_spec(name) is None:
        raise EnvironmentFault(f"{needed} the Python package {name}, which is not installed", hint=hint)


def require_key(judge: Judge) -> None:
    """Raises EnvironmentFault when a judge's key is not set."""
    from align.evaluation.chat_server import key_of

    key_of(judge)


def require_server(endpoint: str) -> None:
    """Raises EnvironmentFault when the server does not accept a connection. Nothing is sent. Behind a proxy this is not
    checked, since only the proxy could tell."""
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    if parts.scheme == "https" and parts.scheme in getproxies() and not proxy_bypass(host):
        return
    try:
        with socket.create_connection(
            (host, parts.port or (443 if parts.scheme == "https" else 80)), timeout=CONNECT_S
        ):
            return
    except OSError as error:
        hint = "start the server first, or leave the stage for later: --only names the stages that run now"
        raise EnvironmentFault(
            f"no server answers at {endpoint} ({error.strerror or type(error).__name__})", hint=hint
        ) from error
