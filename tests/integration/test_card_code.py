"""What a pushed model's card says about loading it: its code, run on the very files that are pushed, by transformers
alone."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from rich.console import Console

from align.pipeline.runner import run_recipe
from align.publish.push import Upload, prepare
from align.recipe.load import load_recipe
from align.recipe.schema import Model
from align.scoring.reward_model import RewardModelScorer
from align.scoring.scorer import Answer
from tests.support.saved import save_tiny

TRAIN = {"learning_rate": 3e-3, "batch_size": 2, "microbatch_tokens": 128, "max_steps": 2}


def pushed(stage: dict[str, Any], rows: list[dict[str, Any]]) -> Upload:
    """Train, and lay the upload where the card's code finds it: in a folder that is named like the repository."""
    save_tiny(Path("model"), max_position_embeddings=512)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"name": "r", "model": "./model", "stages": {"made": {**stage, "data": "rows.jsonl", "train": TRAIN}}}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_recipe(load_recipe("recipe.yaml"), console=Console(file=io.StringIO()))
    upload = prepare("r", Path("runs"), to="me/made")
    Path("me/made").mkdir(parents=True)
    for name, content in upload.files.items():
        (Path("me/made") / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return upload


def printed(upload: Upload) -> str:
    """What the card's code prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        exec(upload.card.split("```python\n")[1].split("```")[0], {})
    return text.getvalue()


def test_a_policy_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "Say tea."}, {"role": "assistant", "content": "Tea it is."}]
    upload = pushed({"kind": "sft", "samples": 0}, [{"messages": turns}])
    assert "Who are you?" in printed(upload)
    everything = b"".join(path.read_bytes() for path in Path("me/made").iterdir() if path.suffix != ".safetensors")
    assert str(tmp_path).encode() not in everything + upload.card.encode(), "a path of this machine"


@pytest.mark.parametrize("lora", [None, {"rank": 2, "save_merged": True}], ids=["full", "merged"])
def test_a_reward_model_scores_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: f"{repo}/{name}")
    upload = pushed({"kind": "reward", "lora": lora}, [{"prompt": "Who?", "chosen": "Me.", "rejected": "No."}] * 2)
    scorer = RewardModelScorer(Model(path="runs/r/stages/made"))
    (expected,) = scorer.score([Answer(({"role": "user", "content": "Who are you?"},), "A model.")])
    assert float(printed(upload)) == pytest.approx(expected, abs=1e-4)
