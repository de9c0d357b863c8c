"""A tiny sentence-transformers model on disk: a random two-layer BERT over the tests' tokenizer, mean pooling, no
download."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from tokenizers import processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.support.tokenizers import build

MAX_TOKENS = 24
_ST = "sentence_transformers.models"


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = build(None, ["<s>", "</s>", "<pad>"], bos="<s>", eos="</s>", pad="<pad>")
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", first), ("</s>", last)]
    )
    return tokenizer


def save_embedder(folder: Path) -> Path:
    """Write the model into ``folder``, as sentence-transformers does; the same weights every time."""
    tokenizer = _tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parts = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{_ST}.{name}"} for i, (name, path) in enumerate(parts)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": MAX_TOKENS, "do_lower_case": False})
    )
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder
