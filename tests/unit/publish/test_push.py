"""`align push`: what goes to the hub, what never does, and the card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.errors import EnvironmentFault, InputError
from align.publish.push import prepare, push
from tests.support.fake_hub import Hub, serving
from tests.support.fake_run import FakeRun

RUNS = Path("runs")
TOKEN = "hf_canaryOfThePush"
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"kind": "sft", "data": "a.jsonl"},
    "dpo": {"kind": "dpo", "policy": "stage:sft", "data": "b.jsonl"},
    "judge": {"kind": "reward", "init": "stage:sft", "data": "b.jsonl"},
    "made": {"kind": "label"},
}
NOTES = {
    "base": {"path": "/srv/me/base", "revision": None, "digest": "d", "dequantised_from": None},
    "stop_ids": [2, 7],
}
WHOLE = {
    "model.safetensors": b"weights",
    "config.json": '{"model_type": "llama", "_name_or_path": "/srv/me/base"}',
    "generation_config.json": "{}",
    "tokenizer.json": '{"path": "/untouched"}',
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "x",
    "align.json": json.dumps(NOTES),
}
PRIVATE = {
    "report.json": "{}",
    "metrics.jsonl": "{}\n",
    "rejects.jsonl": '{"content": "a secret row"}\n',
    "rollouts/iteration-000000.parquet": b"x",
}
PRIVATE |= {"value/model.safetensors": b"value", "trackers/events": b"x"}
ADAPTER = {
    "adapter_model.safetensors": b"a",
    "adapter_config.json": '{"base_model_name_or_path": "/cache/snapshots/1", "r": 4}',
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(**recipe: Any) -> FakeRun:
    run = FakeRun(RUNS / "r", STAGES, **recipe)
    data = {"want": "preference", "trees": 430, "tokens": 9000, "sources": {"sources": [{"path": "b.jsonl"}]}}
    run.result("sft", WHOLE, summary={"eval_before": {"loss": 2.9}, "eval_after": {"loss": 2.5}})
    summary = {"eval_before": {"rewards/margins": 0.0}, "eval_after": {"rewards/margins": 0.35}}
    run.result("dpo", {**WHOLE, **PRIVATE, "report.json": json.dumps({"data": data})}, summary=summary, needs=["sft"])
    run.result("made", {"data.jsonl": "{}\n"}, type="preferences")
    return run


def header(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---")[1]))


def code(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """In this process: huggingface_hub reads its environment when it is imported."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    close_session()
    with serving(Hub()) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        yield served
    close_session()


def test_the_last_model_goes_with_a_card_and_nothing_private(hub: Hub) -> None:
    make()
    upload = prepare("r", RUNS, to="me/mine")
    assert push(upload, "me/mine", private=True) == f"{hub.address}/me/mine/commit/1"
    sent = hub.files["me/mine"]
    assert sent.keys() == {*WHOLE, "README.md"}
    assert hub.private == {"me/mine": True}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert sent["model.safetensors"] == b"weights" and sent["tokenizer.json"] == WHOLE["tokenizer.json"].encode()  # type: ignore[attr-defined]
    everything = b"".join(sent.values())
    for private in (b"/srv/me", b"a secret row", TOKEN.encode()):
        assert private not in everything
    assert json.loads(sent["config.json"]) == {"model_type": "llama", "_name_or_path": "base"}
    assert json.loads(sent["align.json"])["base"] == NOTES["base"] | {"path": "base"}  # type: ignore[operator]


def test_what_exists_keeps_its_visibility(hub: Hub) -> None:
    """A private model is never sent to a public repository by default, nor the other way round."""
    make()
    upload = prepare("r", RUNS, to="me/mine")
    push(upload, "me/mine", private=False)
    assert hub.private == {"me/mine": False}
    hub.files["me/mine"].clear()
    with pytest.raises(InputError, match="me/mine exists and is public; nothing was sent; write --public"):
        push(upload, "me/mine", private=True)
    assert hub.files["me/mine"] == {}
    push(prepare("r", RUNS, to="me/mine"), "me/mine", private=False)
    assert "README.md" in hub.files["me/mine"]


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "refuses access .401.; set HF_TOKEN"), (403, "refuses access .403."), (418, "refuses: .*not for you")],
)
def test_a_refusal_is_one_line_without_the_token(hub: Hub, status: int, message: str) -> None:
    make()
    hub.refusal = status
    with pytest.raises(EnvironmentFault, match=f"me/mine: the hub {message}") as caught:
        push(prepare("r", RUNS, to="me/mine"), "me/mine", private=True)
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)


def test_a_hub_that_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and offline as well."""
    from huggingface_hub import constants

    make()
    upload = prepare("r", RUNS, to="me/mine")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EnvironmentFault, match="me/mine: the hub cannot be reached"):
        push(upload, "me/mine", private=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFault, match="the network is switched off; unset HF_HUB_OFFLINE"):
        push(upload, "me/mine", private=True)


def test_the_card_says_how_it_was_made() -> None:
    make(model="org/base-7b")
    card = prepare("r", RUNS, to="me/mine").card
    expected = {
        "library_name": "transformers",
        "base_model": "org/base-7b",
        "pipeline_tag": "text-generation",
        "tags": ["align", "dpo"],
    }
    assert header(card) == expected
    assert "# mine\n" in card
    assert "made by preference optimisation, starting from `org/base-7b`" in card
    assert "The stages that led to it: `sft` (sft), `dpo` (dpo)." in card, "`judge` and `made` did not"
    assert (
        "| sft: held-out loss | 2.900 | 2.500 |" in card
        and "| dpo: held-out margin of implicit rewards | 0.000 | 0.350 |" in card
    )
    assert "| dpo | `b.jsonl` | 430 preferences | 9,000 |" in card
    assert "policy: stage:sft" in card, "the recipe"
    assert "python 3." in card
    assert "## Licence" in card
    compile(code(card), "card", "exec")


def test_the_licence_is_the_base_models_where_that_says_one() -> None:
    Path("base").mkdir()
    Path("base/config.json").write_text("{}")
    Path("base/README.md").write_text("---\nlicense: apache-2.0\n---\nText\n")
    make(model={"path": "base"})
    card = prepare("r", RUNS, to="me/mine").card
    assert header(card)["license"] == "apache-2.0" and "base_model" not in header(card)
    assert "## Licence" not in card
    for damaged in ("---\nlicense: [", "---\n- a\n---\n", "no header"):
        Path("base/README.md").write_text(damaged)
        assert "license" not in header(prepare("r", RUNS, to="me/mine").card)


def test_a_reward_model_says_how_to_score() -> None:
    run = make()
    run.result("judge", {**WHOLE, "reward_head.safetensors": b"h"}, type="reward_model", needs=["sft"])
    upload = prepare("r", RUNS, to="me/mine", stage="judge")
    assert "reward_head.safetensors" in upload.files
    assert header(upload.card)["pipeline_tag"] == "text-classification"
    assert "in [2, 7])" in code(upload.card)
    compile(code(upload.card), "card", "exec")


def test_an_adapter_names_its_base_by_its_hub_id() -> None:
    """Also where it was loaded from a folder of the cache. One whose base is nowhere else is no use to anybody."""
    run = FakeRun(RUNS / "r", STAGES, model="org/base-7b")
    notes = NOTES | {"base": {"path": "org/base-7b", "revision": "abc"}}
    run.result("sft", {**ADAPTER, "align.json": json.dumps(notes), "tokenizer.json": "{}"})
    upload = prepare("r", RUNS, to="me/mine")
    content = upload.files["adapter_config.json"]
    assert isinstance(content, bytes)
    assert json.loads(content) == {"base_model_name_or_path": "org/base-7b", "revision": "abc", "r": 4}
    assert header(upload.card)["library_name"] == "peft"
    run.result("dpo", {**ADAPTER, "align.json": json.dumps(NOTES)}, needs=["sft"])
    with pytest.raises(InputError, match=r"on this machine only.*align merge"):
        prepare("r", RUNS, to="me/mine", stage="dpo")


def test_a_merged_model_goes_instead_of_its_adapter() -> None:
    run = FakeRun(RUNS / "r", STAGES)
    run.result(
        "sft",
        {**ADAPTER, "align.json": json.dumps(NOTES), **{f"merged/{name}": content for name, content in WHOLE.items()}},
    )
    upload = prepare("r", RUNS, to="me/mine")
    assert upload.files.keys() == WHOLE.keys()
    assert upload.files["model.safetensors"] == run.folder / "stages" / "sft" / "merged" / "model.safetensors"


def test_a_folder_by_itself_will_do() -> None:
    """Copied out of its run: no recipe, but what the manifest says."""
    run = make()
    alone = Path("alone")
    (run.folder / "stages" / "sft").rename(alone)
    card = prepare("alone", RUNS, to="me/mine").card
    assert "made by supervised fine-tuning" in card and "```yaml" not in card
    inside = prepare(str(run.folder / "stages" / "dpo"), RUNS, to="me/mine")
    assert inside.subject.run is not None
    with pytest.raises(InputError, match="is the result of a stage already"):
        prepare("alone", RUNS, to="me/mine", stage="dpo")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "made"}, "stage made left preferences, which is no model; stages with a model: sft, dpo"),
        ({"stage": "judge"}, "stage judge has no result yet"),
        ({"stage": "dop"}, "did you mean `dpo`"),
        ({"to": "mine"}, "--to mine: a repository is written ORG/NAME"),
        ({"to": "me/../mine"}, "--to me/../mine: "),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    make()
    with pytest.raises(InputError, match=message):
        prepare("r", RUNS, **{"to": "me/mine", **options})


def test_a_damaged_model_is_not_sent() -> None:
    run = make()
    (run.folder / "stages" / "dpo" / "model.safetensors").write_bytes(b"wEights")
    with pytest.raises(InputError, match=r"model.safetensors: damaged: sha256"):
        prepare("r", RUNS, to="me/mine")
    empty = FakeRun(RUNS / "empty", STAGES)
    with pytest.raises(InputError, match=r"no stage of .*empty has left a model"):
        prepare(str(empty.folder), RUNS, to="me/mine")


def align(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    offline = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}
    env = {name: value for name, value in os.environ.items() if name not in offline} | environment
    return subprocess.run(
        [sys.executable, "-m", "align", *arguments], capture_output=True, text=True, check=False, timeout=60, env=env
    )


def test_from_the_command_line() -> None:
    """The endpoint and the token of the environment; a dry run asks nobody."""
    run = make()
    with serving(Hub()) as hub:
        environment = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
        dry = align("push", "r", "--to", "me/mine", "--dry-run", **environment)
        assert (dry.returncode, dry.stderr) == (0, "")
        assert "pipeline_tag: text-generation" in dry.stdout and "7  model.safetensors" in dry.stdout
        assert hub.requests == []
        done = align("push", str(run.folder / "stages" / "sft"), "--to", "me/mine", "--public", **environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"me/mine: pushed {run.folder}/stages/sft (8 files): {hub.address}/me/mine/commit/1\n"
        assert (hub.private, hub.tokens) == ({"me/mine": False}, {f"Bearer {TOKEN}"})
        assert TOKEN not in done.stdout + done.stderr + dry.stdout
