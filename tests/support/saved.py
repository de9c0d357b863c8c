"""Model folders on disk for tests: a tiny random model and a tiny tokenizer, as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from align.data.chat.encoder import Encoder
from align.data.records import Message
from align.models.adapters import add_lora
from align.models.load import load_encoder, load_policy
from align.models.save import save_policy
from align.recipe.schema import Lora, Model
from tests.support.tiny import tiny
from tests.support.tokenizers import chatml

QUESTION: list[Message] = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER: Message = {"role": "assistant", "content": "The capital of France is Paris."}
LORA = Lora(rank=4, alpha=8)
SHARP = {"initializer_range": 0.6, "tie_word_embeddings": False}


def rows(tokenizer: PreTrainedTokenizerFast, multiple: int = 8) -> int:
    """Embedding rows for a tokenizer, rounded up as real models do: some ids have no token."""
    return (len(tokenizer) // multiple + 1) * multiple


def save_tiny(
    folder: Path, family: str = "llama", tokenizer: PreTrainedTokenizerFast | None = None, **changes: Any
) -> Model:
    """Save a tiny model with its tokenizer into ``folder``; returns the reference to it."""
    tokenizer = tokenizer or chatml()
    settings = {
        "vocab_size": rows(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        **changes,
    }
    tiny(family, **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Model(path=str(folder))


def overfit(model: nn.Module, encoder: Encoder, steps: int = 80) -> None:
    """Train ``model`` until it answers QUESTION with ANSWER by heart, and stops.

    An adapter cannot make a frozen random head sharper than it is: save the base with ``**SHARP``.
    """
    encoded = encoder.encode([*QUESTION, ANSWER])
    ids = torch.from_numpy(encoded.ids).long()[None]
    labels = ids.masked_fill(~torch.from_numpy(encoded.mask)[None], -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(ids, labels=labels, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss < 0.05, loss


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None or key not in changes}))


CANARY = "import os, pathlib\npathlib.Path(os.environ['CANARY']).write_text('ran')\n"


def trap(folder: Path) -> None:
    """Python files with every name that the libraries look for."""
    classes = (
        "class Evil:\n    pass\nclass EvilConfig(Evil): pass\nclass EvilForCausalLM(Evil): pass\nclass"
        " EvilTokenizer(Evil): pass\n"
    )
    (folder / "custom_generate").mkdir()
    for name in ("evil.py", "custom_generate/generate.py", "__init__.py"):
        (folder / name).write_text(CANARY + classes)


def adapter_on(folder: Path) -> Path:
    """A saved adapter of the model in ``folder``."""
    base = Model(path=str(folder))
    out = folder.parent / "adapter"
    save_policy(add_lora(load_policy(base), LORA), load_encoder(base), out, base=base)
    return out
