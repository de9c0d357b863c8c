"""Which features of PEFT's LoRA adapters are supported. This table is consulted wherever an adapter's folder is read.
Imports no torch.

Everything here treats an adapter as low-rank updates that are added to linear layers inside the transformer: only such
adapters can be switched off exactly, joined with a second one, and merged one weight at a time for an engine. An
adapter with any other feature is refused, naming the feature, before anything is loaded. If PEFT can merge such an
adapter, the message points to ``align merge``, which makes a plain model of it and verifies the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

SUPPORTED = frozenset(
    {
        *("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    }
)
"""Settings of ``LoraConfig`` that are supported (``init_lora_weights``: if the initialisation left the base
unchanged)."""

HARMLESS = frozenset(
    {
        *(
            "auto_mapping",
            "peft_version",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
            "runtime_config",
            "megatron_core",
        ),
        *(
            "lora_dropout",
            "loftq_config",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "qalora_group_size",
            "ensure_weight_tying",
        ),
    }
)
"""Settings about how an adapter was made, which do not affect what the trained adapter computes."""

MERGEABLE = {
    "use_dora": "DoRA rescales the weights that it adapts",
    "lora_bias": "lora_bias adds a bias to the update",
    "bias": "the base's own biases were trained too",
    "modules_to_save": "whole modules were trained too",
    "trainable_token_indices": "single rows of the embedding were trained too",
    "target_parameters": "it adapts bare parameters, such as the experts of a mixture",
}
"""Settings that make an adapter more than low-rank updates of linear layers, but that PEFT can merge."""

REFUSED = {
    "alora_invocation_tokens": "aLoRA has an effect only behind its invocation tokens",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA changes the base's weights",
    "layer_replication": "it repeats layers of its base",
    "megatron_config": "it belongs to Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA samples its weights",
    "use_bdlora": "BD-LoRA has block-diagonal matrices",
    "use_qalora": "QALoRA belongs to a quantised base",
    "velora_config": "VeLoRA compresses its activations",
}
"""Settings that are neither supported nor can be merged."""

_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
"""Initialisations that leave the base's weights alone. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change them, and
the adapter belongs to the changed ones."""
_WHOLE = "it holds a whole tensor besides its low-rank updates"
_OFF: Mapping[str, tuple[Any, ...]] = {"bias": (None, "none")}


def refusals(
    adapter: Mapping[str, Any], tensors: Iterable[str], *, merging: bool = False
) -> Iterator[tuple[str, str, bool]]:
    """The features of an adapter that are not supported.

    Args:
        adapter: its ``adapter_config.json``.
        tensors: names of the tensors in its file.
        merging: it is only to be merged into its base by PEFT.

    Yields:
        (setting or tensor, why, can ``align merge`` help) for each feature that is not supported.
    """
    for name, value in adapter.items():
        if not value or value in _OFF.get(name, ()):
            continue
        if name in REFUSED:
            yield name, REFUSED[name], False
        elif name in MERGEABLE:
            if not merging:
                yield name, MERGEABLE[name], True
        elif name == "init_lora_weights" and value not in _PLAIN_INITS:
            yield name, f"{str(value)[:40]!r} changed the base's weights when the adapter was made", False
        elif name not in SUPPORTED and name not in HARMLESS:
            yield name, f"a setting that the installed PEFT does not know ({str(value)[:40]!r})", False
    if not merging:
        yield from _unfollowed_tensors(tensors, adapter)


def _unfollowed_tensors(tensors: Iterable[str], adapter: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Tensors in the file that its settings do not mention: some tools add the embedding, or a trained head. Yields the
    first of each kind."""
    if any(adapter.get(name) not in (None, False, "none", [], {}) for name in MERGEABLE):
        return  # reported already as a setting, which is why the tensors are there
    reasons: dict[str, str] = {}
    for name in sorted(tensors):
        path, _, kind = name.rpartition(".lora_")
        inside = path.removeprefix("base_model.model.").split(".")
        if kind in ("A.weight", "B.weight"):
            if len(inside) == 1:
                reasons.setdefault("it adapts the LM head, from whose weight log-probs are computed directly", name)
        elif kind.startswith("embedding_"):
            reasons.setdefault("it adapts an embedding", name)
        else:
            reasons.setdefault(_WHOLE, name)
    if len(reasons) > 1:
        reasons.pop(_WHOLE, None)  # PEFT saves the base of an adapted embedding or head as well
    for why, name in reasons.items():
        yield name, why, True
