"""From sampled ids to text that a data file can hold."""

from __future__ import annotations

import pytest

from align.data.encode import Encoder
from align.rollout.engine import Completion
from align.stages.sampling import Sample
from tests.tokenizers import chatml


def sample(text: str, *, cut: int | None = None) -> Sample:
    """As if it had been sampled: with its stop id, or without its last ``cut`` tokens."""
    encoder = Encoder(chatml())
    ids = tuple(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = (*ids, encoder.stop_ids[0]) if cut is None else ids[: len(ids) - cut]
    return Sample.of("p#0", Completion(ids, None, "stop" if cut is None else "length", 0), encoder)


def test_text_ids_and_message() -> None:
    found = sample("\n Hello.\n")
    assert (found.text, found.finished, found.id) == ("Hello.\n", True, "p#0")
    assert found.message == {"role": "assistant", "content": "Hello.\n"}
    assert found.ids[-1] == Encoder(chatml()).stop_ids[0]
    assert sample("Hello", cut=0).message == {"role": "assistant", "content": "Hello", "finished": False}


def test_half_a_character_is_not_kept() -> None:
    """A character of several tokens that was cut in the middle would be trained as a replacement sign."""
    found = [sample("so 🦊", cut=cut).text for cut in range(1, 4)]
    assert found == ["so "] * 3


@pytest.mark.parametrize("text", ["a\0b", "\0"])
def test_what_no_data_file_can_hold_counts_as_empty(text: str) -> None:
    assert sample(text).text == ""
