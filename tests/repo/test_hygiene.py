"""The repository keeps its own rules: no traces of the machine it was written on, short files, documented names, honest
data."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.support.root import ROOT

FOLDERS = ("align", "benchmarks", "data", "docs", "recipes", "requirements", "tests", ".ci")
QUICKSTART = ROOT / "data" / "quickstart"
DATA_FILES = ("conversations", "preferences", "prompts")

# Spelled in two parts, so that this file does not find itself.
FORBIDDEN = {
    "a path of one machine": re.compile("/" + r"(work|root|opt|home/\w+)/|/tmp/" + "w/"),
    "a package registry's host": re.compile(
        "py" + r"pi\.(org|python)|python" + r"hosted\.org|download\.py" + r"torch\.org|conda\.ana" + "conda"
    ),
    "a document that is not in the repository": re.compile(
        "(DESIGN|PIT" + "FALLS|METHODS|APIS|STYLE|PEERS|INTERFACES)" + r"\.md|\bPIT" + r"FALLS\b"
    ),
}


@cache
def files() -> tuple[Path, ...]:
    """Every file that belongs to the repository: what git tracks, or in a copy without git what lies in the known
    folders."""
    if git := shutil.which("git"):
        listed = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
        tracked = [ROOT / name for name in listed.stdout.split("\0") if name]
        if tracked:
            return tuple(path for path in tracked if path.is_file())
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        found += [
            path
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and not {"__pycache__", "out"} & set(path.parts)
        ]
    return tuple(sorted(found))


def python_files(*folders: str) -> list[Path]:
    return [path for path in files() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders]


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (QUICKSTART / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def user_turns(row: dict[str, Any]) -> list[str]:
    return [message["content"] for message in row.get("prompt") or row["messages"] if message["role"] == "user"]


def normal(text: str) -> str:
    """What is left of a text when case, punctuation and spaces do not count."""
    return re.sub(r"[\W_]+", "", text.lower())


def test_no_traces_of_a_machine() -> None:
    found = []
    for path in files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [
                f"{path.relative_to(ROOT)}:{number}: {what}"
                for what, pattern in FORBIDDEN.items()
                if pattern.search(line)
            ]
    assert not found, "\n".join(found)


MARK = re.compile(r"(?<![\w.-])[A-Z]\d{2}(?![\w.-]|\.\d)")


def test_reasons_are_written_out() -> None:
    """Comments and docstrings say why, and name no entry of a list that the reader does not have, such as "see Q17"."""
    wrong = []
    for path in python_files("align", "benchmarks", "tests"):
        if path == Path(__file__):
            continue
        with path.open("rb") as source:
            for token in tokenize.tokenize(source.readline):
                prose = token.type == tokenize.COMMENT or (token.type == tokenize.STRING and token.string[:3] == '"""')
                if prose and (found := MARK.search(token.string)):
                    wrong.append(f"{path.relative_to(ROOT)}:{token.start[0]}: {found[0]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("limit", "folders"), [(440, ("align", "benchmarks", "requirements")), (960, ("tests",))])
def test_files_are_short(limit: int, folders: tuple[str, ...]) -> None:
    """A test file follows its module, so it may be twice as long."""
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files(*folders)
    }
    assert not {path: length for path, length in lengths.items() if length >= limit}


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public classes, functions and methods without a docstring, and the module itself."""
    if ast.get_docstring(tree) is None:
        yield "module"
    for node in tree.body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield node.name
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if (
                    isinstance(item, ast.FunctionDef)
                    and not item.name.startswith("_")
                    and ast.get_docstring(item) is None
                ):
                    yield f"{node.name}.{item.name}"


def test_public_names_are_documented() -> None:
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in python_files("align")
        for name in undocumented(ast.parse(path.read_text()))
    ]
    assert not missing, "\n".join(missing)


def test_the_documentation_check_can_fail() -> None:
    source = '"""Doc."""\nclass A:\n    """Doc."""\n    def f(self): ...\n    def _g(self): ...\ndef h(): ...\n'
    assert list(undocumented(ast.parse(source))) == ["A.f", "h"]


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for path in (path for path in files() if path.suffix == ".md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in target and not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(("name", "least"), [("conversations", 240), ("preferences", 300), ("prompts", 160)])
def test_quickstart_has_enough_rows(name: str, least: int) -> None:
    assert len(rows(name)) >= least


def test_quickstart_holds_out_at_least_100_pairs() -> None:
    assert len(rows("preferences.test")) >= 100


def test_quickstart_ids_are_unique() -> None:
    ids = [row["id"] for name in DATA_FILES for split in (name, f"{name}.test") for row in rows(split)]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("split", ["", ".test"])
def test_quickstart_rows_are_well_formed(split: str) -> None:
    kinds = {
        "conversations": {"messages"},
        "preferences": {"prompt", "chosen", "rejected", "failure"},
        "prompts": {"prompt"},
    }
    for name, keys in kinds.items():
        for row in rows(name + split):
            assert keys <= row.keys(), row["id"]
            assert row["lang"] in ("en", "zh"), row["id"]
            messages = row["messages"] if name == "conversations" else row["prompt"]
            roles = [message["role"] for message in messages if message["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2), row["id"]
            assert (roles[-1] == "assistant") == (name == "conversations"), row["id"]
            answers = [*row["chosen"], *row["rejected"]] if name == "preferences" else []
            texts = [message["content"] for message in [*messages, *answers]]
            assert all(text and text == text.strip() for text in texts), row["id"]
            assert not any("<|" in text or "\ufffd" in text for text in texts), row["id"]
            if name == "preferences":
                assert row["chosen"] != row["rejected"], row["id"]


def test_a_quarter_of_the_conversations_is_chinese() -> None:
    conversations = rows("conversations")
    chinese = sum(row["lang"] == "zh" for row in conversations)
    assert 0.22 <= chinese / len(conversations) <= 0.28
    for row in conversations:
        # "zh" must mean it: Chinese characters in the prompt.
        assert (row["lang"] == "zh") == bool(re.search(r"[\u4e00-\u9fff]", "".join(user_turns(row)))), row["id"]


@pytest.mark.parametrize("split", ["preferences", "preferences.test"])
def test_the_longer_answer_wins_half_of_the_time(split: str) -> None:
    """A reward model must not be able to learn that long is good, or short."""
    pairs = rows(split)
    for language in ("en", "zh"):
        lengths = [
            (len(row["chosen"][0]["content"]), len(row["rejected"][0]["content"]))
            for row in pairs
            if row["lang"] == language
        ]
        assert 0.4 <= sum(chosen > rejected for chosen, rejected in lengths) / len(lengths) <= 0.6, language


def test_rejected_answers_fail_in_different_ways() -> None:
    failures = [row["failure"] for row in rows("preferences")]
    assert {"wrong", "evasive", "rambling", "format", "unsafe", "needless_refusal"} <= set(failures)
    assert max(failures.count(kind) for kind in set(failures)) < len(failures) / 4


def test_no_held_out_prompt_is_trained_on() -> None:
    """Of any file, not only its own: the stages train on one after the other. Every user turn counts, not only the
    whole prompt."""
    trained = {normal(turn): row["id"] for name in DATA_FILES for row in rows(name) for turn in user_turns(row)}
    leaked = [
        (row["id"], trained[normal(turn)])
        for name in DATA_FILES
        for row in rows(f"{name}.test")
        for turn in user_turns(row)
        if normal(turn) in trained
    ]
    assert not leaked


def shingles(row: dict[str, Any]) -> set[str]:
    """Runs of three letters of the user's turns (two for Chinese, where a character says more)."""
    text, size = normal(" ".join(user_turns(row))), 3 if row["lang"] == "en" else 2
    return {text[i : i + size] for i in range(max(1, len(text) - size + 1))}


def overlap(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)


def test_no_held_out_prompt_is_a_rewording_of_a_trained_one() -> None:
    trained = [(row["id"], shingles(row)) for name in DATA_FILES for row in rows(name)]
    held_out = [(row["id"], shingles(row)) for name in DATA_FILES for row in rows(f"{name}.test")]
    close = [(a, b) for a, ours in held_out for b, theirs in trained if overlap(ours, theirs) > 0.55]
    assert not close


@pytest.mark.parametrize("name", DATA_FILES)
def test_no_prompt_comes_twice_in_a_file(name: str) -> None:
    prompts = [(row["id"], shingles(row)) for split in (name, f"{name}.test") for row in rows(split)]
    assert not [(a, b) for (a, ours), (b, theirs) in combinations(prompts, 2) if overlap(ours, theirs) > 0.75]


def test_the_data_card_counts_right() -> None:
    card = (QUICKSTART / "README.md").read_text(encoding="utf-8")
    for split in (split for name in DATA_FILES for split in (name, f"{name}.test")):
        table = rows(split)
        english, single = sum(row["lang"] == "en" for row in table), sum(len(user_turns(row)) == 1 for row in table)
        system = sum((row.get("prompt") or row["messages"])[0]["role"] == "system" for row in table)
        line = (
            f"| `{split}.jsonl` | {len(table)} | {english} / {len(table) - english} | {len(table) - single} |"
            f" {system} |"
        )
        assert line in card, line
    for split in ("preferences", "preferences.test"):
        longer = sum(len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in rows(split))
        assert f"{longer} of {len(rows(split))}" in card, split


def test_conditions_are_not_nested_in_expressions() -> None:
    """`a if x else b if y else c` is read twice: two statements say it at once."""
    wrong = []
    for path in python_files("align"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.IfExp) and any(
                isinstance(part, ast.IfExp) for part in (node.test, node.body, node.orelse)
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)
