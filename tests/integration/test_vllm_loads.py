"""A saved policy in vLLM: it loads with no help, says what transformers says, and stops at the turn's end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from align.models.adapters import add_lora
from align.models.generate import answer
from align.models.load import load_encoder, load_policy
from align.models.save import save_policy
from align.recipe.schema import Lora
from tests.support.saved import QUESTION, SHARP, overfit, save_tiny
from tests.support.tokenizers import llama3

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")]

OUTSIDE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
whole, adapter, base = sys.argv[1:4]
prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[4])]
plain = dict(dtype="float32", max_model_len=128, enforce_eager=True, seed=0)
found = {}
llm = LLM(whole, **plain)
# The folder's own generation_config decides where to stop; only sampling is switched off.
greedy = llm.get_default_sampling_params()
greedy.temperature, greedy.max_tokens = 0.0, 40
found["whole"] = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, greedy, use_tqdm=False)]
found["reasons"] = [o.outputs[0].finish_reason for o in llm.generate(prompts, greedy, use_tqdm=False)]
question = [{"role": "user", "content": "What is the capital of France?"}]
found["chat"] = list(llm.chat(question, greedy, use_tqdm=False)[0].outputs[0].token_ids)
del llm
llm = LLM(base, enable_lora=True, max_lora_rank=8, **plain)
limit = SamplingParams(temperature=0.0, max_tokens=40)
out = llm.generate(prompts, limit, use_tqdm=False, lora_request=LoRARequest("policy", 1, adapter))
found["adapter"] = [list(o.outputs[0].token_ids) for o in out]
print(json.dumps(found))
"""


def test_vllm_says_what_transformers_says(tmp_path: Path) -> None:
    """Llama-3's format, whose turns do not end with the tokenizer's eos, on a base that stops at yet another token."""
    # vLLM's attention on CPU wants heads of at least 32.
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    base = save_tiny(tmp_path / "base", tokenizer=llama3(), eos_token_id=5, **SHARP, **shape)
    encoder = load_encoder(base)
    prompts = [encoder.encode_prompt(QUESTION).tolist(), [7, 8, 9], list(range(30, 60))]
    expected = {}
    for kind, policy in {"whole": load_policy(base), "adapter": add_lora(load_policy(base), Lora(rank=8))}.items():
        overfit(policy, encoder)
        save_policy(policy, encoder, tmp_path / kind, base=base)
        expected[kind] = answer(policy, encoder, prompts, max_new_tokens=40)
    assert expected["whole"][0][-1] == encoder.stop_ids[0] != encoder.tokenizer.eos_token_id

    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    arguments = [str(tmp_path / "whole"), str(tmp_path / "adapter"), str(tmp_path / "base"), json.dumps(prompts)]
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["whole"] == expected["whole"]
    assert found["reasons"][0] == "stop"
    assert found["chat"] == expected["whole"][0]  # its own rendering of the saved template
    assert [ids[: len(e)] for ids, e in zip(found["adapter"], expected["adapter"], strict=True)] == expected["adapter"]
