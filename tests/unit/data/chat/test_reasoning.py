"""Reasoning is a field of a message: rendered where a probe shows that the template reads it, or refused."""

from __future__ import annotations

import re

import numpy as np
import pytest

from align.data.chat.encoder import Encoder, Notes
from align.data.records import Conversation, Origin
from align.data.trees.build import CLOSED, TAGS, Limits, tree_of
from align.errors import InputError
from tests.support import tokenizers
from tests.support.chat import ASK, encoder_of, says, trained

THINKS = {
    "qwen3": "<think>\nSum.\n</think>\n\nNo.<|im_end|>",
    "qwen3_5_think": "Sum.\n</think>\n\nNo.<|im_end|>",
    "qwen3_8": "Sum.\n</think>\n\nNo.<|im_end|>",
    "glm4moe": "\n<think>Sum.</think>\nNo.<|user|>",
    "gptoss": "<|channel|>analysis<|message|>Sum.<|end|><|start|>assistant<|channel|>final<|message|>No.<|return|>",
    "lfm2_2_5": "<think>Sum.</think>No.<|im_end|>",
    "nemotron_3_nano": "Sum.\n</think>\nNo.<|im_end|>",
    "gemma4_v5": "<|channel>thought\nSum.\n<channel|>No.<turn|>",
    "qwen3_fixture": "<think>\nSum.\n</think>\n\nNo.<|im_end|>",
}


@pytest.mark.parametrize("name", THINKS)
def test_reasoning_is_rendered_where_the_template_reads_it(name: str) -> None:
    """Five keys and a way of their own, none of which is known by the template's name; nothing is noted, as nothing is
    closed at once."""
    encoder, notes = encoder_of(name), Notes()
    assert trained(encoder, [ASK, says("No.", reasoning="Sum.")], notes=notes) == THINKS[name]
    assert notes == Notes()
    prompt, (branch,) = encoder.encode_answers([ASK], [[says("No.", reasoning="Sum.")]])
    assert (
        np.array_equal(prompt, encoder.encode_prompt([ASK])) and encoder.spell(branch.ids[branch.mask]) == THINKS[name]
    )


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "glm4", "qwen2_5", "gemma3", "llama3_1", "phi3"])
def test_a_template_without_a_place_for_reasoning_refuses_it_with_the_way_out(name: str) -> None:
    for messages in (
        [ASK, says("No.", reasoning="Sum.")],
        [ASK, says("No.", reasoning="Sum.", train=False), ASK, says("No.")],
    ):
        with pytest.raises(
            InputError,
            match=r"no place for an answer's reasoning; set model\.chat_template_kwargs .*chat_template .*content",
        ):
            encoder_of(name).encode(messages, train_on="last")


@pytest.mark.parametrize("name", ["chatml", "qwen2_5", "gemma3"])
def test_think_tags_are_text_to_a_template_that_knows_no_reasoning_and_it_is_noted(name: str) -> None:
    notes, noted = Notes(), list[str]()
    messages = [ASK, says("<think>\nSum.\n</think>\n\nNo.")]
    assert trained(encoder_of(name), messages, notes=notes).startswith(
        "<think>\nSum.\n</think>\n\nNo."
    ) and notes == Notes(tags=1)
    tree_of(
        Conversation(tuple(messages), "a", Origin("x", 1)), encoder_of(name), Limits(200, "drop", "all"), noted.append
    )
    assert noted == [TAGS]


@pytest.mark.parametrize("name", THINKS)
@pytest.mark.parametrize(
    "content",
    [
        "<think>\nSum.\n</think>\n\nNo.",
        "<think>Sum.</think>No.",
        "Sum.\n</think>\n\nNo.",
        "[THINK]Sum.[/THINK]No.",
        "<think>Sum. No.",
    ],
)
def test_think_tags_are_read_as_the_template_reads_them_or_refused(name: str, content: str) -> None:
    """Whatever the spelling: what is accepted is what the field would have given, white space aside; there is no
    literal or doubled tag."""
    encoder = encoder_of(name)
    try:
        found = trained(encoder, [ASK, says(content)])
    except InputError as error:
        assert re.search(
            r"reasoning tags in its content.*`reasoning_content`|differently from its own generation prompt", str(error)
        )
    else:
        assert "".join(found.split()) == "".join(THINKS[name].split())


@pytest.mark.parametrize(
    ("name", "content", "accepted"),
    [
        ("qwen3", "<think>\nSum.\n</think>\n\nNo.", True),
        ("qwen3", "Sum.\n</think>\n\nNo.", True),
        ("glm4moe", "<think>Sum.</think>\nNo.", True),
        ("gptoss", "<think>\nSum.\n</think>\n\nNo.", False),
        ("qwen3_8", "<think>\nSum.\n</think>\n\nNo.", False),
        ("gemma4_v5", "<think>\nSum.\n</think>\n\nNo.", False),
        ("qwen3", "[THINK]Sum.[/THINK]No.", False),
        ("qwen3", "Write <think> first.", False),
    ],
)
def test_which_tags_are_read(name: str, content: str, accepted: bool) -> None:
    encoder = encoder_of(name)
    for messages in ([ASK, says(content)], [ASK, says(content, train=False), ASK, says("No.")]):
        if accepted:
            assert "No." in trained(encoder, messages)
        else:
            with pytest.raises(InputError, match="reasoning tags in its content"):
                encoder.encode(messages, train_on="last")


CLOSES = {
    "qwen3": True,
    "qwen3_5_think": True,
    "glm4moe": True,
    "gptoss": True,
    "lfm2_2_5": False,
    "gemma4_v5": False,
    "qwen2_5": False,
}


@pytest.mark.parametrize("name", CLOSES)
def test_an_answer_without_reasoning_that_closes_the_thinking_at_once_is_noted(name: str) -> None:
    encoder, noted = encoder_of(name), list[str]()
    for messages in ((ASK, says("No.")), (ASK, says("No.", train=False), ASK, says("No."))):
        tree_of(Conversation(messages, "a", Origin("x", 1)), encoder, Limits(900, "drop", "last"), noted.append)
    assert noted.count(CLOSED) == 2 * CLOSES[name]
    if name.startswith("qwen3"):  # the model is not asked to think: it learns nothing about it
        notes = Notes()
        Encoder(encoder.tokenizer, template_kwargs={"enable_thinking": False}).encode([ASK, says("No.")], notes=notes)
        assert notes.closed == 0


def test_reasoning_that_gets_lost_or_comes_behind_the_answer_is_refused() -> None:
    think = "{% if m.reasoning is defined %}<t>{{ m.reasoning }}</t>{% endif %}"
    frame = (
        "{%% for m in messages %%}[{{ m.role }}]%s</s>{%% endfor %%}{%% if add_generation_prompt %%}[assistant]{%%"
        " endif %%}"
    )
    lost = frame % "{% if m.reasoning is defined %}<t>{{ m.reasoning[:11] }}</t>{% endif %}{{ m.content }}"
    for text, refused in (
        (frame % (think + "{{ m.content }}"), None),
        (lost, "leaves out the reasoning"),
        (frame % ("{{ m.content }}" + think), "no place"),
    ):
        encoder = Encoder(tokenizers.mistral(), chat_template=text)
        if refused is None:
            assert (
                trained(encoder, [ASK, says("No.", reasoning="A long sum, it is.")])
                == "<t>A long sum, it is.</t>No.</s>"
            )
        else:
            with pytest.raises(InputError, match=refused):
                encoder.encode([ASK, says("No.", reasoning="A long sum, it is.")])


def test_control_tokens_in_reasoning_stay_text() -> None:
    encoder = encoder_of("qwen3")
    clean, forged = (
        encoder.encode([ASK, says("No.", reasoning=text)]).ids.tolist() for text in ("x", "x</think><|im_end|>")
    )
    assert [i for i in clean if encoder.is_control(i)] == [i for i in forged if encoder.is_control(i)]


def test_an_answer_may_be_cut_off_in_its_reasoning_and_not_be_without_an_answer() -> None:
    encoder = encoder_of("qwen3")
    with pytest.raises(InputError, match="is empty"):
        encoder.encode([ASK, says("", reasoning="Sum.")])
    assert trained(encoder, [ASK, says("", reasoning="Sum.", finished=False)]).startswith("<think>\nSum.")


@pytest.mark.parametrize("name", THINKS)
@pytest.mark.parametrize(
    "content",
    ["<think>\nSum.\n</think>\n\n", "<think>Sum.</think>", "Sum.\n</think>", "</think>", "[THINK]Sum.[/THINK]"],
)
def test_reasoning_in_the_content_with_no_answer_behind_it_is_refused(name: str, content: str) -> None:
    """The whole answer would become a thought, and the model would learn to say nothing."""
    encoder = encoder_of(name)
    with pytest.raises(
        InputError, match=r"is empty|reasoning tags in its content|differently from its own generation prompt"
    ):
        trained(encoder, [ASK, says(content)])
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    if name == "qwen3" and content.startswith("<think>"):
        assert "Sum." in trained(encoder, [ASK, says(content, tool_calls=[call])]), "a call is an answer"
