"""From a model and a batch to the log-probs of the batch's targets. Every stage runs its models through this module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from align.batching.batch import Batch
from align.errors import InputError
from align.functional.logprobs import token_logprobs, token_logprobs_and_entropy
from align.models.compute import attention, flex
from align.models.placement import in_forward


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's wrapper, if there is one. Adapters are inside its layers and stay active."""
    inside = getattr(model, "get_base_model", None)  # only PEFT's wrapper has it
    inner = model if inside is None else inside()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"expected a transformers model, got {type(inner).__name__}")
    return inner


def transformer_of(lm: PreTrainedModel) -> Any:
    """The transformer inside a language model, which outputs hidden states; a model without LM head is returned itself.

    Raises:
        InputError: the model's class does not say which module it is (some classes name a module that does not exist).
    """
    if lm.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        return lm
    inside: Any = lm.base_model
    if inside is lm:  # the class names a module that it does not have
        inside = getattr(lm, "model", None) or getattr(lm, "transformer", lm)
    if inside is lm or inside is None:
        raise InputError(
            f"{type(lm).__name__} does not say which of its modules the transformer is", hint="use another model"
        )
    return inside


def hidden_states(
    model: nn.Module,
    batch: Batch,
    *,
    own_attention: bool = False,
    trees: attention.Trees | None = None,
    embedded: Tensor | None = None,
) -> Tensor:
    """The last hidden states of a batch, [R * L, H].

    ``own_attention`` runs the model's own attention with a padding mask (the ``padded`` layout); otherwise attention is
    per tree, by the bounds in ``trees`` if given, else by those of the batch. ``embedded`` are the batch's input
    embeddings [R, L, E], if they were looked up already. The model keeps the chosen attention after this call, since
    gradient checkpointing calls it again in the backward pass. Generation sets its own.

    Raises:
        InputError: a layer of the model cannot use tree attention (it mixes tokens in some other way, or has its own
            attention code).
    """
    lm = causal_lm(model)
    name, extra = _attention(lm, batch, own_attention) if trees is None else (attention.NAME, {"trees": trees})
    lm.set_attn_implementation(name)
    backbone = transformer_of(lm)
    inputs = {"input_ids": batch.input_ids} if embedded is None else {"inputs_embeds": embedded}
    output = backbone(**inputs, position_ids=batch.position_ids, use_cache=False, **extra)
    layers = lm.config.get_text_config().num_hidden_layers
    if not own_attention and extra["trees"].layers < layers:
        message = f"{type(lm).__name__}: only {extra['trees'].layers} of {layers} layers keep the trees of a row apart"
        raise InputError(message, hint="set train.layout: padded")
    last: Tensor = output.last_hidden_state
    return last.flatten(0, 1)


def _attention(lm: PreTrainedModel, batch: Batch, own_attention: bool) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the attention to use: the model's own, the fused kernel on CUDA, or tree by tree
    elsewhere."""
    if own_attention:
        return own_attention_name(lm), {"attention_mask": batch.attention_mask}
    if batch.input_ids.is_cuda:
        return flex.NAME, {"trees": flex.FlexTrees(batch.rows, batch.position_ids)}
    return attention.NAME, {"trees": attention.Trees(batch.rows, batch.input_ids.device)}


def own_attention_name(lm: PreTrainedModel) -> str:
    """The fastest of the model's own attentions that computes all that the model asks for: sdpa ignores a cap on the
    scores and has no attention sinks."""
    return "sdpa" if lm._supports_sdpa and not _caps_scores(lm.config) else "eager"


def attention_for(cls: type[PreTrainedModel], config: Any) -> str:
    """:func:`own_attention_name` of a model that is still to be loaded."""
    return "sdpa" if cls._supports_sdpa and not _caps_scores(config) else "eager"


def _caps_scores(config: Any) -> bool:
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def batch_logprobs(model: nn.Module, batch: Batch, *, temperature: float = 1.0, own_attention: bool = False) -> Tensor:
    """Log-probs of the batch's targets under the model, fp32 [N], in the order of ``batch.targets``.

    Hidden states are gathered at the source positions first, so only targets are projected to the vocabulary.
    """
    return in_forward(
        model,
        lambda: project(
            model, hidden_states(model, batch, own_attention=own_attention), batch, temperature=temperature
        ),
    )


def batch_logprobs_and_entropy(
    model: nn.Module, batch: Batch, *, temperature: float = 1.0, own_attention: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`batch_logprobs`, and the entropy of each distribution that a target is drawn from, in nats: fp32 [N] and
    [N]."""

    def both() -> tuple[Tensor, Tensor]:
        hidden = hidden_states(model, batch, own_attention=own_attention)
        return token_logprobs_and_entropy(
            hidden[batch.sources], targets=batch.target_ids, temperature=temperature, **_head(model)
        )

    return in_forward(model, both)


def project(model: nn.Module, hidden: Tensor, batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """Log-probs of the batch's targets, fp32 [N], from hidden states [M, H]; ``batch.sources`` are indices into
    them."""
    return token_logprobs(hidden[batch.sources], targets=batch.target_ids, temperature=temperature, **_head(model))


def _head(model: nn.Module) -> dict[str, Any]:
    """The LM head and the model's transformation of its logits, as arguments of the log-prob functions."""
    lm = causal_lm(model)
    head = lm.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"{type(lm).__name__} has no LM head of one linear layer ({type(head).__name__})", hint="use another model"
        )
    scale, softcap = logit_transform(lm)
    return {"weight": head.weight, "bias": head.bias, "logit_scale": scale, "logit_softcap": softcap}


def logit_transform(lm: nn.Module) -> tuple[float, float | None]:
    """How the model transforms its logits: (factor, soft cap). Granite divides, Cohere multiplies, Gemma caps; most
    models do none of it."""
    config = lm.config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return scale, None if softcap is None else float(softcap)
