"""Our reward step against TRL 1.16's RewardTrainer on one batch with a distinct padding token: loss, gradient and
metrics."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from align.data.tree import Branch, Tree
from tests.invariants.test_dpo import preferences
from tests.invariants.test_reward import marked, scalar, stage, trainer
from tests.support.tiny import VOCAB, tiny
from tests.support.trainers import first_step

PAD = 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("margins", [False, True])
def test_step_equals_trl(tmp_path: Path, margins: bool) -> None:
    """The same pairs, backbone and head; with margins the sign of both is the same. (TRL has no term on both
    scores: l2 is 0.)"""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast
    from trl import RewardConfig, RewardTrainer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    pairs = [
        marked(_without_pad(t), margin=[0.2 * i if margins else 0.0] * 2)
        for i, t in enumerate(preferences(6, rejected=(1,)))
    ]
    net = scalar()
    config = tiny("llama").config
    config.num_labels, config.pad_token_id = 1, PAD
    theirs_model = LlamaForSequenceClassification(config)
    theirs_model.model.load_state_dict(net.backbone.state_dict())
    theirs_model.score.load_state_dict(net.head.state_dict())
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="w2", pad_token=f"w{PAD}"
    )
    rows = [
        {
            "chosen_ids": [*t.trunk.tolist(), *t.branches[0].ids.tolist()],
            "rejected_ids": [*t.trunk.tolist(), *t.branches[1].ids.tolist()],
        }
        | ({"margin": t.branches[1].margin} if margins else {})
        for t in pairs
    ]
    arguments = RewardConfig(
        output_dir=str(tmp_path / "trl"),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        max_length=None,
        per_device_train_batch_size=6,
    )
    theirs = RewardTrainer(
        model=theirs_model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    theirs_model.train()
    their_loss = theirs.compute_loss(theirs_model, theirs.data_collator(rows))
    their_loss.backward()

    metrics, gradients = first_step(
        trainer(tmp_path / "ours", pairs, stage(l2=0.0, train={"microbatch_tokens": 50}), net)
    )
    assert metrics["loss"] == pytest.approx(their_loss.item(), abs=1e-5)
    for name, parameter in theirs_model.named_parameters():
        ours = gradients["head.weight" if name == "score.weight" else f"backbone.{name.removeprefix('model.')}"]
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-4
        scale = max(1.0, float(parameter.grad.abs().max()))
        assert_close(ours / scale, parameter.grad / scale, atol=1e-5, rtol=0)
    logged = theirs._metrics["train"]
    assert metrics["accuracy"] == pytest.approx(float(np.mean(logged["accuracy"])))
    assert metrics["margin"] == pytest.approx(float(np.mean(logged["margin"])), abs=1e-5)
    assert metrics["scores/mean"] == pytest.approx(float(np.mean(logged["mean_reward"])), abs=1e-5)
    assert torch.isfinite(their_loss)


def _without_pad(tree: Tree) -> Tree:
    """Keep the padding token out of the data."""
    branches = tuple(Branch(np.maximum(b.ids, PAD + 1), b.mask) for b in tree.branches)
    return Tree(tree.id, np.maximum(tree.trunk, PAD + 1), branches)
