"""Imports point down only: a lower layer never knows a higher one, not even inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "align"
LAYERS = (
    {"secrets"},
    {"errors"},
    {"files", "signals", "terminal"},
    {"recipe", "functional"},
    {"data"},
    {"batching"},
    {"models"},
    {"training", "rollout"},
    {"scoring"},
    {"evaluation"},
    {"stages"},
    {"pipeline"},
    {"report"},
    {"doctor"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Top-level parts of `align` that a module imports, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module] if node.module != "align" else [f"align.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "align" and rest:
                yield rest.partition(".")[0], node.lineno


def part_of(path: Path) -> str:
    """``align/data/encode.py`` is part of ``data``, ``align/errors.py`` of ``errors``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def test_every_part_has_a_layer() -> None:
    assert {part_of(path) for path in modules()} <= RANK.keys()


def test_imports_point_down() -> None:
    wrong = []
    for path in modules():
        own = part_of(path)
        for name, line in imported(ast.parse(path.read_text())):
            if name in RANK and name != own and RANK[name] >= RANK[own]:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {own} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_finder_sees_imports_inside_functions() -> None:
    tree = ast.parse("import align.cli\ndef f():\n    from align import stages\n    from align.data.trees import Tree\n")
    assert list(imported(tree)) == [("cli", 1), ("stages", 3), ("data", 4)]


def test_no_relative_imports() -> None:
    """They would hide from the check above."""
    relative = [p.name for p in modules() for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.ImportFrom) and n.level > 0]
    assert not relative
