"""A policy's implicit reward, against plain forward passes of both models on what the chat template writes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.errors import InputError
from align.recipe.blocks.scoring import Scoring
from align.recipe.schema import Model
from align.scoring.implicit import ImplicitRewardScorer
from align.scoring.open import open_scorer
from align.scoring.scorer import Answer
from tests.support.saved import save_tiny
from tests.support.tokenizers import qwen3
from tests.unit.scoring.test_reward_model import sampled, texts

BETA = 0.25


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, its reference, and a model with another tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "policy", initializer_range=0.3)
    save_tiny(folder / "reference")
    save_tiny(folder / "other", "qwen3", qwen3())
    return folder


def scorer(models: Path, policy: str = "policy", reference: str = "reference", **options: Any) -> ImplicitRewardScorer:
    return ImplicitRewardScorer(
        Model(path=str(models / policy)), Model(path=str(models / reference)), **{"beta": BETA, **options}
    )


@torch.no_grad()
def logprob(folder: Path, answer: Answer) -> float:
    """Of the answer and the token that ends it, in float64, by transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    said = [*answer.prompt, {"role": "assistant", "content": answer.text}]
    whole = tokenizer.apply_chat_template(said, tokenize=True, return_dict=False)
    asked = tokenizer.apply_chat_template(
        list(answer.prompt), tokenize=True, add_generation_prompt=True, return_dict=False
    )
    end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)  # the template may write a line break after it
    logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(logits[place - 1, whole[place]]) for place in range(len(asked), end))


def test_it_is_beta_times_the_log_ratio(models: Path) -> None:
    answers = texts()[:6]
    expected = [BETA * (logprob(models / "policy", one) - logprob(models / "reference", one)) for one in answers]
    assert scorer(models).score(answers) == pytest.approx(expected, abs=1e-4)
    assert len({round(value, 3) for value in expected}) == 6 and any(abs(value) > 0.1 for value in expected)


def test_turned_round_it_changes_its_sign_and_against_itself_it_is_nothing(models: Path) -> None:
    answers = texts()[:4]
    there, back = scorer(models).score(answers), scorer(models, "reference", "policy").score(answers)
    assert there == pytest.approx([-value for value in back], abs=1e-9)
    assert scorer(models, "policy", "policy").score(answers) == [0.0] * 4


def test_beta_scales_and_micro_batches_change_nothing(models: Path) -> None:
    answers = texts()[:6]
    expected = scorer(models).score(answers)
    assert scorer(models, beta=2 * BETA).score(answers) == pytest.approx([2 * value for value in expected], rel=1e-6)
    assert scorer(models, microbatch_tokens=1).score(answers[::-1]) == pytest.approx(expected[::-1], abs=1e-4)
    assert scorer(models).score([]) == []


def test_sampled_ids_are_read_as_they_are_and_an_answer_that_was_cut_has_no_end(models: Path) -> None:
    one = texts()[0]
    by_text = scorer(models)
    by_ids = scorer(models, ids_from=by_text.encoder.digest)
    for answer in (one, replace(one, finished=False)):
        assert by_ids.score([sampled(answer, by_text.encoder)]) == pytest.approx(by_text.score([answer]), abs=1e-5)
    whole, cut = by_text.score([one, replace(one, finished=False)])
    assert abs(whole - cut) > 1e-4
    (empty,) = by_text.score([replace(one, text=" ")])
    assert math.isfinite(empty)


def test_other_tokens_are_refused(models: Path) -> None:
    with pytest.raises(InputError, match="have different tokenizers"):
        scorer(models, reference="other")


def test_a_recipe_names_both_models(models: Path) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Scoring)
    block = adapter.validate_python(
        {"policy": str(models / "policy"), "reference": str(models / "reference"), "beta": BETA}
    )
    assert open_scorer(block, resolve=Path).score(texts()[:2]) == pytest.approx(scorer(models).score(texts()[:2]))
    with pytest.raises(ValueError, match="reference"):
        adapter.validate_python({"policy": "a"})


def test_an_answer_longer_than_a_models_positions_is_refused(tmp_path: Path) -> None:
    """Of the policy or of the reference: one of them would be read where it has never been."""
    save_tiny(tmp_path / "policy")
    save_tiny(tmp_path / "reference", max_position_embeddings=8)
    with pytest.raises(InputError, match="reads 8 of its tokens"):
        scorer(tmp_path).score(texts()[:1])
