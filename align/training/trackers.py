"""Which packages an experiment tracker needs. Imports none of them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from align.errors import EnvironmentFault

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "tensorboard": ("tensorboard", "tensorboardX"),
}
"""For each tracker, Python packages of which one has to be installed."""


def require_tracker(name: str) -> None:
    """Raises :class:`EnvironmentFault` when the package of a tracker is not installed."""
    packages = PACKAGES[name]
    if not any(find_spec(package) for package in packages):
        hint = f"pip install {packages[0]}, or take {name} out of train.report_to"
        raise EnvironmentFault(f"{name} is asked for, and the Python package {packages[0]} is not installed", hint=hint)
