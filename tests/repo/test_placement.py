"""Parameters are walked in one module, which knows where they lie: whoever walks them by itself would find a part of
each once processes hold parts."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.support.root import ROOT

WALKS = {
    *("parameters", "named_parameters", "buffers", "named_buffers", "state_dict", "load_state_dict"),
    *("get_peft_model_state_dict", "set_peft_model_state_dict", "clip_grad_norm_", "clip_grads_with_norm_"),
}
"""Calls that give or take all parameters of a module, or treat them as if they were whole."""
ALLOWED = {
    ("align/models/placement.py", "named_parameters"): "the module that knows where they lie",
    ("align/models/placement.py", "parameters"): "the module that knows where they lie",
    ("align/models/placement.py", "state_dict"): "the module that knows where they lie",
    ("align/models/placement.py", "clip_grads_with_norm_"): "the module that knows where they lie",
    ("align/models/adapters.py", "get_peft_model_state_dict"): "PEFT picks by name; a placement makes them whole",
    ("align/models/load.py", "set_peft_model_state_dict"): "of a model that was just made, before it is placed",
    ("align/rollout/weight_check.py", "named_parameters"): "of vLLM's model, in vLLM's process",
    ("align/training/trainer.py", "state_dict"): "of a trainer: JSON values",
    ("align/training/trainer.py", "load_state_dict"): "of a trainer: JSON values",
}


def walks(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines and what is called there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in WALKS:
                yield node.lineno, name


def found() -> dict[tuple[str, str], list[int]]:
    """(module, call) -> lines."""
    places: dict[tuple[str, str], list[int]] = {}
    for path in sorted((ROOT / "align").rglob("*.py")):
        for line, name in walks(ast.parse(path.read_text(encoding="utf-8"))):
            places.setdefault((str(path.relative_to(ROOT)), name), []).append(line)
    return places


def test_whoever_needs_parameters_asks_the_placement() -> None:
    others = [
        f"{module}:{line}: {name}: ask align/models/placement.py"
        for (module, name), lines in found().items()
        for line in lines
        if (module, name) not in ALLOWED
    ]
    assert not others, "\n".join(others)


def test_what_is_allowed_is_there() -> None:
    assert not ALLOWED.keys() - found().keys()


@pytest.mark.parametrize(
    "code",
    [
        "sum(p.numel() for p in model.parameters())",
        "dict(self.inner.named_parameters(recurse=False))",
        "torch.nn.utils.clip_grad_norm_(parameters, 1.0)",
        "get_peft_model_state_dict(model)",
    ],
)
def test_the_finder_sees_them(code: str) -> None:
    assert list(walks(ast.parse(code)))


def test_the_finder_lets_pass_what_is_no_walk() -> None:
    assert not list(walks(ast.parse("parameters_of(model)\nself.parameters['a']\nmodel.config.parameters")))
