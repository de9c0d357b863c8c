"""TRL's trainers, and the arguments of their config classes, read from the source files of TRL and transformers.

The files are parsed, not imported: importing a config class needs torch and takes several seconds, too long for `align
check`.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class TrlTrainer:
    """A trainer that runs as a stage."""

    path: str
    """Module path inside the package trl, without ``_trainer`` and ``_config``."""
    rows: Literal["answers", "pairs", "prompts"]
    """What it learns from. ``answers``: prompts with one good or bad answer; ``pairs``: with a chosen and a rejected
    answer; ``prompts``: it samples the answers."""
    reference: bool
    """Does it load its reference model from the policy's path?"""
    answer_length: str | None = None
    """The argument that limits the length of sampled answers."""
    evaluates: bool = True

    @property
    def module(self) -> str:
        """Where its class is."""
        return f"trl.{self.path.replace('/', '.')}_trainer"


TRAINERS: dict[str, TrlTrainer] = {
    "KTOTrainer": TrlTrainer("trainer/kto", "answers", reference=True),
    "ORPOTrainer": TrlTrainer("experimental/orpo/orpo", "pairs", reference=False),
    "CPOTrainer": TrlTrainer("experimental/cpo/cpo", "pairs", reference=False),
    "GRPOTrainer": TrlTrainer("trainer/grpo", "prompts", reference=True, answer_length="max_completion_length"),
    "RLOOTrainer": TrlTrainer("trainer/rloo", "prompts", reference=True, answer_length="max_completion_length"),
    "GMPOTrainer": TrlTrainer(
        "experimental/gmpo/gmpo", "prompts", reference=True, answer_length="max_completion_length"
    ),
    "OnlineDPOTrainer": TrlTrainer(
        "experimental/online_dpo/online_dpo",
        "prompts",
        reference=False,
        answer_length="max_new_tokens",
        evaluates=False,
    ),
}
"""Trainers of TRL 1.16 that make a policy from the data of this package, by the name of their class."""

_TEACHER = "needs a second model as its teacher, which a stage has no key for"
_SERVER = "samples from a server on the network"
OTHERS: dict[str, str] = {
    "SFTTrainer": "is what `kind: sft` does",
    "DPOTrainer": "is what `kind: dpo` does",
    "RewardTrainer": "makes a reward model, which is what `kind: reward` does",
    "TPOTrainer": "needs a third answer in each row, the reference one, which preferences do not have",
    "A2POTrainer": "shows its scorer no tokens, and cannot go on after an interruption",
    "SDPOTrainer": "needs feedback for its own teacher in each row, which prompts do not have",
    "SDFTTrainer": "needs a privileged context in each row, which prompts do not have",
    "DistillationTrainer": _TEACHER,
    "GKDTrainer": _TEACHER,
    "GOLDTrainer": _TEACHER,
    "IWOPDTrainer": _TEACHER,
    "ServerDistillationTrainer": _SERVER,
    "AsyncDistillationTrainer": _SERVER,
    "AsyncGRPOTrainer": _SERVER,
    "PPOTrainer": "is gone from TRL; `kind: ppo` does it",
}
"""Why other trainers of TRL cannot run as a stage."""


def short(name: str) -> str:
    """A trainer's name in a normal form: that of ``KTOTrainer``, ``kto`` and ``KTO`` is the same.

    >>> short("OnlineDPOTrainer"), short("online_dpo")
    ('onlinedpo', 'onlinedpo')
    """
    return name.lower().replace("_", "").replace("-", "").removesuffix("trainer")


def config_name(trainer: str) -> str:
    """The config class of a trainer."""
    return trainer.removesuffix("Trainer") + "Config"


@dataclass(frozen=True)
class Argument:
    """An argument of a config class."""

    annotation: ast.expr
    choices: tuple[str, ...] = ()
    """The texts that its help allows; empty when any will do."""
    default: Any = None
    """The default; None also when it is not a plain value."""

    @property
    def words(self) -> str:
        """Its type as text, from the source."""
        return ast.unparse(self.annotation)

    def takes(self, value: Any) -> bool:
        """Is ``value``, as read from YAML, of the argument's type? Unknown types are assumed to be enumerations, which
        take texts."""
        return _takes(self.annotation, value)


@cache
def arguments(trainer: str) -> dict[str, Argument]:
    """The arguments of a trainer's config class, inherited ones included; empty when the installed sources do not have
    them.

    Raises:
        ModuleNotFoundError: trl or transformers is not installed.
    """
    root = _package("trl")
    try:
        return _fields(root / f"{TRAINERS[trainer].path}_config.py", config_name(trainer))
    # Another version of the sources: the class checks its arguments when the stage starts
    except (OSError, SyntaxError, LookupError):
        return {}


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # for a top-level package this does not import it
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(name, name=name)
    return Path(spec.submodule_search_locations[0])


def _fields(path: Path, name: str) -> dict[str, Argument]:
    """Fields of a dataclass and of its bases; fields of nearer classes replace others."""
    tree = ast.parse(path.read_bytes())
    fields: dict[str, Argument] = {}
    definition = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if definition is None:
        raise LookupError(f"{path} has no class {name}")
    for base in reversed(definition.bases):
        if isinstance(base, ast.Name) and base.id != "object":
            fields |= _fields(_home(tree, path, base.id), base.id)
    for statement in definition.body:
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and not statement.target.id.startswith("_")
        ):
            fields[statement.target.id] = _argument(statement)
    return fields


def _home(tree: ast.Module, path: Path, name: str) -> Path:
    """The file that defines a class which a module uses."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            parts = (node.module or "").split(".")
            if node.level:
                return path.parents[node.level - 1].joinpath(*parts).with_suffix(".py")
            # The package loads it lazily, so that the import does not name its file
            if parts == ["transformers"] and name == "TrainingArguments":
                parts = ["transformers", "training_args"]
            return _package(parts[0]).parent.joinpath(*parts).with_suffix(".py")
    return path


def _argument(statement: ast.AnnAssign) -> Argument:
    """Type, default and choices of an argument, from its annotation and ``field(default=..., metadata={"choices":
    [...]})``."""
    keywords = (
        {keyword.arg: keyword.value for keyword in statement.value.keywords}
        if isinstance(statement.value, ast.Call)
        else {}
    )
    metadata = _literal(keywords.get("metadata")) or {}
    choices = metadata.get("choices") if isinstance(metadata, dict) else None
    texts = tuple(choice for choice in choices or () if isinstance(choice, str))
    default = keywords.get("default", None if isinstance(statement.value, ast.Call) else statement.value)
    return Argument(statement.annotation, texts, _literal(default))


def _literal(node: ast.expr | None) -> Any:
    if isinstance(node, ast.Dict):  # help texts may be expressions: keep plain values only
        pairs = zip(node.keys, node.values, strict=True)
        return {key.value: _literal(value) for key, value in pairs if isinstance(key, ast.Constant)}
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


_PLAIN: dict[str, type | tuple[type, ...]] = {"str": str, "bool": bool, "dict": dict, "list": list, "tuple": list}


def _takes(annotation: ast.expr, value: Any) -> bool:
    match annotation:
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str() as text):
            return _takes(ast.parse(text, mode="eval").body, value)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _takes(left, value) or _takes(right, value)
        case ast.Name(id="int"):
            return isinstance(value, int) and not isinstance(value, bool)
        case ast.Name(id="float"):
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case ast.Name(id=name) if name in _PLAIN:
            return isinstance(value, _PLAIN[name])
        case ast.Name(id="Any"):
            return True
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            return isinstance(value, list) and all(_takes(inner, item) for item in value)
        case ast.Subscript(value=ast.Name(id="dict")):
            return isinstance(value, dict)
        case ast.Subscript(value=ast.Name(id="tuple"), slice=inner):
            return isinstance(value, list) and all(
                any(_takes(kind, item) for kind in _members(inner)) for item in value
            )
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            return value in [_literal(member) for member in _members(inner)]
        case _:
            return isinstance(value, str)


def _members(node: ast.expr) -> Iterator[ast.expr]:
    yield from node.elts if isinstance(node, ast.Tuple) else (node,)
