"""``kind: evaluate`` on tiny models, against numbers computed here from whole forward passes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from align.errors import InputError
from align.models.load import load_encoder, load_policy
from align.pipeline.runner import RunResult, run_recipe
from align.recipe.load import load_recipe
from align.recipe.schema import Model
from align.report.changes import Estimate
from align.rollout import samples as sharding
from align.scoring.embeddings import SentenceEmbedder
from align.stages import evaluate as stage
from align.stages import sampling
from align.stages.metrics import METRICS, Measured
from tests.embedder import save_embedder
from tests.report_run import reported
from tests.saved import save_tiny
from tests.scripted import Dying, open_scripted, write_script
from tests.tokenizers import qwen3

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
    pairs = [("Say tea.", "Tea it is."), ("Say rain.", "Rain it is, all day long."), ("今天天气怎么样？", "很好。"), ("Say sun.", "Sun.")]
    rows = [
        {"id": f"t{i}", "messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for i, (a, b) in enumerate(pairs)
    ]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sampling, "open_engine", open_scripted)
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
    recipe = {"name": "r", "seed": 5, "model": "./first", "stages": {"compare": {**spec, "embedder": "./embedder", **options}}}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run_recipe(load_recipe("recipe.yaml"), console=Console(file=text or io.StringIO(), width=160), runs_dir=Path(runs))


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
    """Margins of both policies on the first one's samples, cosines and lengths of their own, prompt by prompt and in the mean."""
    result = run(["./first", "./second"])
    metrics, embedder = report(result)["metrics"], SentenceEmbedder(folder / "embedder")
    encoder = load_encoder(Model(path="./first"))
    own_samples: dict[str, list[list[list[int]]]] = {}
    for name in ("./first", "./second"):
        engine = Dying(folder / name / "script.jsonl", encoder)
        trunks = [encoder.encode_prompt(row["prompt"]).tolist() for row in rows(result)]
        plan = sampling.Sampling(10, n=3, seed=sharding.sample_seed(sharding.sample_seed(5, 0), 0))
        own_samples[name] = [[list(one.ids) for one in group] for group in engine.generate(trunks, plan)]
    for name in ("./first", "./second"):
        model = load_policy(Model(path=name))
        means: dict[str, list[float]] = {key: [] for key in METRICS}
        for p, row in enumerate(rows(result)):
            trunk, (answer,) = encoder.encode_answers(row["prompt"], [[{"role": "assistant", "content": row["target"]}]])
            target = answer.ids[answer.mask].tolist()
            assert target[-1] == encoder.stop_ids[0]
            target_logprob = logprob(model, trunk.tolist(), target)
            margin = target_logprob - np.mean([logprob(model, trunk.tolist(), ids) for ids in own_samples["./first"][p]])
            own = own_samples[name][p]
            vectors = embedder.embed([row["target"], *(encoder.decode(ids).lstrip() for ids in own)])
            expected = {
                "margin": margin,
                "target_logprob": target_logprob,
                "similarity": float((vectors[1:] @ vectors[0]).mean()),
                "length": float(np.mean([len(ids) for ids in own])),
                "unfinished": float(np.mean([ids[-1] != encoder.stop_ids[0] for ids in own])),
            }
            for key, value in expected.items():
                assert row["policies"][name][key] == pytest.approx(value, abs=2e-4), (name, row["id"], key)
                means[key].append(value)
        for key, values in means.items():
            assert metrics[key][name]["mean"] == pytest.approx(np.mean(values), abs=2e-4)
            assert metrics[key][name]["low"] <= metrics[key][name]["mean"] <= metrics[key][name]["high"]
    first = metrics["margin"]["./first"]["mean"]
    assert metrics["margin"]["./second"]["difference"]["mean"] == pytest.approx(metrics["margin"]["./second"]["mean"] - first, abs=1e-9)
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
    assert found == Estimate(difference["mean"], difference["low"], difference["high"])
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
        assert (difference["mean"], difference["low"], difference["high"]) == (0.0, 0.0, 0.0)


def test_differences_are_paired(folder: Path) -> None:
    """Two policies a constant apart differ by exactly that, however far the prompts are apart."""
    spread = np.array([-50.0, 0.0, 80.0, 400.0])
    shape = np.zeros((4, 2))
    one = Measured(spread, shape, shape, shape + 3, shape + 1)
    two = Measured(spread + 2, shape, shape, shape + 3, shape + 1)
    found = stage.compare({"a": one, "b": two}, seed=1)["margin"]
    assert found["b"]["difference"] == {"mean": 2.0, "low": 2.0, "high": 2.0, "count": 4}
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
    model, encoder = load_policy(Model(path="./capped"), attn_implementation="eager"), load_encoder(Model(path="./capped"))
    row = rows(result)[0]
    trunk, (answer,) = encoder.encode_answers(row["prompt"], [[{"role": "assistant", "content": row["target"]}]])
    expected = logprob(model, trunk.tolist(), answer.ids[answer.mask].tolist())
    assert row["policies"]["./capped"]["target_logprob"] == pytest.approx(expected, abs=2e-4)


def test_other_tokens_are_refused(folder: Path) -> None:
    """C51: log-probs of token ids mean nothing to a model with another vocabulary."""
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
