"""vLLM beside a trainer on the same GPU: which GPU it takes, how much memory it may count on, and what it must not end.
The GPU is made up; what vLLM makes of its memory is vLLM's own check."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from align.errors import InputError
from align.rollout import vllm
from align.rollout.open_vllm import cache_beside
from align.rollout.process import workers_environment
from align.rollout.vllm import VllmEngine, VllmSettings

GB = 10**9


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("held", [0, 27 * GB, 70 * GB])
def test_vllm_starts_beside_a_trainer(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    """A trainer holds some of 80 GB. vLLM's default share is refused beside it; ours is not."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.config import CacheConfig
    from vllm.v1.worker.utils import request_memory

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * GB - held, 80 * GB))
    share = vllm._free_share()
    monkeypatch.undo()
    snapshot = SimpleNamespace(total_memory=80 * GB, free_memory=80 * GB - held, device_="cuda:0")

    def asks(**share: float) -> int:
        return int(request_memory(snapshot, CacheConfig(kv_cache_memory_bytes=8 * GB, **share)))

    if held:
        with pytest.raises(ValueError, match="Free memory"):
            asks()
    assert 0.9 * (80 * GB - held) < asks(gpu_memory_utilization=share) < 80 * GB - held


@pytest.mark.parametrize(
    ("visible", "current", "seen"),
    [(None, 0, "0"), (None, 5, "5"), ("2,3", 1, "3"), ("GPU-aa, GPU-bb", 1, "GPU-bb")],
)
def test_a_worker_sees_the_gpu_of_its_trainer_alone(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, current: int, seen: str
) -> None:
    """Else the engines of all processes are on the first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    given = {"HOME": "/root"} | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
    assert workers_environment(given) == {"HOME": "/root", "CUDA_VISIBLE_DEVICES": seen}


def test_a_worker_does_not_know_of_its_trainers_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM joins a group of its own. With torchrun's store it would wait for one that nobody opened."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x"}
    assert workers_environment({"PATH": os.defpath, **place, **torchrun}) == {"PATH": os.defpath}


def test_an_engine_inside_one_of_several_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end would be the end of the trainer's process groups."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    settings = VllmSettings(stop_ids=[2], vocabulary=9, dtype="fp32", max_length=9, cache_bytes=9, max_sequences=9)
    with pytest.raises(InputError, match="own_process: false, and the run has several processes; leave own_process"):
        VllmEngine(tmp_path, settings)
    assert not VllmEngine.in_use


@pytest.mark.parametrize(
    ("free", "cache"),
    [(80, 26), (53, 26), (45, 20), (21, 2.6), (5, 2.6)],
)
def test_the_cache_leaves_room_for_what_else_is_on_the_gpu(free: float, cache: float) -> None:
    """A third of 80 GB is wanted, and the engine's weights take 20 GB of what is free."""
    assert cache_beside(26 * GB, int(free * GB), 20 * GB) == pytest.approx(cache * GB)
