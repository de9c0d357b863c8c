"""The parts of a report: numbers as people read them, what changed, charts, the drawing of the pipeline, and
warnings."""

from __future__ import annotations

import doctest
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align import terminal
from align.data.answer_file import write_answers
from align.functional.intervals import wilson
from align.report import warnings
from align.report.answers import answers
from align.report.data_account import audit
from align.report.estimates import Change, ReportedNumber
from align.report.html import charts
from align.report.html.charts import Line, line_chart, thin, ticks
from align.report.html.curves import bars, curves
from align.report.html.graph import graph
from align.report.measures import changes
from align.runs import values
from align.runs.record import RunRecord, StageRecord, read_run
from align.runs.samples import answers_of
from tests.support.report_run import STAGES, estimate, mean, sft, trained, write_run, write_stage


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return read_run(write_run(tmp_path / "everything"))


def stage(tmp_path: Path, name: str, **changed: Any) -> StageRecord:
    """One stage of the run, with changes to its report."""
    return read_run(write_run(tmp_path / name, [name], **{name: changed})).stage(name)


@pytest.mark.parametrize("module", [values, charts, warnings, terminal])
def test_the_examples_in_the_documentation(module: Any) -> None:
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


# Values


@pytest.mark.parametrize("value", [None, "1", True, [], {}, float("nan"), float("inf"), 10**400])
def test_what_is_no_number_is_none(value: Any) -> None:
    assert values.number({"a": value}, "a") is None
    assert values.number(value) is None and values.number([value], "a") is None


def test_what_does_not_show_is_written_out() -> None:
    assert values.visible("a\x00b\x1b[1m\x7f\u202e\u200b\ud83d\u2028\ufeff\U000e0041") == (
        "a[U+0000]b[U+001B][1m[U+007F][U+202E][U+200B][U+D83D][U+2028][U+FEFF][U+E0041]"
    )
    for text in ("plain\n\ttext", "你好　世界", "שלום", "👩\u200d🚀 ﷽", "a\u00a0b", "e\u0301"):
        assert values.visible(text) == text


# What changed


def test_an_accuracy_has_the_interval_of_its_prompts(tmp_path: Path) -> None:
    accuracy = changes(stage(tmp_path, "dpo"))[0]
    low, high = wilson(0.9333, 107)
    assert accuracy.after == ReportedNumber(0.9333, low, high) and accuracy.verdict == "above chance"
    assert accuracy.cells == ("0.500", f"0.933 [{low:.3f}, {high:.3f}]", "+0.433")
    unknown = changes(stage(tmp_path, "dpo", held_out_data=None))[0]
    assert unknown.after == ReportedNumber(0.9333) and unknown.verdict == "no interval"


def test_a_reward_model_is_shown_with_its_own_intervals(tmp_path: Path) -> None:
    found = {change.measure: change for change in changes(stage(tmp_path, "reward"))}
    assert found["held-out accuracy"].cells == ("0.480", "0.712 [0.652, 0.772]", "+0.232")
    assert found["accuracy where length tells nothing"].verdict == "within chance"
    assert found["baseline: accuracy of length alone"].cells == ("", "0.690 [0.630, 0.750]", "")


def test_policies_are_compared_with_the_first(tmp_path: Path) -> None:
    found = changes(stage(tmp_path, "compare"))
    assert len(found) == 5 * 2
    assert [(c.subject, c.cells, c.verdict) for c in found[:2]] == [
        ("stage:dpo", ("-12.50 [-14.00, -11.00]", "-8.25 [-9.75, -6.75]", "+4.25 [+2.75, +5.75]"), "better"),
        ("stage:ppo", ("-12.50 [-14.00, -11.00]", "-4.00 [-5.50, -2.50]", "+8.50 [+7.00, +10.00]"), "better"),
    ]
    by_title = {change.title: change.verdict for change in found}
    assert by_title["similarity of own samples to the target: stage:dpo"] == "no difference shown"
    assert by_title["share of own samples that never end: stage:dpo"] == "better", "less of it is better"
    assert by_title["length of own samples, tokens: stage:dpo"] == "", "neither is better"


def test_policies_stand_in_the_recipes_order_and_less_of_a_benchmarks_cut_answers_is_better(tmp_path: Path) -> None:
    cut = {
        "a": mean(0.5, 0.1),
        "b": {**mean(0.2, 0.1), "difference": mean(-0.3, 0.1)},
        "c": {**mean(0.8, 0.1), "difference": mean(0.3, 0.1)},
    }
    report = {"baseline": "a", "policies": ["a", "c", "b"], "words": {}, "metrics": {"ifeval/unfinished": cut}}
    found = changes(stage(tmp_path, "compare", **report))
    assert [(change.subject, change.verdict) for change in found] == [("c", "worse"), ("b", "better")]


def test_one_policy_is_shown_alone(tmp_path: Path) -> None:
    found = changes(stage(tmp_path, "compare", metrics={"margin": {"stage:sft": mean(-2.0, 0.5)}}))
    assert [(c.subject, c.cells) for c in found] == [("stage:sft", ("", "-2.000 [-2.500, -1.500]", ""))]


def test_of_a_trainer_that_is_not_ours_the_known_measures_come_first(tmp_path: Path) -> None:
    values = {"entropy": 2.1, "kl": 0.0, "loss": 0.46, "rewards/margins": 0.33}
    folder = write_run(tmp_path / "r", ["sft"])
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text().replace("kind: sft", "kind: trl"))
    write_stage(folder, "sft", "trl", {"report": trained(dict.fromkeys(values, 0.5), values)})
    measures = [change.measure for change in changes(read_run(folder).stage("sft"))]
    assert measures == ["held-out loss", "held-out margin of implicit rewards", "held-out entropy", "held-out kl"]


def test_what_was_asked_for_comes_before_what_is_counted_anyway(tmp_path: Path) -> None:
    one = {"stage:sft": mean(-2.0, 0.5)}
    found = changes(
        stage(tmp_path, "compare", words={}, metrics={name: one for name in ("distinct_1", "loss", "margin", "scorer")})
    )
    assert [change.measure for change in found] == ["scorer", "margin", "loss", "distinct_1"]
    asked = {name: one for name in ("loss", "score/a", "score/b", "win_rate/a")}
    found = changes(
        stage(tmp_path, "compare", words={}, metrics=asked, measures=["loss", "score/b", "score/a", "win_rate/a"])
    )
    assert [change.measure for change in found] == ["score/b", "score/a", "win_rate/a", "loss"], (
        "among them the recipe's order"
    )


def test_ppo_has_its_interval_and_its_first_and_last_iterations(tmp_path: Path) -> None:
    made = stage(tmp_path, "ppo")
    found = {change.measure: change for change in changes(made)}
    assert found["reward on held-out prompts"].cells == ("0.120", "0.350", "+0.230 [+0.110, +0.350]")
    kl = [row["rollout/kl"] for row in made.metrics if "rollout/kl" in row]
    shown = found["KL from the reference, nats per token"]
    assert (
        len(kl) == 20
        and shown.note == "first and last 5 of 20 iterations"
        and shown.before is not None
        and shown.after is not None
    )
    assert (shown.before.value, shown.after.value) == pytest.approx((sum(kl[:5]) / 5, sum(kl[-5:]) / 5))
    assert found["loss on held-out conversations"].verdict == "no interval"


@pytest.mark.parametrize(
    ("low", "high", "direction", "verdict"),
    [
        (0.1, 0.5, "up", "better"),
        (0.1, 0.5, "down", "worse"),
        (-0.5, -0.1, "down", "better"),
        (-0.1, 0.5, "up", "no difference shown"),
        (None, None, "up", "no interval"),
        (0.1, 0.5, None, ""),
    ],
)
def test_verdicts(low: float | None, high: float | None, direction: Any, verdict: str) -> None:
    shown = Change(
        "s", "m", ReportedNumber(1.0), ReportedNumber(1.2), ReportedNumber(0.2, low, high), direction, items=30
    )
    assert shown.verdict == verdict
    if direction is not None:
        assert replace(shown, items=29).verdict == "too few"
        assert replace(shown, trained=True).verdict == "not held out"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.51, 0.9, "above chance"),
        (0.1, 0.49, "below chance"),
        (0.5, 0.9, "within chance"),
        (None, None, "no interval"),
    ],
)
def test_verdicts_beside_chance(low: float | None, high: float | None, verdict: str) -> None:
    shown = Change(
        "s", "m", ReportedNumber(0.5), ReportedNumber(0.6, low, high), ReportedNumber(0.1), "up", 0.5, items=30
    )
    assert shown.verdict == verdict
    assert replace(shown, items=1).verdict == "too few" and replace(shown, trained=True).verdict == "not held out"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [1e-6, 1.0, 2.5, 1e4])
def test_a_change_within_rounding_is_none(size: float, dtype: str) -> None:
    """However narrow its interval: a part of the number itself, larger in bf16; and it is printed without a sign."""
    step = {"fp32": 1e-8, "bf16": 1e-4}[dtype] * size
    for sign in (1, -1):
        moved = ReportedNumber(sign * step, sign * step, sign * step)
        shown = Change(
            "s", "m", ReportedNumber(size), ReportedNumber(size + sign * step), moved, "down", items=100, dtype=dtype
        )
        assert shown.verdict == "the same"
        large = ReportedNumber(sign * 0.1 * size, sign * 0.1 * size, sign * 0.1 * size)
        assert replace(shown, difference=large).verdict == ("worse" if sign > 0 else "better")


@pytest.mark.parametrize("value", [-1e-9, -4.9e-7, 0.0, -0.0, 1e-9])
def test_nothing_has_no_sign(value: float) -> None:
    """-0.000000 is not a number that anyone measured."""
    shown = Change(
        "s",
        "m",
        ReportedNumber(2.5),
        ReportedNumber(2.5 + value),
        ReportedNumber(value, value, value),
        "down",
        items=100,
    )
    assert "-" not in "".join(shown.cells) and shown.verdict == "the same"
    assert doctest.testmod(terminal).failed == 0


def test_a_stage_whose_held_out_prompts_are_trained_on_has_no_verdict(tmp_path: Path) -> None:
    for kind in ("dpo", "reward", "sft"):
        seen = changes(stage(tmp_path / kind, kind, held_out_leaked=3))
        assert {change.verdict for change in seen} <= {"", "not held out", "the same"}
        assert seen[0].verdict == "not held out"


# Charts


def test_a_chart_is_where_its_numbers_are() -> None:
    chart = line_chart("Loss", [Line("loss", [(1.0, 3.0), (2.0, 2.0), (4.0, 1.0)], 0), Line("none", [], 1)])
    assert chart is not None and [line.label for line in chart.lines] == ["loss"]
    (x1, y1), (x2, y2), (x3, y3) = [(mark.x, mark.y) for mark in chart.lines[0].marks]
    assert chart.left == x1 < x2 < x3 == chart.right and x3 - x2 == pytest.approx(2 * (x2 - x1), abs=0.2)
    assert chart.top < y1 < y2 < y3 < chart.bottom and y3 - y2 == pytest.approx(y2 - y1, abs=0.2)
    assert chart.lines[0].marks[1].title == "loss, step 2: 2" and chart.description == "loss from 3 to 1"
    assert line_chart("nothing", [Line("none", [], 0)]) is None


@pytest.mark.parametrize(
    "values", [[(5.0, 0.0)], [(0.0, 2.0), (1.0, 2.0)], [(0.0, -1e-9), (1e6, 1e9)], [(0.0, 1e300), (1.0, -1e300)]]
)
def test_any_numbers_have_a_chart(values: Any) -> None:
    chart = line_chart("c", [Line("x", values, 0)])
    assert chart is not None and len(chart.y_ticks) >= 2
    for mark in chart.lines[0].marks:
        assert chart.left <= mark.x <= chart.right and chart.top <= mark.y <= chart.bottom


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-84.0, -75.0), (1e-7, 1e-5), (0.0, 123456789.0), (17.0, 17.3)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 8 and all(low - 1e-9 <= value <= high + 1e-9 for value, _ in found)
    assert len({label for _, label in found}) == len(found)
    assert all(float(label.replace(",", "")) == pytest.approx(value, rel=0.02, abs=1e-12) for value, label in found)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (-0.000101, -0.0001),
        (1e-9, 1.001e-9),
        (123456.0, 123456.001),
        (1e7, 1e7 + 3),
        (-1e-12, 1e-12),
        (0.0, 0.001),
        (2.4999999, 2.5),
    ],
)
def test_no_two_ticks_have_the_same_label(low: float, high: float) -> None:
    labels = [label for _, label in ticks(low, high)]
    assert len(labels) >= 2 and len(set(labels)) == len(labels) and "-0" not in labels


def test_thinning_loses_no_peak() -> None:
    points = [(float(step), 1.0) for step in range(10_000)]
    points[4321] = (4321.0, 99.0)
    points[77] = (77.0, -5.0)
    thinned = thin(points)
    assert len(thinned) <= 120 and {points[0], points[77], points[4321], points[-1]} <= set(thinned)
    assert thinned == sorted(thinned) and thin(points[:50]) == points[:50]


def test_every_stage_has_the_curves_of_its_kind(record: RunRecord) -> None:
    titles = {s.name: [chart.title for chart in curves(s)] for s in record.stages}
    assert titles["sft"] == ["Loss"]
    assert titles["dpo"] == ["Loss", "Log-probs of answers", "Implicit rewards", "Accuracy"]
    assert {"Reward", "KL", "Clip fraction", "Entropy", "Explained variance", "Loss on conversations"} <= set(
        titles["ppo"]
    )
    drawn = {chart.title: [line.label for line in chart.lines] for chart in curves(record.stage("dpo"))}
    assert drawn["Log-probs of answers"] == ["chosen", "held-out chosen", "rejected", "held-out rejected"]
    assert [chart.title for s in ("ppo", "contrast") for chart in bars(record.stage(s))] == [
        "Time by phase",
        "Similarity of samples to the target",
    ]


def test_a_kind_of_a_third_party_is_drawn_as_well(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", ["sft"])
    (folder / "recipe.yaml").write_text('name: r\nmodel: m\nstages: {sft: {kind: "mine:Stage"}}\n')
    made = read_run(folder).stage("sft")
    assert [chart.title for chart in curves(made)] == ["loss"] and changes(made)[0].cells == (
        "2.879",
        "2.486",
        "-0.393",
    )


# Pipeline


def test_the_pipeline_is_drawn_from_left_to_right(record: RunRecord) -> None:
    drawn = graph(record)
    at = {node.name: node for node in drawn.nodes}
    assert at.keys() == STAGES.keys() and len(drawn.arrows) == sum(len(s.needs) for s in record.stages) == 16
    for s in record.stages:
        assert all(at[need].x < at[s.name].x for need in s.needs)
        assert (
            0 <= at[s.name].x <= drawn.width - drawn.node_width
            and 0 <= at[s.name].y <= drawn.height - drawn.node_height
        )
    for a, b in itertools.combinations(drawn.nodes, 2):
        assert a.x != b.x or abs(a.y - b.y) >= drawn.node_height, "they overlap"
    assert "ppo (ppo, finished) reads sft, reward, select" in drawn.description


def test_a_circle_in_an_edited_recipe_is_drawn(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", ["sft"])
    circle = "name: r\nmodel: m\nstages: {a: {kind: sft, policy: 'stage:b'}, b: {kind: sft, policy: 'stage:a'}}\n"
    (folder / "recipe.yaml").write_text(circle)
    assert len(graph(read_run(folder)).arrows) == 2


# Data and answers


def test_the_audit_says_what_was_left_out_and_where(tmp_path: Path) -> None:
    found = audit(stage(tmp_path, "sft"))
    assert found is not None
    tables = {table.title: table.rows for table in found.tables}
    assert tables["Sources"][0] == ("talk.jsonl", "preference", "305", "229", "74", "2", "0", "229 (100 %)")
    assert ("a tie: its margin is 0", "4", "talk.jsonl:12, talk.jsonl:40, ...") in tables["Left out"]
    assert ("held out: bad row", "2", "held.jsonl:7 chosen: is missing; held.jsonl:31: is not JSON") in tables[
        "Left out"
    ]
    (held,) = [table for table in found.tables if table.title == "What was encoded"]
    assert held.headers == ("", "talk.jsonl", "held out: held.jsonl")
    assert ("prompts", *["220; 5 of them in several rows"] * 2) in held.rows
    assert "held-out rows whose prompt is trained on, too: 0 of 50" in found.lines
    assert found.lines[0] == "225 conversations, 25,354 tokens, 14,854 of them trained; mean 113, longest 153"
    chosen = audit(stage(tmp_path, "select"))
    assert chosen is not None
    places = ", ".join(f"prompts.jsonl:{k}" for k in range(3, 8))
    assert ("its answers score alike", "14", f"{places}, ...") in next(
        t.rows for t in chosen.tables if t.title == "Left out"
    )


def test_a_prompt_is_shown_once_with_all_answers(record: RunRecord) -> None:
    found = answers(record.stages)
    (toronto,) = [one for one in found.asked if "Toronto" in one.prompt[0][1]]
    assert toronto.where == "sft, dpo"
    assert [(one.who, one.text) for one in toronto.answers] == [
        ("before sft", "The capital of Canada is Toronto."),
        ("after sft, before dpo", "No, Ottawa is."),
        ("after dpo", "No. It is Ottawa."),
    ]
    assert found.asked[3].where == "compare, held-3"
    assert [one.who for one in found.asked[3].answers] == ["target", "stage:sft", "stage:dpo", "stage:ppo"]


def test_runs_made_before_answers_had_one_file_show_the_same(tmp_path: Path) -> None:
    """The fixture is such a run; here it is written once more, with ``answers.jsonl`` in place of its older files."""
    old = read_run(write_run(tmp_path / "old"))
    folder = write_run(tmp_path / "new")
    for record in old.stages:
        made = list(answers_of(record))
        place = folder / "stages" / record.name
        if made:
            write_answers(place, made)
            told = json.loads((place / "report.json").read_text())
            if isinstance(told.get("samples"), list):
                del told["samples"]
            (place / "report.json").write_text(json.dumps(told))
    rows = list(values.jsonl(folder / "stages" / "compare" / "data.jsonl"))
    for row in rows:
        for numbers in row["policies"].values():
            del numbers["samples"]
    (folder / "stages" / "compare" / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    new = read_run(folder)
    assert answers(new.stages) == answers(old.stages)
    assert [note.text for note in notes_of(new)] == [note.text for note in notes_of(old)]


# Warnings


def notes_of(run: RunRecord) -> list[warnings.Note]:
    return [note for record in run.stages for note in warnings.notes(record)]


def said(tmp_path: Path, name: str, **changed: Any) -> str:
    return "\n".join(note.text for note in warnings.notes(stage(tmp_path, name, **changed)))


CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    (
        "dpo",
        "chosen answers became less likely too",
        {},
        {"eval_after": {"logps/chosen": -75.0, "logps/rejected": -90.0}},
    ),
    ("dpo", "held-out accuracy is within chance", {"eval_after": {"rewards/accuracies": 0.55}}, {}),
    ("sft", "the held-out loss rose from 2.879 to 3.100", {"eval_after": {"loss": 3.1}}, {}),
    ("sft", "no held-out data", {"eval_after": None, "eval_before": None}, {}),
    ("sft", "6 of 56 rows (11 %) were left out", {}, {"held_out_data": None}),
    ("sft", "its held-out numbers rest on 12 prompts only", {"held_out_data": {"trees": 12}}, {}),
    ("sft", "the held-out loss was lowest after step 20", {"best_step": 20, "eval_after": {"loss": 2.5}}, {}),
    ("sft", "are the same before and after", {"samples": [{"prompt": "p", "before": "a", "after": "a"}]}, {}),
    (
        "sft",
        "1 of 1 shown answers after it says the same",
        {"samples": [{"prompt": "p", "before": "", "after": "na " * 50}]},
        {},
    ),
    (
        "reward",
        "the score goes with length",
        {},
        {"held_out": {"natural": {"length_correlation": estimate(0.35, 0.4)}}},
    ),
    ("reward", "is not clearly above that of length alone", {}, {"held_out": {"natural": {"accuracy": estimate(0.9)}}}),
    (
        "ppo",
        "the KL from the reference is 0.6 nats per token, more than 0.5 (first at step 18, 2 times)",
        {},
        {"unhealthy": {}},
    ),
    ("ppo", "30 % of the held-out answers do not end", {}, {"eval_after": {"finished": 0.9}}),
    (
        "ppo",
        "the change of +0.230 [-0.100, +0.350] may be chance",
        {"held_out_change": {"mean": 0.23, "interval": [-0.1, 0.35]}},
        {},
    ),
    ("label", "the shorter answer is chosen in 58 of 78 pairs", {}, {"warnings": []}),
    ("label", "the score goes with length (correlation -0.46)", {}, {"length_correlation": 0.1}),
    ("contrast", "the embedder cut 12 % of the texts", {}, {"texts_cut_by_embedder": 0.01}),
    ("contrast", "23 % of the samples do not end", {}, {"samples": 64_000}),
    ("compare", "32 % of the answers of stage:sft do not end", {}, {"metrics": {}}),
]


@pytest.mark.parametrize(("name", "words", "ill", "well"), CASES, ids=[case[1][:40] for case in CASES])
def test_warnings_come_from_numbers(
    tmp_path: Path, name: str, words: str, ill: dict[str, Any], well: dict[str, Any]
) -> None:
    """Said where the numbers ask for it, and not where they do not."""
    assert words in said(tmp_path, name, **ill)
    assert words not in said(tmp_path, name, **well) if well else words not in said(tmp_path, name)


def test_a_trainer_that_learns_from_rewards_is_judged_by_them(tmp_path: Path) -> None:
    """GRPO's loss may rise while the reward does."""
    folder = write_run(tmp_path / "r", ["sft"])
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text().replace("kind: sft", "kind: trl"))
    for reward, told in ((0.8, False), (0.6, True)):
        write_stage(
            folder, "sft", "trl", {"report": trained({"loss": 0.1, "reward": 0.7}, {"loss": 0.2, "reward": reward})}
        )
        words = " ".join(note.text for note in warnings.notes(read_run(folder).stage("sft")))
        assert "loss" not in words and ("the held-out reward fell from 0.700 to 0.600" in words) == told


def test_a_warning_that_the_stage_gave_is_not_given_twice(tmp_path: Path) -> None:
    told = said(tmp_path / "silent", "dpo").splitlines()[0]
    assert told.startswith("held-out chosen answers became less likely too (-75.6 to -77.2 nats)")
    assert said(tmp_path, "dpo", warnings=[told]).count("became less likely too") == 1


@pytest.mark.parametrize("best", [0, 20])
def test_a_stage_that_kept_the_model_it_started_from_says_so(tmp_path: Path, best: int) -> None:
    folder = write_run(tmp_path / "r", ["sft"])
    made = sft()
    made["report"]["best_step"] = best
    write_stage(folder, "sft", "sft", made, train={"load_best_model": True})
    words = [note.text for note in warnings.notes(read_run(folder).stage("sft"))]
    assert any("the one that the stage started from" in one for one in words) == (best == 0)


def test_a_stage_that_failed_says_why(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", ["sft"])
    event = {"stage": "sft", "event": "failed", "error": "TrainingFault: loss not finite"}
    with (folder / "history.jsonl").open("a") as history:
        history.write(json.dumps(event) + "\n")
    words = [note.text for note in warnings.notes(read_run(folder).stage("sft"))]
    assert words[:2] == [
        "failed: TrainingFault: loss not finite",
        "the result shown here is of an earlier run, not of this recipe",
    ]


@pytest.mark.parametrize(
    ("own", "trained"),
    [
        ({"path": "talk.jsonl"}, True),
        ({"path": "talk.jsonl", "where": {"split": "test"}}, False),
        ({"path": "other.jsonl"}, False),
    ],
)
def test_an_evaluation_on_training_data_has_no_verdict(own: dict[str, Any], trained: bool, tmp_path: Path) -> None:
    """The policy's own data, or those of a stage before it; not another choice of rows from the same file."""
    folder = write_run(tmp_path / "r", ["sft", "dpo", "compare"])
    write_stage(folder, "sft", "sft", sft(), data=[{"path": "talk.jsonl", "where": None}])
    write_stage(folder, "dpo", "dpo", sft(), data=[{"path": "pairs.jsonl"}], policy="stage:sft")
    for policy in ("stage:sft", "stage:dpo"):
        better = {"base": mean(1.0, 0.1), policy: {**mean(2.0, 0.1), "difference": mean(1.0, 0.1)}}
        report = {"baseline": "base", "policies": ["base", policy], "words": {}, "metrics": {"margin": better}}
        write_stage(folder, "compare", "evaluate", {"report": report}, data=[own])
        (found,) = changes(read_run(folder).stage("compare"))
        assert found.verdict == ("not held out" if trained else "better")
