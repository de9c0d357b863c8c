"""PPO as a stage: from a recipe to a policy, a value model and the answers of every iteration, on a tiny model."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from align.batching.tree import build
from align.data.answer_file import pairs_of, read_answers
from align.data.tree import Branch, Tree
from align.errors import InputError
from align.models.compute.forward import batch_logprobs
from align.models.load import load_encoder, load_policy
from align.models.scalar.heads import ScalarModel, ScoreStats, load_scalar, save_scalar, token_values
from align.pipeline.artifacts import verify
from align.pipeline.runner import RunResult, run_recipe
from align.pipeline.selection import Selection
from align.recipe.load import load_recipe
from align.recipe.schema import Model, PpoStage
from align.report.estimates import ReportedNumber
from align.stages.ppo import run as ppo
from align.stages.ppo.trainer import PpoTrainer
from align.training.launch import Ranks
from tests.support.readme import every_file_is_explained
from tests.support.report_run import reported
from tests.support.saved import save_tiny
from tests.support.tokenizers import chatml

PPO: dict[str, Any] = {
    "kind": "ppo",
    "reward": "./reward",
    "prompts": "prompts.jsonl",
    "eval_prompts": "held_out.jsonl",
    "sft_data": "talk.jsonl",
    "sft_weight": 0.1,
    "eval_sft_data": "talk.jsonl",
    "iterations": 3,
    "max_new_tokens": 6,
    "max_prompt_length": 100,
    "samples_per_prompt": 2,
    "minibatches": 2,
    "rollout": {"engine": "transformers"},
    "train": {"learning_rate": 1e-3, "batch_size": 2, "microbatch_tokens": 128, "save_steps": 1},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a model, a reward model, prompts and conversations."""
    monkeypatch.chdir(tmp_path)
    return fill(tmp_path)


def fill(tmp_path: Path, **shape: Any) -> Path:
    """Everything that the recipe below names."""
    base = save_tiny(tmp_path / "model", max_position_embeddings=512, **shape)
    torch.manual_seed(7)
    reward = ScalarModel(load_policy(base).base_model)  # type: ignore[arg-type]
    stats = ScoreStats(0.0, 1.0, 1)
    save_scalar(reward, load_encoder(base), tmp_path / "reward", base=base, scores=stats, layout="tree")
    words = ("tea", "rain", "sun", "snow")
    for name, ask in (("prompts", "Say"), ("held_out", "Name")):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"prompt": f"{ask} {word}."}) + "\n" for word in words)
        )
    rows = [
        {"messages": [{"role": "user", "content": f"Say {w}."}, {"role": "assistant", "content": f"{w} it is."}]}
        for w in words
    ]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return tmp_path


def run(text: io.StringIO | None = None, **options: Any) -> RunResult:
    stage = {**PPO, **options}
    Path("recipe.yaml").write_text(
        yaml.safe_dump({"name": "r", "model": "./model", "stages": {"ppo": stage}}, sort_keys=False)
    )
    result = run_recipe(
        load_recipe("recipe.yaml"),
        console=Console(file=text or io.StringIO(), width=160),
        selection=Selection(replace=True),
    )
    every_file_is_explained(result.folder)
    return result


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_from_a_recipe_to_a_policy(folder: Path, lora: Any) -> None:
    """Everything that a run promises to leave is there, verifies, loads, and is another model than before; a rerun does
    nothing."""
    text = io.StringIO()
    result = run(text, lora=lora)
    out = result.folder / "stages" / "ppo"
    assert verify(out) == []
    before, after = load_policy(Model(path="model")), load_policy(Model(path=str(out)))
    encoder = load_encoder(Model(path="model"))
    trunk = encoder.encode_prompt([{"role": "user", "content": "Name tea."}])
    batch = build([Tree("x", trunk, (Branch(trunk[:9], trunk[:9] > -1),))], [0], layout="tree")
    with torch.no_grad():
        assert not torch.allclose(batch_logprobs(before, batch), batch_logprobs(after, batch), atol=1e-4)
        value = load_scalar(Model(path=str(out / "value")))
        assert not torch.allclose(
            token_values(value, batch), token_values(load_scalar(Model(path="reward")), batch), atol=1e-5
        )
    answers = list(read_answers(out))
    assert list(dict.fromkeys((answer.part, answer.version) for answer in answers)) == [
        *(("held-out", 0), ("held-out", 6), ("reference", 0)),
        *(("rollouts", step) for step in (0, 2, 4)),
    ]
    assert all(answer.policy == "ppo" and "score" in answer.scores for answer in answers)
    assert {"kl", "baseline"} <= answers[-1].scores.keys()
    summary = result.summaries["ppo"]
    assert summary["iterations"] == 3 and summary["steps"] == 6
    assert summary["eval_before"].keys() == {"reward", "length", "finished", "sft_loss"}
    assert summary["held_out_change"]["prompts"] == 4
    assert summary["trainable_parameters"] <= summary["parameters"], "the value model's are among them"
    assert len(list(pairs_of(answers))) == 4, "all held-out prompts, though two are printed"
    assert (
        summary["phase_seconds"].keys() == {"sync", "generate", "score", "values", "train"}
        and summary["phase_seconds"]["train"] > 0
    )
    changed = reported(result.folder)["ppo"]["reward on held-out prompts"].difference
    assert changed == ReportedNumber(summary["held_out_change"]["mean"], *summary["held_out_change"]["interval"])
    shown = text.getvalue()
    assert f"held-out reward {summary['eval_before']['reward']:.4f}" in shown
    assert all(
        source in shown
        for source in ("prompts.jsonl", "held out: held_out.jsonl", "sft: talk.jsonl", "held out: talk.jsonl")
    )
    assert "iteration 3/3" in shown and "generate" in shown and "before and after" in shown
    assert "the reward on 4 held-out prompts changed by" in shown and "reference answers to 4 prompts score" in shown
    assert ("a second model in memory" in shown) == (lora is not None), (
        "the reward model is no adapter of the policy's base"
    )
    assert run(lora=lora).ran == ()


def test_the_baseline_is_the_references_own_score(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt's baseline is the mean of its reference answers; another run with the same policy and reward
    finds them again.

    Their time is no iteration's."""
    baselines = ppo._baselines

    def slow(spec: Any, ctx: Any, rollouts: Any, *rest: Any) -> torch.Tensor:
        rollouts._clock.add("generate", 1e6)
        return baselines(spec, ctx, rollouts, *rest)

    monkeypatch.setattr(ppo, "_baselines", slow)
    result = run(baseline_samples=2, unfinished_penalty=0.25)
    assert 0 < result.summaries["ppo"]["phase_seconds"]["generate"] < 1e6
    answers = list(read_answers(result.folder / "stages" / "ppo"))
    reference: dict[str, list[float]] = {}
    for row in answers:
        if row.part == "reference":
            reference.setdefault(row.prompt_id, []).append(row.scores["score"] - 0.25 * (not row.finished))
    rows = [row for row in answers if row.part == "rollouts" and row.version == 0]
    assert rows
    for row in rows:
        assert len(reference[row.prompt_id]) == 2
        assert row.scores["baseline"] == pytest.approx(sum(reference[row.prompt_id]) / 2, abs=1e-6)
    kept = sorted((folder / "runs" / ".cache" / "baseline").glob("*.parquet"))
    assert len(kept) == 1
    run(baseline_samples=2, unfinished_penalty=0.5)
    assert sorted((folder / "runs" / ".cache" / "baseline").glob("*.parquet")) == kept
    run(baseline_samples=2, temperature=0.5)
    assert len(list((folder / "runs" / ".cache" / "baseline").glob("*.parquet"))) == 2


def test_the_value_model_is_used_again(folder: Path) -> None:
    """A saved value model starts the next run's."""
    first = run()
    value = first.folder / "stages" / "ppo" / "value"
    (folder / "kept").mkdir()
    value.rename(folder / "kept" / "value")
    result = run(
        value_model="kept/value",
        iterations=1,
        train={**PPO["train"], "learning_rate": 1e-12},
        value_learning_rate=1e-12,
    )
    again = load_file(result.folder / "stages" / "ppo" / "value" / "reward_head.safetensors")["weight"]
    kept = load_file(folder / "kept" / "value" / "reward_head.safetensors")["weight"]
    reward = load_file(folder / "reward" / "reward_head.safetensors")["weight"]
    torch.testing.assert_close(again, kept, atol=1e-9, rtol=0)
    assert not torch.allclose(again, reward, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "rloo"},
        {"estimator": "group", "lora": {"rank": 2, "save_merged": True}},
        {"estimator": "reinforce", "sft_data": None, "sft_weight": 0.0, "eval_prompts": None, "eval_sft_data": None},
        {"value_init": "policy", "lora": {"rank": 2}},
    ],
    ids=["rloo", "group", "reinforce", "value from policy"],
)
def test_the_other_ways(folder: Path, options: dict[str, Any]) -> None:
    """Estimators without a value model leave none; a value model on the policy's base is said to be no second model;
    held-out data and conversations may be absent."""
    text = io.StringIO()
    out = run(text, **options).folder / "stages" / "ppo"
    assert (out / "value").exists() == ("value_init" in options)
    assert (out / "merged").exists() == options.get("lora", {}).get("save_merged", False)
    assert "second model" not in text.getvalue()


@pytest.mark.parametrize("best", [True, False])
def test_the_change_is_that_of_the_policy_that_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, best: bool
) -> None:
    """The best, or the last: its numbers, its answers, and how far it is from the beginning. Here every evaluation is
    worse than the one before, so that the best is what training began with."""
    (folder / "my_scores.py").write_text(
        "calls = []\ndef falls(answers):\n    calls.append(1)\n    return [-len(calls)] * len(answers)\n"
    )
    monkeypatch.syspath_prepend(folder)
    train = {**PPO["train"], "eval_steps": 1, "load_best_model": best}
    summary = run(reward={"function": "my_scores:falls"}, value_init="policy", iterations=1, train=train).summaries[
        "ppo"
    ]
    fell = summary["eval_after"]["reward"] - summary["eval_before"]["reward"]
    assert fell == 0 if best else fell < 0
    assert summary["held_out_change"]["mean"] == pytest.approx(fell)


def test_stopped_in_the_middle_and_run_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command goes on inside the iteration, and ends with the bytes of a run that was never stopped."""
    whole = run().folder / "stages" / "ppo"
    whole.rename(folder / "whole")
    after = PpoTrainer.after_step

    def stop(self: PpoTrainer, metrics: Any) -> None:
        after(self, metrics)
        if self.progress.step == 4:
            raise RuntimeError("pulled the plug")

    monkeypatch.setattr(PpoTrainer, "after_step", stop)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run()
    monkeypatch.setattr(PpoTrainer, "after_step", after)
    text = io.StringIO()
    again = run(text).folder / "stages" / "ppo"
    assert "continues from step 3 of 6" in text.getvalue()
    for name in (
        "model.safetensors",
        "value/model.safetensors",
        "answers.jsonl",
    ):
        assert (again / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


def test_adapters_all_the_way_share_one_base(folder: Path) -> None:
    """SFT, reward model and PPO, each with LoRA: the reward model's adapter becomes the value model on the policy's
    base, begins by saying what the reward model says, and loads by itself when it is saved; where nothing moves, the
    policy is the SFT policy."""
    train = {"learning_rate": 3e-3, "batch_size": 2, "microbatch_tokens": 128}
    pairs = [
        {"prompt": f"Say {w}.", "chosen": f"{w} it is.", "rejected": f"No {w}."} for w in ("tea", "rain", "sun", "snow")
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    still = {"learning_rate": 1e-12, "batch_size": 2, "microbatch_tokens": 128}
    stages = {
        "sft": {"kind": "sft", "data": "talk.jsonl", "lora": {"rank": 4}, "train": train},
        "reward": {"kind": "reward", "init": "stage:sft", "data": "pairs.jsonl", "lora": {"rank": 3}, "train": train},
        "ppo": {
            **PPO,
            "policy": "stage:sft",
            "reward": "stage:reward",
            "lora": {"rank": 2},
            "value_learning_rate": 1e-12,
            "train": still,
        },
    }
    Path("recipe.yaml").write_text(yaml.safe_dump({"name": "r", "model": "./model", "stages": stages}, sort_keys=False))
    text = io.StringIO()
    result = run_recipe(
        load_recipe("recipe.yaml"), console=Console(file=text, width=160), selection=Selection(replace=True)
    )
    assert "second model" not in text.getvalue()
    places = {name: result.folder / "stages" / name for name in stages}
    encoder = load_encoder(Model(path="model"))
    trunk = encoder.encode_prompt([{"role": "user", "content": "Name tea."}])
    batch = build([Tree("x", trunk, (Branch(trunk[:9], trunk[:9] > -1),))], [0], layout="tree")
    with torch.no_grad():
        reward, value = (load_scalar(Model(path=str(path))) for path in (places["reward"], places["ppo"] / "value"))
        torch.testing.assert_close(token_values(value, batch), token_values(reward, batch), atol=1e-5, rtol=0)
        before, after = (batch_logprobs(load_policy(Model(path=str(places[name]))), batch) for name in ("sft", "ppo"))
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
        base = batch_logprobs(load_policy(Model(path="model")), batch)
        assert not torch.allclose(base, before, atol=1e-2)
    assert abs(result.summaries["ppo"]["last_iteration"]["kl"]) < 1e-5


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_says_what_is_trained(folder: Path, rank: int) -> None:
    """And that a second model is in memory; the other processes are silent."""
    text = io.StringIO()
    spec = PpoStage.model_validate({**PPO, "lora": {"rank": 2}})
    base = Model(path="model")
    encoder = load_encoder(base)
    ctx: Any = SimpleNamespace(
        name="ppo", seed=1, cache=folder / "cache", resolve=Path, console=Console(file=text, width=200)
    )
    models, reference = ppo._models(spec, ctx, base, encoder, Ranks(rank, 2), [5, 6, 7])
    assert not models.shared and reference is None
    said = text.getvalue()
    assert ("adapters on" in said and "second model in memory" in said) if rank == 0 else not said


def test_a_value_model_reads_the_policys_tokens(folder: Path) -> None:
    """A reward model with another template may score text, but its weights cannot value the policy's
    tokens."""
    notes = json.loads((folder / "reward" / "align.json").read_text())
    (folder / "reward" / "align.json").write_text(json.dumps({**notes, "encoder": "another"}))
    with pytest.raises(InputError, match="another tokenizer or chat template"):
        run()


def test_a_rule_as_reward(folder: Path) -> None:
    """Any scorer will do; without a reward model the value model starts from the policy."""
    out = run(reward={"rule": "length", "min": 1, "max": 2}, value_init="policy").folder / "stages" / "ppo"
    rows = list(read_answers(out))
    assert {0 <= row.scores["score"] <= 1 for row in rows} == {True} and (out / "value").exists()


def test_a_script_stands_in_for_an_engine(folder: Path) -> None:
    """For trying a recipe out: no weights are pushed, nothing is compared, and the old log-probs are the trainer's all
    the same."""
    (folder / "script.jsonl").write_text(
        "".join(json.dumps({"completion": text}) + "\n" for text in ("tea", "rain it is"))
    )
    options: dict[str, Any] = {"rollout": {"engine": "scripted", "script": "script.jsonl"}, "max_new_tokens": 20}
    result = run(**options)
    rows = [row for row in read_answers(result.folder / "stages" / "ppo") if row.part == "rollouts"]
    assert {row.text for row in rows} <= {"tea", "rain it is"} and all(row.finished for row in rows)
    summary = result.summaries["ppo"]
    assert "mismatch" not in summary["last_iteration"] and "sync" not in summary["phase_seconds"]
    assert "first_ratio" not in summary["unhealthy"]
    with pytest.raises(InputError, match="importance_cap"):
        run(**options, importance_cap=2.0)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_on_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Any) -> None:
    """Every iteration's weights reach vLLM, the adapters' too: its log-probs are the trainer's after large
    steps."""
    monkeypatch.chdir(tmp_path)
    # vLLM's attention on a CPU wants heads of at least 32, and never samples an id that has no token.
    fill(tmp_path, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, vocab_size=len(chatml()))
    train = {**PPO["train"], "learning_rate": 1e-2}
    result = run(lora=lora, train=train, rollout={"engine": "vllm", "cache_gb": 0.1, "max_sequences": 16})
    summary = result.summaries["ppo"]
    assert not {"mismatch", "first_ratio"} & summary["unhealthy"].keys()
    rows = [json.loads(line) for line in (result.folder / "stages" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    off = [row["rollout/mismatch_max"] for row in rows if "rollout/mismatch_max" in row]
    assert len(off) == 3 and max(off) < 1e-3
    assert abs(summary["last_iteration"]["kl"]) > 1e-3, "the steps were large"
