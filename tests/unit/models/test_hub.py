"""Hub models: local first, and quick to say that they cannot be had."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.errors import EnvironmentFault, InputError
from align.models.adapters import add_lora
from align.models.files import hub
from align.models.files.identity import model_digest
from align.models.load import load_encoder, load_policy
from align.models.save import save_policy
from align.recipe.schema import Model
from tests.support.saved import LORA, save_tiny
from tests.support.tokenizers import template

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(hub_cache: Path, name: str = "some/model") -> Path:
    """A hub model in the cache, as the hub's client lays it out; returns its snapshot folder."""
    root = hub_cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    save_tiny(root / "snapshots" / COMMIT)
    return root / "snapshots" / COMMIT


def test_a_cached_hub_model_needs_no_network(hub_cache: Path) -> None:
    cached(hub_cache)
    policy = load_policy(Model(path="some/model"))
    assert policy.name_or_path == "some/model"
    assert load_encoder(Model(path="some/model")).template == template("chatml")
    assert model_digest("some/model") == f"hub:some/model@{COMMIT}"
    load_policy(Model(path="some/model", revision=COMMIT))


def test_an_adapter_of_a_hub_model(hub_cache: Path, tmp_path: Path) -> None:
    """Its base is the id and the commit, wherever the files lie."""
    cached(hub_cache)
    base = Model(path="some/model")
    save_policy(add_lora(load_policy(base), LORA), load_encoder(base), tmp_path / "adapter", base=base)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("some/model", COMMIT)
    load_policy(Model(path=str(tmp_path / "adapter")))


@pytest.mark.parametrize("present", ["nothing", "branch", "tokenizer"])
def test_offline_fails_at_once_and_names_the_model(hub_cache: Path, present: str) -> None:
    """A snapshot that another program left with the tokenizer only is not a model either."""
    if present != "nothing":
        snapshot = cached(hub_cache)
        if present == "branch":
            shutil.rmtree(snapshot)
        else:
            (snapshot / "model.safetensors").unlink()
    start = time.monotonic()
    with pytest.raises(EnvironmentFault, match="some/model: not on this machine, and the network is switched off"):
        load_policy(Model(path="some/model"))
    assert time.monotonic() - start < 2


@pytest.fixture
def silent_server() -> Iterator[int]:
    """A server that accepts connections and never answers: a network that swallows everything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        open_ones: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    open_ones.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        for connection in open_ones:
            connection.close()
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("reachable", [False, True])
def test_a_dead_network_fails_within_seconds(tmp_path: Path, silent_server: int, reachable: bool) -> None:
    """Neither a refused connection nor a silent server may make the user wait for minutes of retries."""
    port = silent_server if reachable else 9  # nobody listens there
    script = """
import time
from align.errors import EnvironmentFault
from align.models.files import hub
hub.PATIENCE = 1.0
start = time.monotonic()
try:
    hub.local_snapshot("some/model", None)
except EnvironmentFault as error:
    print(f"{time.monotonic() - start:.1f} {error}")
"""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    seconds, _, message = done.stdout.partition(" ")
    assert message.startswith("some/model: not on this machine, and the hub cannot be reached ("), done
    assert float(seconds) < 5


def test_names_that_cannot_be_hub_ids() -> None:
    with pytest.raises(InputError, match="is neither a path that exists nor a hub id"):
        hub.local_snapshot("some model/with spaces", None)


def test_checking_a_model_folder_needs_no_torch() -> None:
    """`align check` looks at local models in under 2 s."""
    script = (
        "import sys, align.models.files.identity, align.models.files.gguf; print({'torch', 'transformers', 'peft'} &"
        " set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )
