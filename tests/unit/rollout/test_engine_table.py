"""The table of engines: each of them says all that others ask, and what it names is there."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from align.data.chat.encoder import Encoder
from align.errors import EnvironmentFault, InputError
from align.models.load import load_encoder, load_policy
from align.recipe.blocks.rollout import CHOICES, ENGINES, AutoRollout, Rollout, ScriptedRollout, VllmRollout
from align.recipe.reference_syntax import registered
from align.recipe.schema import Model
from align.rollout import engines
from align.rollout.engine import SampledPolicy, Sampling
from align.rollout.scripted import ScriptedEngine
from align.rollout.transformers import TransformersEngine
from tests.support.saved import save_tiny
from tests.support.scripted import write_script

REQUIRED: dict[str, dict[str, Any]] = {"scripted": {"script": "script.jsonl"}}


def engine(name: str) -> Rollout:
    return CHOICES[name].model_validate({"engine": name, **REQUIRED.get(name, {})})


@pytest.mark.parametrize("name", CHOICES)
def test_every_engine_has_all_of_it(name: str) -> None:
    rollout = engine(name)
    assert rollout.engine == name and (CHOICES[name].__doc__ or "").strip()
    opened = registered(rollout.opens)
    assert list(inspect.signature(opened).parameters) == ["rollout", "policy"]
    assert rollout.limits is None or list(inspect.signature(registered(rollout.limits)).parameters) == [
        "config",
        "device",
    ]
    for device in ("cpu", "cuda"):
        assert (rollout.precision(device) is None) != rollout.follows_policy
        parts = list(rollout.memory(10**6, device, 80e9))
        assert bool(parts) == rollout.holds_weights
        assert all(part.amount > 0 and part.name and part.how for part in parts)
    assert rollout.follows_policy or (not rollout.exact and not rollout.holds_weights)
    assert set(rollout.neutral) <= {key for kind in ENGINES.values() for key in kind.model_fields}
    package = rollout.package
    assert package is None or (package.title and package.hint and package.module and package.distributions)


def test_what_vllm_takes_and_how_precise_it_is() -> None:
    """The plan's numbers are those with which it is opened."""
    plain, own = VllmRollout(engine="vllm"), VllmRollout(engine="vllm", dtype="fp32", cache_gb=10.0)
    assert (plain.precision("cpu"), plain.precision("cuda"), own.precision("cuda")) == ("fp32", "bf16", "fp32")
    amounts = {
        (device, rollout.cache_gb): [part.amount for part in rollout.memory(100, device, 90e9)]
        for device in ("cpu", "cuda")
        for rollout in (plain, own)
    }
    assert amounts == {
        ("cpu", None): [400, 2e9],
        ("cpu", 10.0): [400, 10e9],
        ("cuda", None): [200, 30e9],
        ("cuda", 10.0): [400, 10e9],
    }
    assert [part.amount for part in plain.memory(100, "cuda", None)] == [200, 0]
    assert list(AutoRollout().memory(100, "cuda", 90e9)) == list(plain.memory(100, "cuda", 90e9))


@pytest.fixture
def model(tmp_path: Path) -> Model:
    write_script(tmp_path, ["Tea it is."])
    return save_tiny(tmp_path / "model")


@pytest.fixture
def encoder(model: Model) -> Encoder:
    return load_encoder(model)


def opened(rollout: Rollout, model: Model, encoder: Encoder, folder: Path, **options: Any) -> Any:
    given = {"max_length": 64, "cache": folder, "resolve": lambda text: folder / text, **options}
    return engines.open_engine(rollout, model, encoder, **given)


def test_each_name_opens_its_engine(model: Model, encoder: Encoder, tmp_path: Path) -> None:
    with opened(engine("scripted"), model, encoder, tmp_path) as found:
        assert isinstance(found, ScriptedEngine)
        (of_prompt,) = found.generate([[5, 6]], Sampling(20))
        assert encoder.decode(of_prompt[0].ids) == "Tea it is."
    live = load_policy(model)
    for shared in (None, live):
        with opened(engine("transformers"), model, encoder, tmp_path, live=shared) as found:
            assert isinstance(found, TransformersEngine)
            assert found.generate([[5, 6]], Sampling(3))[0][0].logprobs is not None


@pytest.mark.parametrize("name", ["vllm", "auto"])
def test_without_its_package_an_engine_is_refused_and_auto_takes_another(
    name: str, model: Model, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.recipe.blocks.rollout.find_spec", lambda name: None)
    if name == "auto":
        with opened(engine(name), model, encoder, tmp_path) as found:
            assert isinstance(found, TransformersEngine)
        assert engines.precision(engine(name)) == "fp32"
        return
    message = "rollout.engine: vllm needs vLLM, which is not installed; `align doctor` says how to install it"
    with pytest.raises(EnvironmentFault, match=message), opened(engine(name), model, encoder, tmp_path):
        pass


def test_positions_bound_what_follows_the_policy_and_nothing_else(encoder: Encoder, tmp_path: Path) -> None:
    write_script(tmp_path, ["Tea it is."])
    short = save_tiny(tmp_path / "short", "gpt2", n_positions=32)
    with opened(engine("scripted"), short, encoder, tmp_path):
        pass
    with (
        pytest.raises(InputError, match="prompt and answer: 64 tokens, the model has 32 positions"),
        opened(engine("transformers"), short, encoder, tmp_path),
    ):
        pass


def test_an_engine_is_closed_whatever_happens(
    model: Model, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    monkeypatch.setattr(ScriptedEngine, "close", lambda self: closed.append(self))

    @contextmanager
    def fails() -> Iterator[None]:
        with opened(engine("scripted"), model, encoder, tmp_path):
            raise ZeroDivisionError
        yield

    with pytest.raises(ZeroDivisionError), fails():
        pass
    assert len(closed) == 1


def test_what_opens_an_engine_gets_the_keys_and_the_policy(
    model: Model, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[Any] = []
    script = ScriptedEngine(tmp_path / "script.jsonl", encoder)
    monkeypatch.setattr(engines, "registered", lambda place: lambda *given: got.extend((place, *given)) or script)
    live = nn.Linear(1, 1)
    rollout = engine("scripted")
    assert isinstance(rollout, ScriptedRollout)
    with opened(rollout, model, encoder, tmp_path, live=live):
        pass
    place, keys, policy = got
    assert (place, keys) == ("align.rollout.scripted:opened", rollout)
    assert isinstance(policy, SampledPolicy)
    assert (policy.model, policy.encoder, policy.max_length, policy.live) == (model, encoder, 64, live)
