"""``kind: evaluate`` on tiny models, against numbers computed here from whole forward passes."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from align import cli
from align.data.answer_file import TARGET, read_answers
from align.errors import EnvironmentFault, InputError
from align.evaluation.compare import compare
from align.evaluation.metrics import METRICS, PolicyMeasures, Targets, metrics_of
from align.evaluation.tasks import gsm8k
from align.models.load import load_encoder, load_policy
from align.pipeline.runner import RunResult, run_recipe
from align.pipeline.selection import Selection
from align.recipe.load import load_recipe
from align.recipe.reference_syntax import shipped_root
from align.recipe.schema import EvaluateStage, Model
from align.report.estimates import ReportedNumber
from align.rollout.engine import sample_seed
from align.scoring.embeddings import SentenceEmbedder
from align.scoring.text_metrics import distinct_n
from align.stages.shared import policy_samples
from tests.support.embedder import save_embedder
from tests.support.report_run import reported
from tests.support.saved import save_tiny
from tests.support.scripted import Dying, open_scripted, write_script
from tests.support.tokenizers import qwen3

FIRST = ["Tea it is.", "The dog sleeps, and the fox runs away, and so on and on.", "Paris."]
SECOND = ["Rain it is.", "No."]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies with scripts of their own, one with another template, and an embedder."""
    folder = tmp_path_factory.mktemp("models")
    for name, changes, script in (("first", {}, FIRST), ("second", {"initializer_range": 0.3}, SECOND)):
        save_tiny(folder / name, max_position_embeddings=512, **changes)
        write_script(folder / name, script)
    save_tiny(folder / "other", "qwen3", qwen3())
    save_embedder(folder / "embedder")
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second", "other", "embedder"):
        (tmp_path / name).symlink_to(models / name)
    pairs = [
        ("Say tea.", "Tea it is."),
        ("Say rain.", "Rain it is, all day long."),
        ("今天天气怎么样？", "很好。"),
        ("Say sun.", "Sun."),
    ]
    rows = [
        {"id": f"t{i}", "messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for i, (a, b) in enumerate(pairs)
    ]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(policy_samples, "open_engine", open_scripted)
    monkeypatch.setattr(Dying, "calls", 0)
    monkeypatch.setattr(Dying, "dies_at", -1)
    yield tmp_path


def run(policies: list[str], text: io.StringIO | None = None, runs: str = "runs", **options: Any) -> RunResult:
    spec = {
        "kind": "evaluate",
        "policies": policies,
        "data": "held.jsonl",
        "samples_per_prompt": 3,
        "max_new_tokens": 10,
        "max_length": 200,
    }
    recipe = {
        "name": "r",
        "seed": 5,
        "model": "./first",
        "stages": {"compare": {**spec, "embedder": "./embedder", **options}},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run_recipe(
        load_recipe("recipe.yaml"),
        console=Console(file=text or io.StringIO(), width=160),
        runs_dir=Path(runs),
        selection=Selection(replace=True),
    )


def report(result: RunResult) -> dict[str, Any]:
    return json.loads((result.folder / "stages" / "compare" / "report.json").read_text())


def rows(result: RunResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result.folder / "stages" / "compare" / "data.jsonl").read_text().splitlines()]


@torch.no_grad()
def logprob(model: Any, trunk: list[int], ids: list[int]) -> float:
    """Summed log-prob of ``ids`` after ``trunk``, from the model's own logits of the one sequence."""
    logits = model(torch.tensor([[*trunk, *ids]])).logits[0, len(trunk) - 1 : -1].double().log_softmax(-1)
    return float(logits.gather(1, torch.tensor(ids)[:, None]).sum())


def test_numbers_are_those_of_plain_forward_passes(folder: Path) -> None:
    """Margins of both policies on the first one's samples, cosines and lengths of their own, prompt by prompt and in
    the mean."""
    result = run(["./first", "./second"])
    metrics, embedder = report(result)["metrics"], SentenceEmbedder(folder / "embedder")
    encoder = load_encoder(Model(path="./first"))
    own_samples: dict[str, list[list[list[int]]]] = {}
    for name in ("./first", "./second"):
        engine = Dying(folder / name / "script.jsonl", encoder)
        trunks = [encoder.encode_prompt(row["prompt"]).tolist() for row in rows(result)]
        plan = policy_samples.Sampling(10, n=3, seed=sample_seed(sample_seed(5, 0), 0))
        own_samples[name] = [[list(one.ids) for one in group] for group in engine.generate(trunks, plan)]
    for name in ("./first", "./second"):
        model = load_policy(Model(path=name))
        means: dict[str, list[float]] = {key: [] for key in METRICS}
        tokens: list[int] = []
        for p, row in enumerate(rows(result)):
            trunk, (answer,) = encoder.encode_answers(
                row["prompt"], [[{"role": "assistant", "content": row["target"]}]]
            )
            target = answer.ids[answer.mask].tolist()
            assert target[-1] == encoder.stop_ids[0]
            target_logprob = logprob(model, trunk.tolist(), target)
            margin = target_logprob - np.mean(
                [logprob(model, trunk.tolist(), ids) for ids in own_samples["./first"][p]]
            )
            own = own_samples[name][p]
            vectors = embedder.embed([row["target"], *(encoder.decode(ids).lstrip() for ids in own)])
            expected = {
                "margin": margin,
                "target_logprob": target_logprob,
                "similarity": float((vectors[1:] @ vectors[0]).mean()),
                "length": float(np.mean([len(ids) for ids in own])),
                "unfinished": float(np.mean([ids[-1] != encoder.stop_ids[0] for ids in own])),
                "loss": -target_logprob / len(target),
                **{f"distinct_{n}": distinct_n([encoder.decode(ids) for ids in own], n) for n in (1, 2)},
                "mixed_languages": 0.0,
            }
            tokens.append(len(target))
            for key, value in expected.items():
                assert row["policies"][name][key] == pytest.approx(value, abs=2e-4), (name, row["id"], key)
                means[key].append(value)
        for key, values in means.items():
            weights = tokens if key == "loss" else None  # of all target tokens together, not of the prompts' means
            assert metrics[key][name]["mean"] == pytest.approx(np.average(values, weights=weights), abs=2e-4)
            assert metrics[key][name]["low"] <= metrics[key][name]["mean"] <= metrics[key][name]["high"]
    first = metrics["margin"]["./first"]["mean"]
    assert metrics["margin"]["./second"]["difference"]["mean"] == pytest.approx(
        metrics["margin"]["./second"]["mean"] - first, abs=1e-9
    )
    assert "difference" not in metrics["margin"]["./first"]


def test_the_table_the_summary_and_a_rerun(folder: Path) -> None:
    text = io.StringIO()
    result = run(["./first", "./second"], text)
    shown = text.getvalue()
    for metric in METRICS.values():
        assert metric.words.split(",")[0][:20] in shown
    assert "difference to ./first" in shown and "4 held-out prompts" in shown
    found = reported(result.folder)["compare"][f"{METRICS['margin'].words}: ./second"].difference
    difference = result.summaries["compare"]["metrics"]["margin"]["./second"]["difference"]
    assert found == ReportedNumber(difference["mean"], difference["low"], difference["high"])
    assert difference["count"] == 4
    assert run(["./first", "./second"]).ran == ()
    again = run(["./first", "./second"], runs="again")
    assert (again.folder / "stages" / "compare" / "report.json").read_bytes() == (
        result.folder / "stages" / "compare" / "report.json"
    ).read_bytes()


def test_a_policy_equals_itself(folder: Path) -> None:
    """Under another name: same samples, same log-probs, a difference of exactly nothing."""
    (folder / "copy").symlink_to(folder / "first")
    metrics = report(run(["./first", "./copy"]))["metrics"]
    for name in METRICS:
        difference = metrics[name]["./copy"]["difference"]
        assert difference["mean"] == 0.0, name
        assert difference["low"] is None or difference["low"] <= 0.0 <= difference["high"], (
            "four prompts are never certain"
        )


def test_differences_are_paired(folder: Path) -> None:
    """Two policies a constant apart differ by exactly that, however far the prompts are apart."""
    spread = np.tile([-50.0, 0.0, 80.0, 400.0], 10)
    shape = np.zeros((40, 2))
    one, two = (
        PolicyMeasures(shape + 3, shape + 1, shape, shape, Targets(s, np.full(40, 5.0), shape, None))
        for s in (spread, spread + 2)
    )
    metrics = metrics_of({"a": one, "b": two})
    assert "similarity" not in metrics, "no embedder, no similarity"
    found = compare(metrics, "a", seed=1)["margin"]
    assert found["b"]["difference"] == {"mean": 2.0, "low": 2.0, "high": 2.0, "count": 40}
    assert found["a"]["high"] - found["a"]["low"] > 100


def test_killed_while_sampling_it_goes_on(folder: Path) -> None:
    expected = report(run(["./first", "./second"], runs="whole"))
    Dying.calls, Dying.dies_at = 0, 1
    with pytest.raises(KeyboardInterrupt):
        run(["./first", "./second"])
    assert report(run(["./first", "./second"])) == expected
    assert Dying.calls == 2 + 1


def test_models_that_trees_cannot_serve_are_scored_in_rows(folder: Path) -> None:
    """A model whose layers cannot keep trees apart gets padded rows, and is told so."""
    save_tiny(folder / "capped", "capped", max_position_embeddings=512)
    write_script(folder / "capped", FIRST)
    text = io.StringIO()
    result = run(["./capped"], text)
    assert "./capped: padded rows (" in text.getvalue() or "capped: padded rows (" in text.getvalue()
    model, encoder = (
        load_policy(Model(path="./capped"), attn_implementation="eager"),
        load_encoder(Model(path="./capped")),
    )
    row = rows(result)[0]
    trunk, (answer,) = encoder.encode_answers(row["prompt"], [[{"role": "assistant", "content": row["target"]}]])
    expected = logprob(model, trunk.tolist(), answer.ids[answer.mask].tolist())
    assert row["policies"]["./capped"]["target_logprob"] == pytest.approx(expected, abs=2e-4)


def test_other_tokens_are_refused(folder: Path) -> None:
    """Log-probs of token ids mean nothing to a model with another vocabulary."""
    with pytest.raises(InputError, match=r"\./other has another tokenizer or chat template than \./first"):
        run(["./first", "./other"])
    save_tiny(folder / "retold", max_position_embeddings=512)
    template = folder / "retold" / "chat_template.jinja"
    template.write_text("{{ 'Note: ' }}" + template.read_text())
    with pytest.raises(InputError, match=r"\./retold has another tokenizer or chat template"):
        run(["./first", "./retold"])


def test_a_policy_twice_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"\./first is named twice"):
        run(["./first", "./first"])


# Scorers, prompts without targets


def test_scorers_and_win_rates(folder: Path) -> None:
    """By an independent count: every sample against every sample of the baseline, and against the target; ties half."""
    result = run(["./first", "./second"], scorers=[{"rule": "length", "max": 2}, {"rule": "regex", "pattern": "it is"}])
    metrics, table = report(result)["metrics"], rows(result)
    answers = list(read_answers(result.folder / "stages" / "compare"))
    assert {(a.part, a.policy) for a in answers} == {("data", who) for who in (TARGET, "./first", "./second")}
    assert all(answer.scores["regex"] == ("it is" in answer.text) for answer in answers)

    def score(text: str) -> float:
        return 1.0 if "it is" in text else 0.0

    wins, over_target = [], []
    for row in table:
        ours, theirs = (
            [score(a.text) for a in answers if (a.prompt_id, a.policy) == (row["id"], name)]
            for name in ("./second", "./first")
        )
        wins.append(np.mean([(a > b) + 0.5 * (a == b) for a in ours for b in theirs]))
        target = score(row["target"])
        over_target.append(np.mean([(a > target) + 0.5 * (a == target) for a in ours]))
        assert row["policies"]["./second"]["score/regex"] == pytest.approx(np.mean(ours), abs=1e-6)
    assert metrics["win_rate/regex"]["./second"]["mean"] == pytest.approx(np.mean(wins))
    assert metrics["win_rate_over_target/regex"]["./second"]["mean"] == pytest.approx(np.mean(over_target))
    assert set(metrics["win_rate/regex"]) == {"./second"}, "the baseline is not compared with itself"
    assert set(metrics["win_rate_over_target/length"]) == {"./first", "./second"}
    for name in ("lc_win_rate/regex", "lc_win_rate_over_target/length"):
        entry = metrics[name]["./second"]
        assert 0 <= entry["mean"] <= 1 and "difference" not in entry
        assert entry["low"] is entry["high"] is None, "four prompts are too few to resample"


def test_prompts_without_targets(folder: Path) -> None:
    """What needs a target is left out, and said so; policies may then have other tokenizers."""
    (folder / "asked.jsonl").write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in ("Say tea.", "Say rain."))
    )
    (folder / "script.jsonl").write_text('{"completion": "Rain it is."}\n')
    text = io.StringIO()
    result = run(["./first", "./other"], text, data="asked.jsonl", scorers=[{"rule": "length", "max": 3}])
    found = report(result)
    assert "the data have no answers" in text.getvalue() and "the data have no answers" in found["warnings"][0]
    assert set(found["metrics"]) == {
        *("length", "unfinished", "distinct_1", "distinct_2", "mixed_languages"),
        *("score/length", "win_rate/length", "lc_win_rate/length"),
    }
    assert all("target" not in row for row in rows(result)) and len(rows(result)) == 2


def test_another_scorer_samples_nothing_anew(folder: Path) -> None:
    run(["./first", "./second"])
    before = Dying.calls
    run(["./first", "./second"], scorers=[{"rule": "repetition"}])
    assert Dying.calls == before


# Benchmarks and probes


def script(folder: Path, answers: dict[str, str]) -> None:
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in answers.items()]
    folder.joinpath("script.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@pytest.fixture
def free(folder: Path) -> Path:
    """A policy with no script in its folder: it answers from ./script.jsonl."""
    save_tiny(folder / "free", max_position_embeddings=4096)
    return folder


def evaluate(spec: dict[str, Any], text: io.StringIO | None = None) -> tuple[dict[str, Any], Path]:
    stages = {"compare": {"kind": "evaluate", "embedder": None, **spec}}
    Path("recipe.yaml").write_text(yaml.safe_dump({"name": "t", "seed": 5, "model": "./free", "stages": stages}))
    result = run_recipe(
        load_recipe("recipe.yaml"),
        console=Console(file=text or io.StringIO(), width=160),
        runs_dir=Path("runs"),
        selection=Selection(replace=True),
    )
    out = result.folder / "stages" / "compare"
    return json.loads((out / "report.json").read_text()), out


def test_gsm8k_is_asked_and_graded(free: Path) -> None:
    problems = {"Two and two?": "4", "Three and three?": "6", "Ten less one?": "9"}
    rows = [{"id": i, "question": q, "answer": f"Because.\n#### {a}"} for i, (q, a) in enumerate(problems.items())]
    Path("gsm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = ["2 + 2 = 4\n#### 4", "It is 7.", "First 10, so 9"]
    script(free, {f"{q}\n\n{gsm8k.INSTRUCTION}": text for q, text in zip(problems, said, strict=True)})
    found, out = evaluate(
        {"policies": ["./free"], "tasks": [{"task": "gsm8k", "data": "gsm.jsonl", "max_new_tokens": 40}]}
    )
    assert found["metrics"]["gsm8k/exact_match"]["./free"]["mean"] == pytest.approx(2 / 3)
    answers = list(read_answers(out))
    assert [(answer.part, answer.scores["exact_match"]) for answer in answers] == [
        *(("gsm8k", 1.0), ("gsm8k", 0.0), ("gsm8k", 1.0))
    ]
    assert [answer.text for answer in answers] == said


def test_worked_examples_come_first_and_are_not_asked(free: Path) -> None:
    rows = [
        {"id": i, "question": f"What is {i} and 1?", "answer": f"<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}
        for i in range(3)
    ]
    Path("gsm.jsonl").write_text(json.dumps(rows[2]) + "\n")
    Path("shown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    (free / "script.jsonl").write_text('{"completion": "#### 3"}\n')
    task = {"task": "gsm8k", "data": "gsm.jsonl", "few_shot": 2, "examples": "shown.jsonl", "max_new_tokens": 20}
    _, out = evaluate({"policies": ["./free"], "tasks": [task]})
    (answer,) = read_answers(out)
    assert [message["role"] for message in answer.prompt] == ["user", "assistant"] * 2 + ["user"]  # type: ignore[index]
    assert answer.prompt[1]["content"] == "1\n#### 1" and answer.scores["exact_match"] == 1.0  # type: ignore[index]
    Path("shown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"shown\.jsonl:3: a worked example is among the problems"):
        evaluate({"policies": ["./free"], "tasks": [{**task, "few_shot": 3}]})
    with pytest.raises(InputError, match="has 3 rows, few_shot asks for 4"):
        evaluate({"policies": ["./free"], "tasks": [{**task, "few_shot": 4}]})


def test_a_bad_row_of_a_benchmark_is_told_with_its_line(free: Path) -> None:
    Path("gsm.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n{"question": "b", "answer": "two"}\n')
    with pytest.raises(InputError, match=r"gsm\.jsonl:2 answer: expected a solution that ends with `#### NUMBER`"):
        evaluate({"policies": ["./free"], "tasks": [{"task": "gsm8k", "data": "gsm.jsonl"}]})


def test_ifeval_is_asked_and_graded(free: Path) -> None:
    pytest.importorskip("if_verifiable")
    asked = [
        {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {
            "key": 2,
            "prompt": "Title and no commas.",
            "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
            "kwargs": [{}, {}],
        },
    ]
    Path("ifeval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    script(free, {"No commas.": "So be it.", "Title and no commas.": "No title here."})
    found, _ = evaluate(
        {"policies": ["./free"], "tasks": [{"task": "ifeval", "data": "ifeval.jsonl", "max_new_tokens": 30}]}
    )
    means = {name: entry["./free"]["mean"] for name, entry in found["metrics"].items()}
    assert means["ifeval/prompt_strict"] == 0.5
    assert means["ifeval/instruction_strict"] == pytest.approx(2 / 3), "over instructions, not over prompts"


def test_probes_run_on_the_shipped_prompts(free: Path) -> None:
    (free / "script.jsonl").write_text('{"completion": "I am ChatGPT."}\n')
    found, out = evaluate({"policies": ["./free"], "probes": ["identity", "json"]})
    means = {name: entry["./free"]["mean"] for name, entry in found["metrics"].items()}
    assert means["probe-identity/claims"] == 1.0 and means["probe-json/bare"] == 0.0
    asked = (shipped_root() / "data" / "probes" / "identity.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum(answer.part == "probe-identity" for answer in read_answers(out)) == len(asked)
    found, _ = evaluate({"policies": ["./free"], "probes": ["identity"], "own_names": ["ChatGPT"]})
    assert found["metrics"]["probe-identity/claims"]["./free"]["mean"] == 0.0


# lm-evaluation-harness


def test_the_harness_is_handed_every_policy(free: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        return {
            "results": {
                "mmlu": {"alias": "mmlu", "acc,none": 0.25 * len(calls), "acc_stderr,none": 0.1, "f1,strict": 0.5}
            }
        }

    module = types.ModuleType("lm_eval")
    module.__spec__ = importlib.machinery.ModuleSpec("lm_eval", None)
    module.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    found, _ = evaluate({"policies": ["./free", "./first"], "lm_eval_tasks": ["mmlu"]})
    assert [Path(call["model_args"]["pretrained"]).name for call in calls] == ["free", "first"]
    assert all(call["tasks"] == ["mmlu"] and call["model_args"]["trust_remote_code"] is False for call in calls)
    entry = found["metrics"]["lm-eval/mmlu/acc"]["./first"]
    assert (entry["mean"], entry["low"], entry["high"]) == (0.5, pytest.approx(0.3040036), pytest.approx(0.6959964))
    assert found["metrics"]["lm-eval/mmlu/f1 (strict)"]["./free"]["low"] is None


def test_without_the_harness_nothing_starts(free: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "lm_eval" else real(name, *rest)
    )
    with pytest.raises(EnvironmentFault, match=r"lm_eval_tasks need the Python package lm-eval.*alignkit\[eval\]"):
        evaluate({"policies": ["./free"], "lm_eval_tasks": ["mmlu"], "probes": ["json"]})
    assert Dying.calls == 0


# align eval


def test_align_eval_runs_once_and_always_ends_with_the_table(
    free: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (free / "script.jsonl").write_text('{"completion": "#### 4"}\n')
    Path("gsm.jsonl").write_text(
        '{"question": "2 and 2?", "answer": "#### 4"}\n{"question": "2 and 3?", "answer": "#### 5"}\n'
    )
    arguments = [
        "align",
        "eval",
        "./free",
        "--tasks",
        "gsm8k",
        "--data",
        "gsm.jsonl",
        "--max-new-tokens",
        "16",
        "--out",
        "found.json",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    shown = []
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        assert stopped.value.code == 0, printed.err
        shown.append(printed.out)
        assert json.loads(Path("found.json").read_text())["metrics"]["gsm8k/exact_match"]["./free"]["mean"] == 0.5
    assert "eval: running" in shown[0] and "eval: up to date" in shown[1]
    assert all(text.count("GSM8K, problems solved") == 1 and "0.500 [0.095, 0.905]" in text for text in shown)
    (recipe,) = Path("runs").glob("eval-*.yaml")
    assert load_recipe(str(recipe)).recipe.name == recipe.stem


def test_the_recipe_of_the_page_is_valid(free: Path) -> None:
    page = (shipped_root() / "docs" / "evaluate.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- example: compare.yaml -->\n```yaml\n(.*?)```", page, re.DOTALL)
    assert found
    for name in ("held_out.jsonl", "ifeval.jsonl", "gsm8k.jsonl"):
        Path(name).write_text("{}\n")
    text = found.group(1).replace("runs/mine/stages/sft", "./free").replace("runs/mine/stages/dpo", "./first")
    judge = re.search(r"```yaml\n(    judge:.*?)```", page, re.DOTALL)
    assert judge
    Path("compare.yaml").write_text(text + judge.group(1))
    assert load_recipe("compare.yaml").order == ("compare",)
    assert f"| `{next(iter(METRICS))}`" in page and all(f"`{name}`" in page for name in METRICS)


def test_the_recipe_of_reward_benchmarks_is_valid(free: Path) -> None:
    page = (shipped_root() / "docs" / "evaluate.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- example: bench.yaml -->\n```yaml\n(.*?)```", page, re.DOTALL)
    assert found
    for name in re.findall(r"data: (\S+)\}", found.group(1)):
        Path(name).write_text("")
    Path("bench.yaml").write_text(re.sub(r"runs/mine/stages/\w+", "./free", found.group(1)))
    spec = load_recipe("bench.yaml").recipe.stages["bench"]
    assert isinstance(spec, EvaluateStage) and len(spec.reward_benches) == 4 and len(spec.scorers) == 3
