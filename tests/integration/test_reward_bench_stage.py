"""Reward benchmarks in an evaluation: scorers of each kind and a judge on loopback, on files in the official shapes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from align.errors import InputError
from align.evaluation.reward_bench import rewardbench1, rewardbench2, rmbench
from align.pipeline.runner import run_recipe
from align.pipeline.selection import Selection
from align.recipe.load import load_recipe
from align.recipe.schema import Model
from align.report.measures import changes
from align.runs.record import read_run
from align.scoring import stored
from align.scoring.reward_model import RewardModelScorer
from align.scoring.scorer import Answer
from tests.oracles.test_classifier import head_at_the_end, rendered, save_classifier
from tests.support import reward_benches as made
from tests.support.chat_server import Reply, serving
from tests.support.readme import every_file_is_explained
from tests.support.saved import save_tiny
from tests.support.tokenizers import mistral
from tests.unit.scoring.test_reward_model import save_rm

SHORT = {"rule": "length", "max": 1, "unit": "characters"}
"""A scorer that finds the shorter answer better."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_rm(folder)
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "rm"):
        (tmp_path / name).symlink_to(models / name)
    subsets = [subset for of in rewardbench1.SECTIONS.values() for subset in of]
    made.write(Path("rb1.jsonl"), [made.rewardbench1(subset, i) for i, subset in enumerate(subsets)])
    ties = [
        made.rewardbench2("Ties", f"{kind}:{n}", right) for n in range(2) for kind, right in (("ref", 1), ("tied", 2))
    ]
    made.write(
        Path("rb2.jsonl"),
        [*(made.rewardbench2(subset, str(i)) for i, subset in enumerate(rewardbench2.SUBSETS)), *ties],
    )
    Path("rm.json").write_text(json.dumps([made.rmbench(domain, i) for i, domain in enumerate(rmbench.DOMAINS)]))
    sources = ("mmlu-pro-law", "livebench-math", "livecodebench")
    pairs = [(label, source) for label in ("A>B", "B>A") for source in sources]
    made.write(Path("jb.jsonl"), [made.judgebench(label, source, i) for i, (label, source) in enumerate(pairs)])
    yield tmp_path


def run(
    files: Sequence[str], scorers: Sequence[Any] = (), judge: dict[str, Any] | None = None, runs: str = "runs"
) -> tuple[dict[str, Any], Path, str]:
    """(report, folder of the result, what was printed)."""
    tasks = [{"task": "reward_bench", "data": file} for file in files]
    stage = {
        "kind": "evaluate",
        "scorers": list(scorers),
        "tasks": tasks,
        **({} if judge is None else {"judge": judge}),
    }
    Path("r.yaml").write_text(yaml.safe_dump({"name": "r", "seed": 5, "model": "./base", "stages": {"bench": stage}}))
    text = io.StringIO()
    console = Console(file=text, width=200)
    result = run_recipe(load_recipe("r.yaml"), console=console, runs_dir=Path(runs), selection=Selection(replace=True))
    out = result.folder / "stages" / "bench"
    return json.loads((out / "report.json").read_text()), out, text.getvalue()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_reward_model_on_all_four(folder: Path) -> None:
    """Its numbers are those of the scores that it gives by itself; what it said of every answer is in the result."""
    report, out, printed = run(["rb1.jsonl", "rb2.jsonl", "rm.json", "jb.jsonl"], ["./rm"])
    assert report["baseline"] == "rm" and report["policies"] == [] and report["scorers"] == ["rm", "longer answer"]
    scorer = RewardModelScorer(Model(path="rm"))
    expected: dict[str, float] = {}
    for file in ("rb1.jsonl", "rb2.jsonl", "jb.jsonl"):
        rows = lines(Path(file))
        _, items = made.read(Path("again.jsonl"), rows)
        scores = [scorer.score([Answer(item.prompt, text) for text in item.answers]) for item in items]
        expected |= made.means(Path("again.jsonl"), rows, scores)
    found = {name: of["rm"]["mean"] for name, of in report["metrics"].items() if not name.startswith("rmbench")}
    assert found == pytest.approx({name: value for name, value in expected.items() if name in found}, abs=1e-9)
    assert {"rewardbench1/score", "rewardbench1/reasoning", "rewardbench2/ties", "judgebench/coding"} <= found.keys()
    assert {"rmbench/score", "rmbench/hard", "rmbench/safety"} <= report["metrics"].keys()
    (row, *_), rows = lines(out / "rewardbench2.jsonl"), lines(Path("rb2.jsonl"))
    (score, *_) = scorer.score([Answer(({"role": "user", "content": rows[0]["prompt"]},), rows[0]["chosen"][0])])
    assert row["right"] == rows[0]["chosen"] and row["scorers"]["rm"]["scores"][0] == pytest.approx(score, abs=1e-5)
    assert "RewardBench 1, score" in printed and "right concise over wrong markdown" in printed
    assert any("RewardBench 1: 23 pairs, and the official file has 2,985" in warning for warning in report["warnings"])


def test_scorers_beside_the_control(folder: Path) -> None:
    """One that finds the longer answer better says what the control says; its opposite says the opposite, and is warned
    of."""
    report, out, _ = run(["rb1.jsonl"], [SHORT, {"rule": "length", "min": 500, "unit": "characters"}])
    entry = report["metrics"]["rewardbench1/score"]
    assert {who: of["mean"] for who, of in entry.items()} == {"length-1": 0.0, "length-2": 1.0, "longer answer": 1.0}
    assert entry["length-2"]["difference"]["mean"] == 1.0 and "difference" not in entry["length-1"]
    warned = [
        warning
        for warning in report["warnings"]
        if "is not clearly above a rule that prefers the longer answer" in warning
    ]
    assert len(warned) == 2 and warned[0].endswith("0.000 and 1.000"), "the second one is the same rule"
    (shown,) = [
        change for change in changes(read_run(out.parents[1]).stages[0]) if change.measure == "RewardBench 1, score"
    ]
    assert shown.subject == "length-2" and shown.before is not None and shown.before.value == 0.0
    assert shown.note == "before: length-1; longer answer: 1"


def test_equal_scores_are_wrong_and_half_right(folder: Path) -> None:
    """Where no scores are equal, the two ways of counting are one, and it is shown once."""
    report, _, _ = run(["rb1.jsonl"], [{"rule": "regex", "pattern": "."}])
    assert report["metrics"]["rewardbench1/score"]["regex"]["mean"] == 0.0
    assert report["metrics"]["rewardbench1/score_ties_half"]["regex"]["mean"] == 0.5
    assert report["benches"]["rewardbench1"]["ties"] == {"regex": 23, "longer answer": 0}
    assert "rewardbench1/score_ties_half" not in run(["rb1.jsonl"], [SHORT])[0]["metrics"]


def test_two_files_of_one_benchmark_are_kept_apart(folder: Path) -> None:
    made.write(Path("other.jsonl"), lines(Path("jb.jsonl"))[:2])
    report, out, _ = run(["jb.jsonl", "other.jsonl"], [SHORT])
    assert report["benches"]["judgebench-1"]["items"] == 6 and report["benches"]["judgebench-2"]["items"] == 2
    assert report["words"]["judgebench-2/score"] == "JudgeBench (other.jsonl), right pairs"
    assert len(lines(out / "judgebench-1.jsonl")) == 6 and len(lines(out / "judgebench-2.jsonl")) == 2


def test_a_bad_row_is_told_before_anything_is_scored(folder: Path) -> None:
    made.write(Path("jb.jsonl"), [made.judgebench("A>B"), made.judgebench("?")])
    with pytest.raises(InputError, match=r"jb\.jsonl:2 label: expected A>B or B>A, found `\?`"):
        run(["rb1.jsonl", "jb.jsonl"], ["./rm"])


def test_killed_while_scoring_it_goes_on_and_damaged_scores_are_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    dies = [3]

    class Counting:
        name = "counting"

        def score(self, answers: Sequence[Answer]) -> list[float]:
            if len(scored) == dies[0]:
                raise KeyboardInterrupt
            scored.append(len(answers))
            return [float(len(answer.text)) for answer in answers]

    monkeypatch.setattr("align.stages.evaluate.scorers.open_scorer", lambda *_, **__: Counting())
    monkeypatch.setattr(
        stored.score_answers, "__kwdefaults__", {**(stored.score_answers.__kwdefaults__ or {}), "shard_answers": 8}
    )
    with pytest.raises(KeyboardInterrupt):
        run(["rb1.jsonl"], ["./rm"])
    assert len(scored) == 3
    (kept,) = Path("runs").rglob("scores-00001.json")
    kept.write_text("[1.0]")
    dies[0] = -1
    report, _, _ = run(["rb1.jsonl"], ["./rm"])
    assert len(scored) == 3 + (46 - 3 * 8 + 8 + 7) // 8, "two shards were kept, the damaged one and the rest are new"
    assert report["metrics"]["rewardbench1/score"]["rm"]["mean"] == 1.0


def test_a_classifier_of_other_people_on_a_benchmark(folder: Path) -> None:
    """Its scores are its head's at the last token, one conversation at a time; what is right follows from them and the
    labels alone."""
    tokenizer = mistral()
    save_classifier(folder / "classifier", tokenizer)
    report, _, _ = run(["jb.jsonl"], ["./classifier"])
    right = []
    for row in lines(Path("jb.jsonl")):
        asked = ({"role": "user", "content": row["question"]},)
        a, b = (
            head_at_the_end(folder / "classifier", rendered(tokenizer, Answer(asked, row[f"response_{x}"])))
            for x in "AB"
        )
        right.append(row["label"] == ("A>B" if a > b else "B>A"))
    assert 0 < sum(right) < len(right)
    assert report["metrics"]["judgebench/score"]["classifier"]["mean"] == pytest.approx(sum(right) / len(right))


def test_a_policys_implicit_reward_on_a_benchmark(folder: Path) -> None:
    """Against itself a policy knows nothing: every pair is a tie. Turned round, it says the opposite."""
    save_tiny(folder / "sharp", initializer_range=0.3)
    there, back, same = (
        {"policy": f"./{policy}", "reference": f"./{reference}"}
        for policy, reference in (("sharp", "base"), ("base", "sharp"), ("base", "base"))
    )
    report, _, _ = run(["jb.jsonl"], [there, back, same])
    entry = report["metrics"]["judgebench/score_ties_half"]
    assert entry["base over base"]["mean"] == 0.5 and report["benches"]["judgebench"]["ties"]["base over base"] == 6
    assert entry["sharp over base"]["mean"] == pytest.approx(1 - entry["base over sharp"]["mean"])


def test_prompts_that_a_scorer_was_trained_on_are_told(folder: Path) -> None:
    """By the recipe's own stages: the training data of the reward model, and of the policy that it began as."""
    pairs = [
        {"prompt": row["question"] + "  ", "chosen": "Yes, so it is.", "rejected": "No."}
        for row in lines(Path("jb.jsonl"))[:2]
    ]
    made.write(
        Path("pairs.jsonl"),
        [*pairs, *({"prompt": f"Else {i}?", "chosen": "Yes.", "rejected": "No."} for i in range(6))],
    )
    train = {"learning_rate": 1e-3, "batch_size": 8, "microbatch_tokens": 256, "epochs": 1}
    stages = {
        "reward": {"kind": "reward", "data": "pairs.jsonl", "train": train},
        "bench": {
            "kind": "evaluate",
            "scorers": ["stage:reward", SHORT],
            "tasks": [{"task": "reward_bench", "data": file} for file in ("jb.jsonl", "rb1.jsonl")],
        },
    }
    Path("r.yaml").write_text(
        yaml.safe_dump({"name": "r", "seed": 5, "model": "./base", "stages": stages}, sort_keys=False)
    )
    result = run_recipe(load_recipe("r.yaml"), console=Console(file=io.StringIO(), width=200), runs_dir=Path("runs"))
    every_file_is_explained(result.folder)
    report = json.loads((result.folder / "stages" / "bench" / "report.json").read_text())
    assert (
        report["benches"]["judgebench"]["trained_on"] == {"reward": 2}
        and report["benches"]["rewardbench1"]["trained_on"] == {}
    )
    assert "JudgeBench: reward was trained on 2 of its 6 prompts" in report["warnings"]


# A judge


def judge(endpoint: str, *methods: str) -> dict[str, Any]:
    return {"endpoint": endpoint, "model": "j", "retries": 0, "methods": list(methods)}


def prefers(good: str) -> Any:
    """A judge that finds the answer with a word in it better, and grades it 9 instead of 2."""

    def answer(question: str, before: int) -> Reply:
        if "reference_answer" in question or "overall" in question:
            said = question[question.rindex("<answer>") :]
            grade = 9 if good in said else 2
            return Reply(
                json.dumps(dict.fromkeys(("correctness", "helpfulness", "completeness", "clarity", "overall"), grade))
            )
        first = question.index(good) < question.index("<answer_b>") if good in question else False
        return Reply("Verdict: A" if first else "Verdict: B")

    return answer


def test_a_judge_that_is_right(folder: Path) -> None:
    """Pairs in both orders, and grades: on RewardBench 1 the good answers have "good" in them."""
    with serving(prefers("good answer")) as server:
        report, _, _ = run(["rb1.jsonl"], judge=judge(server.endpoint, "pairwise", "pointwise"))
    entry = report["metrics"]["rewardbench1/score"]
    assert entry["j, pairs"]["mean"] == entry["j, grades"]["mean"] == 1.0
    told = report["benches"]["rewardbench1"]["judge"]
    assert (
        told["verdicts"]["win"] == 23
        and told["verdicts"]["first"] == told["verdicts"]["second"] == 23
        and told["replies"] == 46 + 46
    )


def test_a_judge_that_likes_a_place_is_half_right_and_doubted(folder: Path) -> None:
    """Always the first answer: each pair is right once and wrong once. JudgeBench's own code counts that as not
    right."""
    with serving(lambda question, before: Reply("Verdict: A")) as server:
        report, _, _ = run(["rb1.jsonl", "jb.jsonl"], judge=judge(server.endpoint, "pairwise"))
    assert report["metrics"]["rewardbench1/score"]["j, pairs"]["mean"] == 0.5
    assert report["metrics"]["judgebench/score"]["j, pairs"]["mean"] == 0.0
    assert report["metrics"]["judgebench/score_ties_half"]["j, pairs"]["mean"] == 0.5
    assert report["benches"]["judgebench"]["judge"]["verdicts"]["inconsistent"] == 6
    assert any("prefers the first answer" in warning for warning in report["warnings"])


def test_the_better_answer_is_told_by_its_text_and_not_by_its_place(folder: Path) -> None:
    """JudgeBench's rows have the right answer at either place: a judge that always prefers B's is right where the label
    says B."""
    with serving(prefers("that is all there is")) as server:
        report, _, _ = run(["jb.jsonl"], judge=judge(server.endpoint, "pairwise"))
    assert report["metrics"]["judgebench/score"]["j, pairs"]["mean"] == 0.5
    details = report["benches"]["judgebench"]["details"]
    assert {source: of["j, pairs"]["mean"] for source, of in details.items()} == dict.fromkeys(details, 0.5)


def test_grades_are_scores(folder: Path) -> None:
    with serving(prefers("Right")) as server:
        report, _, _ = run(["rb2.jsonl"], [SHORT], judge(server.endpoint, "pointwise"))
    assert report["metrics"]["rewardbench2/score"]["j, grades"]["mean"] == pytest.approx(1.0), (
        "right answers are graded alike"
    )
    assert report["scorers"] == ["length", "j, grades", "longer answer"]


def test_verdicts_are_no_grades(folder: Path) -> None:
    with pytest.raises(InputError, match=r"rb2\.jsonl: RewardBench 2 asks for a grade of each answer"):
        run(["rb2.jsonl"], [SHORT], judge("http://127.0.0.1:9/v1", "pairwise"))


def test_items_whose_replies_cannot_be_read_are_left_out_for_all(folder: Path) -> None:
    """So that everybody is compared on the same items; how many were left out is said."""
    lost = lines(Path("jb.jsonl"))[0]["question"]
    with serving(lambda question, before: Reply("?" if lost in question else "Verdict: tie")) as server:
        report, out, _ = run(["jb.jsonl"], [SHORT], judge(server.endpoint, "pairwise"))
    assert {of["count"] for of in report["metrics"]["judgebench/score"].values()} == {5} and len(
        lines(out / "judgebench.jsonl")
    ) == 5
    assert any("JudgeBench: 1 of 6 items are left out, for everybody" in warning for warning in report["warnings"])


def test_nothing_is_asked_twice(folder: Path) -> None:
    with serving(prefers("good answer")) as server:
        asking = judge(server.endpoint, "pairwise")
        first, _, _ = run(["rb1.jsonl"], judge=asking)
        asked = len(server.requests)
        again, _, _ = run(["rb1.jsonl"], [SHORT], asking)
        assert len(server.requests) == asked == 46
    key = "rewardbench1/score"
    assert np.isclose(first["metrics"][key]["j, pairs"]["mean"], again["metrics"][key]["j, pairs"]["mean"])
