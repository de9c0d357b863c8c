"""The check for a GPU, on a CPU with tiny shapes: its parts run, its counts are right, and it goes on where it was
ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from align.batching.tree import pack
from benchmarks.gpu import counts, page, parts, peers, steps
from benchmarks.harness import GPU
from tests.support.root import ROOT

ON_CPU = ["--device", "cpu", "--tiny"]


@pytest.fixture(autouse=True)
def in_scratch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks", "gpu", *arguments]


@pytest.mark.parametrize("model", parts.MODELS)
@pytest.mark.parametrize("name", ["sft", "dpo-3", "reward", "ppo"])
def test_a_step_of_each_kind_is_measured(model: str, name: str) -> None:
    """Every number that the page shows is there and positive, and the loss falls on examples that come again."""
    _, kind, rejected = parts.STEPS[name]
    found = steps.measured(kind, model, rejected, tiny=True)
    assert len(found["seconds"]) == steps.TIMED and min(found["seconds"]) > 0
    assert found["tokens"] >= (steps.TINY.step if kind != "ppo" else 1)
    assert found["flops"] > 0 and found["peak_bytes"] > 0 and found["plan_bytes"] > 0
    assert sum(found["kernel_shares"].values()) == pytest.approx(1) and found["kernel_shares"]["matmul"] > 0
    if kind != "ppo":
        assert found["losses"] == sorted(found["losses"], reverse=True)
    json.dumps(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "rejected"), [("sft", 0), ("dpo", 3)])
def test_trl_does_the_same_work(kind: str, rejected: int) -> None:
    """All losses of TRL's steps are those of ours."""
    own, theirs = steps.measured(kind, "llama", rejected, tiny=True), peers.trl(kind, rejected, tiny=True)
    assert theirs["losses"] == pytest.approx(own["losses"], abs=1e-5)
    assert theirs["tokens"] == own["tokens"]


def test_operations_are_those_that_torch_counts() -> None:
    """Forward and backward of all weights, for every product but those of attention, which torch counts for all pairs
    of tokens, and the LM head's, which our log-probs compute again."""
    from align.models.compute.forward import hidden_states

    chosen = steps.setting("llama", tiny=True)
    model = steps.language_model(chosen)
    (batch,) = pack(steps.work(steps.TINY, 3, 1).trees[:2], microbatch_tokens=2048)
    with FlopCounterMode(display=False) as counter:
        hidden_states(model, batch).sum().backward()
    found = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in found.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    no_attention = counts.model_flops(chosen.shape, None, [batch], lm_head=False) - attention_flops(chosen, batch)
    assert products == no_attention
    with_head = counts.model_flops(chosen.shape, None, [batch], lm_head=True) - attention_flops(chosen, batch)
    assert with_head - no_attention == 6 * chosen.shape.vocab * chosen.shape.hidden * batch.num_targets


def attention_flops(chosen: steps.Setting, batch: Any) -> float:
    """From the mask itself: every pair of a token and one that it sees, in two products forward and four backward."""
    shape = chosen.shape
    seen = sum(int(position) + 1 for position in real_positions(batch))  # a token sees its path, itself included
    return 12 * shape.layers * shape.heads * shape.head_dim * seen


def real_positions(batch: Any) -> torch.Tensor:
    rows = [batch.position_ids[r, span.start : span.end] for r, row in enumerate(batch.rows) for span in row]
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", "matmul"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "matmul"),
        ("triton_tem_fused_flex_attention_backward_zeros_0", "attention"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(...)>", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...FusedAdamMathFunctor...>",
            "elementwise",
        ),
        ("aten::mm", "matmul"),
        ("aten::mul", "elementwise"),
        ("void at::native::(anonymous namespace)::compute_grad_weight", "other"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert counts.kernel_kind(name) == kind


def test_without_a_gpu_it_says_so_and_ends_with_3() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(command(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("no GPU here")


def quick(monkeypatch: pytest.MonkeyPatch, out: Path, outcomes: dict[str, Any]) -> tuple[int, list[str]]:
    """Run the check with made-up outcomes of its parts; the exit code and which parts were run."""
    ran = []

    def outcome(part: parts.Part, device: str, tiny: bool, seconds: float) -> dict[str, Any]:
        ran.append(part.name)
        if part.name == "machine":
            return {"machine": {"gpu": None}, "versions": {}}
        return dict(outcomes.get(part.name, {"seconds": [1.0]}))

    monkeypatch.setattr(parts, "in_own_process", outcome)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return parts.main([*ON_CPU, "--out", str(out)]), ran[1:]


def test_a_failing_part_leaves_the_others_and_is_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    code, ran = quick(monkeypatch, out, {"llama-sft": {"error": "out of memory"}, "vllm": {"skipped": "needs vllm"}})
    kept = json.loads(out.read_text())["parts"]
    assert code == 1 and ran == list(parts.PARTS) and kept.keys() == parts.PARTS.keys()
    assert kept["llama-sft"]["error"] == "out of memory" and kept["glm-sft"]["seconds"] == [1.0]
    code, ran = quick(monkeypatch, out, {})
    assert code == 0 and ran == ["llama-sft", "vllm"]
    assert quick(monkeypatch, out, {}) == (0, [])


def test_what_the_time_does_not_reach_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A part that the end of the call cut off is no failed part."""
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(parts, "BUDGET", 30.0)
    code, ran = quick(monkeypatch, out, {"llama-sft": {"error": "slow", "timed_out": True}})
    assert code == 1 and ran == ["tests", "llama-sft"] and list(json.loads(out.read_text())["parts"]) == ["tests"]
    monkeypatch.setattr(parts, "BUDGET", 465.0)
    code, ran = quick(monkeypatch, out, {})
    assert code == 0 and ran == [name for name in parts.PARTS if name != "tests"]


def test_results_of_another_machine_are_not_added_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    quick(monkeypatch, out, {})
    kept = json.loads(out.read_text())
    out.write_text(json.dumps({**kept, "machine": {"gpu": "another"}}))
    capsys.readouterr()
    assert quick(monkeypatch, out, {})[0] == 2
    assert "another machine" in capsys.readouterr().err
    out.write_text("{")
    assert quick(monkeypatch, out, {})[0] == 2


@pytest.mark.slow
def test_a_part_killed_in_the_middle_is_run_again(tmp_path: Path) -> None:
    """The first call is killed inside its second part; the second call keeps the first part and goes on."""
    out = tmp_path / "gpu.json"
    call = command("llama-sft", "llama-reward", *ON_CPU, "--out", str(out))
    first = subprocess.Popen(call, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 100
    while not (out.exists() and "llama-sft" in out.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    assert first.wait(20) == 143
    before = json.loads(out.read_text())["parts"]
    assert list(before) == ["llama-sft"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    after = json.loads(out.read_text())["parts"]
    assert done.returncode == 0 and after.keys() == {"llama-sft", "llama-reward"}
    assert after["llama-sft"] == before["llama-sft"] and "llama-sft" not in done.stdout


@pytest.mark.slow
@pytest.mark.vllm
def test_the_parts_beside_our_trainers_run(tmp_path: Path) -> None:
    """The tests that need a GPU are skipped on a CPU; vLLM samples with the trainer's weights."""
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        command("tests", "vllm", *ON_CPU, "--out", str(out)), cwd=ROOT, capture_output=True, text=True
    )
    kept = json.loads(out.read_text())["parts"]
    assert done.returncode == 0, kept
    assert kept["tests"]["tests_passed"] == 0 and kept["tests"]["tests_skipped"] > 0
    assert kept["vllm"]["sampled_tokens"] > 0 and kept["vllm"]["largest_logprob_difference"] < 1e-3


@pytest.mark.parametrize("run", ["raises", "kills itself", "sleeps", "lacks a package"])
def test_the_process_of_a_part(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a part's process ends, there is a result with a text that says how."""
    code = {
        "raises": "raise RuntimeError('CUDA out of memory')",
        "kills itself": "import os; os.kill(os.getpid(), 9)",
        "sleeps": "import time; time.sleep(60)",
        "lacks a package": "import a_package_that_is_nowhere",
    }[run]
    (tmp_path / "sitecustomize.py").write_text(
        "import benchmarks.gpu.parts as parts\n"
        f"def run(tiny):\n    {code}\n"
        "parts.PARTS['made'] = parts.Part('made', 'made here', run)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    found = parts.in_own_process(parts.Part("made", "made here", dict), "cpu", True, 20.0 if run != "sleeps" else 3.0)
    wanted = {
        "raises": ("error", "RuntimeError: CUDA out of memory"),
        "kills itself": ("error", "ended with code -9"),
        "sleeps": ("error", "ended after its limit of 3 seconds"),
        "lacks a package": ("skipped", "needs a_package_that_is_nowhere, not installed"),
    }[run]
    assert found[wanted[0]].strip().endswith(wanted[1]) and str(ROOT) not in found[wanted[0]]


def test_the_page_is_that_of_the_results() -> None:
    """Without results it says so; with some it was made from them."""
    results = json.loads(GPU.read_text()) if GPU.exists() else None
    assert page.GPU_PAGE.read_text() == page.page(results)
    assert ("No GPU was measured yet." in page.GPU_PAGE.read_text()) == (results is None)


def made_up(gpu: str | None, tiny: bool = False) -> dict[str, Any]:
    step = {"seconds": [1.0, 3.0, 2.0], "tokens_per_second": 1000.0, "flops": 989e12, "peak_bytes": 2e9}
    step |= {"plan_bytes": 3e9, "kernel_shares": {"matmul": 0.75, "other": 0.25}}
    kept = {"llama-sft": step, "vllm": {"skipped": "needs vllm, not installed"}, "glm-ppo": {"error": "a\nno memory"}}
    return {"machine": {"gpu": gpu}, "versions": {"torch": "2"}, "date": "2000-01-01", "tiny": tiny, "parts": kept}


def test_the_page_shows_what_was_measured_and_what_was_not() -> None:
    """989 TFLOP in 2 seconds are half of an H200's peak; an unknown device has no utilisation."""
    known, unknown = page.page(made_up("NVIDIA H200")), page.page(made_up("A device of tomorrow"))
    row = "| SFT | 1000 | 2.00 | {} | 2.0 GB | 3.0 GB | 75% / 0% / 0% / 0% / 25% |"
    assert row.format("50%") in known and row.format("") in unknown
    assert "989 TFLOP/s" in known and "peak is not known" in unknown
    assert "skipped, needs vllm" in known and "failed: `no memory`" in known and "Llama: PPO: not reached" in known
    for wrong in (made_up(None), made_up("NVIDIA H200", tiny=True)):
        with pytest.raises(ValueError, match="none of a GPU"):
            page.page(wrong)


def test_cpu_without_tiny_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--device", "cpu"], ["no-such-part"]):
        with pytest.raises(SystemExit) as ended:
            parts.main(arguments)
        assert ended.value.code == 2
