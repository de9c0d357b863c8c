"""QLoRA: adapters on a base whose linear layers are kept in 4 bits. Runs on bitsandbytes' CPU backend here, the same code on a GPU."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from align.batching.tree import pack
from align.errors import EnvironmentFault
from align.models.adapters import add_lora
from align.models.forward import batch_logprobs
from align.models.load import load_policy
from align.recipe.schema import Lora, Model
from tests.invariants.test_dpo import first_step, preferences, stage, trainer
from tests.tiny import tiny

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
    (batch,) = pack(preferences(3), microbatch_tokens=10_000)
    with torch.no_grad():
        difference = (batch_logprobs(full, batch) - batch_logprobs(packed, batch)).abs()
    assert 1e-4 < difference.mean() < 1.0


def test_dpo_starts_at_ln_2_and_trains_only_adapters(folder: Path, tmp_path: Path) -> None:
    """C36, C64: the reference is the quantised starting policy, every adapter matrix B gets a gradient, and the base none."""
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
