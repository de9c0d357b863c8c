"""A judge in an evaluation: a server on loopback that prefers one word, or always the first answer, or makes no sense."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from align.pipeline.runner import run_recipe
from align.recipe.load import load_recipe
from align.stages import sampling
from tests.chat_server import Reply, serving
from tests.saved import save_tiny
from tests.scripted import open_scripted, write_script

GRADES = '{"correctness": %d, "helpfulness": 5, "completeness": 5, "clarity": 5, "overall": %d}'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, answer, spread in (("first", "Rain.", 0.25), ("second", "Tea it is.", 0.3)):  # other weights, so other samples
        save_tiny(folder / name, max_position_embeddings=512, initializer_range=spread)
        write_script(folder / name, [answer])
    return folder


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        (tmp_path / name).symlink_to(models / name)
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Tea."}]} for i in range(4)]
    Path("held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sampling, "open_engine", open_scripted)
    yield


def run(endpoint: str, runs: str = "runs", **judge: Any) -> tuple[dict[str, Any], str]:
    stage = {"kind": "evaluate", "policies": ["./first", "./second"], "data": "held.jsonl", "samples_per_prompt": 1, "embedder": None}
    stage |= {"max_new_tokens": 12, "judge": {"endpoint": endpoint, "model": "j", "retries": 0, **judge}}
    Path("r.yaml").write_text(yaml.safe_dump({"name": "r", "model": "./first", "stages": {"e": stage}}))
    text = io.StringIO()
    result = run_recipe(load_recipe("r.yaml"), console=Console(file=text, width=160), runs_dir=Path(runs))
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
        assert entry["./second"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "count": 4} and set(entry) == {"./second"}
        assert report["judge"]["verdicts"]["./second"] == {"win": 4, "tie": 0, "lose": 0, "inconsistent": 0}
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


def test_a_judge_that_likes_the_first_answer_says_nothing() -> None:
    with serving(lambda question, before: Reply("Verdict: A")) as server:
        report, _ = run(server.endpoint)
    assert report["metrics"]["judge/win_rate"]["./second"]["mean"] == 0.5
    assert report["judge"]["verdicts"]["./second"] == {"win": 0, "tie": 4, "lose": 0, "inconsistent": 4}


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
    assert set(metrics["judge/win_rate"]) == {"./first", "./second"} and metrics["judge/win_rate"]["./first"]["mean"] == 0.5
    assert metrics["judge/overall"]["./first"]["mean"] == 3.0 and metrics["judge/overall"]["./second"]["difference"]["mean"] == 5.0
    assert metrics["judge/correctness"]["./second"]["mean"] == 9.0


def test_replies_that_make_no_sense_are_left_out_and_said() -> None:
    with serving(lambda question, before: Reply("Who knows?" if "\n0?\n" in question else "Verdict: tie")) as server:
        report, text = run(server.endpoint)
    assert report["metrics"]["judge/win_rate"]["./second"]["count"] == 3 and report["judge"]["unreadable"] == 2
    assert "2 of the judge's replies could not be read" in text
    with serving(lambda question, before: Reply("Who knows?")) as server:
        report, _ = run(server.endpoint, runs="others")
    assert "judge/win_rate" not in report["metrics"]
