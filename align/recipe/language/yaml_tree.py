"""Parsing a recipe's text into a tree with the line and column of each key and value, and with the scalars of YAML 1.2.

PyYAML composes the nodes, but scalars are not read as in YAML 1.1: ``1e-5`` is a number, ``no`` and ``on`` are text,
and ``012`` is refused because YAML 1.1 and 1.2 disagree on it. Tags, merge keys, duplicate keys, ``${VAR}`` and aliases
that expand to very large trees are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from align.errors import Problem

MAX_BYTES = 1_000_000
_MAX_NODES = 10_000
_MAX_DEPTH = 40

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class SourcePlace:
    """A place: a file with line and column (from 1), or an override (which has neither)."""

    file: str
    line: int | None = None
    col: int | None = None

    def problem(self, key: str, message: str, hint: str | None = None) -> Problem:
        """``message`` about ``key``, at this place."""
        return Problem(message, self.file, self.line, self.col, key or None, hint)


@dataclass
class Node:
    """A mapping, a list or a scalar, with its place."""

    content: dict[str, Node] | list[Node] | Scalar
    place: SourcePlace
    key_place: SourcePlace
    """Place of the key whose value this is; in a list, the place of the value."""
    text: str = ""
    """The text of a scalar, as written."""

    def plain(self) -> Any:
        """The tree as dicts, lists and scalars."""
        if isinstance(self.content, dict):
            return {key: child.plain() for key, child in self.content.items()}
        if isinstance(self.content, list):
            return [child.plain() for child in self.content]
        return self.content


class _Loader(yaml.SafeLoader):
    """Composes nodes without resolving scalars: a node has another tag than the default only if the recipe has a
    tag."""

    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {_MAX_NODES:,} values", self.get_mark())
        return super().compose_node(parent, index)

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode:
            return "plain" if implicit[0] else "quoted"
        return "collection"


class _Refused(Exception):
    """Raised to stop building a tree, after its problem was added to the list."""


def parse(text: str, file: str, problems: list[Problem]) -> Node | None:
    """The tree of a YAML text; None when it cannot be parsed. Mistakes are added to ``problems``.

    Args:
        text: the whole document.
        file: the name to show in problems.
    """
    return _parse(text, lambda mark: SourcePlace(file, mark.line + 1, mark.column + 1), SourcePlace(file), problems)


def parse_value(text: str, place: SourcePlace, problems: list[Problem]) -> Node | None:
    """The tree of an override's value; ``place`` is the place of everything in it."""
    return _parse(text, lambda mark: place, place, problems)


def _parse(
    text: str, place_of: Callable[[Any], SourcePlace], whole: SourcePlace, problems: list[Problem]
) -> Node | None:
    if len(text) > MAX_BYTES:
        problems.append(whole.problem("", f"larger than {MAX_BYTES:,} bytes; a recipe is short"))
        return None
    try:
        loader = _Loader(text)
        try:
            composed = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = place_of(mark) if mark else whole
        problems.append(
            place.problem(
                "", f"not valid YAML: {error.problem or error.context}", error.context if error.problem else None
            )
        )
        return None
    except yaml.reader.ReaderError as error:
        place = place_of(yaml.Mark("", error.position, text.count("\n", 0, error.position), 0, "", 0))
        problems.append(place.problem("", f"not valid YAML: the character U+{error.character:04X} is not allowed"))
        return None
    except RecursionError:
        problems.append(whole.problem("", "nested too deeply"))
        return None
    if composed is None:
        problems.append(whole.problem("", "is empty"))
        return None
    try:
        return _Builder(place_of, problems).build(composed, (), place_of(composed.start_mark))
    except _Refused:
        return None


class _Builder:
    """Turns PyYAML's nodes into :class:`Node`, counting the nodes that aliases expand to."""

    def __init__(self, place_of: Callable[[Any], SourcePlace], problems: list[Problem]) -> None:
        self.place_of = place_of
        self.problems = problems
        self.nodes = 0

    def build(self, node: Any, path: tuple[str, ...], key_place: SourcePlace) -> Node:
        place, key = self.place_of(node.start_mark), ".".join(path)
        self.nodes += 1
        if self.nodes > _MAX_NODES or len(path) > _MAX_DEPTH:
            self.problems.append(
                place.problem("", "too many values once its aliases (`*name`) are followed", "write them out")
            )
            raise _Refused
        if node.tag not in ("plain", "quoted", "collection"):
            self.problems.append(place.problem(key, f"tags such as `{_shown_tag(node.tag)}` are not allowed"))
            return Node(None, place, key_place, "null")
        if isinstance(node, yaml.MappingNode):
            return Node(self.mapping(node, path), place, key_place)
        if isinstance(node, yaml.SequenceNode):
            items = [
                self.build(item, (*path, str(i)), self.place_of(item.start_mark)) for i, item in enumerate(node.value)
            ]
            return Node(items, place, key_place)
        return Node(self.scalar(node, key, place), place, key_place, node.value)

    def mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Node]:
        content: dict[str, Node] = {}
        for key_node, value_node in node.value:
            place = self.place_of(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in ("plain", "quoted"):
                self.problems.append(place.problem(".".join(path), "a key must be plain text"))
                continue
            name = str(key_node.value)
            if unreadable := _UNREADABLE.search(name):
                self.problems.append(place.problem(".".join(path), _not_text(unreadable[0])))
                continue
            key = ".".join((*path, name))
            if name == "<<" and key_node.tag == "plain":
                self.problems.append(place.problem(key, "merge keys are not supported", "write the keys out"))
                continue
            child = self.build(value_node, (*path, name), place)
            if name in content:
                first = content[name].key_place
                self.problems.append(place.problem(key, f"duplicate key; it stands on line {first.line} already"))
                continue
            content[name] = child
        return content

    def scalar(self, node: yaml.ScalarNode, key: str, place: SourcePlace) -> Scalar:
        text = str(node.value)
        if unreadable := _UNREADABLE.search(text):
            self.problems.append(place.problem(key, _not_text(unreadable[0])))
        variable = re.search(r"\$\{[^}]*\}?", text)
        if variable:
            message = f"`{variable[0][:80]}`: recipes do not read environment variables"
            self.problems.append(
                place.problem(key, message, f"let the shell fill it in, as an override: '{key}=...' after the recipe")
            )
        if node.tag == "quoted":
            return text
        if re.fullmatch(r"[-+]?0\d+", text):
            self.problems.append(
                place.problem(key, f"`{text[:80]}` is octal in YAML 1.1, decimal in 1.2", "drop the zeros, or quote it")
            )
        return _plain_scalar(text)


_UNREADABLE = re.compile("[\0\ud800-\udfff]")
"""NUL and lone surrogates. YAML can write them in quotes, but no file, path or tokenizer accepts them."""


def _not_text(character: str) -> str:
    return f"holds U+{ord(character):04X}, which is no character of any text"


def _plain_scalar(text: str) -> Scalar:
    """The core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema). Digits that are too long for a number
    remain text."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if len(text) > 40:
        return text
    for pattern, base in ((r"[-+]?[0-9]+", 10), (r"0o[0-7]+", 8), (r"0x[0-9a-fA-F]+", 16)):
        if re.fullmatch(pattern, text):
            return int(text, base)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        return float(text)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        return float(text.replace(".", "", 1))
    return text


def _shown_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")[:80]


def follow(root: Node, loc: Sequence[str | int]) -> tuple[tuple[str | int, ...], Node, int | None]:
    """Go down from ``root`` along ``loc`` as far as its parts exist.

    Parts that do not exist are skipped, such as the index of a single item that the recipe wrote without its list.

    Returns:
        The parts that were followed, the node that they lead to, and after how many parts the first one was skipped
        (None when none was).
    """
    node = root
    path: tuple[str | int, ...] = ()
    gap: int | None = None
    for part in loc:
        content = node.content
        child = None
        if isinstance(content, list) and str(part).isdigit():
            child = content[int(part)] if int(part) < len(content) else None
        elif isinstance(content, dict) and isinstance(part, str):
            child = content.get(part)
        if child is not None:
            node, path = child, (*path, part)
        elif not isinstance(part, int) and gap is None:
            gap = len(path)
    return path, node, gap
