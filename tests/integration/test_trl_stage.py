"""TRL's trainers as stages, on a tiny model: what they are given, what they leave behind, and that they can be
interrupted."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file

from align.data.answer_file import pairs_of, read_answers
from align.data.tree import Tree
from align.errors import InputError, Interrupted, TrainingFault
from align.models.adapters import is_lora
from align.models.load import load_encoder, load_policy
from align.pipeline.artifacts import verify
from align.pipeline.runner import RunResult, run_recipe
from align.pipeline.selection import Selection
from align.recipe.load import load_recipe
from align.recipe.schema import DataSource, Model
from align.stages.context import StageContext
from align.stages.trl import callback
from align.stages.trl import run as stage
from align.training.launch import Ranks
from tests.support.saved import save_tiny

ARGS = {"learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 2, "gradient_checkpointing": False}
SAMPLED = {"num_generations": 2, "max_completion_length": 5, "per_device_train_batch_size": 4}
WORDS = ("tea", "rain", "sun", "snow")
SCORED: list[Any] = []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder: a model, preferences (one with two rejected answers, one with a cut answer), prompts, and a
    scorer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    save_tiny(tmp_path / "model", max_position_embeddings=512)
    rows: list[dict[str, Any]] = [
        {"prompt": f"Say {w}.", "chosen": f"{w.title()} it is.", "rejected": [f"No {w}."]} for w in WORDS
    ]
    rows[0]["rejected"].append("Not <|im_end|> that.")  # text of a control token, which must stay text
    cut = {"role": "assistant", "content": "I was going to", "finished": False}
    rows.append({"prompt": "Say more.", "chosen": "More.", "rejected": [[cut]]})
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": f"Name {w}.", "target": w, "hint": w.upper()} for w in WORDS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (tmp_path / "trl_scorer.py").write_text(
        "from tests.integration import test_trl_stage as test\n\n"
        "def tokens(answers):\n    test.SCORED.extend(answers)\n    return [float(sum(a.ids) % 7) for a in answers]\n"
    )
    SCORED.clear()
    yield tmp_path


def run(stages: dict[str, Any], text: io.StringIO | None = None, runs: str = "runs") -> RunResult:
    Path("recipe.yaml").write_text(yaml.safe_dump({"name": "r", "model": "./model", "stages": stages}, sort_keys=False))
    return run_recipe(
        load_recipe("recipe.yaml"),
        console=Console(file=text or io.StringIO(), width=160),
        runs_dir=Path(runs),
        selection=Selection(replace=True),
    )


def kto(trainer: str = "kto", **options: Any) -> dict[str, Any]:
    args = {**ARGS, **options.pop("args", {})}
    return {
        "kind": "trl",
        "trainer": trainer,
        "data": "mine.jsonl",
        "max_length": 120,
        "samples": 1,
        "args": args,
        **options,
    }


def sampling(trainer: str, **options: Any) -> dict[str, Any]:
    args = {**ARGS, **SAMPLED, **options.pop("args", {})}
    common = {"data": "prompts.jsonl", "reward": "trl_scorer:tokens", "max_length": 120, "samples": 1}
    return {"kind": "trl", "trainer": trainer, **common, "args": args, **options}


def metrics(result: RunResult, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result.folder / "stages" / name / "metrics.jsonl").read_text().splitlines()]


def trainer_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Will hold the trainer of the next run."""
    made: list[Any] = []
    build = stage._build

    def remember(*arguments: Any) -> Any:
        built = build(*arguments)
        made.append(built[0])
        return built

    monkeypatch.setattr(stage, "_build", remember)
    return made


def trees(folder: Path) -> list[Tree]:
    """The preferences as every other stage sees them, without the one that TRL cannot train on."""
    from align.data.trees.load import load_trees

    settings: dict[str, Any] = {"max_length": 120, "too_long": "drop", "train_on": "last", "seed": 0, "rejects": None}
    encoder = load_encoder(Model(path=str(folder / "model")))
    source = DataSource(path="mine.jsonl")
    store, _ = load_trees(
        "preference", [source], resolve=lambda _: folder / "mine.jsonl", encoder=encoder, cache=folder / "c", **settings
    )
    return [store[place] for place in range(len(store))][:-1]


def test_kto_is_a_stage_like_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that the next stage takes, a report, metrics of each step; its data are the encoder's, its first loss
    KTO's of a policy that is its own reference (the adapter of the stage before it included), and a second run does
    nothing."""
    made = trainer_of(monkeypatch)
    text = io.StringIO()
    sft = {
        "kind": "sft",
        "data": "talk.jsonl",
        "lora": {"rank": 4},
        "train": {"learning_rate": 1e-2, "batch_size": 2, "epochs": 2},
    }
    talk = [
        {"messages": [{"role": "user", "content": f"Say {w}."}, {"role": "assistant", "content": f"{w}."}]}
        for w in WORDS
    ]
    (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    stages = {"sft": sft, "kto": kto(policy="stage:sft", eval_data="mine.jsonl")}
    result = run(stages, text)
    assert result.ran == ("sft", "kto")
    rows = metrics(result, "kto")
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    assert rows[1]["loss"] == pytest.approx(0.5, abs=1e-6) and rows[2]["loss"] != pytest.approx(0.5, abs=1e-6)
    summary = result.summaries["kto"]
    assert (summary["trainer"], summary["steps"], summary["format"]) == ("KTOTrainer", 2, "full")
    assert summary["eval_before"]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert summary["eval_after"]["loss"] == rows[3]["eval/loss"] != summary["eval_before"]["loss"]
    assert "dropped, an answer that was cut" in text.getvalue() and "9 rows for TRL" in text.getvalue()
    assert (
        "sft  adapters on " in text.getvalue()
        and "kto  the policy's adapter is merged into its base" in text.getvalue()
    )
    out = result.folder / "stages" / "kto"
    assert not verify(out)
    ((before, after),) = pairs_of(read_answers(out))
    assert (before.policy, before.version, after.version) == ("kto", 0, summary["steps"]) and before.tokens > 0
    assert json.loads((out / "config.json").read_text()).get("_name_or_path", "model").endswith("model")
    policy, encoder = load_policy(Model(path=str(out))), load_encoder(Model(path=str(out)))
    assert not is_lora(policy) and encoder.digest == load_encoder(Model(path="model")).digest
    given = {(tuple(r["prompt_ids"]), tuple(r["completion_ids"]), r["label"]) for r in made[0].train_dataset}
    ours = {
        (tuple(t.trunk.tolist()), tuple(b.ids.tolist()), k == 0)
        for t in trees(folder)
        for k, b in enumerate(t.branches)
    }
    assert given == ours and len(ours) == 9
    again = run(stages)
    assert again.ran == () and again.up_to_date == ("sft", "kto")
    with pytest.raises(InputError, match=r"stages.kto.lora: the policy is an adapter"):
        run({"sft": sft, "kto": kto(policy="stage:sft", lora={})})


def test_pairs_are_the_encoders_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ORPO and CPO build their rows of pieces, and may add begin and end tokens: prompt, answer and labels come out as
    ours."""
    made = trainer_of(monkeypatch)
    for trainer in ("orpo", "cpo"):
        lora = {"lora": {"rank": 2}} if trainer == "cpo" else {}
        text = io.StringIO()
        summary = run({trainer: kto(trainer=trainer, args={"max_steps": 1}, **lora)}, text).summaries[trainer]
        assert (summary["steps"], summary["format"]) == (1, "lora" if lora else "full")
        assert (f"{trainer}  adapters on " in text.getvalue()) == bool(lora)
        expected = set()
        for tree in trees(folder):
            trunk, (chosen, *others) = tree.trunk.tolist(), [branch.ids.tolist() for branch in tree.branches]
            expected |= {((*trunk, *chosen), (*trunk, *other), len(trunk)) for other in others}
        given = {
            (tuple(r["chosen_input_ids"]), tuple(r["rejected_input_ids"]), r["chosen_labels"].count(-100))
            for r in made[-1].train_dataset
        }
        assert given == expected and len(expected) == 5


def test_grpo_samples_from_our_prompts_and_asks_our_scorer(folder: Path) -> None:
    """Answers reach the scorer with the tokens that were sampled, and the row that they belong to; adapters come out as
    adapters."""
    stages = {"grpo": sampling("grpo", eval_data="prompts.jsonl", lora={"rank": 2})}
    result = run(stages)
    encoder = load_encoder(Model(path="model"))
    assert len(SCORED) == 4 * 2 + 2 * 4 + 4 * 2  # held-out, two steps, held-out
    for answer in SCORED:
        assert list(answer.prompt_ids) == encoder.encode_prompt(answer.prompt).tolist()
        assert answer.text == encoder.answer_text(answer.ids, finished=answer.finished)
        assert answer.target in answer.prompt[0]["content"] and answer.fields["hint"] == answer.target.upper()
        assert answer.finished == (answer.ids[-1] in encoder.stop_ids) and len(answer.ids) <= 5
        assert all(token < encoder.vocabulary for token in answer.ids), "an id without a token was sampled"
    rewards = [sum(a.ids) % 7 for a in SCORED[8:12]]
    rows = metrics(result, "grpo")
    assert rows[1]["reward"] == pytest.approx(sum(rewards) / 4)
    summary = result.summaries["grpo"]
    assert summary["format"] == "lora" and summary["tokens"] > 0 and set(summary["eval_after"]) >= {"reward", "loss"}
    assert is_lora(load_policy(Model(path=str(result.folder / "stages" / "grpo"))))
    assert run(stages).ran == ()


@pytest.mark.parametrize("trainer", ["rloo", "gmpo", "online_dpo"])
def test_other_trainers_that_sample(folder: Path, trainer: str) -> None:
    args: dict[str, Any] = {"max_steps": 1}
    if trainer == "online_dpo":
        spec = sampling(trainer, lora={"rank": 2})
        spec["args"] = {**ARGS, **args, "max_new_tokens": 5}
    else:
        spec = sampling(trainer, args={**args, "beta": 0.1})  # loads the reference
    result = run({"s": spec})
    encoder = load_encoder(Model(path="model"))
    assert result.summaries["s"]["steps"] == 1
    assert len(SCORED) == 4
    assert all(list(answer.prompt_ids) == encoder.encode_prompt(answer.prompt).tolist() for answer in SCORED)
    assert all(answer.ids[-1] in encoder.stop_ids or len(answer.ids) == 5 for answer in SCORED)


@pytest.mark.parametrize("name", ["kto", "grpo"])
def test_a_signal_stops_it_and_the_same_command_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The weights and the metrics of a run that nothing disturbed, from a checkpoint without a pickle; all weights, and
    adapters."""
    options = {"eval_data": "mine.jsonl", "args": {"max_steps": 3}}
    stages = {name: kto(**options) if name == "kto" else sampling(name, lora={"rank": 2}, **options)}
    file = "model.safetensors" if name == "kto" else "adapter_model.safetensors"
    clean = run(stages, runs="clean")
    stop_after(monkeypatch, 1)
    with pytest.raises(Interrupted, match="saved at step 1 of 3") as stopped:
        run(stages)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    (checkpoint,) = (folder / "runs").rglob("checkpoint-1")
    assert not list(checkpoint.rglob("*.bin")) and (checkpoint / file).is_file()
    text = io.StringIO()
    resumed = run(stages, text)
    assert "continues from step 1" in text.getvalue()
    weights = [load_file(result.folder / "stages" / name / file) for result in (clean, resumed)]
    assert all(value.equal(weights[1][key]) for key, value in weights[0].items())
    first, second = metrics(clean, name), metrics(resumed, name)
    assert [row["step"] for row in second] == [0, 1, 2, 3, 3]
    assert [row.get("loss") for row in first] == [row.get("loss") for row in second]


def test_a_damaged_checkpoint_is_thrown_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {"kto": kto()}
    stop_after(monkeypatch, 1)
    with pytest.raises(Interrupted):
        run(stages)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    (state,) = (folder / "runs").rglob("checkpoint-1/optimizer.pt")
    state.write_bytes(state.read_bytes() + b"x")
    text = io.StringIO()
    result = run(stages, text)
    assert "continues" not in text.getvalue()
    assert [row["step"] for row in metrics(result, "kto")] == [1, 2]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A SIGTERM in a step: asked for once before training, and after each step."""
    asked: list[int] = []

    def requested() -> int | None:
        asked.append(1)
        return signal.SIGTERM if len(asked) > step else None

    monkeypatch.setattr(callback, "stop_requested", requested)
    monkeypatch.setattr(stage, "stop_requested", requested)


def test_arguments_that_contradict_each_other(folder: Path) -> None:
    """What only the class itself can tell is told before anything is loaded, as one line at its key."""
    with pytest.raises(
        InputError, match=r"stages.grpo.args: generation_batch_size \(3\) must be divisible by num_generations \(2\)"
    ):
        run({"grpo": sampling("grpo", args={"per_device_train_batch_size": 3})})
    with pytest.raises(InputError, match=r"stages.kto.args: Actual \(not effective\) batch size must be > 1"):
        run({"kto": kto(args={"per_device_train_batch_size": 1})})
    with pytest.raises(InputError, match=r"too few for a single step; a batch takes 8 prompts"):
        run({"grpo": sampling("grpo", args={"per_device_train_batch_size": 16})})


def test_several_processes_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "ranks", lambda: Ranks(0, 2))
    with pytest.raises(InputError, match="`kind: trl` runs in one process"):
        run({"kto": kto()})


def test_a_loss_that_is_no_number_ends_the_stage(tmp_path: Path) -> None:
    ctx = StageContext("s", 0, tmp_path, tmp_path, tmp_path, Model(path="m"), resolve=lambda text: text)
    watch = callback.TrlCallback(ctx, None)

    class State:
        global_step, max_steps = 3, 9

    with pytest.raises(TrainingFault, match="step 3: loss is nan"):
        watch.on_log(None, State, None, logs={"loss": float("nan")})


def test_nothing_is_told_to_anybody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Telemetry is off while TRL runs even where the environment does not say so, and the hub is out of reach."""
    from huggingface_hub import constants
    from trl.trainer import base_trainer

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("CI", raising=False)
    seen: list[tuple[bool, bool]] = []
    monkeypatch.setattr(
        base_trainer,
        "send_telemetry",
        lambda **_: seen.append((constants.HF_HUB_DISABLE_TELEMETRY, constants.HF_HUB_OFFLINE)),
    )
    run({"kto": kto(args={"max_steps": 1})})
    assert seen == [(True, True)]
    assert not constants.HF_HUB_DISABLE_TELEMETRY
