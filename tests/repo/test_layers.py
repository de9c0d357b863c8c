"""Imports point down only: a lower layer never knows a higher one, not even inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support.root import ROOT

PACKAGE = ROOT / "align"
LAYERS = (
    {"secrets"},
    {"errors"},
    {"files", "signals", "terminal", "collective", "machines", "slurm"},
    {"functional", "sealed", "model_families"},
    {"recipe.reference_syntax", "recipe.language"},
    {"recipe.rows"},
    {"recipe.blocks"},
    {"recipe.kinds"},
    {"recipe.schema"},
    {"recipe.checks"},
    {"recipe.load"},
    {"recipe.manuals", "sizing"},
    {"data.strict_json", "data.records", "data.tree"},
    {"data.rows", "data.leakage", "data.report", "data.answer_file"},
    {"data.description"},
    {"data.messages", "data.files"},
    {"data.mapping"},
    {"data.formats"},
    {"data.sources", "data.chat"},
    {"data.trees"},
    {"batching"},
    {"models.files"},
    {"models.placement"},
    {"models.compute"},
    {"models"},
    {"models.scalar"},
    {"training", "rollout"},
    {"scoring"},
    {"evaluation.compare"},
    {"evaluation.tasks", "evaluation.reward_bench"},
    {"evaluation"},
    {"stages.context"},
    {"stages.shared"},
    {"stages"},
    {"pipeline"},
    {"planning"},
    {"preflight"},
    {"pipeline.runner"},
    {"runs"},
    {"report.verdicts", "report.trained"},
    {"report.estimates"},
    {"report.views"},
    {"report"},
    {"report.text", "report.html"},
    {"publish"},
    {"commands"},
    {"doctor"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SHARED_BY_STAGES = {"stages.context", "stages.shared"}


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The names below `align` that a module imports, such as ``data.tree`` or ``data.tree.Tree``, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "align" and rest:
                yield rest, node.lineno


def layer_of(name: str) -> str | None:
    """The longest beginning of a name that is in the table: ``data.tree`` of ``data.tree.Tree``, ``models`` of
    ``models.load``."""
    parts = name.split(".")
    return next((own for k in range(len(parts), 0, -1) if (own := ".".join(parts[:k])) in RANK), None)


def name_of(path: Path) -> str:
    """``data.chat.encoder`` for ``align/data/chat/encoder.py``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


def test_every_module_has_a_layer() -> None:
    assert [name for path in modules() if layer_of(name := name_of(path)) is None] == []


def test_every_layer_has_a_module() -> None:
    assert {layer_of(name_of(path)) for path in modules()} | {"cli"} == RANK.keys()


def test_imports_point_down() -> None:
    wrong = []
    for path in modules():
        own = layer_of(name_of(path))
        for name, line in imported(ast.parse(path.read_text())):
            other = layer_of(name)
            if own is not None and other is not None and other != own and RANK[other] >= RANK[own]:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {own} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_kind_of_stage_imports_another() -> None:
    """What two kinds need lies in ``stages/shared``."""
    wrong = []
    for path in (PACKAGE / "stages").rglob("*.py"):
        own = path.relative_to(PACKAGE / "stages").parts[0].removesuffix(".py")
        for name, line in imported(ast.parse(path.read_text())):
            if name.startswith("stages.") and layer_of(name) not in SHARED_BY_STAGES and name.split(".")[1] != own:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_view_of_a_kind_imports_another() -> None:
    """What two kinds share lies in ``report/views/view.py``."""
    wrong = []
    for path in (PACKAGE / "report" / "views").glob("*.py"):
        for name, line in imported(ast.parse(path.read_text())):
            if name.startswith("report.views.") and name.split(".")[2] not in ("view", path.stem):
                wrong.append(f"{path.name}:{line}: imports {name}")
    assert not wrong, "\n".join(wrong)


def test_commands_and_report_import_no_stage() -> None:
    wrong = []
    for folder in ("cli", "commands", "report", "runs", "publish"):
        for path in (PACKAGE / folder).rglob("*.py"):
            for name, line in imported(ast.parse(path.read_text())):
                if name.startswith("stages.") and layer_of(name) not in SHARED_BY_STAGES:
                    wrong.append(f"{path.relative_to(PACKAGE)}:{line}: imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_finder_sees_imports_inside_functions() -> None:
    tree = ast.parse("import align.cli\ndef f():\n    from align import stages\n    from align.data.tree import Tree\n")
    assert list(imported(tree)) == [("cli", 1), ("stages", 3), ("data.tree.Tree", 4)]
    assert layer_of("data.tree.Tree") == "data.tree"


def test_no_relative_imports() -> None:
    """They would hide from the check above."""
    relative = [
        p.name
        for p in modules()
        for n in ast.walk(ast.parse(p.read_text()))
        if isinstance(n, ast.ImportFrom) and n.level > 0
    ]
    assert not relative
