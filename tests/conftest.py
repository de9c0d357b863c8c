"""What every test runs under: one thread (or TEST_THREADS), no network, no telemetry, no GPU unless asked for, the same
seeds.

The environment is set before anything imports torch or a Hugging Face library: they read it at import.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator

import pytest

# Under nohup and some schedulers this signal is ignored, and so it would be in the processes that tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Two workers share two cores; results must not depend on how many there are
THREADS = os.environ.get("TEST_THREADS", "1")
os.environ.update(
    {
        "OMP_NUM_THREADS": THREADS,
        "MKL_NUM_THREADS": THREADS,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TORCH_COMPILE_DISABLE": "1",  # a machine without a C++ compiler runs the same tests
    }
)
# A cache of its own: no test may pass because of what the developer has downloaded, nor leave anything behind.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="align-tests-hf-")


def pytest_configure(config: pytest.Config) -> None:
    if "gpu" not in (config.getoption("markexpr") or "").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        skip = pytest.mark.skip(reason="needs a CUDA device: run with -m gpu")
        for item in items:
            if item.get_closest_marker("gpu"):  # the keywords hold the names of folders too
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_seeds() -> None:
    """Every test starts from the same random state, alone or in any order."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_module_of_another_test(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Modules that a test wrote into its folder and imported are forgotten, and so is the folder as a place to import
    from: the next test may write another module of the same name."""
    modules, places = set(sys.modules), sys.path.copy()
    yield
    sys.path[:] = places
    folder = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - modules:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
            del sys.modules[name]
