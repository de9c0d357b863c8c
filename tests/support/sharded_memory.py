"""Memory of processes that each hold a part of a model. :func:`memory_of_training` and :func:`memory_of_leaving` run in
each process of a group."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align.models import save
from align.models.placement import size_of
from align.rollout import weight_files
from align.rollout.sync import weights_of
from align.training.launch import leave, ranks
from align.training.memory import begin_stage, peak_memory_bytes
from tests.support.sharded import sft

SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16, "num_attention_heads": 8}
VOCAB = 8000
MICROBATCH = 256


def model() -> LlamaForCausalLM:
    """250 MB."""
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=8, vocab_size=VOCAB, tie_word_embeddings=False))


def memory_of_training(folder: Path) -> None:
    """How much memory of the first process rises in three steps above what it had before the model was made, in
    bytes."""
    torch.set_num_threads(1)
    group = ranks()
    begin_stage()
    before = peak_memory_bytes()
    placement = group.placement_for("full")
    run = sft(folder / "work", group, placement, net=model, loss="token_mean", microbatch_tokens=MICROBATCH, epochs=3)
    begin_stage()  # not the loading
    run.fit()
    found = {"model": 4 * size_of(run.model), "peak": peak_memory_bytes() - before}
    if group.first:
        (folder / "found.json").write_text(json.dumps(found))
    group.barrier()
    leave()


def memory_of_leaving(folder: Path) -> None:
    """How much memory of the first process rises, in bytes, while a model of 250 MB is saved and while it is handed to
    an engine, both in files of 20 MB."""
    torch.set_num_threads(1)
    group = ranks()
    net = model()
    group.placement_for("full").wrap(net)
    found = {"model": 4 * size_of(net), "largest": 4 * max(p.numel() for p in net.parameters())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "FILE_BYTES", found.setdefault("file", 20 * 10**6))
        patch.setattr(weight_files, "FILE_BYTES", found["file"])

        def saved() -> None:
            if group.first:
                (folder / "out").mkdir()
                save.save_weights(net, folder / "out")
            else:
                save.take_part(net)

        def handed_over() -> None:
            with weight_files.weight_files(weights_of(net, 1, group)):
                pass

        for name, leave_process in {"saved": saved, "handed over": handed_over}.items():
            begin_stage()
            before = peak_memory_bytes()
            leave_process()
            found[name] = peak_memory_bytes() - before
    if group.first:
        (folder / "found.json").write_text(json.dumps(found))
    group.barrier()
    leave()
