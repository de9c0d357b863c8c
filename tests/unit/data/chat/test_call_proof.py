"""An answer counts as complete when its calls are all there: number, names and every value, in order, in any form of
writing."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.chat.call_proof import CallProof
from align.data.chat.encoder import Encoder
from align.data.chat.rendering import RenderedRow
from align.data.chat.tokens import any_of
from align.data.records import Message
from align.errors import InputError
from tests.support import tokenizers
from tests.support.chat import ASK, TOOLS, call, encoder_of, says, trained

CALLS = {  # the template, and how many calls it takes in one message
    **dict.fromkeys(
        ("qwen2_5", "qwen3", "qwen3_5_think", "qwen3_6", "qwen3_instruct_2507", "glm4moe", "lfm2_2_5", "lfm2_2_5_vl"), 2
    ),
    **dict.fromkeys(
        ("nemotron_3_nano", "muse_glimmer", "gemma4_v5", "deepseekv3", "glm4", "glm4_arguments", "qwen3_fixture"), 2
    ),
    **dict.fromkeys(("gptoss", "llama3_1", "llama3_2"), 1),
}
ARGUMENTS = {
    "place": "Oslo",
    "days": 3,
    "range": [1.5, "km"],
    "wet": True,
    "unit": {"name": "it's 5\" <b>"},
    "other": False,
}


def turn(name: str, count: int) -> list[Message]:
    calls = [call("weather", 1, **ARGUMENTS), call("clock", 2, place="Rome", days=12)][:count]
    thought = {"reasoning": "Sum."} if name.startswith("nemotron") else {}  # its prompt has opened the thinking
    return [ASK, says(tool_calls=calls, **thought)]


def rendered(name: str, count: int) -> tuple[Encoder, RenderedRow, str, CallProof, str, re.Pattern[str]]:
    encoder = encoder_of(name)
    row = encoder._row(turn(name, count), TOOLS)
    proof = CallProof(row.messages)
    masked = row._rendered([row.template.spell(message) for message in proof.messages], False)
    ends = any_of([ending.text for ending in (row.template.plain, row.template.call) if ending])
    return encoder, row, row.render(2, prompt=False), proof, masked, ends


@pytest.mark.parametrize("name", CALLS)
def test_every_current_form_of_calls_is_proved_complete(name: str) -> None:
    for count in range(1, CALLS[name] + 1):
        encoder, _, text, proof, masked, ends = rendered(name, count)
        proof.check(text, masked, ends)
        if name == "deepseekv3":  # it renders no tools, and its prompt opens a thinking that its answers do not have
            continue
        found = trained(encoder, turn(name, count), TOOLS)
        assert all(
            word in found for word in ("weather", "Oslo", "3", "km", *(["clock", "Rome", "12"] if count > 1 else []))
        )


@pytest.mark.parametrize("name", CALLS)
def test_a_call_with_anything_missing_or_changed_is_refused(name: str) -> None:
    """Each value changed, each name changed, calls dropped, doubled and swapped in the text that the template gave."""
    _, _, text, proof, masked, ends = rendered(name, CALLS[name])
    begin = text.rfind(ASK["content"])
    head, said = text[:begin], text[begin:]
    words = ["Oslo", "3", "1.5", "km", "weather", "true", "True", *(["Rome", "12", "clock"] if CALLS[name] > 1 else [])]
    changed = [
        re.sub(rf"(?<![\w.]){re.escape(word)}(?![\w.])", other, said, count=1)
        for word in words
        for other in ("", f"{word}1", "x")
    ]
    places = [said.find(word) for word in ("weather", "clock") if CALLS[name] > 1]
    if places:
        first, second = said[places[0] : places[1]], said[places[1] :]
        changed += [said[: places[1]], said[: places[0]] + second, said[: places[0]] + second + first, said + second]
        changed.append(said.replace("weather", "~").replace("clock", "weather").replace("~", "clock"))
        changed.append(said.replace("Oslo", "~").replace("Rome", "Oslo").replace("~", "Rome"))
    for wrong in changed:
        if wrong != said:
            with pytest.raises(
                InputError, match=r"the chat template (leaves out|does not render|mixes up|renders tool calls)"
            ):
                proof.check(head + wrong, masked, ends)


FRAME = (
    "{{% for t in tools or [] %}}({{{{ t.function.name }}}}){{% endfor %}}{{% for m in messages %}}[{{{{ m.role"
    " }}}}]{{{{ m.content }}}}{{% for c in {calls} %}}{inside}{{% endfor %}}</s>{{% endfor %}}{{% if"
    " add_generation_prompt %}}[assistant]{{% endif %}}"
)
ALL, AS_JSON = "m.tool_calls or []", "<{{ c.function.name }}>{{ c.function.arguments | tojson }}"
EACH = "<{{ c.function.name }}>{% for k, v in c.function.arguments.items() %}%s{% endfor %}"


@pytest.mark.parametrize(
    ("calls", "inside", "lost"),
    [
        (ALL, AS_JSON, None),
        (ALL, EACH.replace("%s", "{{ k }}={{ v }};"), None),
        ("(m.tool_calls or [])[:1]", AS_JSON, "leaves out the name of the call 'clock'.*one call in a message only"),
        ("(m.tool_calls or []) | reverse", AS_JSON, "mixes up the name of the call 'clock'"),
        (
            ALL,
            "<{{ c.function.name }}>{{ c.function.arguments['key'] }}{{ c.function.arguments['place'] }}",
            "leaves out the value of 'days'",
        ),
        (ALL, "{{ c.function.arguments | tojson }}", None),
        (
            ALL,
            "<{{ c.function.name }}>{{ c.function.arguments | tojson | upper }}",
            "the value of 'place' in the call 'weather' as it is",
        ),
        (ALL, "<{{ c.function.name | truncate(12, True) }}>{{ c.function.arguments | tojson }}", None),
        (ALL, EACH.replace("%s", "{% if v is string or v is number %}{{ k }}={{ v }};{% endif %}"), "leaves out"),
        (ALL, EACH.replace("%s", "{% if v %}{{ k }}={{ v }};{% endif %}"), "leaves out 'other' of the call 'weather'"),
        (ALL, EACH.replace("%s", "{{ v }};"), "leaves out 'place' of the call"),
        (ALL, EACH.replace("%s", "{{ k }}={{ v if v is not string else v[:3] }};"), "leaves out|as it is"),
    ],
)
def test_a_template_that_loses_a_part_of_a_call_is_refused(calls: str, inside: str, lost: str | None) -> None:
    text = FRAME.format(calls=calls, inside=inside)
    try:
        encoder = Encoder(tokenizers.mistral(), chat_template=text)
        encoder.encode(
            [ASK, says(tool_calls=[call("weather", 1, **ARGUMENTS), call("clock", 2, place="Rome", days=12)])], TOOLS
        )
    except InputError as error:
        problem = str(error)
        assert (lost is not None and re.search(lost, problem)) or "does not render tool calls" in problem, problem
    else:
        assert lost is None


def test_calls_of_the_context_are_proved_too() -> None:
    """In a prompt that is sampled from, and in a turn that is not trained."""
    one_only = FRAME.format(calls="(m.tool_calls or [])[:1]", inside=AS_JSON)
    encoder = Encoder(tokenizers.mistral(), chat_template=one_only)
    history = [
        ASK,
        says(tool_calls=[call("weather", 1, a=1), call("clock", 2, b=2)], train=False),
        {"role": "tool", "content": "4"},
    ]
    for encode in (
        lambda: encoder.encode_prompt(history, TOOLS),
        lambda: encoder.encode([*history, says("So.")], TOOLS),
    ):  # type: ignore[list-item]
        with pytest.raises(InputError, match="leaves out the name of the call 'clock'"):
            encode()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(-1e6, 1e6)
    | st.text("ab \"'<>&\\\n{}é天:,=", max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b c", "key"]), inner, max_size=2)
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["qwen2_5", "glm4moe", "glm4", "llama3_1", "qwen3_6"]),
    arguments=st.dictionaries(st.sampled_from("xyz"), VALUES),
)
def test_whatever_the_arguments_a_template_that_renders_them_is_not_refused(
    name: str, arguments: dict[str, Any]
) -> None:
    found = trained(encoder_of(name), [ASK, says(tool_calls=[call("weather", 1, **arguments)])], TOOLS)
    assert "weather" in found


# GLM-4's heads, and custom tools


@pytest.mark.parametrize("name", ["glm4", "glm4_arguments"])
def test_glm4_writes_a_payload_of_plain_text_under_its_head(name: str) -> None:
    """``<|assistant|>python`` and the code, as GLM-4 writes it; the head of an observation likewise."""
    code = 'import math\nprint(f"{math.pi:.2f}", {"a": [1]})'
    messages: list[Message] = [
        ASK,
        says(tool_calls=[{"type": "custom", "custom": {"name": "python", "input": code}}]),
        {"role": "tool", "content": "3.14", "metadata": "python"},
        says("About 3.14."),
    ]
    encoder = encoder_of(name)
    encoded = encoder.encode(messages)
    assert encoder.spell(encoded.ids[encoded.mask]) == f"python\n{code}<|observation|>\nAbout 3.14.<|user|>"
    assert f"<|assistant|>python\n{code}<|observation|>python\n3.14<|assistant|>" in encoder.spell(encoded.ids)
    mixed = [
        ASK,
        says(
            "Let me see.",
            tool_calls=[call("weather", 1, a=1), {"type": "custom", "custom": {"name": "python", "input": code}}],
        ),
    ]
    block = '<|assistant|>weather\n{"a": 1}<|assistant|>python\n' + code
    assert trained(encoder, mixed) == f"\nLet me see.{block}<|observation|>"  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["chatml", "qwen3", "qwen2_5", "glm4moe", "llama3_1", "gptoss"])
def test_other_templates_refuse_them_by_name(name: str) -> None:
    custom = says(tool_calls=[{"type": "custom", "custom": {"name": "python", "input": "print(4)"}}])
    with pytest.raises(InputError, match=r"does not render (calls of custom tools|tool calls)"):
        encoder_of(name).encode([ASK, custom])
    result: Message = {"role": "tool", "content": "4", "metadata": "python"}
    with pytest.raises(InputError, match=r"no place for the metadata of a tool's result|does not render tool calls"):
        encoder_of(name).encode([ASK, says(tool_calls=[call("weather", 1, a=1)]), result, says("4.")], TOOLS)


def test_an_end_that_no_answer_can_have_is_refused() -> None:
    """GLM-4 leaves out a message without text; the marker behind the call would then be that of the next answer."""
    with pytest.raises(InputError, match=r"lets <\|assistant\|> follow an answer"):
        encoder_of("glm4").encode(
            [ASK, says(tool_calls=[call("weather", 1, a=1)]), {"role": "tool", "content": ""}, says("So.")], TOOLS
        )
