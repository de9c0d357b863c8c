"""An answer that was cut off is never trained to end where it was cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from align.data.chat.encoder import Encoder
from align.data.formats.formats import RowError, converter
from align.data.records import Origin, Record
from align.data.sources.readers import Row
from align.data.trees.build import Limits, tree_of
from align.recipe.schema import DataSource
from tests.support import tokenizers
from tests.support.root import ROOT
from tests.support.tokenizers import TEMPLATES

FAMILIES = {
    "chatml": tokenizers.chatml,
    "llama3": tokenizers.llama3,
    "mistral": tokenizers.mistral,
    "glm4": tokenizers.glm4,
    "qwen3": tokenizers.qwen3,
}
ASK = {"role": "user", "content": "What is the capital of France?"}


def says(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


def record(value: dict[str, Any], want: Any = "preference") -> Record:
    (found,) = converter(DataSource(path="x.jsonl"), want)(Row(value, Origin("x.jsonl", 1)))
    return found


def tree(value: dict[str, Any], family: str, want: Any = "preference", train_on: Any = "all") -> Any:
    encoder = Encoder(FAMILIES[family]())
    return tree_of(record(value, want), encoder, Limits(200, "drop", train_on), lambda what: None), encoder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_preference_loses_the_end_of_the_unfinished_answer_only(family: str) -> None:
    """Ids and mask lack exactly the end token; the other answers keep theirs, and the text before it is the same."""
    rejected = ["The dog sleeps, and", "The fox runs away."]
    whole, encoder = tree(
        {"prompt": [ASK], "chosen": [says("Paris.")], "rejected": [[says(text)] for text in rejected]}, family
    )
    answers = [[says(rejected[0], finished=False)], [says(rejected[1], finished=True)]]
    cut, _ = tree({"prompt": [ASK], "chosen": [says("Paris.")], "rejected": answers}, family)
    assert np.array_equal(whole.trunk, cut.trunk)
    assert whole.branches[1].ids[-1] in encoder.stop_ids
    assert np.array_equal(cut.branches[1].ids, whole.branches[1].ids[:-1])
    assert np.array_equal(cut.branches[1].mask, whole.branches[1].mask[:-1]) and cut.branches[1].mask.all()
    assert not set(cut.branches[1].ids.tolist()) & set(encoder.stop_ids)
    for branch in (0, 2):
        assert np.array_equal(cut.branches[branch].ids, whole.branches[branch].ids)
    assert encoder.spell(cut.branches[1].ids).endswith(rejected[0])


@pytest.mark.parametrize("family", ["chatml", "glm4"])
def test_a_conversation_may_end_unfinished(family: str) -> None:
    """The last turn without its end token; an earlier unfinished turn keeps it as context, but is not trained on it."""
    turns = [
        ASK,
        says("Paris is the", finished=False),
        {"role": "user", "content": "And?"},
        says("The capital", finished=False),
    ]
    found, encoder = tree({"messages": turns}, family, "conversation")
    (branch,) = found.branches
    assert branch.ids[-1] not in encoder.stop_ids
    trained = encoder.spell(branch.ids[branch.mask])
    assert trained.replace("\n", "") == "Paris is theThe capital"
    assert encoder.stop_ids[0] in branch.ids.tolist()


def test_templates_do_not_see_the_mark() -> None:
    """A template that refuses or prints unknown keys of a message must not be asked to."""
    looks = "{%- for m in messages %}{{ 'SEEN' if m.finished is defined }}{% endfor %}"
    template = looks + TEMPLATES.joinpath("chatml.jinja").read_text()
    encoder = Encoder(tokenizers.chatml(), chat_template=template)
    encoded = encoder.encode([ASK, says("Paris", finished=False)])  # type: ignore[list-item]
    assert "SEEN" not in encoder.spell(encoded.ids)


@pytest.mark.parametrize(("value", "kept"), [(True, None), (1, None), (None, None), (False, False), (0, False)])
def test_the_mark_is_read(value: Any, kept: bool | None) -> None:
    found: Any = record({"prompt": [ASK], "chosen": [says("Paris.")], "rejected": [[says("Rome", finished=value)]]})
    assert found.rejected[0][0].get("finished") is kept


@pytest.mark.parametrize("value", ["false", 2, []])
def test_another_mark_is_refused(value: Any) -> None:
    with pytest.raises(RowError, match="expected true or false") as caught:
        record({"prompt": [ASK], "chosen": [says("Paris.")], "rejected": [[says("Rome", finished=value)]]})
    assert caught.value.field == "rejected.0.0.finished"


def test_an_answer_and_its_unfinished_twin_are_the_same_text() -> None:
    """The mark does not make a rejected answer another one than the chosen."""
    with pytest.raises(RowError, match="chosen and rejected are equal"):
        record({"prompt": [ASK], "chosen": [says("Paris.")], "rejected": [[says("Paris.", finished=False)]]})


def test_the_docs_say_so() -> None:
    docs = ROOT / "docs"
    assert (
        '"finished": false' in (docs / "data.md").read_text()
        and '"finished": false' in (docs / "self_contrast.md").read_text()
    )
