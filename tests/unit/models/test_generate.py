"""Answers of a model: batched as one by one, and nothing about the model changed by asking."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import GenerationConfig

from align.data.chat.encoder import Encoder
from align.models.adapters import add_lora
from align.models.generate import answer, generating
from align.recipe.schema import Lora
from tests.support.saved import rows
from tests.support.tiny import tiny
from tests.support.tokenizers import chatml, llama3

PROMPTS = [[5, 6, 7], list(range(20, 45)), [9], [30, 31, 32, 33, 34, 35, 36, 37], *([i, i + 1] for i in range(50, 66))]


def small(family: str, tokenizer: object = None) -> nn.Module:
    return tiny(family, vocab_size=rows(tokenizer or chatml()))  # type: ignore[arg-type]


@pytest.mark.parametrize("distinct_pad", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral_short_window", "gemma3"])
def test_batched_is_one_by_one(family: str, distinct_pad: bool) -> None:
    """Prompts of unequal length, more than one batch of them; GPT-2's absolute positions must not count the
    padding."""
    model, encoder = small(family), Encoder(chatml(distinct_pad=distinct_pad))
    together = answer(model, encoder, PROMPTS, max_new_tokens=6)
    assert together == [answer(model, encoder, [prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    assert len({tuple(ids) for ids in together}) > 10


def test_greedy_is_the_plain_argmax() -> None:
    """An oracle without cache, padding or generate()."""
    model, encoder = small("llama"), Encoder(chatml())
    ids = list(PROMPTS[1])
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1, : len(chatml())].argmax()))
    assert answer(model, encoder, PROMPTS[:2], max_new_tokens=6)[1] == ids[-6:]


def rigged(model: nn.Module, token: int) -> nn.Module:
    """Make ``token`` the likeliest after anything."""
    model.get_output_embeddings().bias = nn.Parameter(torch.zeros(model.config.vocab_size))
    model.get_output_embeddings().bias.data[token] = 100.0
    return model


def test_an_answer_ends_with_its_stop_id() -> None:
    """Any stop id ends it, not only the tokenizer's eos; it is kept, and nothing follows, though padding is a stop id
    here."""
    encoder = Encoder(llama3())
    assert len(encoder.stop_ids) == 2 and encoder.pad_id in encoder.stop_ids
    for stop in encoder.stop_ids:
        assert answer(rigged(small("llama", llama3()), stop), encoder, [[5, 6], [7]], max_new_tokens=6) == [
            [stop],
            [stop],
        ]


def test_the_models_own_defaults_do_not_interfere() -> None:
    """A repetition penalty, a length limit or sampling in generation_config would make "greedy" something else."""
    model, encoder = small("llama"), Encoder(chatml())
    expected = answer(model, encoder, PROMPTS, max_new_tokens=6)
    own = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1, eos_token_id=3
    )
    model.generation_config = own
    assert answer(model, encoder, PROMPTS, max_new_tokens=6) == expected
    assert model.generation_config is own


def test_sampling() -> None:
    """A seed repeats, other seeds differ, and samples follow softmax(logits / T) without a top-k cut."""
    model, encoder = small("llama"), Encoder(chatml())
    first = answer(model, encoder, PROMPTS, max_new_tokens=6, temperature=1.0)
    assert answer(model, encoder, PROMPTS, max_new_tokens=6, temperature=1.0) == first
    assert answer(model, encoder, PROMPTS, max_new_tokens=6, temperature=1.0, seed=1) != first
    draws = answer(model, encoder, [[5, 6, 7]] * 1600, max_new_tokens=1, temperature=2.0)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1, : len(chatml())]
    probabilities = (logits / 2.0).softmax(-1)
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=len(probabilities))
    assert (counts > 0).sum() > 50  # the default top-k of generate()
    top = probabilities.argmax()
    spread = (1600 * probabilities[top] * (1 - probabilities[top])).sqrt()
    assert abs(counts[top] - 1600 * probabilities[top]) < 5 * spread


def test_asking_changes_nothing() -> None:
    """Training goes on bit-equal: mode, attention, random state and gradients are as before; also with adapters and
    checkpointing on."""
    model = add_lora(small("llama"), Lora(rank=2, dropout=0.5)).train()
    lm = model.get_base_model()
    lm.gradient_checkpointing_enable()
    lm.set_attn_implementation("align_tree")
    lm.config.use_cache = False
    state = torch.get_rng_state()
    answer(model, Encoder(chatml()), PROMPTS[:2], max_new_tokens=3, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(module.training for module in model.modules())
    assert (lm.config._attn_implementation, lm.config.use_cache) == ("align_tree", False)
    assert all(p.grad is None for p in model.parameters())


def test_the_model_is_put_back_after_an_interrupt() -> None:
    model = small("llama").train()
    with pytest.raises(KeyboardInterrupt), generating(model):
        raise KeyboardInterrupt
    assert model.training


def test_adapter_answers_are_the_adapters() -> None:
    model = add_lora(small("llama"), Lora(rank=4))
    encoder = Encoder(chatml())
    before = answer(model, encoder, PROMPTS, max_new_tokens=6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    assert answer(model, encoder, PROMPTS, max_new_tokens=6) != before
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        first = int(model(ids).logits[0, -1, : len(chatml())].argmax())
    assert answer(model, encoder, PROMPTS[:1], max_new_tokens=1) == [[first]]
    assert_close(model(ids).logits, model(ids).logits)
