"""The shape of a transformer, and the numbers of parameters that follow from it.

Symbols: L layers, H hidden size, A = heads x head size, K = key-value heads x head size, I intermediate size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from align.model_families import LayerShape, Setting, family_of


@dataclass(frozen=True)
class Shape:
    """A decoder with rotary positions, RMSNorm and a gated MLP: the family of Llama, Qwen and GLM-4."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    """Do embedding and LM head share one matrix?"""
    lm_head: bool = True
    """Is there an LM head? False for reward models, which have a head with a single output."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Norms on queries and keys (Qwen3)."""
    norms: int = 2
    """RMSNorms in a layer: 4 in GLM-4-0414, which has them after attention and MLP too."""
    fused_mlp: bool = False
    """Gate and up projection are one linear layer (GLM)."""

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one layer: name to (inputs, outputs)."""
        h = self.hidden
        a = self.heads * self.head_dim
        k = self.kv_heads * self.head_dim
        i = self.intermediate
        mlp = {"gate_up_proj": (h, 2 * i)} if self.fused_mlp else {"gate_proj": (h, i), "up_proj": (h, i)}
        return {"q_proj": (h, a), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (a, h), **mlp, "down_proj": (i, h)}

    @property
    def matrices(self) -> int:
        """Number of weights of all linear layers except the LM head, without biases."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def parameters(self) -> int:
        """Number of all parameters; a tied LM head counts once, a head with one output is not counted."""
        biased = {"q_proj": self.qkv_bias, "k_proj": self.qkv_bias, "v_proj": self.qkv_bias, "o_proj": self.out_bias}
        biases = sum(outputs for name, (_, outputs) in self.linears.items() if biased.get(name, self.mlp_bias))
        norms = self.norms * self.hidden + 2 * self.head_dim * self.qk_norm
        embeddings = self.vocab * self.hidden * (1 if self.tied or not self.lm_head else 2)
        return self.matrices + self.layers * (biases + norms) + self.hidden + embeddings

    def lora_parameters(self, rank: int, targets: str | list[str]) -> int:
        """Parameters of LoRA adapters: rank x (inputs + outputs) for each linear layer that ``targets`` names."""
        chosen = [
            size
            for name, size in self.linears.items()
            if targets == "all-linear" or any(name.endswith(target) for target in targets)
        ]
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in chosen)


GLM_4_9B = Shape(40, 4096, 32, 2, 128, 13696, 151552, tied=False, norms=4, fused_mlp=True)
QWEN3_4B = Shape(36, 2560, 32, 8, 128, 9728, 151936, tied=True, qk_norm=True)
QWEN3_8B = Shape(36, 4096, 32, 8, 128, 12288, 151936, tied=False, qk_norm=True)
MISTRAL_7B = Shape(32, 4096, 32, 8, 128, 14336, 32000, tied=False)

KNOWN: dict[str, Shape] = {
    "zai-org/GLM-4-9B-0414": GLM_4_9B,
    "Qwen/Qwen3-4B": QWEN3_4B,
    "Qwen/Qwen3-8B": QWEN3_8B,
    "mistralai/Mistral-7B-v0.1": MISTRAL_7B,
}
"""Shapes of models in shipped recipes, so that these can be planned without a network."""


def from_config(config: Mapping[str, Any]) -> Shape | None:
    """The shape that a ``config.json`` describes; None for a family whose layers are not counted."""
    layer = family_of(config.get("model_type")).layer
    if layer is None:
        return None
    heads = int(config["num_attention_heads"])
    return Shape(
        layers=int(config["num_hidden_layers"]),
        hidden=int(config["hidden_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        intermediate=int(config["intermediate_size"]),
        vocab=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        **_of_layer(layer, config),
    )


def from_gguf(metadata: Mapping[str, Any], tied: bool) -> Shape | None:
    """The shape in the metadata of a GGUF file; None for a family whose layers are not counted.

    Args:
        metadata: the key-value pairs of the file; the value of an array is its length.
        tied: whether the file has no LM head of its own.
    """
    family = str(metadata.get("general.architecture"))
    layer = family_of(family).layer
    if layer is None or not family_of(family).gguf:
        return None
    heads = int(metadata[f"{family}.attention.head_count"])
    hidden = int(metadata[f"{family}.embedding_length"])
    return Shape(
        layers=int(metadata[f"{family}.block_count"]),
        hidden=hidden,
        heads=heads,
        kv_heads=int(metadata.get(f"{family}.attention.head_count_kv", heads)),
        head_dim=int(metadata.get(f"{family}.attention.key_length", hidden // heads)),
        intermediate=int(metadata[f"{family}.feed_forward_length"]),
        vocab=int(metadata.get(f"{family}.vocab_size", metadata.get("tokenizer.ggml.tokens", 0))),
        tied=tied,
        **_of_layer(layer, {}),
    )


def _of_layer(layer: LayerShape, config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a shape that say how its layers differ from Llama's."""
    values = {field.name: getattr(layer, field.name) for field in fields(layer)}
    return {name: value.of(config) if isinstance(value, Setting) else value for name, value in values.items()}
