"""What an evaluation may ask for, what is refused and where, and the recipe that `align eval` writes."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from align import cli
from align.commands.evaluate import quick_recipe
from align.errors import InputError
from align.pipeline import runner
from align.pipeline.identity import identify, needs_model
from align.planning.plan import make_plan
from align.preflight import checks
from align.recipe.kinds.tasks import Gsm8kTask, IfevalTask
from align.recipe.load import LoadedRecipe, load_recipe
from align.recipe.schema import EvaluateStage
from align.stages.evaluate.scorers import scorer_names
from tests.support.reward_benches import rewardbench1, rewardbench2, write

HEAD = "name: r\nmodel: ./m\nstages:\n  e:\n    kind: evaluate\n    policies: [./m, ./n]\n    embedder: null\n"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("m", "n"):
        Path(name).mkdir()
        Path(name, "config.json").write_text("{}")
    Path("prompts.jsonl").write_text('{"prompt": "Hi?"}\n{"prompt": "And?"}\n')
    Path("ifeval.jsonl").write_text(
        json.dumps({"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}) + "\n"
    )
    write(Path("rb.jsonl"), [rewardbench1("hep-go", i) for i in range(3)])
    Path("gsm.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n')


def load(lines: str) -> LoadedRecipe:
    Path("r.yaml").write_text(HEAD + textwrap.indent(textwrap.dedent(lines), "    "))
    return load_recipe("r.yaml")


def stage(lines: str) -> EvaluateStage:
    spec = load(lines).recipe.stages["e"]
    assert isinstance(spec, EvaluateStage)
    return spec


BENCH = "scorers: [./m]\ntasks: [{task: reward_bench, data: rb.jsonl}]"
JUDGE = "judge: {endpoint: 'https://host/v1', model: m, %s}"


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("seed: 1", "r.yaml:5:5 stages.e: nothing to evaluate on: needs `data`, `tasks`, `probes` or `lm_eval_tasks`"),
        ("tasks: [ifeval]", "r.yaml:8:13 stages.e.tasks.0: expected a mapping with `task` (one of ifeval, gsm8k, reward_bench) and `data`"),
        ("tasks: [{task: ifevl, data: ifeval.jsonl}]", "no task `ifevl`; known: ifeval, gsm8k, reward_bench, or your own as package.module:Class; did you mean `ifeval`?"),
        ("tasks: [{task: ifeval}]", "stages.e.tasks.0.data: required key is missing"),
        ("tasks: [{task: ifeval, data: absent.jsonl}]", "r.yaml:8:34 stages.e.tasks.0.data: no such file or folder: absent.jsonl"),
        ("tasks: [{task: ifeval, data: ifeval.jsonl, few_shot: 2}]", "stages.e.tasks.0.few_shot: unknown key"),
        ("tasks: [{task: gsm8k, data: gsm.jsonl, few_shot: 2}]", "stages.e.tasks.0: few_shot and examples need each other"),
        ("tasks: [{task: gsm8k, data: {path: gsm.jsonl, format: alpaca}}]", "stages.e.tasks.0: gsm8k has a row format of its own"),
        ("tasks: [{task: gsm8k, data: gsm.jsonl}, {task: gsm8k, data: gsm.jsonl}]", "stages.e: gsm8k is named twice"),
        ("probes: [json]\ntasks: [{task: reward_bench, data: rb.jsonl}]", "e: reward_bench measures `scorers` and a `judge`"),
        (BENCH, "r.yaml:6:5 stages.e.policies: has no effect where only reward_bench tasks are run"),
        (BENCH + "\nrollout: {engine: transformers}", "stages.e.rollout: has no effect where only reward_bench tasks are run"),
        (BENCH + "\n" + "temperature: 2.0", "stages.e.temperature: has no effect without `data`"),
        (BENCH + "\n" + JUDGE % "against: target", "stages.e.judge.against: has no effect without `data`"),
        (BENCH.replace("rb.jsonl", "rb.jsonl, max_new_tokens: 4"), "stages.e.tasks.0.max_new_tokens: unknown key"),
        (BENCH.replace("rb.jsonl", "{path: rb.jsonl, on_bad_row: skip}"), "a reward benchmark is taken as it is: remove `on_bad"),
        (BENCH.replace("rb.jsonl", "{path: rb.jsonl, format: preference}"), "e.tasks.0: reward_bench has a row format of its own"),
        (BENCH.replace("}]", "}, {task: reward_bench, data: rb.jsonl}]\nprobes: [json]"), '{"path":"rb.jsonl"} is named twice'),
        ("probes: [jsn]", "stages.e.probes.0: must be one of identity, json; got the text `jsn`; did you mean `json`?"),
        ("probes: [json]\nown_names: [me]", "stages.e.own_names: has no effect without the probe identity"),
        ("probes: [json]\nscorers: [{rule: repetition}]", "stages.e.scorers: has no effect without `data`"),
        ("data: prompts.jsonl\nscorers: [{rule: lenght}]", "stages.e.scorers.0.rule: no rule `lenght`"),
        ("data: prompts.jsonl\n" + JUDGE % "key_env: sk-123", "e.judge.key_env: expected the name of an environment variable"),
        ("data: prompts.jsonl\n" + JUDGE % "price_input: 1.0", "stages.e.judge: price_input and price_output need each other"),
        ("data: prompts.jsonl\n" + JUDGE % "methods: [ranking]", "stages.e.judge.methods.0: must be one of pairwise, pointwise"),
        ("data: prompts.jsonl\n" + JUDGE % "against: target, methods: [pointwise]", "e.judge.against: has no effect without"),
        ("data: prompts.jsonl\njudge: {endpoint: 'http://host/v1', model: m}", "e.judge.endpoint: prompts and answers would travel"),
        ("data: prompts.jsonl\njudge: {endpoint: 'https://a:b@host/v1', model: m}", "stages.e.judge.endpoint: an address with a user"),
        ("data: prompts.jsonl\njudge: {endpoint: host, model: m}", "stages.e.judge.endpoint: expected an address such as https://HOST/v1"),
        ("data: prompts.jsonl\njudge: {endpoint: 'http://127.0.0.1.evil/v1', model: m}", "stages.e.judge.endpoint: prompts and answers"),
    ],
)  # fmt: skip
def test_mistakes_are_told_at_their_place(lines: str, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        load(lines)
    texts = [str(one) for one in caught.value.problems]
    assert any(problem in text for text in texts), texts
    assert all(text.startswith("r.yaml:") for text in texts)


def test_what_is_allowed() -> None:
    spec = stage("""\
        data: prompts.jsonl
        scorers: [./m, {rule: length, max: 9}, {rule: length, min: 2}]
        tasks:
          - {task: ifeval, data: {path: ifeval.jsonl, limit: 5}}
          - {task: gsm8k, data: gsm.jsonl, few_shot: 1, examples: org/name}
        judge: {endpoint: 'http://localhost:8000/v1/', model: m, methods: [pairwise, pointwise], language: zh}
        """)
    assert isinstance(spec.tasks[0], IfevalTask) and isinstance(spec.tasks[1], Gsm8kTask)
    assert spec.judge is not None and spec.judge.endpoint == "http://localhost:8000/v1"
    assert scorer_names(spec.scorers) == ["m", "length-1", "length-2"]


def test_a_single_policy_and_a_judge() -> None:
    Path("r.yaml").write_text(HEAD.replace(", ./n", "") + "    data: prompts.jsonl\n    " + JUDGE % "retries: 1" + "\n")
    with pytest.raises(InputError, match="a single policy has nobody to be compared with"):
        load_recipe("r.yaml")
    assert load_recipe("r.yaml", ["stages.e.judge.against=target"])


def test_what_changes_no_result_makes_no_other_identity() -> None:
    def digest(options: str) -> str:
        return identify(load("data: prompts.jsonl\n" + JUDGE % options), "e", lambda text: text).digest

    assert digest("retries: 1") == digest("retries: 9, timeout_s: 1, requests_at_once: 2")
    assert digest("temperature: 0") != digest("temperature: 1.0")


def test_benchmark_files_are_inputs() -> None:
    """So that another content of theirs makes another identity."""
    Path("shown.jsonl").write_text("{}")
    loaded = load("tasks: [{task: gsm8k, data: gsm.jsonl, few_shot: 1, examples: shown.jsonl}]")
    assert {"gsm.jsonl", "shown.jsonl"} <= {referred.text for referred in loaded.references("e")}


def test_plans_of_prompts_and_of_benchmarks_alone() -> None:
    rows = {row.name: row.value for row in make_plan(load("data: prompts.jsonl")).stages[0].rows}
    assert (rows["prompts"], rows["samples"]) == ("2", "16")
    assert "samples" not in {row.name for row in make_plan(load("probes: [json]")).stages[0].rows}


def bench(lines: str = "") -> LoadedRecipe:
    """An evaluation of scorers alone."""
    Path("r.yaml").write_text(
        HEAD.replace("    policies: [./m, ./n]\n    embedder: null\n", "") + textwrap.indent(BENCH + lines, "    ")
    )
    return load_recipe("r.yaml")


def test_a_stage_of_reward_benchmarks_needs_no_policy_and_no_model() -> None:
    loaded = bench()
    assert not needs_model(loaded.recipe.stages["e"])
    identity = identify(loaded, "e", lambda text: f"digest of {text}")
    assert identity.model is None and {"./m", "rb.jsonl"} <= identity.inputs.keys()
    with pytest.raises(InputError, match=r"stages\.e: nobody to evaluate: needs `policies`"):
        bench("\nprobes: [json]")


def test_the_plan_counts_answers_and_the_judges_replies() -> None:
    judge = "\njudge: {endpoint: 'https://host/v1', model: j, methods: [pairwise, pointwise]}"
    rows = {row.name: (row.value, row.source) for row in make_plan(bench(judge)).stages[0].rows}
    assert rows["scored answers"] == ("6", "RewardBench 1: 3 prompts with 6 answers")
    assert rows["judge's replies"] == ("12 at most", "RewardBench 1: 3 pairs in both orders and 6 grades")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "completion": "b"}, "rb.jsonl:1: is a row of none of the reward benchmarks"),
        (rewardbench1("no-such"), "rb.jsonl:1 subset: `no-such` is no subset of RewardBench 1"),
        (
            rewardbench2("Math", "0"),
            "rb.jsonl: RewardBench 2 asks for a grade of each answer, and the judge only compares two",
        ),
    ],
)
def test_the_file_of_a_reward_benchmark_is_looked_at_before_anything_runs(row: dict[str, Any], problem: str) -> None:
    write(Path("rb.jsonl"), [row])
    found = checks.look(bench("\njudge: {endpoint: 'http://127.0.0.1:9/v1', model: j}"), Path("runs"))
    assert any(problem in str(one) for one in found.inputs), [str(one) for one in found.inputs]


# align eval


def quick(**options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tasks": [],
        "data": [],
        "limit": None,
        "seed": 1,
        "max_new_tokens": None,
        "options": {},
    }
    return quick_recipe(["./m", "./n"], **{**settings, **options})


def test_every_file_goes_to_the_task_whose_columns_it_has() -> None:
    made = quick(
        tasks=["ifeval", "gsm8k"], data=["gsm.jsonl", "prompts.jsonl", "ifeval.jsonl"], limit=3, max_new_tokens=9
    )
    assert made["stages"]["eval"]["tasks"] == [
        {"task": "ifeval", "data": {"path": "ifeval.jsonl", "limit": 3}, "max_new_tokens": 9},
        {"task": "gsm8k", "data": {"path": "gsm.jsonl", "limit": 3}, "max_new_tokens": 9},
    ]
    assert made["stages"]["eval"]["data"] == [{"path": "prompts.jsonl", "limit": 3}]
    Path("q.yaml").write_text(yaml.safe_dump(made))
    assert load_recipe("q.yaml").recipe.name == made["name"]
    assert quick(data=["prompts.jsonl"])["name"] != quick(data=["prompts.jsonl"], seed=2)["name"], (
        "another evaluation, another run"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["mmlu"]}, "no task mmlu; known: ifeval, gsm8k"),
        ({"tasks": ["reward_bench"]}, "reward_bench measures scorers, not models that answer"),
        ({"tasks": ["gsm8k"], "data": ["prompts.jsonl"]}, "no --data file has the columns of gsm8k: answer, question"),
        ({"tasks": ["gsm8k"], "data": ["gsm.jsonl", "gsm.jsonl"]}, "both have the columns of gsm8k"),
        ({"data": ["absent.jsonl"]}, "no such file"),
    ],
)
def test_files_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        quick(**options)


def test_from_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Options reach the recipe, which is kept; a result that is up to date is shown all the same; the report is written
    where asked."""
    seen: list[LoadedRecipe] = []
    report = {
        "baseline": "./m",
        "words": {"gsm8k/exact_match": "GSM8K"},
        "metrics": {"gsm8k/exact_match": {"./m": {"mean": 0.25, "low": 0.2, "high": 0.3, "count": 8}}},
    }
    folder = Path("runs/x/stages/eval")
    folder.mkdir(parents=True)
    folder.joinpath("report.json").write_text(json.dumps(report))

    def run(loaded: LoadedRecipe, **options: Any) -> Any:
        seen.append(loaded)
        return SimpleNamespace(folder=Path("runs/x"), up_to_date=("eval",))

    monkeypatch.setattr(runner, "run_recipe", run)
    arguments = (
        "./m",
        "./n",
        "--tasks",
        "gsm8k",
        "--data",
        "gsm.jsonl",
        "--probes",
        "json,identity",
        "--out",
        "o.json",
    )
    monkeypatch.setattr(sys, "argv", ["align", "eval", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 0, printed.err
    spec = seen[0].recipe.stages["eval"].model_dump()
    assert (spec["policies"], spec["probes"]) == (["./m", "./n"], ["json", "identity"])
    assert seen[0].path.parent.name == "runs" and seen[0].path.is_file()
    assert "0.250 [0.200, 0.300]" in printed.out and json.loads(Path("o.json").read_text()) == report
    # The second command has no held-out prompts to answer
    for more, code in ((["--data", "prompts.jsonl"], 0), ([], 2)):
        monkeypatch.setattr(sys, "argv", ["align", "eval", *arguments, *more, "--samples", "2"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == code
    assert seen[-1].recipe.stages["eval"].model_dump()["samples_per_prompt"] == 2
    assert "stages.eval.samples_per_prompt: has no effect without `data`" in capsys.readouterr().err
