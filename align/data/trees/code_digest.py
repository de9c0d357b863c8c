"""A digest of the code that token ids and masks depend on. Cached data are not used any more after it changed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import align
from align import files
from align.recipe.rows.presets import FILE as PRESETS_FILE

_PACKAGE = Path(align.__file__).parent
_ENTRY = "align.data.trees.load"
_INSIDE = ("align.data", "align.recipe.rows")
"""Imports are followed inside these packages; the rest of align neither reads rows nor makes tokens."""


@cache
def code_digest() -> str:
    """Digest of the modules that turn rows into trees, which are found by following imports, and of the presets."""
    paths = {*(_file(name) for name in deciding_modules()), PRESETS_FILE}
    return files.digest_json({path.relative_to(_PACKAGE).as_posix(): files.sha256_file(path) for path in sorted(paths)})


def deciding_modules() -> set[str]:
    """The names of the modules that turn rows into trees."""
    found: set[str] = set()
    waiting = [_ENTRY]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imported(ast.parse(_file(name).read_text(encoding="utf-8")))
    return found


def imported(tree: ast.Module) -> Iterator[str]:
    """The modules of these packages that a module imports, at its top or in a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith(_INSIDE):
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                if _file(name).is_file():
                    yield name


def _file(module: str) -> Path:
    path = _PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
