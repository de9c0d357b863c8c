"""From sampled ids to text that a data file can hold, and back to the same ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.chat.encoder import Encoder, Notes
from align.data.formats.formats import converter
from align.data.records import Origin, Prompt, Record
from align.data.sources.readers import Row
from align.data.trees.build import TEXT_ONLY, Limits, tree_of
from align.data.trees.prompts import EncodedPrompt
from align.errors import InputError
from align.recipe.schema import DataSource
from align.scoring.scorer import Answer
from align.stages.shared.policy_samples import AsSampled
from tests.support import tokenizers
from tests.support.tokenizers import chatml

ENCODERS = {
    "chatml": Encoder(chatml()),
    "llama3": Encoder(tokenizers.llama3()),
    "mistral": Encoder(tokenizers.mistral()),
    "glm4": Encoder(tokenizers.glm4()),
    "qwen3": Encoder(tokenizers.qwen3()),
}
ASK = {"role": "user", "content": "What is the capital of France?"}


def answer(encoder: Encoder, ids: Sequence[int]) -> Answer:
    """What is made of sampled ids."""
    return Answer.sampled(EncodedPrompt(Prompt((ASK,), "p", Origin("x.jsonl", 1)), (1, 2)), ids, encoder)  # type: ignore[arg-type]


def sample(text: str, *, cut: int | None = None) -> Answer:
    """As if it had been sampled: with its stop id, or without its last ``cut`` tokens."""
    encoder = Encoder(chatml())
    ids = tuple(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = (*ids, encoder.stop_ids[0]) if cut is None else ids[: len(ids) - cut]
    return answer(encoder, ids)


def test_text_and_ids() -> None:
    found = sample("\n Hello.\n")
    assert (found.text, found.finished) == ("Hello.\n", True)
    assert found.ids[-1] == Encoder(chatml()).stop_ids[0]
    assert not sample("Hello", cut=0).finished


def test_half_a_character_is_not_kept() -> None:
    """A character of several tokens that was cut in the middle would be trained as a replacement sign."""
    found = [sample("so 🦊", cut=cut).text for cut in range(1, 4)]
    assert found == ["so "] * 3


@pytest.mark.parametrize("text", ["a\0b", "\0"])
def test_what_no_data_file_can_hold_counts_as_empty(text: str) -> None:
    assert sample(text).text == ""


# As training data


def kept(encoder: Encoder, ids: list[int]) -> dict[str, Any]:
    """The message that a data file has of sampled ids."""
    message = AsSampled(encoder).message(answer(encoder, ids), ())
    return json.loads(json.dumps(message))  # type: ignore[no-any-return]


def read(row: dict[str, Any], want: Any = "preference") -> Record:
    (found,) = converter(DataSource(path="x.jsonl"), want)(Row(row, Origin("x.jsonl", 1)))
    return found


LIMITS = Limits(4000, "drop", "all")


@settings(max_examples=80, deadline=None)
@given(family=st.sampled_from(sorted(ENCODERS)), data=st.data())
def test_whatever_was_sampled_is_trained_as_it_was_sampled(family: str, data: st.DataObject) -> None:
    """Words in odd pieces, special tokens, white space, halves of characters, think tags and calls, with any stop id or
    cut off."""
    encoder = ENCODERS[family]
    free = [i for i in range(encoder.vocabulary) if i not in encoder.stop_ids]
    answers = []
    for _ in range(2):
        ids = data.draw(st.lists(st.sampled_from(free), min_size=1, max_size=12))
        if data.draw(st.booleans()):
            ids = [*ids, data.draw(st.sampled_from(encoder.stop_ids))]
        answers.append(ids)
    if not all(answer(encoder, ids).text.strip() for ids in answers) or answers[0] == answers[1]:
        return  # stages leave out answers without text
    if answer(encoder, answers[0]).text.strip() == answer(encoder, answers[1]).text.strip():
        return
    row = {"prompt": [ASK], "chosen": [kept(encoder, answers[0])], "rejected": [[kept(encoder, answers[1])]]}
    tree = tree_of(read(row), encoder, LIMITS, lambda what: None)
    assert tree.trunk.tolist() == encoder.encode_prompt([ASK]).tolist()  # type: ignore[list-item]
    for ids, branch in zip(answers, tree.branches, strict=True):
        assert branch.ids.tolist() == ids and branch.mask.all()
    chosen = tree_of(read(row, "conversation"), encoder, LIMITS, lambda what: None)
    assert chosen.branches[0].ids.tolist() == answers[0] and chosen.branches[0].mask.all()


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_ids_are_kept_only_where_the_text_is_not_enough(family: str) -> None:
    encoder = ENCODERS[family]
    _, (branch,) = encoder.encode_answers([ASK], [[{"role": "assistant", "content": "Paris is the capital."}]])  # type: ignore[list-item]
    ids = branch.ids[branch.mask].tolist()
    if family == "qwen3":  # the text of a sample has the think block in it, and is read as such
        assert kept(encoder, ids)["content"].startswith("<think>")
    else:
        assert kept(encoder, ids) == {"role": "assistant", "content": "Paris is the capital."}
    letters = [i for letter in "Paris" for i in encoder.tokenizer(letter, add_special_tokens=False)["input_ids"]]
    odd = [*letters, encoder.stop_ids[0]]
    assert kept(encoder, odd)["sampled"] == {"encoder": encoder.digest, "ids": odd}


def test_ids_of_another_tokenizer_are_not_taken_and_it_is_counted() -> None:
    odd = [
        *(i for letter in "Paris" for i in ENCODERS["chatml"].tokenizer(letter)["input_ids"]),
        ENCODERS["chatml"].stop_ids[0],
    ]
    message, other, notes = kept(ENCODERS["chatml"], odd), ENCODERS["glm4"], Notes()
    _, (branch,) = other.encode_answers([ASK], [[message]], notes=notes)  # type: ignore[list-item]
    plain = other.encode_answers([ASK], [[{"role": "assistant", "content": "Paris"}]])[1][0]  # type: ignore[list-item]
    assert np.array_equal(branch.ids, plain.ids) and notes.text_only == 1
    noted: list[str] = []
    row = {"prompt": [ASK], "chosen": [message], "rejected": [[{"role": "assistant", "content": "Rome"}]]}
    tree_of(read(row), other, LIMITS, noted.append)
    assert noted == [TEXT_ONLY]


def test_ids_that_say_something_else_than_the_content_are_refused() -> None:
    """Somebody corrected the text of a row; the ids are still those of the old one."""
    encoder = ENCODERS["chatml"]
    odd = [*(i for letter in "Paris" for i in encoder.tokenizer(letter)["input_ids"]), encoder.stop_ids[0]]
    message = kept(encoder, odd)
    for wrong, reason in (
        ({**message, "content": "Rome"}, "say something else than the content; remove `sampled`"),
        ({**message, "finished": False}, "no policy can have sampled"),
        (
            {**message, "sampled": {"encoder": encoder.digest, "ids": [*odd[:-1], 10**6, odd[-1]]}},
            "no policy can have sampled",
        ),
        ({**message, "sampled": {"encoder": encoder.digest, "ids": []}}, "no policy can have sampled"),
    ):
        with pytest.raises(InputError, match=reason):
            encoder.encode_answers([ASK], [[wrong]])  # type: ignore[list-item]
    for shape in ([1], {"ids": [1]}, {"encoder": "x", "ids": ["1"]}, {"encoder": "x", "ids": [True]}):
        with pytest.raises(ValueError, match="expected"):
            read({"prompt": [ASK], "chosen": [{**message, "sampled": shape}], "rejected": "x"})


def test_a_sampled_answer_that_is_not_trained_is_not_trained() -> None:
    encoder = ENCODERS["chatml"]
    odd = [*(i for letter in "Paris" for i in encoder.tokenizer(letter)["input_ids"]), encoder.stop_ids[0]]
    encoded = encoder.encode([ASK, {**kept(encoder, odd), "train": False}])  # type: ignore[list-item]
    assert encoded.ids[-len(odd) :].tolist() == odd and not encoded.mask.any()
