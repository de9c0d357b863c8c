"""Generating answers with a model in this process, in left-padded batches; the answers are those that single prompts
would get.

Used by chat and to show answers before and after training. Rollouts for training come from a rollout engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from align.data.chat.encoder import Encoder
from align.models.adapters import unwrap
from align.models.compute.forward import causal_lm, own_attention_name
from align.models.placement import device_of, in_forward, in_step

BATCH = 16
"""Prompts that are continued at the same time."""


def answer(
    model: nn.Module,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch: int = BATCH,
) -> list[list[int]]:
    """Continue every prompt (token ids, from ``Encoder.encode_prompt``) until a stop id or ``max_new_tokens``;
    ``batch`` at a time.

    Greedy at temperature 0, else sampling from ``seed``. Returns the generated ids, which end with a stop id unless the
    limit cut them. The caller's random state, training mode and attention are left as they were. Where each process has
    a part of the model, all of them must continue the same prompts.
    """
    device, together = device_of(model), in_step(model)

    def answers() -> list[list[int]]:
        made: list[list[int]] = []
        with generating(model) as lm, torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            settings = generation_settings(
                lm, encoder, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k
            )
            for start in range(0, len(prompts), batch):
                made += _continue(lm, encoder, prompts[start : start + batch], settings, together=together)
        return made

    with torch.no_grad():
        return in_forward(model, answers)


def _continue(
    lm: Any, encoder: Encoder, prompts: Sequence[Sequence[int]], settings: GenerationConfig, *, together: bool
) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), encoder.pad_id)
    attended = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor([int(i) for i in prompt])
        attended[row, width - len(prompt) :] = 1
    # generate() derives positions from the mask, so they count from each prompt's first token, not from the padding.
    # synced_gpus: go on until the answers of all processes are finished, since each needs the others' parts of the
    # model. When it is left out, transformers asks whether the model is sharded, which it may also be while every
    # process has gathered it and samples by itself.
    output = lm.generate(
        ids.to(lm.device), attention_mask=attended.to(lm.device), generation_config=settings, synced_gpus=together
    )
    return [_cut(row, encoder.stop_ids) for row in output[:, width:].tolist()]


def _cut(ids: list[int], stops: Sequence[int]) -> list[int]:
    """``ids`` up to and including the first stop id. The rest is padding, whose id may be a stop id too."""
    end = next((place + 1 for place, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


def embedding_rows(lm: PreTrainedModel) -> int:
    """The number of token ids for which the model has an embedding."""
    embedding: Any = lm.get_input_embeddings()
    return int(embedding.weight.shape[0])


def generation_settings(
    lm: PreTrainedModel,
    encoder: Encoder,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
) -> GenerationConfig:
    """Settings for plain greedy search or sampling without the model's own defaults. Ids that the tokenizer does not
    have are never generated."""
    rows = embedding_rows(lm)
    known = encoder.vocabulary
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p} if temperature > 0 else {}
    )
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        eos_token_id=list(encoder.stop_ids),
        pad_token_id=encoder.pad_id,
        suppress_tokens=list(range(known, rows)) or None,
        use_cache=True,
        **sampling,
    )


@contextmanager
def generating(model: nn.Module) -> Iterator[PreTrainedModel]:
    """Inside, the transformers model within ``model`` is ready to generate; afterwards it is put back as it was."""
    outer = unwrap(model)
    lm = causal_lm(outer)
    training = outer.training
    attention = lm.config._attn_implementation
    defaults = lm.generation_config
    outer.eval()
    lm.set_attn_implementation(own_attention_name(lm))  # tree attention would need a batch of trees
    lm.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # generate() fills what is not set from the model's defaults
    try:
        with torch.no_grad():
            yield lm
    finally:
        lm.generation_config = defaults
        if attention is not None:
            lm.set_attn_implementation(attention)
        outer.train(training)
