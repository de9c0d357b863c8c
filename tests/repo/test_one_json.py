"""JSON of rows is decoded by one decoder, the strict one: Python's own lets pass duplicate keys, NaN, 1e400 and lone
surrogates."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.support.root import ROOT

PACKAGE = ROOT / "align"
ROWS = tuple(
    sorted(path for folder in ("data", "commands", "evaluation/tasks") for path in (PACKAGE / folder).rglob("*.py"))
)
OWN_FILES = {
    "strict_json.py": "the decoder",
    "answer_file.py": "reads back the answers that a stage wrote",
    "grouped.py": "reads back the rows that it put on disk",
    "json_rows.py": "finds where the rows of a file stand; the rows themselves go to the decoder",
    "locations.py": "reads the description that another library left beside the data",
    "load.py": "reads back the report that it wrote",
    "generate.py": "reads back the settings that it wrote",
    "store.py": "reads back what it wrote",
    "tokens.py": "reads a tokenizer's own description",
}


def decodes(path: Path) -> list[int]:
    """Lines where a module decodes JSON, or Python literals, by itself."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            name = f"{node.func.value.id}.{node.func.attr}"
            if name in ("json.loads", "json.load", "json.JSONDecoder", "ast.literal_eval") or name.startswith(
                ("orjson.", "simplejson.")
            ):
                found.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module in ("json", "orjson", "simplejson"):
            found.append(node.lineno)
    return found


def test_rows_are_decoded_in_one_place() -> None:
    wrong = {path.name: lines for path in ROWS if path.name not in OWN_FILES and (lines := decodes(path))}
    assert wrong == {"calls.py": wrong.get("calls.py", [])}
    assert len(wrong["calls.py"]) == 1, "only a call that Python printed is read as Python's literal"
