"""Saved policies in a process that knows nothing of this package: transformers and TRL load them, say the same, and
stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from align.models.adapters import add_lora
from align.models.generate import answer
from align.models.load import load_encoder, load_policy
from align.models.save import save_policy
from align.recipe.schema import Lora, Model
from tests.support.saved import ANSWER, QUESTION, SHARP, overfit, save_tiny
from tests.support.tokenizers import chatml, glm4, llama3

TOKENIZERS = {"chatml": chatml, "llama3": llama3, "glm4": glm4}

OUTSIDE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, TextGenerationPipeline
from trl.trainer.utils import create_model_from_path
found = {}
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}],
                                           add_generation_prompt=True, return_tensors="pt")
    if "adapter" in folder:
        models = {"transformers": AutoModelForCausalLM.from_pretrained(folder)}
    else:
        models = {"transformers": AutoModelForCausalLM.from_pretrained(folder), "trl": create_model_from_path(folder)}
    for name, model in models.items():
        # Only max_new_tokens: everything else is the folder's own generation_config.
        found[f"{folder} {name}"] = model.generate(**prompt, max_new_tokens=40)[0, prompt["input_ids"].shape[1]:].tolist()
assert not any(name == "align" or name.startswith("align.") for name in sys.modules)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Policies that know one answer by heart, saved whole and as adapters, and what another process makes them say."""
    root = tmp_path_factory.mktemp("saved")
    expected, folders = {}, []
    for name, make in TOKENIZERS.items():
        # The base stops at something else
        base = save_tiny(root / f"{name}-base", tokenizer=make(), eos_token_id=5, **SHARP)
        encoder = load_encoder(base)
        for kind in ("whole", "adapter"):
            policy = load_policy(base) if kind == "whole" else add_lora(load_policy(base), Lora(rank=8))
            overfit(policy, encoder)
            out = root / f"{name}-{kind}"
            save_policy(policy, encoder, out, base=base, save_merged=kind == "adapter")
            (expected[str(out)],) = answer(policy, encoder, [encoder.encode_prompt(QUESTION)], max_new_tokens=40)
            folders.append(out)
            if kind == "adapter":
                (out / "merged").rename(root / f"{name}-merged")
                expected[str(root / f"{name}-merged")] = expected[str(out)]
                folders.append(root / f"{name}-merged")
    command = [sys.executable, "-W", "ignore", "-c", OUTSIDE, *map(str, folders)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {"root": root, "expected": expected, "said": json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "merged", "adapter"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_others_load_it_and_it_stops(outside: dict[str, Any], name: str, kind: str) -> None:
    """With the folder's own settings and nothing else, the answer ends with the turn's end token; and it is the
    answer."""
    folder = outside["root"] / f"{name}-{kind}"
    expected = outside["expected"][str(folder)]
    encoder = load_encoder(Model(path=str(folder)))
    assert encoder.decode(expected).strip() == ANSWER["content"] and expected[-1] == encoder.stop_ids[0]
    said = {key.removeprefix(f"{folder} "): ids for key, ids in outside["said"].items() if key.startswith(f"{folder} ")}
    if kind == "adapter":
        # An adapter's folder cannot change where its base stops in transformers; what is said up to there is the same.
        assert said["transformers"][: len(expected)] == expected
    else:
        assert said == {"transformers": expected, "trl": expected}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "adapter", "merged"])
def test_it_loads_here_again(outside: dict[str, Any], kind: str) -> None:
    model = Model(path=str(outside["root"] / f"chatml-{kind}"))
    encoder = load_encoder(model)
    (ids,) = answer(load_policy(model), encoder, [encoder.encode_prompt(QUESTION)], max_new_tokens=40)
    assert ids == outside["expected"][model.path]
