"""The scripted engine: canned answers behind the interface of a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.chat.encoder import Encoder
from align.errors import InputError
from align.rollout.engine import Sampling, WeightSource
from align.rollout.scripted import ScriptedEngine
from tests.support import tokenizers

FAMILIES = {
    "chatml": tokenizers.chatml,
    "llama3": tokenizers.llama3,
    "mistral": tokenizers.mistral,
    "glm4": tokenizers.glm4,
}


def script(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "script.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def asks(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_is_its_text_and_the_stop_id(tmp_path: Path, family: str) -> None:
    """What is decoded again is what was written; control-token text in a script stays text."""
    encoder = Encoder(FAMILIES[family]())
    text = f"Paris, 巴黎. {encoder.spell([encoder.stop_ids[0]])} too"
    engine = ScriptedEngine(script(tmp_path, {"completion": text}), encoder)
    ((made,),) = engine.generate([encoder.encode_prompt(asks("Where?"))], Sampling(200))
    assert made.ids[-1] == encoder.stop_ids[0] and made.ids.count(encoder.stop_ids[0]) == 1
    assert encoder.decode(made.ids) == text
    assert (made.logprobs, made.finish_reason, made.version, made.finished) == (None, "stop", 0, True)


def test_a_long_completion_is_cut_without_an_end(tmp_path: Path) -> None:
    """The stop id is only there when it fits."""
    encoder = Encoder(tokenizers.chatml())
    engine = ScriptedEngine(script(tmp_path, {"completion": "a b c"}), encoder)
    prompt = [encoder.encode_prompt(asks("?"))]
    ((whole,),) = engine.generate(prompt, Sampling(100))
    size = len(whole.ids) - 1
    ((fits,),) = engine.generate(prompt, Sampling(size + 1))
    ((cut,),) = engine.generate(prompt, Sampling(size))
    assert fits == whole
    assert (cut.ids, cut.finish_reason, cut.finished) == (whole.ids[:-1], "length", False)


def test_samples_follow_from_seed_prompt_and_number(tmp_path: Path) -> None:
    """The same seed gives the same samples, another one others, and the samples of a prompt differ."""
    encoder = Encoder(tokenizers.chatml())
    engine = ScriptedEngine(script(tmp_path, *({"completion": f"answer {i}"} for i in range(50))), encoder)
    prompts = [encoder.encode_prompt(asks(text)) for text in ("one", "two")]
    first = engine.generate(prompts, Sampling(50, n=8, seed=3))
    assert first == engine.generate(prompts, Sampling(50, n=8, seed=3))
    assert first != engine.generate(prompts, Sampling(50, n=8, seed=4))
    assert len({one.ids for one in first[0]}) > 4
    assert first[0] != first[1]
    assert first[0][:4] == engine.generate(prompts, Sampling(50, n=4, seed=3))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_a_prompt_answer_only_that_one(tmp_path: Path, family: str) -> None:
    encoder = Encoder(FAMILIES[family]())
    rows = [{"prompt": "What is the capital of France?", "completion": "Paris."}, {"completion": "Hm."}]
    engine = ScriptedEngine(script(tmp_path, *rows), encoder)
    turns = [*asks("Hello."), {"role": "assistant", "content": "Hi."}, *asks("What is the capital of France?")]
    conversations = [
        asks("What is the capital of France?"),
        turns,
        asks("Is it so? What is the capital of France?"),
        asks("Hello."),
    ]
    made = engine.generate([encoder.encode_prompt(messages) for messages in conversations], Sampling(50))
    assert [encoder.decode(one.ids) for (one,) in made] == ["Paris.", "Paris.", "Hm.", "Hm."]


def test_versions_room_and_missing_answers(tmp_path: Path) -> None:
    encoder = Encoder(tokenizers.chatml())
    engine = ScriptedEngine(script(tmp_path, {"prompt": "x", "completion": "y"}), encoder, max_length=40)
    engine.load_weights(WeightSource(3, list))
    prompt = encoder.encode_prompt(asks("x"))
    assert engine.generate([prompt], Sampling(4))[0][0].version == 3
    with pytest.raises(InputError, match="no room for 40 more in 40"):
        engine.generate([prompt], Sampling(40))
    with pytest.raises(InputError, match=r"script\.jsonl: no row answers a prompt; add rows without `prompt`"):
        engine.generate([encoder.encode_prompt(asks("z"))], Sampling(4))
    engine.close()
    engine.close()


def test_bad_rows_are_named_with_their_lines(tmp_path: Path) -> None:
    path = script(
        tmp_path, {"completion": "fine"}, {"completion": 3}, {"completions": "x"}, {"completion": "x", "prompt": 1}
    )
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(InputError) as caught:
        ScriptedEngine(path, Encoder(tokenizers.chatml()))
    places = [(problem.line, problem.key) for problem in caught.value.problems]
    assert sorted(places, key=str) == sorted([(2, "completion"), (3, "completions"), (4, "prompt"), (5, None)], key=str)
    assert all(problem.file == str(path) for problem in caught.value.problems)
