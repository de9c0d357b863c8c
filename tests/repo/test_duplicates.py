"""No two places of the package share six lines, with the same names or with others.

A logical line is compared as its shape: every name is N, every text S, every number 0; keywords and operators stay. Not
compared are what is alike by its nature: imports, docstrings, constants of a module, the headers of classes and
functions with their decorators, and declarations of fields (``name: type`` with or without a default).
"""

from __future__ import annotations

import ast
import io
import keyword
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from tests.support.root import ROOT

WINDOW = 6
ALLOWED: dict[frozenset[str], str] = {}
"""Pairs of modules -> why what they share is alike by chance."""

_SHAPE = {tokenize.NUMBER: "0", tokenize.STRING: "S"}
_BLANK = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}


def left_out(tree: ast.Module) -> set[int]:
    """The lines of imports, docstrings (and the ``...`` of a protocol), constants, headers and declarations."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        constant = isinstance(node, ast.Assign) and node in tree.body
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if constant or text or isinstance(node, (ast.Import, ast.ImportFrom, ast.AnnAssign)):
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            lines |= set(range(first, node.body[0].lineno))
    return lines


def logical_lines(source: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(number, shape) of every line that is compared."""
    unseen = left_out(ast.parse(source))
    shape: list[str] = []
    first = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE:
            if shape and first not in unseen:
                yield first, tuple(shape)
            shape = []
        elif token.type not in _BLANK:
            if not shape:
                first = token.start[0]
            name = token.type == tokenize.NAME and not keyword.iskeyword(token.string)
            kind = "N" if name else _SHAPE.get(token.type, token.string)
            shape.append("S" if tokenize.tok_name[token.type].startswith("FSTRING") else kind)


def shared(files: dict[str, str]) -> list[tuple[str, int, str, int]]:
    """(file, line, file, line) of all windows that stand in two places."""
    windows: dict[tuple[tuple[str, ...], ...], list[tuple[str, int]]] = defaultdict(list)
    for name, source in files.items():
        lines = list(logical_lines(source))
        for place in range(len(lines) - WINDOW + 1):
            window = tuple(shape for _, shape in lines[place : place + WINDOW])
            windows[window].append((name, lines[place][0]))
    return sorted((*one, *two) for places in windows.values() for one, two in pairwise(places))


def of_package() -> dict[str, str]:
    return {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted((ROOT / "align").rglob("*.py"))
    }


def test_no_two_places_share_six_lines() -> None:
    found = [row for row in shared(of_package()) if frozenset({row[0], row[2]}) not in ALLOWED]
    assert not found, "\n".join(f"{a}:{i} is like {b}:{j}" for a, i, b, j in found)


def test_what_is_allowed_is_still_there() -> None:
    """An entry that nothing needs any more must go, or it would hide the next one."""
    found = {frozenset({row[0], row[2]}) for row in shared(of_package())}
    assert ALLOWED.keys() <= found


BODY = '''
def f(a, b):
    """Text."""
    first = [one.value for one in a if one.value > 1]
    second = {name: len(value) for name, value in b.items()}
    if not first or not second:
        raise ValueError(f"nothing in {a}")
    total = sum(first) + sum(second.values()) * 2
    print(total, first, second, sep=", ")
    return total / len(first), total / len(second)
'''


def test_other_names_texts_and_numbers_are_no_other_code() -> None:
    other = BODY.replace("first", "one_thing").replace("nothing in", "no rows of").replace("* 2", "* 3")
    assert [row[0::2] for row in shared({"a.py": BODY, "b.py": other})] == [("a.py", "b.py")] * 2
    assert [row[0::2] for row in shared({"a.py": BODY + other})] == [("a.py", "a.py")] * 2


def test_other_code_is_not_found() -> None:
    assert not shared({"a.py": BODY, "b.py": BODY.replace("if not", "while not").replace("* 2", "** 2")})
    alike = "import os\n" * 12 + "A = 1\n" * 12 + "class B:\n" + "    c: int = 0\n" * 12
    assert not shared({"a.py": alike, "b.py": alike})
