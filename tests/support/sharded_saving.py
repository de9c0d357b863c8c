"""Models of which each of several processes holds a part, saved. :func:`saved_side_by_side` runs in each process of a
group."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from align.data.chat.encoder import Encoder
from align.models import save
from align.models.adapters import add_lora
from align.models.generate import answer
from align.models.load import load_encoder, load_policy
from align.models.placement import gathered
from align.models.save import save_policy
from align.models.scalar.heads import ScalarModel, ScoreStats, save_scalar
from align.recipe.schema import Lora, Model
from align.training.launch import leave, ranks
from tests.support.saved import rows
from tests.support.sharded import lora
from tests.support.tiny import tiny
from tests.support.tokenizers import chatml

ROWS = rows(chatml())


def mixtral() -> nn.Module:
    """Its experts are one tensor in memory and several in files."""
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = {**shape, "num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": ROWS}
    net: nn.Module = MixtralForCausalLM(MixtralConfig(**settings))
    return net


SAVED: dict[str, Callable[[], Any]] = {
    "tied": lambda: tiny("llama", vocab_size=ROWS),
    "untied": lambda: tiny("glm4", vocab_size=ROWS),
    "experts": mixtral,
    "loaded": lambda: load_policy(Model(path="loaded")),
    "reward": lambda: ScalarModel(tiny("glm4", vocab_size=ROWS).model),
    "adapter": lambda: lora(load_policy(Model(path="loaded"))),
    "adapters": lambda: add_lora(load_policy(Model(path="adapter")), Lora(rank=2)),
}
"""Ways in which a model is saved: all of its weights, one by one or converted, or an adapter, or two joined."""
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


def saved_side_by_side(folder: Path) -> None:
    """Every model of ``SAVED``, saved by one process that holds it whole (``NAME-whole``) and by the first of several
    that hold parts (``NAME-parts``), in small files; and whether their answers are the same (``answers.json``). In the
    folder is a model ``loaded`` and an ``adapter`` of it."""
    os.chdir(folder)
    torch.set_num_threads(1)
    group = ranks()
    encoder = load_encoder(Model(path="loaded"))
    answers = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "FILE_BYTES", 10_000)
        for name, make in SAVED.items():
            build = partial(seeded, make)
            net = build()
            if name == "loaded":
                answers["whole"] = answer(net, encoder, PROMPTS, max_new_tokens=12)
            if group.first:
                save_as(net, encoder, folder / f"{name}-whole", writes=True)
            net = group.placement_for("full").wrap(build())
            save_as(net, encoder, folder / f"{name}-parts", writes=group.first)
            if name == "loaded":
                answers["parts"] = answer(net, encoder, PROMPTS, max_new_tokens=12)
                with gathered(net):  # each by itself: one process has one prompt more
                    own = answer(net, encoder, PROMPTS[: 2 + group.rank], max_new_tokens=12)
                answers["gathered"] = group.gather(own)[1]
    if group.first:
        (folder / "answers.json").write_text(json.dumps(answers))
    group.barrier()
    leave()


def seeded(build: Callable[[], Any]) -> Any:
    torch.manual_seed(7)
    return build()


def save_as(net: Any, encoder: Encoder, out: Path, *, writes: bool) -> None:
    base = Model(path="loaded")
    if isinstance(net, ScalarModel):
        save_scalar(net, encoder, out, base=base, scores=ScoreStats(0.0, 1.0, 1), writes=writes)
    else:
        save_policy(net, encoder, out, base=base, writes=writes)
