"""One name, one thing: a public class of the package is the only one of its name."""

from __future__ import annotations

import ast
from collections import defaultdict

from tests.support.root import ROOT


def public_classes() -> dict[str, list[str]]:
    """Name -> the places that define it, at the top of a module."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "align").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_no_two_public_classes_have_one_name() -> None:
    twice = {name: places for name, places in public_classes().items() if len(places) > 1}
    assert not twice, "\n".join(f"{name}: {', '.join(places)}" for name, places in twice.items())


def test_classes_are_found() -> None:
    assert {"Answer", "Sample", "Trainer"} <= public_classes().keys()
