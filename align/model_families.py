"""What is special about the models of a family: one row for each ``model_type`` of transformers that differs.

Read from here is only what a model's ``config.json`` does not say itself. What it does say (a factor or a cap on the
logits, a sliding window, sizes, how many positions) is read there, so a family without a row works as well: it only
has no plan of its memory, and counts as one whose positions go on. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """A property that all models of a family have or lack, unless a key of ``config.json`` says otherwise."""

    default: bool
    """As transformers has it where the key is absent."""
    key: str | None = None
    """The key; None where there is none."""

    def of(self, config: Mapping[str, Any]) -> bool:
        """As a model's ``config.json`` has it."""
        return self.default if self.key is None else bool(config.get(self.key, self.default))


NEVER, ALWAYS = Setting(False), Setting(True)


@dataclass(frozen=True)
class LayerShape:
    """How a layer differs from one with RMSNorm, a gated MLP and no biases, which is Llama's."""

    norms: int = 2
    """RMSNorms in a layer."""
    fused_mlp: bool = False
    """Gate and up projection are one linear layer."""
    qk_norm: bool = False
    """Norms on queries and keys."""
    qkv_bias: Setting = NEVER
    out_bias: Setting = NEVER
    mlp_bias: Setting = NEVER


@dataclass(frozen=True)
class ModelFamily:
    """A row of the table. As it is: a family whose layers are not counted, with positions that go on behind the
    last one that the model was made for."""

    layer: LayerShape | None = None
    """For counting parameters and activations; None where that is not known."""
    gguf: bool = False
    """Are the shapes counted from the metadata of GGUF files too?"""
    table_of_positions: bool = False
    """Does the forward pass fail behind the last position, because a table of embeddings, of rotations or of biases
    ends there?"""
    no_positions: Setting = NEVER
    """Have the positions no end (ALiBi)?"""


_ATTENTION_BIAS = Setting(False, "attention_bias")

FAMILIES = {
    "llama": ModelFamily(
        LayerShape(qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, mlp_bias=Setting(False, "mlp_bias")), gguf=True
    ),
    "mistral": ModelFamily(LayerShape()),
    "qwen2": ModelFamily(LayerShape(qkv_bias=ALWAYS), gguf=True),
    "qwen3": ModelFamily(LayerShape(qk_norm=True, qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS), gguf=True),
    "glm": ModelFamily(LayerShape(fused_mlp=True, qkv_bias=Setting(True, "attention_bias"))),
    "glm4": ModelFamily(LayerShape(norms=4, fused_mlp=True, qkv_bias=Setting(True, "attention_bias"))),
    **dict.fromkeys(
        ("biogpt", "codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "mpt", "opt"),
        ModelFamily(table_of_positions=True),
    ),
    "bloom": ModelFamily(no_positions=ALWAYS),
    "falcon": ModelFamily(no_positions=Setting(False, "alibi")),
}
"""By ``model_type`` of ``config.json``, which is also ``general.architecture`` of a GGUF file."""


def family_of(model_type: object) -> ModelFamily:
    """The row of a family, or that of one with nothing special."""
    return FAMILIES.get(str(model_type), ModelFamily())
