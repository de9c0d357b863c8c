"""A reward model as a scorer: policy ids as they are, everything else encoded as it was trained; alone or together."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from align.commands.score import score_rows
from align.data.chat.encoder import Encoder
from align.data.records import Message, Origin, Preference
from align.data.trees.build import Limits, tree_of
from align.errors import InputError, TrainingFault
from align.models.load import load_backbone, load_encoder
from align.models.scalar.heads import ScalarModel, ScoreStats, load_scalar, save_scalar, score_trees
from align.recipe.schema import Model
from align.scoring.encoded import encoded
from align.scoring.reward_model import RewardModelScorer
from align.scoring.scorer import Answer
from tests.support import tokenizers
from tests.support.saved import edit, save_tiny

WORDS = ("Paris", "France", "a river", "the dog", "今天", "12 + 34", "print(add)", "lazy", "fox runs", "散步")


def save_rm(folder: Path, tokenizer: Any = None, stats: ScoreStats | None = None) -> Model:
    base = save_tiny(folder / "base", tokenizer=tokenizer or tokenizers.chatml())
    torch.manual_seed(0)
    model = ScalarModel(load_backbone(base))
    save_scalar(model, load_encoder(base), folder / "rm", base=base, scores=stats or ScoreStats(0.0, 1.0, 1))
    return Model(path=str(folder / "rm"))


@pytest.fixture(scope="module")
def rm(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return save_rm(tmp_path_factory.mktemp("rm"), stats=ScoreStats(0.5, 2.0, 40))


@pytest.fixture(scope="module")
def scorer(rm: Model) -> RewardModelScorer:
    return RewardModelScorer(rm)


def user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def texts() -> list[Answer]:
    """Twenty answers to ten prompts, as text."""
    return [
        Answer(user(f"Tell me about {w}."), f"{w} is {v}.")
        for w in WORDS
        for v in ("nice", "what the fox runs from, I think")
    ]


def sampled(answer: Answer, encoder: Encoder) -> Answer:
    """The same answer as a policy's rollout: ids of prompt and answer, with its stop id when it ended by itself."""
    trunk, (branch,) = encoder.encode_answers(answer.prompt, [[{"role": "assistant", "content": answer.text}]])
    ids = branch.ids[: int(np.flatnonzero(branch.mask)[-1]) + 1]
    return replace(answer, prompt_ids=tuple(trunk.tolist()), ids=tuple((ids if answer.finished else ids[:-1]).tolist()))


def test_rollout_ids_score_as_training_rows_do(rm: Model, scorer: RewardModelScorer) -> None:
    """20 rows, three roads: preferences as the reward stage encodes them, text, and the ids of a policy with the
    same encoder."""
    answers = texts()
    limits = Limits(200, "drop", "last")
    records = [
        Preference(one.prompt, *(({"role": "assistant", "content": a.text},) for a in (one, other)), "", Origin("", 1))  # type: ignore[arg-type]
        for one, other in zip(answers[::2], answers[1::2], strict=True)
    ]
    records = [replace(r, rejected=(r.rejected,)) for r in records]  # type: ignore[arg-type]
    trees = [tree_of(r, scorer.encoder, limits, lambda what: None) for r in records]
    expected = [
        s for tree in score_trees(load_scalar(rm), trees, microbatch_tokens=99, layout="tree", pad_id=0) for s in tree
    ]
    assert scorer.score(answers) == pytest.approx(expected, abs=1e-6)
    by_ids = RewardModelScorer(rm, ids_from=scorer.encoder.digest)
    assert by_ids.score([sampled(a, scorer.encoder) for a in answers]) == pytest.approx(expected, abs=1e-6)
    assert len({round(score, 4) for score in expected}) == 20


def test_ids_count_where_the_encoder_is_the_same_and_text_elsewhere(rm: Model, scorer: RewardModelScorer) -> None:
    """Ids and text that say different things show which one was read. Ids of another tokenizer are never read as
    ours."""
    a, b = texts()[:2]
    mixed = replace(sampled(a, scorer.encoder), text=b.text)
    ids, text = scorer.score([a, b])
    same, other = (
        RewardModelScorer(rm, ids_from=digest).score([mixed])[0] for digest in (scorer.encoder.digest, "0" * 64)
    )
    assert same == pytest.approx(ids, abs=1e-6) and other == pytest.approx(text, abs=1e-6) and abs(ids - text) > 1e-3
    foreign = Encoder(tokenizers.llama3())
    answer = sampled(a, foreign)
    assert answer.ids != sampled(a, scorer.encoder).ids
    assert RewardModelScorer(rm, ids_from=foreign.digest).score([answer]) == pytest.approx([ids], abs=1e-6)
    assert RewardModelScorer(rm, ids_from=scorer.encoder.digest).score([a]) == pytest.approx([ids], abs=1e-6), (
        "an answer without ids"
    )


def test_an_unfinished_answer_is_scored_where_it_stops(rm: Model, scorer: RewardModelScorer) -> None:
    """No end token is invented, by ids or by text; an empty answer is its end token alone."""
    whole = texts()[0]
    cut = replace(whole, finished=False)
    (by_text,) = scorer.score([cut])
    (by_ids,) = RewardModelScorer(rm, ids_from=scorer.encoder.digest).score([sampled(cut, scorer.encoder)])
    assert by_text == pytest.approx(by_ids, abs=1e-6) and abs(by_text - scorer.score([whole])[0]) > 1e-3
    trunk = tuple(scorer.encoder.encode_prompt(whole.prompt).tolist())
    empty = Answer(whole.prompt, "", trunk, (scorer.encoder.stop_ids[0],))
    (expected,) = RewardModelScorer(rm, ids_from=scorer.encoder.digest).score([empty])
    assert scorer.score([empty, replace(empty, text=" \n")]) == pytest.approx([expected] * 2, abs=1e-6)


@pytest.mark.parametrize("tokens", [1, 64, 100_000])
def test_no_score_depends_on_the_others(rm: Model, scorer: RewardModelScorer, tokens: int) -> None:
    """Alone, together, in another order, in small or large micro-batches."""
    answers = texts()
    alone = [scorer.score([answer])[0] for answer in answers]
    sized = RewardModelScorer(rm, microbatch_tokens=tokens)
    assert sized.score(answers) == pytest.approx(alone, abs=1e-5)
    assert sized.score(answers[::-1]) == pytest.approx(alone[::-1], abs=1e-5)
    assert sized.score([]) == []


def test_normalised_on_request_and_once(rm: Model, scorer: RewardModelScorer) -> None:
    """(score - 0.5) / 2."""
    answers = texts()[:3]
    assert RewardModelScorer(rm, normalise=True).score(answers) == pytest.approx(
        [(s - 0.5) / 2 for s in scorer.score(answers)], abs=1e-6
    )


def test_another_template_than_that_of_training_is_refused(tmp_path: Path) -> None:
    """The folder's template was changed after training."""
    rm = save_rm(tmp_path)
    template = tmp_path / "rm" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    with pytest.raises(InputError, match="not the one that it was trained with"):
        RewardModelScorer(rm)


def test_a_score_that_is_not_finite_stops(rm: Model) -> None:
    broken = RewardModelScorer(rm)
    nn.init.constant_(broken._model.head.weight, math.nan)
    with pytest.raises(TrainingFault, match="not finite"):
        broken.score(texts()[:1])


def test_notes_are_needed(tmp_path: Path) -> None:
    rm = save_rm(tmp_path)
    edit(tmp_path / "rm" / "align.json", scores=None)
    with pytest.raises(InputError, match="no statistics of its scores"):
        RewardModelScorer(rm)


# Rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_all_kinds(scorer: RewardModelScorer, tmp_path: Path) -> None:
    """Preferences, conversations and prompts with answers get the scores that their answers have one by one, in
    order."""
    prompt, good, bad = user("Where?"), "In Paris.", "Nowhere."
    one, two = scorer.score([Answer(prompt, good), Answer(prompt, bad)])
    preferences = write(
        tmp_path / "p.jsonl", [{"id": "a", "prompt": "Where?", "chosen": good, "rejected": [bad, "The dog."]}] * 70
    )
    rows = list(score_rows(scorer, preferences))
    assert len(rows) == 70 and rows[0]["id"] == "a"
    assert rows[69]["chosen"] == pytest.approx(one, abs=1e-5) and rows[69]["rejected"][0] == pytest.approx(
        two, abs=1e-5
    )
    talk = [*prompt, {"role": "assistant", "content": good}, *user("Sure?"), {"role": "assistant", "content": bad}]
    (row,) = score_rows(scorer, write(tmp_path / "c.jsonl", [{"id": "b", "messages": talk}]))
    assert row == {"id": "b", "score": pytest.approx(scorer.score([Answer(tuple(talk[:-1]), bad)])[0], abs=1e-5)}  # type: ignore[arg-type]
    (row,) = score_rows(scorer, write(tmp_path / "a.jsonl", [{"id": "c", "prompt": "Where?", "answers": [bad, good]}]))
    assert row == {"id": "c", "scores": [pytest.approx(two, abs=1e-5), pytest.approx(one, abs=1e-5)]}


def test_bad_rows_are_told_of_at_the_end(scorer: RewardModelScorer, tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "q", "answers": ["x"]},
        {"id": "b", "prompt": "q", "answers": "x"},
        {"id": "c", "prompt": "q", "answers": ["y"]},
    ]
    scored = score_rows(scorer, write(tmp_path / "a.jsonl", rows))
    assert [next(scored)["id"], next(scored)["id"]] == ["a", "c"]
    with pytest.raises(InputError, match=r"a.jsonl:2 answers: expected a list of texts"):
        next(scored)


def test_the_command(
    rm: Model, scorer: RewardModelScorer, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """`align score MODEL FILE`, printed or written."""
    from align import cli

    file = write(tmp_path / "p.jsonl", [{"id": "a", "prompt": "Where?", "chosen": "In Paris.", "rejected": "No."}])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for more, read in (([], None), (["--out", "scores.jsonl"], Path("scores.jsonl"))):
        monkeypatch.setattr("sys.argv", ["align", "score", rm.path, str(file), *more])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        assert not stopped.value.code, printed.err
        (line,) = (read.read_text() if read else printed.out).splitlines()
        row = json.loads(line)
        assert [row["chosen"], *row["rejected"]] == pytest.approx(
            scorer.score([Answer(user("Where?"), text) for text in ("In Paris.", "No.")]), abs=1e-5
        )


def test_an_answer_longer_than_the_models_positions_is_refused(tmp_path: Path) -> None:
    """A score from positions that the model has never seen would be a number like any other."""
    model = save_rm(tmp_path)
    scorer = RewardModelScorer(model)
    answer = texts()[0]
    trunk, branch = encoded(scorer.encoder, answer, same_ids=False)
    size = len(trunk) + len(branch.ids)
    edit(Path(model.path) / "config.json", max_position_embeddings=size)
    fits = RewardModelScorer(model)
    assert fits.score([answer]) == scorer.score([answer])
    longer = replace(answer, text=answer.text + " and more")
    with pytest.raises(InputError, match=rf"reads {size} of its tokens; an answer with its prompt has \d+"):
        fits.score([answer, longer])
