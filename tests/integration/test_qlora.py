"""QLoRA: adapters on a base whose linear layers are kept in 4 bits. Runs on bitsandbytes' CPU backend here, the same
code on a GPU."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from align.batching.tree import pack
from align.errors import EnvironmentFault
from align.models.adapters import add_lora
from align.models.compute.forward import batch_logprobs
from align.models.load import load_encoder, load_policy
from align.models.scalar.heads import ScalarModel, ScoreStats, load_scalar, save_scalar, score_trees
from align.recipe.schema import Lora, Model
from align.stages.reward.run import build_reward
from tests.invariants.test_dpo import preferences, stage, trainer
from tests.invariants.test_reward import stage as reward_stage
from tests.invariants.test_reward import trainer as reward_trainer
from tests.support.saved import rows
from tests.support.tiny import tiny
from tests.support.tokenizers import chatml
from tests.support.trainers import first_step

LORA = Lora(rank=4, quantize="nf4")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama", hidden_size=64, intermediate_size=128, vocab_size=97).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def quantised(folder: Path) -> torch.nn.Module:
    return load_policy(Model(path=str(folder)), quantize="nf4")


def test_the_base_is_in_four_bits(folder: Path) -> None:
    """Linear layers are packed; log-probs stay near the full ones, and are not equal (or nothing was quantised)."""
    pytest.importorskip("bitsandbytes")
    full, packed = load_policy(Model(path=str(folder))), quantised(folder)
    weights = {n: p.dtype for n, p in packed.named_parameters() if n.endswith("_proj.weight")}
    assert set(weights.values()) == {torch.uint8}
    assert not any(getattr(layer, "support_avx512bf16_for_cpu", False) for layer in packed.modules()), (
        "that kernel has no gradient"
    )
    (batch,) = pack(preferences(3), microbatch_tokens=10_000)
    with torch.no_grad():
        difference = (batch_logprobs(full, batch) - batch_logprobs(packed, batch)).abs()
    assert 1e-4 < difference.mean() < 1.0


def test_dpo_starts_at_ln_2_and_trains_only_adapters(folder: Path, tmp_path: Path) -> None:
    """The reference is the quantised starting policy, every adapter matrix B gets a gradient, and the base
    none."""
    pytest.importorskip("bitsandbytes")
    net = add_lora(quantised(folder), LORA)  # type: ignore[arg-type]
    run = trainer(tmp_path / "run", preferences(6), stage("sigmoid", label_smoothing=0.0), net)
    metrics, gradients = first_step(run)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert all("lora_" in name for name in run.parameters)
    ups = {name: g for name, g in gradients.items() if "lora_B" in name}
    assert len(ups) == 14 and all(g.abs().max() > 0 for g in ups.values())


def test_missing_package_is_one_clear_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bitsandbytes: exit code 3, the package named, and what to do."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(EnvironmentFault, match="bitsandbytes") as caught:
        quantised(folder)
    assert caught.value.exit_code == 3


def test_a_reward_model_on_four_bits(folder: Path, tmp_path: Path) -> None:
    """Adapters and head are trained, the packed base is not; saved and loaded on four bits, the scores are the
    same."""
    pytest.importorskip("bitsandbytes")
    tokenizer = chatml()
    tiny("llama", hidden_size=64, intermediate_size=128, vocab_size=rows(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    base = Model(path=str(folder))
    net = build_reward(quantised(folder), LORA, seed=1)
    run = reward_trainer(tmp_path / "run", preferences(6), reward_stage(), net)
    metrics, gradients = first_step(run)
    assert abs(metrics["loss"] - math.log(2)) < 2 and "head.weight" in gradients
    assert all("lora_" in name or name == "head.weight" for name in run.parameters)
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            if "lora_B" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    assert isinstance(net, ScalarModel)
    save_scalar(net.eval(), load_encoder(base), tmp_path / "rm", base=base, scores=ScoreStats(0.0, 1.0, 1))
    again = load_scalar(Model(path=str(tmp_path / "rm")), quantize="nf4")
    settings: dict[str, Any] = {"microbatch_tokens": 1000, "layout": "tree", "pad_id": 0}
    for one, other in zip(
        score_trees(net, preferences(3), **settings), score_trees(again, preferences(3), **settings), strict=True
    ):
        assert one == pytest.approx(other, abs=1e-5)
