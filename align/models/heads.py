"""Scalar models: a transformer without LM head and one linear output, fp32. Reward models read it where an answer ends, value models before
every token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from align import files
from align.batching.batch import Batch
from align.data.encode import Encoder
from align.errors import InputError, Problem
from align.functional.segments import segment_count
from align.models.adapters import is_lora, merged_copy
from align.models.forward import causal_lm, hidden_states
from align.models.load import DTYPES, locate
from align.recipe.schema import Model

HEAD = "reward_head.safetensors"
"""Beside the backbone's own files."""


class ScalarModel(nn.Module):
    """``backbone`` (a transformers model, or a PeftModel around one) and ``head``, an fp32 linear layer to one number."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        inner = causal_lm(backbone)
        width = int(inner.config.get_text_config().hidden_size)
        self.backbone: nn.Module = backbone
        self.head = nn.Linear(width, 1, bias=False, dtype=torch.float32)
        nn.init.normal_(self.head.weight, std=(width + 1) ** -0.5)
        self.head.to(inner.device)

    def at(self, batch: Batch, positions: Tensor, *, own_attention: bool = False) -> Tensor:
        """The head's value at ``positions`` of the flattened tokens, fp32 [len(positions)]."""
        states = hidden_states(self.backbone, batch, own_attention=own_attention)[positions]
        with torch.autocast(states.device.type, enabled=False):
            values: Tensor = self.head(states.float()).squeeze(-1)
        return values

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """As the method of transformers' models."""
        causal_lm(self.backbone).gradient_checkpointing_enable(**options)


def branch_scores(model: ScalarModel, batch: Batch, *, own_attention: bool = False) -> Tensor:
    """The number at each answer's last token: fp32 [B]."""
    ends = segment_count(batch.branch, batch.num_branches).cumsum(0) - 1
    return model.at(batch, batch.targets[ends], own_attention=own_attention)


def token_values(model: ScalarModel, batch: Batch, *, own_attention: bool = False) -> Tensor:
    """The number at the token before each target, the state in which that target is chosen: fp32 [N]."""
    return model.at(batch, batch.sources, own_attention=own_attention)


@dataclass(frozen=True)
class ScoreStats:
    """Mean and standard deviation of a model's numbers, and of how many."""

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, scores: npt.ArrayLike) -> ScoreStats:
        """Those of ``scores``."""
        values = np.asarray(scores, dtype=np.float64)
        return cls(float(values.mean()), float(values.std()), values.size)


def load_scalar(
    model: Model,
    *,
    dtype: Literal["fp32", "bf16"] = "fp32",
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    quantize: Literal["nf4"] | None = None,
) -> ScalarModel:
    """The reward or value model at ``model.path``, already resolved. Raises InputError when it is a language model without such a head."""
    folder = locate(model)
    if not (folder / HEAD).is_file():
        raise InputError(Problem(f"not a reward model: it has no {HEAD}", file=str(folder)))
    backbone: Any = AutoModel.from_pretrained(str(folder), dtype=DTYPES[dtype], use_safetensors=True, local_files_only=True)
    scalar = ScalarModel(backbone.to(device))
    with torch.no_grad():
        scalar.head.weight.copy_(load_file(folder / HEAD)["weight"])
    return scalar.eval()


def save_scalar(
    model: ScalarModel, encoder: Encoder, out: Path, *, base: Model, scores: ScoreStats, layout: str = "tree", save_merged: bool = False
) -> dict[str, Any]:
    """Write a model with all its weights, its head and its tokenizer into the folder ``out``."""
    with files.machine_faults(out):
        plain = merged_copy(model.backbone) if is_lora(model.backbone) else model.backbone
        causal_lm(plain).save_pretrained(out)
        encoder.tokenizer.save_pretrained(out)
        save_file({"weight": model.head.weight.detach().cpu().contiguous()}, out / HEAD)
    files.write_json(out / "align.json", {"scores": vars(scores), "layout": layout, "encoder": encoder.digest})
    return {"format": "full"}
