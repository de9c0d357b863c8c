"""The benchmarks drive our trainers by their Python interface, which moves: each of them takes its steps here on a tiny
model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import benchmarks.dpo
import benchmarks.reward
import benchmarks.sft
from align.data.chat.encoder import Encoder
from benchmarks import model, ours
from benchmarks.harness import Benchmark, Work
from benchmarks.measure import Recorder
from tests.support.tiny import random_trees, tiny
from tests.support.tokenizers import chatml


@pytest.mark.parametrize(
    ("benchmark", "branches"),
    [(benchmarks.sft.BENCHMARKS[0], 1), (benchmarks.dpo.BENCHMARKS[0], 3), (benchmarks.reward.BENCHMARKS[0], 3)],
    ids=lambda value: value.name if isinstance(value, Benchmark) else "",
)
def test_our_contender_takes_every_step(
    benchmark: Benchmark, branches: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for module in (model, ours):
        monkeypatch.setattr(module, "policy", lambda: tiny("llama"))
        monkeypatch.setattr(module, "encoder", lambda: Encoder(chatml()))
    work = Work(random_trees(np.random.default_rng(0), [branches] * 4), [[0, 1], [2, 3]], "made here")
    contender = next(one for one in benchmark.contenders if one.name == "ours")
    recorder = Recorder()
    contender.run(work, contender.settings[0], recorder)
    assert len(recorder.losses) == len(work.steps) and np.isfinite(recorder.losses).all()
