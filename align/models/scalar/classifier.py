"""Exporting a reward model as ``AutoModelForSequenceClassification``, for TRL, vLLM and other tools that read one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from align import files
from align.data.chat.encoder import Encoder
from align.errors import InputError, Problem
from align.models.adapters import is_lora
from align.models.compute.dropout import input_config
from align.models.compute.forward import causal_lm
from align.models.files.quiet import no_progress_bars
from align.models.generate import embedding_rows
from align.models.load import load_encoder
from align.models.merging import merged_copy
from align.models.save import save_tokenizer, save_weights
from align.models.scalar.heads import load_scalar
from align.recipe.schema import Model

PAD = "<|pad|>"


def export_classifier(model: Model, out: Path, *, cache: Path | None = None) -> dict[str, Any]:
    """Write the reward model at ``model.path`` as a classifier into the new folder ``out``; an adapter is merged in. It
    has one label, or one for each grade that the model learned, in their order (``id2label``; ``grade_weights`` in its
    config.json make them one score).

    transformers reads the score at the last token whose id is not the padding's. The folder's tokenizer therefore pads
    with a token that ends no answer (a new one, ``<|pad|>``, if the model has none). An input has to end with the token
    that ends the answer: some templates append a line break, which must be cut off. The scores are then equal to those
    of align. Weights are fp32, since transformers would round the head to the dtype of the rest.

    Returns:
        ``{"architecture": ..., "pad_token": ...}``.

    Raises:
        InputError: ``out`` exists, ``model`` is not a reward model of this package, or transformers has no such
            classifier for its architecture.
        EnvironmentFault: the disk is full or cannot be written.
    """
    if out.exists():
        raise InputError(Problem("exists already", file=str(out), hint="name a new folder"))
    scalar, encoder = load_scalar(model, cache=cache, grades=True), load_encoder(model, cache=cache)
    backbone = causal_lm(merged_copy(scalar.backbone) if is_lora(scalar.backbone) else scalar.backbone)
    if type(backbone.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise InputError(f"transformers has no sequence classifier for {backbone.config.model_type} models")
    padded = _with_distinct_pad(encoder)
    if len(padded) > embedding_rows(backbone):
        backbone.resize_token_embeddings(len(padded), mean_resizing=False)
    config = input_config(backbone)
    config.num_labels = len(scalar.grades) or 1
    if scalar.grades:
        config.id2label = dict(enumerate(scalar.grades))
        config.label2id = {name: number for number, name in enumerate(scalar.grades)}
        config.problem_type = "regression"
        config.grade_weights = scalar.grades
    config.pad_token_id = config.get_text_config().pad_token_id = padded.pad_token_id
    auto: Any = AutoModelForSequenceClassification
    with torch.device("meta"):
        classifier = auto.from_config(config)
    prefix = classifier.base_model_prefix
    head = getattr(classifier, "score", None)
    if (
        type(getattr(classifier, prefix)) is not type(backbone)
        or not isinstance(head, nn.Linear)
        or head.bias is not None
    ):
        raise InputError(
            f"{type(classifier).__name__} is not a backbone with one linear layer, so it cannot give the same scores"
        )
    setattr(classifier, prefix, backbone)
    classifier.score = scalar.head
    with files.machine_faults(out), no_progress_bars():
        out.mkdir(parents=True)
        save_weights(classifier, out, config=config)
        save_tokenizer(encoder, out, padded)
    return {"architecture": type(classifier).__name__, "pad_token": str(padded.pad_token)}


def _with_distinct_pad(encoder: Encoder) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer whose padding token ends no answer."""
    tokenizer = copy.deepcopy(encoder.tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in encoder.stop_ids:
        tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer
