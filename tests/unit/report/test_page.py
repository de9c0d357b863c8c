"""The report's page: it says what the run left, in one file; what models and data say never becomes markup; damage
stays where it is."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align.report.html.page import render, write_report
from align.report.text.summary import show
from align.runs.record import read_run
from align.runs.values import visible
from tests.support.report_run import HOSTILE, STAGES, jsonl, write_run

VOID = {"meta", "input"}


class Parsed(HTMLParser):
    """A page as a browser's parser sees it: elements, attributes, and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.raw: dict[str, list[str]] = {"style": [], "script": []}
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in self.raw:
            self.raw[self._open[-1]].append(data)
            return
        self.text += data
        if {"td", "th"} & set(self._open) and self.rows:
            self.rows[-1][-1] += data


def page_of(folder: Path) -> Parsed:
    return Parsed(render(read_run(folder)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "everything")


def test_the_numbers_are_those_of_the_run(folder: Path) -> None:
    parsed = page_of(folder)
    rows = [[" ".join(cell.split()) for cell in row] for row in parsed.rows]
    assert ["sft", "held-out loss", "2.879", "2.486", "-0.393", "no interval"] in rows
    assert ["log-prob of held-out chosen answers, nats", "-75.58", "-77.20", "-1.62", "no interval"] in rows
    reward = "reward on held-out prompts 60 prompts, greedy answers"
    assert ["ppo", reward, "0.120", "0.350", "+0.230 [+0.110, +0.350]", "better"] in rows
    assert ["talk.jsonl", "preference", "305", "229", "74", "2", "0", "229 (100 %)"] in rows
    titles = [attrs for tag, attrs in parsed.tags if tag == "svg" and attrs.get("class") == "chart"]
    assert len(titles) > 20
    for words in (
        "align run 'a recipe.yaml' seed=3",
        "8 min 40 s",
        "stage:dpo says 7.0",
        "chosen answers became less likely too",
        "kind: self_contrast",
    ):
        assert words in parsed.text
    assert read_run(folder).stage("dpo").manifest.identity.digest in parsed.text  # type: ignore[union-attr]


def test_the_order_is_the_readers(folder: Path) -> None:
    ids = [attrs["id"] for tag, attrs in page_of(folder).tags if tag == "section" and "id" in attrs]
    assert ids == ["pipeline", "changes", "data", "curves", "answers", "warnings", "repeat"]


def test_the_same_run_gives_the_same_bytes(folder: Path) -> None:
    path = write_report(read_run(folder))
    assert path == folder / "report.html"
    first = path.read_bytes()
    assert write_report(read_run(folder), folder / "again.html").read_bytes() == first


# One file


def test_nothing_comes_from_elsewhere(folder: Path) -> None:
    page = render(read_run(folder))
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#arrow\))", page)
    for tag, attrs in Parsed(page).tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base", "form")
        assert not {"src", "srcset", "action", "style", "xlink:href"} & attrs.keys()
        assert not [name for name in attrs if name.startswith("on")]
        assert (attrs.get("href") or "#").startswith("#")


def test_the_policy_allows_the_style_and_the_script_of_the_page_only(folder: Path) -> None:
    parsed = page_of(folder)
    policy = next(
        attrs["content"] for tag, attrs in parsed.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    hashes = {
        kind: base64.b64encode(hashlib.sha256("".join(texts).encode()).digest()).decode()
        for kind, texts in parsed.raw.items()
    }
    allowed = f"style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'"
    assert policy == f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    assert [tag for tag, _ in parsed.tags].count("script") == [tag for tag, _ in parsed.tags].count("style") == 1


def test_every_drawing_has_words(folder: Path) -> None:
    tags = page_of(folder).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in tags:
        if tag == "svg":
            assert attrs.get("aria-hidden") == "true" or (
                attrs.get("role") == "img" and attrs["aria-labelledby"] in ids
            )
        if tag == "a":
            assert (attrs["href"] or "").removeprefix("#") in ids


def test_a_large_run_makes_no_large_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "large", ["dpo", "compare"])
    long = {"samples": ["x " * 20_000] * 16}
    row = {
        "prompt": [{"role": "user", "content": "y" * 50_000}],
        "target": "z" * 9_000,
        "policies": {f"p{k}": long for k in range(4)},
    }
    jsonl(folder / "stages" / "compare" / "data.jsonl", [row | {"id": str(k)} for k in range(40)])
    jsonl(
        folder / "stages" / "dpo" / "metrics.jsonl",
        [{"step": k, "loss": k % 7, "grad_norm": 1.0, "logps/chosen": -k} for k in range(30_000)],
    )
    size = len(render(read_run(folder)).encode())
    assert 500_000 < size < 1_000_000


# What models and data say


def poisoned(value: Any) -> Any:
    """Every text in it, keys of free choice included, replaced by something that wants to be markup."""
    if isinstance(value, dict):
        free = {
            "dropped",
            "figures",
            "noted",
            "left_out",
            "samples_by_reason",
            "unhealthy",
            "phase_seconds",
            "policies",
            "answers_left_out",
        }
        changed = {key: poisoned(item) for key, item in value.items()}
        return changed | {
            key: {f"{HOSTILE}{k}": item for k, item in changed[key].items()}
            for key in free & changed.keys()
            if isinstance(changed[key], dict)
        }
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_text_is_text(tmp_path: Path) -> None:
    """The page has the same elements as that of a harmless run, and shows the text literally."""
    folder = write_run(tmp_path / "harmless")
    harmless = page_of(folder)
    for path in [*folder.glob("stages/*/report.json"), folder / "run.json"]:
        path.write_text(json.dumps(poisoned(json.loads(path.read_text()))))
    for path in folder.glob("stages/*/*.jsonl"):
        jsonl(path, [poisoned(json.loads(line)) for line in path.read_text().splitlines()])
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("base/model", json.dumps(HOSTILE)) + "# </script><img src=x>\n")
    page = render(read_run(folder))
    parsed = Parsed(page)
    assert {tag for tag, _ in parsed.tags} <= {tag for tag, _ in harmless.tags} | {"p"}
    assert {name for _, attrs in parsed.tags for name in attrs} <= {
        name for _, attrs in harmless.tags for name in attrs
    }
    assert parsed.raw == harmless.raw, "nothing was added to the script"
    assert parsed.text.count(visible(HOSTILE)) > 300
    assert not set(page) & {"\x1b", "\u202e"} and "{{ 7 * 7 }}" in parsed.text


def test_a_terminal_gets_no_control_characters(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", ["label"], label={"warnings": [HOSTILE + "[bold]x[/bold]"]})
    out = io.StringIO()
    show(read_run(folder), folder / "report.html", Console(file=out, width=200))
    shown = out.getvalue()
    assert visible(HOSTILE) + "[bold]x[/bold]" in shown and "\x1b" not in shown and "\u202e" not in shown
    assert shown.splitlines()[-1] == f"report: {folder / 'report.html'}"


# Damage


def scrambled(value: Any, turn: int) -> Any:
    """Every leaf and some containers replaced by something of another type."""
    others: list[Any] = [None, "text", -1, 1e308, [], {}, [None, "x", {}], {"x": None}, True]
    if isinstance(value, dict) and value:
        return (
            {key: scrambled(item, turn + k) for k, (key, item) in enumerate(value.items())}
            if turn % 5
            else others[turn % 9]
        )
    if isinstance(value, list) and value:
        return [scrambled(item, turn + k) for k, item in enumerate(value)] if turn % 4 else others[turn % 9]
    return others[turn % 9]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "gone": Path.unlink,
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00" + path.read_bytes()),
    "null": lambda path: path.write_text("null"),
    "a list": lambda path: path.write_text("[1, [], {}]\n" * 3),
}
for _turn in range(9):
    DAMAGES[f"scrambled {_turn}"] = lambda path, turn=_turn: jsonl(
        path, [scrambled(json.loads(line), turn + 1) for line in _objects(path)]
    )


def _objects(path: Path) -> list[str]:
    return [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_leaves_the_rest(tmp_path: Path, damage: str) -> None:
    """Everything of the other stages is damaged, and run.json; sft is there as before, and the page is whole."""
    folder = write_run(tmp_path / "r")
    for name in set(STAGES) - {"sft"}:
        for path in sorted((folder / "stages" / name).iterdir()):
            DAMAGES[damage](path)
    DAMAGES[damage](folder / "run.json")
    parsed = page_of(folder)
    assert ["sft", "held-out loss", "2.879", "2.486", "-0.393", "no interval"] in parsed.rows
    assert "The capital of Canada is Toronto." in parsed.text and "kind: self_contrast" in parsed.text
    show(read_run(folder), folder / "report.html", Console(file=io.StringIO(), width=100))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_history_leaves_the_numbers(tmp_path: Path, damage: str) -> None:
    folder = write_run(tmp_path / "r")
    DAMAGES[damage](folder / "history.jsonl")
    assert "2.486" in page_of(folder).text


def test_before_anything_has_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", ["sft", "dpo"])
    for path in sorted(folder.rglob("stages/*/*")):
        path.unlink()
    for name in ("history.jsonl", "run.json"):
        (folder / name).unlink()
    parsed = page_of(folder)
    assert "No stage has a result yet." in parsed.text and "not run" in parsed.text
