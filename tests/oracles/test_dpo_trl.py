"""Our DPO step against TRL 1.16's own trainer on one batch: loss, gradient and metrics."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
from torch.testing import assert_close

from align.data.tree import Branch, Tree
from tests.invariants.test_dpo import moved, preferences, reference, stage, trainer
from tests.support.tiny import VOCAB, tiny
from tests.support.trainers import first_step


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("loss", "theirs_is_called"), [("sigmoid", "sigmoid"), ("hinge", "hinge"), ("ipo", "ipo")])
def test_step_equals_trl(tmp_path: Path, loss: str, theirs_is_called: str) -> None:
    """The same pairs, policy and reference. TRL's plain sigmoid takes no label smoothing, so that is 0."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="w2", pad_token="w0"
    )
    pairs = [_without_pad(tree) for tree in preferences(6, rejected=(1,))]
    start, policy = tiny("llama"), moved(tiny("llama"), scale=0.02)
    their_policy, their_reference = copy.deepcopy(policy), copy.deepcopy(start)
    for model in (their_policy, their_reference):
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
    config = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        beta=0.1,
        loss_type=[theirs_is_called],
        max_length=None,
        per_device_train_batch_size=6,
    )
    placeholder = Dataset.from_list([{"prompt": "w3 ", "chosen": "w4", "rejected": "w5"}])
    theirs = DPOTrainer(
        model=their_policy,
        ref_model=their_reference,
        args=config,
        train_dataset=placeholder,
        processing_class=tokenizer,
    )
    rows = [
        {
            "prompt_ids": t.trunk.tolist(),
            "chosen_ids": t.branches[0].ids.tolist(),
            "rejected_ids": t.branches[1].ids.tolist(),
        }
        for t in pairs
    ]
    their_policy.train()
    their_loss = theirs.compute_loss(their_policy, theirs.data_collator(rows))
    their_loss.backward()

    spec = stage(loss, train={"microbatch_tokens": 50}, **({"label_smoothing": 0.0} if loss == "sigmoid" else {}))
    run = trainer(tmp_path / "ours", pairs, spec, policy, reference(start, pairs, spec, tmp_path / "reference"))
    metrics, gradients = first_step(run)
    assert metrics["loss"] == pytest.approx(their_loss.item(), abs=1e-5)
    for name, parameter in their_policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-4
        scale = max(1.0, float(parameter.grad.abs().max()))
        assert_close(gradients[name] / scale, parameter.grad / scale, atol=1e-5, rtol=0)
    logged = theirs._metrics["train"]
    if loss != "ipo":  # TRL's rewards for IPO are length-normalised; ours are sums for every loss with a reference
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            assert metrics[key] == pytest.approx(float(np.mean(logged[key])), abs=1e-5)
    assert metrics["logps/chosen"] == pytest.approx(float(np.mean(logged["logps/chosen"])), abs=1e-3)


def _without_pad(tree: Tree) -> Tree:
    """Token 0 is the padding token of TRL's collator here: keep it out of the data."""
    branches = tuple(Branch(np.maximum(b.ids, 1), b.mask) for b in tree.branches)
    return Tree(tree.id, np.maximum(tree.trunk, 1), branches)
