"""A judge in an evaluation: a server on loopback that prefers one word, or always the first answer, or makes no
sense."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from align.functional.intervals import wilson
from align.pipeline.runner import run_recipe
from align.pipeline.selection import Selection
from align.recipe.load import load_recipe
from align.stages.shared import policy_samples
from tests.support.chat_server import Reply, serving
from tests.support.saved import save_tiny
from tests.support.scripted import open_scripted, write_script

GRADES = '{"correctness": %d, "helpfulness": 5, "completeness": 5, "clarity": 5, "overall": %d}'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    # Other weights, so other samples
    for name, answer, spread in (("first", "Rain.", 0.25), ("second", "Tea it is.", 0.3)):
        save_tiny(folder / name, max_position_embeddings=512, initializer_range=spread)
        write_script(folder / name, [answer])
    return folder


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        (tmp_path / name).symlink_to(models / name)
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Tea."}]} for i in range(4)
    ]
    Path("held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(policy_samples, "open_engine", open_scripted)
    yield


def run(
    endpoint: str, runs: str = "runs", policies: Sequence[str] = ("./first", "./second"), **judge: Any
) -> tuple[dict[str, Any], str]:
    stage = {
        "kind": "evaluate",
        "policies": list(policies),
        "data": "held.jsonl",
        "samples_per_prompt": 1,
        "embedder": None,
    }
    stage |= {"max_new_tokens": 12, "judge": {"endpoint": endpoint, "model": "j", "retries": 0, **judge}}
    Path("r.yaml").write_text(yaml.safe_dump({"name": "r", "model": "./first", "stages": {"e": stage}}))
    text = io.StringIO()
    result = run_recipe(
        load_recipe("r.yaml"),
        console=Console(file=text, width=160),
        runs_dir=Path(runs),
        selection=Selection(replace=True),
    )
    return json.loads((result.folder / "stages" / "e" / "report.json").read_text()), text.getvalue()


def answers_in(question: str) -> tuple[str, str]:
    found = re.search(r"<answer_a>\n(.*?)\n</answer_a>.*<answer_b>\n(.*?)\n</answer_b>", question, re.DOTALL)
    assert found
    return found.group(1), found.group(2)


def test_pairwise_in_both_orders() -> None:
    def prefers_tea(question: str, before: int) -> Reply:
        a, b = answers_in(question)
        return Reply(f"Verdict: {'tie' if a == b else 'A' if 'Tea' in a else 'B'}")

    with serving(prefers_tea) as server:
        report, _ = run(server.endpoint, price_input=1.0, price_output=2.0)
        assert len(server.requests) == 8, "four prompts, two orders"
        entry = report["metrics"]["judge/win_rate"]
        low, high = wilson(1.0, 4)
        assert entry["./second"] == {"mean": 1.0, "low": low, "high": high, "count": 4} and set(entry) == {"./second"}
        said = {"win": 4, "tie": 0, "lose": 0, "inconsistent": 0, "identical": 0, "asked": 4, "first": 4, "second": 4}
        assert report["judge"]["verdicts"]["./second"] == said and not [w for w in report["warnings"] if "judge" in w]
        assert report["judge"] | {"verdicts": 0} == {
            "model": "j",
            "verdicts": 0,
            "replies": 8,
            "unreadable": 0,
            "input_tokens": 800,
            "output_tokens": 80,
            "cost": pytest.approx((800 + 160) / 1e6),
        }
        run(server.endpoint, price_input=1.0, price_output=1.0)
        assert len(server.requests) == 8, "another price asks nothing anew"


@pytest.mark.parametrize(("always", "place", "share"), [("A", "first", "100%"), ("B", "second", "0%")])
def test_a_judge_that_likes_a_place_is_doubted(always: str, place: str, share: str) -> None:
    """With the numbers: on a coin's side in half of the verdicts, whichever answer it is."""
    with serving(lambda question, before: Reply(f"Verdict: {always}")) as server:
        report, text = run(server.endpoint)
    assert report["metrics"]["judge/win_rate"]["./second"]["mean"] == 0.5
    verdicts = report["judge"]["verdicts"]["./second"]
    assert (verdicts["tie"], verdicts["inconsistent"], verdicts["first"] + verdicts["second"]) == (4, 4, 8)
    contradicts, prefers = (warning for warning in report["warnings"] if warning.startswith("the judge"))
    assert "in 4 of 4 pairs (100%) the verdict changed with the order" in contradicts
    assert (
        prefers.startswith(f"the judge prefers the {place} answer on ./second")
        and f"of 8 verdicts ({share} [" in prefers
    )
    assert contradicts in text and prefers in text


def test_a_judge_that_says_a_tie_to_all_is_not_doubted() -> None:
    with serving(lambda question, before: Reply("Verdict: tie")) as server:
        report, _ = run(server.endpoint)
    assert not [warning for warning in report["warnings"] if "judge" in warning]


def test_identical_answers_are_ties_that_nobody_is_asked_about() -> None:
    """Both policies write the same to two of four prompts, but for white space."""

    def answer(question: str, before: int) -> Reply:
        a, b = answers_in(question)
        assert a.strip() != b.strip()
        return Reply("Verdict: A" if a == "Tea it is." else "Verdict: B")

    for name in ("first", "second"):
        shutil.copytree(Path(name).resolve(), f"own-{name}")
        write_script(Path(f"own-{name}"), ["Same.", "Same. ", "Rain." if name == "first" else "Tea it is."])
    with serving(answer) as server:
        report, text = run(server.endpoint, policies=["./own-first", "./own-second"])
        sent = len(server.requests)
    verdicts = report["judge"]["verdicts"]["./own-second"]
    assert (
        verdicts["identical"] > 0 and verdicts["asked"] + verdicts["identical"] == 4 and sent == 2 * verdicts["asked"]
    )
    assert (
        report["metrics"]["judge/win_rate"]["./own-second"]["count"] == 4 and verdicts["tie"] >= verdicts["identical"]
    )
    assert f"{verdicts['identical']} of 4 pairs of answers are identical; they are ties, and not sent" in text


def test_against_the_datas_answer_and_grades_beside_it() -> None:
    def answer(question: str, before: int) -> Reply:
        if "<answer_a>" in question:
            return Reply("Verdict: tie")
        own = question.rpartition("<answer>\n")[2].partition("\n</answer>")[0]
        assert "<reference_answer>\nTea.\n" in question
        return Reply(GRADES % ((9, 8) if own.startswith("Tea") else (2, 3)))

    with serving(answer) as server:
        report, _ = run(server.endpoint, methods=["pairwise", "pointwise"], against="target")
    metrics = report["metrics"]
    assert (
        set(metrics["judge/win_rate"]) == {"./first", "./second"}
        and metrics["judge/win_rate"]["./first"]["mean"] == 0.5
    )
    assert (
        metrics["judge/overall"]["./first"]["mean"] == 3.0
        and metrics["judge/overall"]["./second"]["difference"]["mean"] == 5.0
    )
    assert metrics["judge/correctness"]["./second"]["mean"] == 9.0


def test_replies_that_make_no_sense_are_left_out_and_said() -> None:
    with serving(lambda question, before: Reply("Who knows?" if "\n0?\n" in question else "Verdict: tie")) as server:
        report, text = run(server.endpoint)
    assert report["metrics"]["judge/win_rate"]["./second"]["count"] == 3 and report["judge"]["unreadable"] == 2
    assert "2 of the judge's replies could not be read" in text
    assert (
        report["judge"]["unreadable_replies"] == ["Who knows?", "Who knows?"]
        and 'They begin: "Who knows?"; "Who knows?"' in text
    )
    with serving(lambda question, before: Reply("\x1b[31mNo\n\x07" + "way " * 100)) as server:
        report, text = run(server.endpoint, runs="steering")
    (warning,) = (warning for warning in report["warnings"] if "could not be read" in warning)
    assert "\x1b" not in warning + text and "\x07" not in warning and "?[31mNo" in warning and len(warning) < 400
    with serving(lambda question, before: Reply("Who knows?")) as server:
        report, _ = run(server.endpoint, runs="others")
    assert "judge/win_rate" not in report["metrics"]
