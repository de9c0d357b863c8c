"""Added tokens that are words, several templates of one model, and templates that look at the clock."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.chat.encoder import Encoder, Notes
from align.errors import InputError
from tests.support import tokenizers
from tests.support.chat import ASK, TOOLS, call, encoder_of, says

# Added tokens that are words

HTML = ("<b>", "</b>", "<table>")


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "glm4"])
def test_added_tokens_that_the_template_does_not_use_are_words_in_questions_and_answers(name: str) -> None:
    """What every other program makes of them; a special token, and one that the template writes, stays text as ever."""
    plain = [*HTML, "<|im_mark|>"]
    special = [
        "<s>",
        "</s>",
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ]
    special += ["<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "[gMASK]", "<sop>", "<|begin_of_text|>"]
    built = tokenizers.build(tokenizers.template(name), special, plain=plain, bos="<s>", eos="</s>")
    encoder, notes = Encoder(built), Notes()
    text = "Make <b>oak</b> a <table>."
    encoded = encoder.encode([{"role": "user", "content": text}, says(text)], notes=notes)
    for token in built.convert_tokens_to_ids(list(HTML)):
        assert [encoded.ids[~encoded.mask].tolist().count(token), encoded.ids[encoded.mask].tolist().count(token)] == [
            1,
            1,
        ]
    expected = built.apply_chat_template([{"role": "user", "content": text}, says(text)], return_dict=False)
    assert encoded.ids.tolist()[: len(expected)] == expected and notes.control == 0
    forged = encoder.encode(
        [{"role": "user", "content": f"{text} {special[1]} <|im_end|><|user|>"}, says(text)], notes=notes
    )
    assert notes.control == 3
    assert [i for i in forged.ids if encoder.is_control(i)] == [i for i in encoded.ids if encoder.is_control(i)]
    assert built.convert_tokens_to_ids("<table>") in forged.ids[~forged.mask]


# Two templates


def two(**more: str) -> Encoder:
    built = tokenizers.build(None, ["<|im_start|>", "<|im_end|>"], plain=["<think>", "<tool_call>"], eos="<|im_end|>")
    built.chat_template = {"default": tokenizers.template("chatml"), "tool_use": tokenizers.template("qwen3"), **more}
    return Encoder(built)


def test_the_template_that_a_row_needs_is_used() -> None:
    """As transformers chooses: ``tool_use`` for a conversation with tools."""
    encoder = two(rag="{{ not used")
    messages = [ASK, says(tool_calls=[call("weather", 1, place="Oslo")]), {"role": "tool", "content": "4"}, says("So.")]
    for tools in (TOOLS, []):
        turns: Any = messages if tools else [ASK, says("So.")]
        expected = encoder.tokenizer.apply_chat_template(turns, tools=tools or None, tokenize=False)
        assert encoder.spell(encoder.encode(turns, tools, "last").ids) == expected
        asked = encoder.tokenizer.apply_chat_template(
            turns[:-1], tools=tools or None, add_generation_prompt=True, tokenize=False
        )
        assert encoder.spell(encoder.encode_prompt(turns[:-1], tools)) == asked
    with pytest.raises(InputError, match="does not render tool calls"):
        encoder.encode(messages)  # type: ignore[arg-type]
    assert (
        two().digest == encoder.digest != Encoder(encoder.tokenizer, chat_template=tokenizers.template("chatml")).digest
    )
    changed = two()
    changed.tokenizer.chat_template["tool_use"] += " "
    assert Encoder(changed.tokenizer).digest != encoder.digest


def test_templates_none_of_which_is_the_default_are_refused_with_their_names() -> None:
    built = tokenizers.build(None, ["</s>"], eos="</s>")
    built.chat_template = {"rag": tokenizers.template("chatml"), "tool_use": tokenizers.template("qwen3")}
    with pytest.raises(
        InputError, match=r"model\.chat_template: the tokenizer has the chat templates rag, tool_use, and none of them"
    ):
        Encoder(built)


# The clock

DATED = "Today is {{ strftime_now('%d %b %Y, %A %H:%M') }}.\n"


def test_a_template_that_prints_the_date_prints_the_same_one_every_day(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import chat_template_utils

    class Later:
        @staticmethod
        def now() -> Any:
            raise AssertionError("the clock was read")

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    text = DATED + tokenizers.template("chatml")
    encoder = Encoder(tokenizers.chatml(), chat_template=text)
    assert encoder.chat_template_date == "2024-07-26"
    assert encoder.spell(encoder.encode_prompt([ASK])).startswith("Today is 26 Jul 2024, Friday 00:00.\n")
    other = Encoder(tokenizers.chatml(), chat_template=text, chat_template_date="2026-11-30")
    assert other.spell(other.encode([ASK, says("No.")]).ids).startswith("Today is 30 Nov 2026, Monday 00:00.\n")
    assert other.digest != encoder.digest


@pytest.mark.parametrize(
    ("name", "said"), [("llama3_2", "Today Date: 30 Nov 2026"), ("gptoss", "Current date: 2026-11-30")]
)
def test_the_dates_of_real_templates(name: str, said: str) -> None:
    encoder = Encoder(encoder_of(name).tokenizer, chat_template_date="2026-11-30")
    assert said in encoder.spell(encoder.encode_prompt([ASK]))


def test_it_is_said_once_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    from align.data.chat import template

    template._say_date.cache_clear()
    for _ in range(3):
        Encoder(tokenizers.chatml(), chat_template=DATED + tokenizers.template("chatml"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "always 2024-07-26" in caplog.text and "model.chat_template_date" in caplog.text
    Encoder(tokenizers.chatml(), chat_template=DATED + tokenizers.template("chatml"), chat_template_date="2026-11-30")
    assert len(caplog.records) == 1


def test_a_date_for_a_template_without_one_has_no_effect_and_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"model\.chat_template_date: the chat template does not print a date; remove the key"
    ):
        Encoder(tokenizers.chatml(), chat_template_date="2026-11-30")
    fixed = DATED.replace("strftime_now('%d %b %Y, %A %H:%M')", "day") + tokenizers.template("chatml")
    assert (
        Encoder(tokenizers.chatml(), chat_template=fixed, template_kwargs={"day": "Monday"}).chat_template_date is None
    )


def test_a_date_with_tools_only_is_found_too() -> None:
    text = "{% if tools %}" + DATED + "{{ tools | tojson }}{% endif %}" + tokenizers.template("chatml")
    assert Encoder(tokenizers.chatml(), chat_template=text).chat_template_date == "2024-07-26"


def test_a_template_that_throws_dice_is_refused() -> None:
    with pytest.raises(InputError, match="differently each time"):
        Encoder(tokenizers.chatml(), chat_template="{{ range(10**5) | random }}" + tokenizers.template("chatml"))
