"""What a run looks at before its first stage: every fault of every stage at once, before anything is written."""

from __future__ import annotations

import io
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from align.errors import AlignError, EnvironmentFault, InputError
from align.models.files import hub
from align.pipeline.runner import run_recipe
from align.planning import requirements
from align.preflight import first_rows
from align.preflight.checks import look
from align.preflight.models_here import refused
from align.recipe.load import load_recipe
from align.recipe.schema import BUILTIN_STAGES, DataSource
from align.sizing import machine
from align.training import trackers
from tests.support.saved import save_tiny

TALK = {"messages": [{"role": "user", "content": "Say tea."}, {"role": "assistant", "content": "Tea it is."}]}
PAIR = {"prompt": "Say tea.", "chosen": "Tea.", "rejected": "No."}
ROWS: dict[str, list[Any]] = {
    "talk.jsonl": [TALK] * 3,
    "pairs.jsonl": [PAIR] * 3,
    "prompts.jsonl": [{"prompt": "Say tea."}] * 3,
    "gsm.jsonl": [{"question": "1 + 1?", "answer": "#### 2"}],
    "broken.jsonl": [{"messages": 3}, {"chosen": None}, {"zzz": 1}],
}
PPO = {"kind": "ppo", "reward": {"rule": "length", "max": 9}, "value_init": "policy", "prompts": "prompts.jsonl"}
SAMPLES = {"reward": {"rule": "json"}, "prompts": "prompts.jsonl"}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"kind": "sft", "data": "talk.jsonl", "eval_data": "talk.jsonl"},
    "dpo": {"kind": "dpo", "data": "pairs.jsonl", "eval_data": "pairs.jsonl"},
    "reward": {"kind": "reward", "data": "pairs.jsonl", "eval_data": "pairs.jsonl"},
    "ppo": {**PPO, "eval_prompts": "prompts.jsonl", "sft_data": "talk.jsonl", "eval_sft_data": "talk.jsonl"},
    "select_prompts": {"kind": "select_prompts", **SAMPLES},
    "label": {"kind": "label", **SAMPLES},
    "self_contrast": {"kind": "self_contrast", "data": "talk.jsonl", "embedder": "./embedder"},
    "trl": {"kind": "trl", "trainer": "orpo", "data": "pairs.jsonl", "eval_data": "pairs.jsonl"},
    "evaluate": {
        "kind": "evaluate",
        "policies": ["./model"],
        "data": "talk.jsonl",
        "embedder": None,
        "tasks": [{"task": "gsm8k", "data": "gsm.jsonl"}],
    },
}
SOURCES = [(kind, key) for kind, stage in STAGES.items() for key, value in stage.items() if value in list(ROWS)] + [
    ("evaluate", "tasks")
]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    save_tiny(Path("model"))
    Path("embedder").mkdir()
    Path("embedder/modules.json").write_text("[]")
    for name, rows in ROWS.items():
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write(stages: dict[str, Any], **top: Any) -> Any:
    Path("r.yaml").write_text(
        yaml.safe_dump({"name": "r", "model": "./model", **top, "stages": stages}, sort_keys=False)
    )
    return load_recipe("r.yaml")


def told(stages: dict[str, Any], *, thorough: bool = False, nproc: int = 1, **top: Any) -> list[str]:
    """Every problem; those of the machine begin with `!`."""
    found = look(write(stages, **top), Path("runs"), nproc=nproc, thorough=thorough)
    return [str(problem) for problem in found.inputs] + [f"!{problem}" for problem in found.machine]


def test_every_kind_is_here() -> None:
    assert STAGES.keys() == BUILTIN_STAGES.keys()


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    """All kinds of stages in one recipe."""
    found = look(write(STAGES), Path("runs"), thorough=False)
    assert (found.inputs, found.machine, found.skipped, found.looked) == ([], [], [], len(STAGES))
    assert not Path("runs").exists()


@pytest.mark.parametrize(("kind", "key"), SOURCES)
def test_bad_rows_are_found_in_every_source_of_every_stage(kind: str, key: str) -> None:
    """With the line of the file, and only for that source; as the last of other stages, which begin hours later."""
    value: Any = [{"task": "gsm8k", "data": "broken.jsonl"}] if key == "tasks" else "broken.jsonl"
    problems = told({"first": STAGES["sft"], "it": {**STAGES[kind], key: value}})
    assert problems and all(problem.startswith("broken.jsonl:") for problem in problems)


REFUSING = """{% for m in messages %}{% if 'FORBIDDEN' in m.content %}{{ raise_exception('no such word') }}{% endif %}
{{- '<|im_start|>' + m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ENCODED = [(kind, key) for kind, key in SOURCES if key != "tasks"]
BOUNDS: dict[str, dict[str, Any]] = {
    "ppo": {"max_prompt_length": 20, "max_new_tokens": 8},
    "select_prompts": {"max_length": 28, "max_new_tokens": 8},
    "label": {"max_length": 28, "max_new_tokens": 8},
    "self_contrast": {"max_length": 28, "max_new_tokens": 8},
    "evaluate": {"max_length": 28, "max_new_tokens": 8},
}


def with_text(kind: str, key: str, text: str, place: int) -> Any:
    """The stage, one of whose sources has three rows; the user of row ``place``, or of all (-1), says ``text``."""
    rows = json.loads(json.dumps(ROWS[STAGES[kind][key]]))
    for row in rows if place < 0 else [rows[place]]:
        if "messages" in row:
            row["messages"][0]["content"] = text
        else:
            row["prompt"] = text
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    apart = {"filters": False} if kind == "reward" else {}  # training and held-out data have the same prompts here
    return {"first": STAGES["sft"], "it": {**STAGES[kind], **apart, key: "other.jsonl"}}


@pytest.mark.parametrize(("kind", "key"), ENCODED)
def test_what_the_chat_template_refuses_is_found_in_every_source(kind: str, key: str) -> None:
    """With its line, before the first stage trains."""
    Path("refusing.jinja").write_text(REFUSING)
    policies: dict[str, Any] = {"policies": ["stage:first"]} if kind == "evaluate" else {}
    for text, expected in (("A FORBIDDEN word.", 1), ("Say tea.", 0)):
        stages = with_text(kind, key, text, 1)
        stages["it"] |= policies
        found = told(stages, thorough=True, model={"path": "./model", "chat_template": "refusing.jinja"})
        assert [problem.startswith("other.jsonl:2: ") and "no such word" in problem for problem in found] == [
            True
        ] * expected, found


@pytest.mark.parametrize(("kind", "key"), ENCODED)
def test_rows_that_are_all_too_long_are_found_in_every_source(kind: str, key: str) -> None:
    """Nothing would be left of the file. One that can be used is enough: the run counts the others."""
    bound = BOUNDS.get(kind, {"max_length": 28})
    for place, text, fine in ((-1, "tea " * 60, False), (1, "tea " * 60, True), (-1, "Say tea.", True)):
        stages = with_text(kind, key, text, place)
        stages["it"] |= bound
        found = told(stages, thorough=True)
        assert ([problem for problem in found if "other.jsonl" in problem] == []) == fine, found


def test_rows_are_looked_at_as_far_as_the_run_would_use_them() -> None:
    """`where`, `limit` and `on_bad_row` count; fifty rows are enough."""
    many = [TALK] * 60 + [{"messages": 3}]
    Path("many.jsonl").write_text("".join(json.dumps({**row, "n": i}) + "\n" for i, row in enumerate(many)))
    assert told({"s": {**STAGES["sft"], "data": "many.jsonl"}}) == []
    assert told({"s": {**STAGES["sft"], "data": {"path": "many.jsonl", "where": {"n": 60}}}}) == [
        "many.jsonl:61 messages: expected a list of messages, found a number"
    ]
    mixed = [{"messages": 3}] + [TALK] * 3
    Path("mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    assert len(told({"s": {**STAGES["sft"], "data": "mixed.jsonl"}})) == 1
    assert told({"s": {**STAGES["sft"], "data": {"path": "mixed.jsonl", "on_bad_row": "skip"}}}) == []
    skipping = {"path": "broken.jsonl", "on_bad_row": "skip", "format": "messages"}
    assert told({"s": {**STAGES["sft"], "data": skipping}})[0].startswith("broken.jsonl:1")
    assert first_rows.faults(DataSource(path="many.jsonl", limit=2), Path("many.jsonl"), "conversation") == []


def test_what_a_stage_has_to_make_first_is_left_out_with_the_reason() -> None:
    stages = {"label": STAGES["label"], "dpo": {**STAGES["dpo"], "data": "stage:label"}}
    found = look(write(stages), Path("runs"), thorough=False)
    assert found.skipped == ["stages.dpo.data.0: stage:label has to run first"] and not found.inputs


@pytest.mark.parametrize("tracker", trackers.PACKAGES)
def test_a_tracker_that_is_not_installed(tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate leaves it out in silence; here it stops the run, and the log itself too."""
    stage = {**STAGES["sft"], "train": {"report_to": [tracker]}}
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    (problem,) = told({"s": stage})
    package = trackers.PACKAGES[tracker][0]
    assert problem.startswith(
        f"!r.yaml:9:7 stages.s.train.report_to: {tracker} is asked for, and the Python package {package} is not"
    )
    from align.training.metrics import MetricsLog

    with pytest.raises(EnvironmentFault, match="is asked for"):
        MetricsLog(Path("m.jsonl"), resumed_at=0, report_to=[tracker], run_name="r", config={})
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    assert told({"s": stage}) == []


def evaluation(**judge: Any) -> dict[str, Any]:
    return {
        "e": {
            **STAGES["evaluate"],
            "judge": {"endpoint": "http://127.0.0.1:1/v1", "model": "m", "methods": ["pointwise"], **judge},
        }
    }


def test_a_judge_without_its_key_or_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        here = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        assert told(evaluation(endpoint=here)) == []
        (problem,) = told(evaluation(endpoint=here, key_env="SOME_KEY"))
        assert "stages.e.judge.key_env: the environment variable SOME_KEY holds no key" in problem
        monkeypatch.setenv("SOME_KEY", "abc")
        assert told(evaluation(endpoint=here, key_env="SOME_KEY")) == []
    (problem,) = told(evaluation(endpoint=here))
    assert (
        problem.startswith("!r.yaml:")
        and f"stages.e.judge.endpoint: no server answers at {here} (Connection refused)" in problem
    )


def test_hub_models_are_asked_for_once_and_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(name: str, revision: str | None, *, data: bool = False) -> None:
        asked.append(name)
        raise EnvironmentFault(f"{name}: not on this machine, and the hub cannot be reached (no route)", hint="connect")

    monkeypatch.setattr(hub, "ask", ask)
    stages = {
        "a": {**STAGES["sft"], "policy": "org/one"},
        "b": {**STAGES["dpo"], "policy": "org/two"},
        "c": {**PPO, "reward": "org/three"},
    }
    stages["c"].pop("value_init")
    problems = told(stages)
    assert asked == ["org/one"]
    assert [problem.partition(": ")[2].partition(":")[0] for problem in problems] == ["org/one", "org/two", "org/three"]
    assert problems[1].startswith("!r.yaml:")
    monkeypatch.setattr(hub, "ask", lambda name, revision, data=False: None)
    assert told(stages) == []
    monkeypatch.setattr(hub, "cached_commit", lambda name, revision: "abc")
    monkeypatch.setattr(hub, "ask", ask)
    assert told(stages) == [], "what is here is not asked for"


def test_a_gpu_recipe_on_a_machine_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One fault, and at once: the hub is not asked, and no process is started."""
    monkeypatch.setattr(machine, "gpu_memory", list)
    monkeypatch.setattr(hub, "ask", lambda *given, **options: pytest.fail("asked"))
    stages = {"a": {**STAGES["sft"], "policy": "org/one"}}
    (problem,) = told(stages, nproc=8, hardware={"gpus": 8, "memory_gb": 80})
    assert problem.startswith("!r.yaml:3:1 hardware: the recipe is meant for 8 GPUs, and there is none here")
    monkeypatch.setattr(machine, "gpu_memory", lambda: [10**10] * 2)
    assert any("--nproc 8: there are 2 GPUs" in problem for problem in told({"a": STAGES["sft"]}, nproc=8))
    assert told({"a": STAGES["sft"]}, nproc=2) == []


def test_what_cannot_fit_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the numbers, by the plan's own estimate."""
    assert told({"a": STAGES["sft"]}, thorough=True) == []
    small = machine.Machine("a small machine", "cpu", 1, 1e6, 1e12, True)
    monkeypatch.setattr("align.planning.plan.this_machine", lambda runs_dir: small)
    (problem,) = told({"a": STAGES["sft"]}, thorough=True)
    assert "stages.a" in problem and "needs at least" in problem and "a small machine has 1.0 MB" in problem


def test_all_faults_of_all_stages_are_told_at_once_and_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    stages = {
        "a": {**STAGES["sft"], "train": {"report_to": ["wandb"]}},
        "b": {**STAGES["dpo"], "data": "talk.jsonl"},
        "c": {**STAGES["reward"], "eval_data": "broken.jsonl"},
    }
    loaded = write(stages)
    with pytest.raises(InputError) as caught:
        run_recipe(loaded, runs_dir=Path("runs"), console=Console(file=io.StringIO()))
    text = str(caught.value)
    assert "talk.jsonl:1: is a conversation" in text and "broken.jsonl:1" in text and "wandb is asked for" in text
    assert not Path("runs").exists()
    Path("runs").mkdir()
    with pytest.raises(InputError):
        run_recipe(loaded, runs_dir=Path("runs"), console=Console(file=io.StringIO()))
    assert not any(Path("runs").iterdir())


def test_looking_is_quick() -> None:
    """A hundred thousand rows are not read."""
    Path("large.jsonl").write_text((json.dumps(TALK) + "\n") * 100_000)
    began = time.process_time()
    assert told({"a": {**STAGES["sft"], "data": "large.jsonl"}}) == []
    assert time.process_time() - began < 2


# Models


def test_check_refuses_the_models_that_a_run_refuses() -> None:
    """Pickled weights, code of its own, a missing shard, a classifier: seen without torch."""

    def problem(model: str) -> str:
        return "\n".join(map(str, refused(write({"a": STAGES["sft"]}, model=model))))

    assert problem("./model") == ""
    bad = Path("bad")
    bad.mkdir()
    (bad / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "r.yaml:2:1 model: bad: no weights: expected model.safetensors" in problem("./bad")
    (bad / "pytorch_model.bin").write_text("")
    assert "refused: weights in pickle or another unsafe format" in problem("./bad")
    (bad / "model.safetensors").write_text("")
    assert problem("./bad") == ""
    (bad / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoModel": "m.M"}}))
    assert "wants its own Python code to be run" in problem("./bad")
    (bad / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoModel": "m.M"}}))
    assert problem("./bad") == "", "transformers has the class itself"
    (bad / "config.json").write_text(json.dumps({"architectures": ["XForSequenceClassification"]}))
    assert "is a classifier" in problem("./bad")


def test_every_problem_is_an_error_of_ours() -> None:
    assert issubclass(EnvironmentFault, AlignError) and requirements.CONNECT_S <= 5


@pytest.mark.parametrize(
    ("sharding", "nproc", "of_machine", "message"),
    [
        ("none", 1, None, None),
        ("full", 2, None, None),
        ("full", 1, None, "the model cannot be divided among the processes: there is only one"),
        ("hybrid", 1, None, "the model cannot be divided among the processes: there is only one"),
        ("hybrid", 4, None, "each machine would have a copy of the model, but all 4 processes are on one"),
        ("hybrid", 4, "4", "each machine would have a copy of the model, but all 4 processes are on one"),
        ("hybrid", 4, "2", None),
        ("hybrid", 5, "2", "every machine needs as many processes, but one has 2 of 5"),
    ],
)
@pytest.mark.parametrize("kind", ["sft", "dpo", "reward", "ppo"])
def test_a_model_is_divided_among_processes_that_are_there(
    kind: str,
    sharding: str,
    nproc: int,
    of_machine: str | None,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line before anything starts; LOCAL_WORLD_SIZE is what launchers say of a machine."""
    monkeypatch.setattr(machine, "gpu_memory", list)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if of_machine is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", of_machine)
    stage = {**STAGES[kind], "train": {**STAGES[kind].get("train", {}), "sharding": sharding}}
    problems = told({"it": stage}, nproc=nproc)
    assert [problem.partition(" ")[2].partition(";")[0] for problem in problems] == (
        [] if message is None else [f"stages.it.train.sharding: {message}"]
    )


def test_the_number_of_processes_may_not_be_known_yet() -> None:
    """`align check --data` starts none."""
    stage = {**STAGES["sft"], "train": {"sharding": "full"}}
    assert look(write({"it": stage}), Path("runs"), nproc=None, thorough=False).inputs == []
