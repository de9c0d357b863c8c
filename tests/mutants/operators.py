"""Small mistakes that a program can make in any Python source: what a random mutant is drawn from.

Docstrings, annotations, ``assert`` and the texts of messages are left alone: nothing is computed from them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_COMPARED: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_CALCULATED: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}
_PAIRS = [
    *(
        ("min", "max"),
        ("amin", "amax"),
        ("argmin", "argmax"),
        ("sum", "mean"),
        ("any", "all"),
        ("minimum", "maximum"),
        ("floor", "ceil"),
    ),
    *(
        ("tril", "triu"),
        ("zeros", "ones"),
        ("zeros_like", "ones_like"),
        ("new_zeros", "new_ones"),
        ("exp", "log"),
        ("chosen", "rejected"),
    ),
]
_ATTRIBUTES = dict(_PAIRS) | {other: one for one, other in _PAIRS}
_METHODS = {"train": "eval", "eval": "train"}
_LOOKS = {"overflow", "highlight", "soft_wrap", "title_justify", "justify", "markup", "strict"}
"""Keyword arguments that say how something looks on a terminal, or only check, as ``zip``'s ``strict``: nothing is
computed from them."""
_TRANSPARENT = {
    "detach",
    "abs",
    "float",
    "sqrt",
    "sort",
    "cumsum",
    "contiguous",
    "transpose",
    "squeeze",
    "flatten",
    "long",
    "copy",
    "to",
    "exp",
}
"""Methods that can be left out: what they are called on stays."""
_AROUND = {"sorted", "abs", "reversed", "round", "float"}
"""Functions that can be left out: their argument stays."""


@dataclass(frozen=True)
class Mutation:
    """One mistake: ``owner.field`` becomes ``new``."""

    owner: ast.AST
    field: str
    new: Any
    what: str
    lines: tuple[int, int]
    """First and last line of what is changed."""
    statement: ast.stmt
    """The innermost statement that it is in."""

    def source(self, module: ast.Module) -> str:
        """The module with the mistake in it."""
        before = getattr(self.owner, self.field)
        setattr(self.owner, self.field, self.new)
        try:
            return ast.unparse(ast.fix_missing_locations(module))
        finally:
            setattr(self.owner, self.field, before)

    def statements(self) -> tuple[str, str]:
        """The statement without and with the mistake; of a statement with a body, its head."""
        before = getattr(self.owner, self.field)
        sound = self._text()
        if self.what == "statement dropped":
            return sound, "pass"
        setattr(self.owner, self.field, self.new)
        try:
            return sound, self._text()
        finally:
            setattr(self.owner, self.field, before)

    def _text(self) -> str:
        lines = ast.unparse(self.statement).split("\n")
        return (
            next((line for line in lines if not line.startswith("@")), "")
            if hasattr(self.statement, "body")
            else "\n".join(lines)
        )


def mutations(module: ast.Module) -> list[Mutation]:
    """All that the operators find, in the order of the source."""
    return [found for statement in module.body for found in _statement(statement, module, "body")]


def _statement(node: ast.stmt, parent: ast.AST, field: str) -> Iterator[Mutation]:
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.Assert, ast.Global, ast.Nonlocal)) or _is_type_checking(node):
        return
    place = _span(node)
    if _can_be_dropped(node):
        body: list[ast.stmt] = getattr(parent, field)
        yield Mutation(
            parent, field, [ast.Pass() if other is node else other for other in body], "statement dropped", place, node
        )
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        kept = [d for d in node.decorator_list if "no_grad" not in ast.unparse(d)]
        if len(kept) < len(node.decorator_list):
            yield Mutation(node, "decorator_list", kept, "no_grad dropped", place, node)
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.stmt):
                yield from _statement(child, node, name)
            elif isinstance(child, (ast.ExceptHandler, ast.match_case)):
                for inner in child.body:
                    yield from _statement(inner, child, "body")
            elif isinstance(child, ast.withitem):
                yield from _expression(child.context_expr, child, "context_expr", node)
            elif isinstance(child, ast.arguments):
                for default in [*child.defaults, *child.kw_defaults]:
                    if default is not None:
                        yield from _expression(default, child, "", node)
            elif isinstance(child, ast.expr) and not _is_docstring(node):
                yield from _expression(child, node, name, node)


def _expression(node: ast.expr, parent: ast.AST, field: str, statement: ast.stmt) -> Iterator[Mutation]:
    """Of an expression and all inside it; ``field`` is empty where it cannot be replaced as a whole."""
    if isinstance(node, ast.JoinedStr):
        return
    for owner, name, new, what in _edits(node, parent, field):
        yield Mutation(owner, name, new, what, _span(node), statement)
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.expr):
                yield from _expression(child, node, name, statement)
            elif isinstance(child, ast.keyword) and child.arg not in _LOOKS:
                yield from _expression(child.value, child, "value", statement)
            elif isinstance(child, ast.comprehension):
                for inner, what in ((child.iter, "iter"), *((one, "ifs") for one in child.ifs)):
                    yield from _expression(inner, child, what, statement)
                for place, condition in enumerate(child.ifs):
                    ifs = [_negated(one) if k == place else one for k, one in enumerate(child.ifs)]
                    yield Mutation(child, "ifs", ifs, "condition negated", _span(condition), statement)


def _edits(node: ast.expr, parent: ast.AST, field: str) -> Iterator[tuple[ast.AST, str, Any, str]]:
    """(owner, field, new value, what) of one node; what is inside it comes by itself."""
    if field in ("test",) and isinstance(parent, (ast.If, ast.IfExp, ast.While)):
        yield parent, field, _negated(node), "condition negated"
    match node:
        case ast.Compare(ops=ops):
            for place, op in enumerate(ops):
                for other in _COMPARED[type(op)]:
                    yield node, "ops", [other() if k == place else one for k, one in enumerate(ops)], "comparison"
        case ast.BinOp(op=op) if type(op) in _CALCULATED:
            yield node, "op", _CALCULATED[type(op)](), "arithmetic"
        case ast.BoolOp(op=op):
            yield node, "op", ast.And() if isinstance(op, ast.Or) else ast.Or(), "and, or"
            for place in range(len(node.values)):
                values = [one for k, one in enumerate(node.values) if k != place]
                yield node, "values", values, "operand of and, or dropped"
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            yield from _replaced(node, parent, field, node.operand, "not, sign dropped")
        case ast.Constant(value=bool() as value):
            yield node, "value", not value, "constant"
        case ast.Constant(value=int() | float() as value):
            yield node, "value", value + 1, "constant"
            yield node, "value", value - 1 if isinstance(value, int) else value * 2 or 0.5, "constant"
        case ast.Name(id=name) if name in _FUNCTIONS:
            yield node, "id", _FUNCTIONS[name], "name"
        case ast.Attribute(attr=name) if name in _ATTRIBUTES:
            yield node, "attr", _ATTRIBUTES[name], "name"
        case ast.Attribute(attr=name) if name in _METHODS and isinstance(parent, ast.Call) and field == "func":
            yield node, "attr", _METHODS[name], "name"
        case ast.Slice(lower=lower, upper=upper):
            if lower is not None:
                yield node, "lower", ast.BinOp(lower, ast.Add(), ast.Constant(1)), "slice"
            if upper is not None:
                yield node, "upper", ast.BinOp(upper, ast.Sub(), ast.Constant(1)), "slice"
        case ast.IfExp():
            yield from _replaced(node, parent, field, node.body, "condition always true")
            yield from _replaced(node, parent, field, node.orelse, "condition never true")
    if isinstance(node, ast.Call):
        yield from _call(node, parent, field)


def _call(node: ast.Call, parent: ast.AST, field: str) -> Iterator[tuple[ast.AST, str, Any, str]]:
    for keyword in (one for one in node.keywords if one.arg not in _LOOKS):
        yield node, "keywords", [other for other in node.keywords if other is not keyword], "keyword argument dropped"
    if len(node.args) >= 2 and not any(isinstance(one, ast.Starred) for one in node.args[:2]):
        yield node, "args", [node.args[1], node.args[0], *node.args[2:]], "arguments exchanged"
    if isinstance(node.func, ast.Name) and node.func.id == "range":
        yield node, "args", [*node.args[:-1], ast.BinOp(node.args[-1], ast.Sub(), ast.Constant(1))], "range one shorter"
    if isinstance(node.func, ast.Name) and node.func.id in _AROUND and node.args:
        yield from _replaced(node, parent, field, node.args[0], "function dropped")
    if isinstance(node.func, ast.Attribute) and node.func.attr in _TRANSPARENT:
        yield from _replaced(node, parent, field, node.func.value, "method dropped")


def _replaced(
    node: ast.expr, parent: ast.AST, field: str, new: ast.expr, what: str
) -> Iterator[tuple[ast.AST, str, Any, str]]:
    """``node`` in ``parent`` by ``new``."""
    if not field:
        return
    value = getattr(parent, field)
    yield parent, field, [new if one is node else one for one in value] if isinstance(value, list) else new, what


def _negated(node: ast.expr) -> ast.expr:
    return (
        node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) else ast.UnaryOp(ast.Not(), node)
    )


def _can_be_dropped(node: ast.stmt) -> bool:
    """Not the assignment of a name: what is missing then is noticed at once."""
    if isinstance(node, ast.Assign):
        return not any(isinstance(target, (ast.Name, ast.Tuple)) for target in node.targets)
    return isinstance(node, (ast.AugAssign, ast.Raise, ast.Break, ast.Continue)) or (
        isinstance(node, ast.Expr) and not _is_docstring(node)
    )


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _span(node: ast.expr | ast.stmt) -> tuple[int, int]:
    """First and last line; of a statement with a body, its head."""
    last = (
        node.body[0].lineno - 1
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If, ast.For, ast.While, ast.With, ast.Try))
        else 0
    )
    return node.lineno, max(node.lineno, last or node.end_lineno or node.lineno)
