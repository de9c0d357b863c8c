"""`align ls`, `show`, `diff` and `verify`: what they print of runs, and their exit codes."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.data.answer_file import ANSWERS, AnswerRow, write_answers
from align.files import sha256_file
from align.runs.record import read_run
from align.runs.verify import verify_run
from tests.support.command_line import Call
from tests.support.fake_run import FakeRun, event

STAGES = {
    "sft": {"kind": "sft", "data": "a.jsonl"},
    "contrast": {"kind": "self_contrast", "policy": "stage:sft", "data": "a.jsonl"},
    "dpo": {"kind": "dpo", "policy": "stage:sft", "data": "stage:contrast", "lora": {}},
    "judge": {"kind": "evaluate", "policies": ["stage:sft", "stage:dpo"], "data": "a.jsonl"},
}
DATA = {
    "want": "conversation",
    "trees": 1200,
    "tokens": 5000,
    "targets": 300,
    "longest": 9,
    "source_lines": ["a.jsonl (chat): 4 rows read"],
}
DATA |= {"dropped": {"too long": {"total": 2, "first": ["a.jsonl:3"]}}, "noted": {}, "sources": {}}
EVIL = "[bold]\x1b[31mred\x1b[0m \u202e [/nonsense]"
"""Markup, an escape sequence, and a mark that turns the direction of writing."""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("{}\n")


def words(text: str) -> str:
    """Without line breaks and the blanks of tables."""
    return re.sub(r"\s+", " ", text)


def make(name: str = "r", loss: float = 2.5, **stages: Any) -> FakeRun:
    run = FakeRun(Path("runs") / name, {**STAGES, **stages})
    report = {"data": DATA, "samples": [{"prompt": "Who?", "before": EVIL, "after": "Me."}]}
    summary = {
        "eval_before": {"loss": 2.875},
        "eval_after": {"loss": loss},
        "steps": 7,
        "warnings": [f"careful {EVIL}"],
    }
    source = {"a.jsonl": sha256_file(Path("a.jsonl"))}
    run.result(
        "sft",
        {"report.json": json.dumps(report), "model.safetensors": "weights"},
        summary=summary,
        inputs=source,
        seconds=150,
    )
    row = {
        "prompt": [{"role": "user", "content": "Who?"}],
        "chosen": [{"role": "assistant", "content": "Me."}],
        "rejected": [[{"x": 1}], "No."],
    }
    kept = {"prompts": 45, "kept": 40}
    run.result(
        "contrast",
        {"data.jsonl": json.dumps(row) + "\n" + "{\n"},
        type="preferences",
        summary=kept,
        inputs=source,
        needs=["sft"],
    )
    both = {
        name: {"rewards/accuracies": a, "rewards/margins": m}
        for name, a, m in (("eval_before", 0.5, 0.0), ("eval_after", 0.933, 0.35))
    }
    run.result("dpo", {"model.safetensors": "weights 2"}, summary=both, needs=["sft", "contrast"])
    margin = {"stage:sft": {"mean": 1.0}, "stage:dpo": {"mean": 2.8, "difference": {"mean": 1.8}}}
    row = {
        "prompt": "Who?",
        "target": "Me.",
        "policies": {"stage:sft": {"samples": ["You."]}, "stage:dpo": {"samples": []}},
    }
    files = {"data.jsonl": json.dumps(row) + "\n"}
    run.result(
        "judge",
        files,
        type="evaluation",
        summary={"metrics": {"margin": margin}, "baseline": "stage:sft"},
        needs=["sft", "dpo"],
    )
    return run


# ls


def test_ls_shows_state_time_and_headlines(call: Call) -> None:
    assert call("ls") == (0, "no runs in runs\n", "")
    make()
    code, out, _ = call("ls")
    assert code == 0
    text = words(out)
    assert "r finished 4/4 2026-01-02 03:04 3.1 min" in text
    for line in (
        "sft: held-out loss 2.875 -> 2.500",
        "prompts in, preferences out 45 -> 40",
        "dpo: held-out accuracy 0.500 -> 0.933",
    ):
        assert line in text
    assert "margin: stage:dpo 1.000 -> 2.800" in text


def test_ls_json_is_one_object_a_run(call: Call) -> None:
    """A run that cannot be read is one as well."""
    make()
    broken = FakeRun(Path("runs") / "broken", STAGES)
    (broken.folder / "recipe.yaml").write_text("stages: [")
    code, out, _ = call("ls", "--json")
    assert code == 0
    rows = {row["name"]: row for row in map(json.loads, out.splitlines())}
    assert rows["broken"]["state"] == "damaged"
    assert (rows["r"]["state"], rows["r"]["done"], rows["r"]["seconds"]) == ("finished", 4, 186.0)
    assert rows["r"]["stages"][0]["headlines"] == [{"words": "held-out loss", "before": 2.875, "after": 2.5}]
    assert "damaged" in call("ls")[1]


def test_ls_tells_killed_from_running(call: Call) -> None:
    run = make()
    run.history([event("dpo", "started")])
    code, out, _ = call("ls")
    assert (code, "r killed 3/4" in words(out)) == (0, True)


def test_numbers_that_are_none_are_left_out(call: Call) -> None:
    """Manifests hold `nan` as a text; a stage without held-out data has no numbers."""
    run = FakeRun(
        Path("runs") / "r", {"sft": {"kind": "sft"}, "rl": {"kind": "ppo"}, "other": {"kind": "my_stages:Mine"}}
    )
    run.result("sft", {"x": "x"}, summary={"eval_before": None, "eval_after": {"loss": "nan"}})
    run.result("rl", {"x": "x"}, summary={"held_out_change": None, "last_iteration": {"kl": float("inf")}})
    run.result("other", {"x": "x"}, summary={"eval_after": {"loss": 1}})
    out = call("ls", "--json")[1]
    assert [stage["headlines"] for stage in json.loads(out)["stages"]] == [
        [],
        [],
        [{"words": "held-out loss", "before": None, "after": 1.0}],
    ]


# show


def test_show_a_run(call: Call) -> None:
    run = make()
    run.history(
        [
            event("dpo", "started", reason="config changed: beta 0.1 -> 0.2"),
            event("dpo", "failed", error="ValueError: boo [x]"),
        ]
    )
    code, out, _ = call("show", "r")
    text = words(out)
    assert code == 0
    assert "dpo dpo failed config changed: beta 0.1 -> 0.2" in text
    assert "dpo failed: ValueError: boo [x]" in text
    assert "dpo the result of an earlier run is there" in text
    assert "sft warning: careful [bold]?[31mred?[0m ? [/nonsense]" in text


def test_show_a_stage_with_untrusted_text(call: Call) -> None:
    """What a model wrote is shown, not obeyed."""
    make()
    code, out, _ = call("show", "r", "sft")
    assert code == 0
    assert "[bold]?[31mred?[0m ? [/nonsense]" in out
    assert "\x1b" not in out and "\u202e" not in out
    text = words(out)
    for line in (
        "held-out loss 2.8750 2.5000",
        "steps 7",
        "1,200 conversations: 5,000 tokens",
        "dropped, too long: 2",
        "after: Me.",
    ):
        assert line in text
    assert "Me." not in call("show", "r", "sft", "--limit", "0")[1]


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ("contrast", ['prompt: Who? chosen: Me. rejected 1: [{"x": 1}] rejected 2: No.', "kept 40"]),
        ("judge", ["prompt: Who? target: Me. stage:sft: You.", "margin: stage:dpo 1.000 2.800"]),
        ("dpo", ["held-out rewards/margins 0.0000 0.3500"]),
    ],
)
def test_show_stages_of_other_kinds(call: Call, stage: str, parts: list[str]) -> None:
    make()
    code, out, _ = call("show", "r", stage)
    assert code == 0
    assert all(part in words(out) for part in parts), out


def rollout(answer: str, **more: Any) -> dict[str, Any]:
    return {
        "prompt_id": "p1",
        "prompt": "Who?",
        "answer": answer,
        "score": 0.5,
        "baseline": 0.25,
        "kl": 0.125,
        "length": 3,
        **more,
    }


def parquet(*rows: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


def test_show_rollouts(call: Call) -> None:
    """The last iteration's, or one by number; and all iterations in numbers. Of a run that is not finished, from its
    work folder."""
    run = FakeRun(Path("runs") / "rl", {"ppo": {"kind": "ppo"}})
    first, second = (
        parquet(rollout("One.", finished=True)),
        parquet(rollout("Two.", finished=False), rollout(EVIL, finished=True, score=1.5)),
    )
    files = {
        "rollouts/iteration-000000.parquet": first,
        "rollouts/iteration-000001.parquet": second,
        "rollouts/reference.parquet": first,
    }
    run.result("ppo", files, summary={"iterations": 2})
    code, out, _ = call("show", "rl", "ppo")
    text = words(out)
    assert code == 0
    assert "iteration answers score baseline kl length finished 1 1 0.5 0.25 0.125 3 1 2 2 1 0.25 0.125 3 0.5" in text
    assert "iteration 2, prompt p1: Who? answer, score 0.5, baseline 0.25, kl 0.125, 3 tokens, cut off: Two." in text
    assert "One." not in text and "\x1b" not in out
    assert "One." in call("show", "rl", "ppo", "--iteration", "1")[1]
    assert (
        call("show", "rl", "ppo", "--iteration", "3")[2]
        == "error: --iteration 3: stage ppo has the iterations 1 to 2\n"
    )
    work = run.folder / "work" / "ppo" / ("a" * 16)
    (work / "rollouts").mkdir(parents=True)
    (work / "metrics.jsonl").write_text("{}\n")
    (work / "rollouts" / "iteration-000000.parquet").write_bytes(parquet(rollout("Fresh.")))
    run.history([event("ppo", "started"), event("ppo", "interrupted", error="stopped")])
    assert "Fresh." in call("show", "rl", "ppo")[1]


def test_show_answers_of_a_finished_stage(call: Call, tmp_path: Path) -> None:
    """From its one file: the last iteration's, or one by number, which follows from when it was sampled."""
    scores = {"score": 0.5, "baseline": 0.25, "kl": 0.125}
    asked: dict[str, Any] = {"prompt_id": "p1", "prompt": "Who?", "policy": "ppo", "sample": 0, "scores": scores}
    rows = [
        AnswerRow("held-out", **asked, text="Before.", tokens=2, finished=True),
        AnswerRow("rollouts", **asked, text="One.", tokens=3, finished=True, version=0),
        AnswerRow("rollouts", **asked, text="Two.", tokens=4, finished=False, version=4),
    ]
    write_answers(tmp_path, rows)
    run = FakeRun(Path("runs") / "rl", {"ppo": {"kind": "ppo"}})
    run.result("ppo", {ANSWERS: (tmp_path / ANSWERS).read_text(encoding="utf-8")})
    text = words(call("show", "rl", "ppo")[1])
    assert "iteration answers score baseline kl length finished 1 1 0.5 0.25 0.125 3 1 2 1 0.5 0.25 0.125 4 0" in text
    assert "iteration 2, prompt p1: Who? answer, score 0.5, baseline 0.25, kl 0.125, 4 tokens, cut off: Two." in text
    assert "One." not in text and "One." in call("show", "rl", "ppo", "--iteration", "1")[1]


def test_show_refuses_what_is_not_there(call: Call) -> None:
    make()
    assert call("show", "rr")[2] == "error: no run rr; runs has: r\n"
    assert call("show", "r", "dop") == (2, "", "error: runs/r has no stage dop; did you mean `dpo`?\n")
    assert call("show", "r", "sft", "--iteration", "1")[2] == "error: --iteration: stage sft (sft) has no rollouts\n"
    assert call("show", "r", "--iteration", "1")[0] == 2


# diff


def test_diff_names_every_difference_once(call: Call) -> None:
    make("one")
    Path("a.jsonl").write_text("other\n")
    other = make(
        "two",
        loss=2.25,
        sft={"kind": "sft", "data": "a.jsonl", "train": {"learning_rate": 2e-5}},
        dpo={**STAGES["dpo"], "lora": None},
    )
    code, out, _ = call("diff", "one", "two")
    text = words(out)
    assert code == 0
    assert "stages.sft.train.learning_rate 1e-05 (default) 2e-05" in text
    assert "stages.dpo.lora {} None" in text
    assert "name one two" in text
    assert "sft: a.jsonl" in text
    assert "sft: held-out loss 2.500 2.250 -0.250" in text
    assert "dpo: held-out margin of implicit rewards 0.350 0.350 0.000" in text
    assert "the same: packages" in text
    code, out, _ = call("diff", str(other.folder), "two")
    assert "the same: recipe, data, packages" in out


def test_a_default_that_is_written_out_is_no_difference(call: Call) -> None:
    make("one")
    make(
        "two",
        sft={
            "kind": "sft",
            "data": "a.jsonl",
            "train": {"learning_rate": 1e-5, "epochs": 1},
            "max_length": 2048,
            "seed": None,
        },
    )
    code, out, _ = call("diff", "one", "two")
    assert (
        code == 0
        and "epochs" not in out
        and "max_length" not in out
        and "learning_rate" not in out
        and "seed" not in out
    )


# verify


def test_verify_a_whole_run(call: Call) -> None:
    make()
    code, out, err = call("verify", "r")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"(\w+: ok \([12] files, \d+ bytes\)\n){4}", out)


def test_verify_names_what_is_damaged_and_ends_with_2(call: Call) -> None:
    """A flipped byte in a large file, which nothing else would notice; a missing file; a damaged manifest."""
    run = make()
    stages = run.folder / "stages"
    (stages / "sft" / "model.safetensors").write_text("wEights")
    (stages / "contrast" / "data.jsonl").unlink()
    manifest = stages / "judge" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"kind"', '"kjnd"'))
    code, out, _ = call("verify", "r")
    assert code == 2
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert lines["sft"].startswith("damaged: model.safetensors: damaged: sha256 is ")
    assert lines["contrast"] == "damaged: data.jsonl: missing"
    assert lines["judge"].startswith("damaged: manifest.json: damaged: sha256 is ")
    assert lines["dpo"].startswith("ok")


def test_verify_tells_a_result_that_was_made_from_another_one(call: Call) -> None:
    """Each folder is whole, but they do not belong together."""
    run = make()
    moved = run.folder / "stages" / "sft"
    moved.rename(run.folder / "stages" / "old")
    run.result("sft", {"model.safetensors": "others"})
    code, out, _ = call("verify", "r")
    assert code == 2
    assert "dpo: was made from another result of stage sft than the one that is there" in out
    assert "old: ok" in out, "a stage that the recipe does not name"


def test_verify_notes_sources_that_changed(call: Call) -> None:
    """They make no result wrong. Relative paths are those of the folder in which the run was started."""
    run = make()
    elsewhere = Path("elsewhere")
    elsewhere.mkdir()
    Path("a.jsonl").write_text("other\n")
    assert "sft: ok (2 files" in (out := call("verify", "r")[1])
    assert out.count("note: a.jsonl has changed since") == 2
    Path("a.jsonl").unlink()
    code, out, _ = call("verify", "r")
    assert (code, out.count("note: a.jsonl is not there any more")) == (0, 2)
    Path("a.jsonl").write_text("{}\n")
    about = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(
        json.dumps(about | {"folder": str(elsewhere.absolute()), "root": str(elsewhere.absolute())})
    )
    assert [str(found).count("is not there any more") for found in verify_run(read_run(run.folder))] == [1, 1, 0, 0]


def test_verify_tells_a_result_that_is_gone(call: Call) -> None:
    run = make()
    for path in sorted((run.folder / "stages" / "judge").iterdir()):
        path.unlink()
    (run.folder / "stages" / "judge").rmdir()
    code, out, _ = call("verify", "r")
    assert (code, out.splitlines()[-1]) == (2, "judge: damaged: its folder is gone")
    fresh = FakeRun(Path("runs") / "fresh", {"sft": {"kind": "sft"}})
    assert [str(found) for found in verify_run(read_run(fresh.folder))] == ["sft: no result"]


def test_verify_one_folder(call: Call) -> None:
    run = make()
    folder = str(run.folder / "stages" / "sft")
    assert call("verify", folder)[:2] == (
        0,
        f"{folder}: ok (2 files, {len('weights') + (run.folder / 'stages/sft/report.json').stat().st_size} bytes)\n",
    )
    (run.folder / "stages" / "sft" / "report.json").write_text("{}")
    assert call("verify", folder)[0] == 2


# Torch


@pytest.mark.parametrize("command", [["ls"], ["show", "rl", "ppo"], ["diff", "rl", "rl"], ["verify", "rl"]])
def test_looking_at_runs_needs_no_torch(command: list[str]) -> None:
    FakeRun(Path("runs") / "rl", {"ppo": {"kind": "ppo"}}).result(
        "ppo", {"rollouts/iteration-000000.parquet": parquet(rollout("One."))}
    )
    code = (
        f"import sys; sys.argv = {['align', *command]!r}\nfrom align import cli\ntry:\n cli.main()\nexcept SystemExit"
        " as end:\n"
    )
    code += " assert not end.code\nassert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
