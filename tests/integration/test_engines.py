"""Rollout engines: the same promises from vLLM in this process, vLLM in its own, and transformers; and weights that
really arrive."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from align.data.chat.encoder import Encoder
from align.errors import EnvironmentFault, InputError, TrainingFault
from align.models.adapters import add_lora
from align.models.load import load_encoder, load_policy
from align.models.save import save_policy
from align.recipe.blocks.rollout import AutoRollout
from align.recipe.schema import Lora, Model
from align.rollout import sync
from align.rollout.engine import RolloutEngine, Sampling
from align.rollout.engines import open_engine
from align.rollout.process import ProcessEngine
from align.rollout.transformers import TransformersEngine
from align.rollout.vllm import VllmEngine, VllmSettings
from tests.support.saved import save_tiny
from tests.support.tokenizers import llama3

MARKS = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")]
SHAPE = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}  # vLLM's attention on a CPU wants heads of at least 32
PROMPTS = [list(range(10, 30)), [7, 8, 9], list(range(40, 75))]
DRAW = Sampling(max_new_tokens=12, n=3, seed=5)


def needs_vllm(test: Callable[..., None]) -> Callable[..., None]:
    for mark in MARKS:
        test = mark(test)
    return test


def settings(encoder: Encoder) -> VllmSettings:
    return VllmSettings(
        stop_ids=list(encoder.stop_ids),
        vocabulary=encoder.vocabulary,
        dtype="fp32",
        max_length=192,
        cache_bytes=10**8,
        max_sequences=16,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A Llama with a tied LM head, one embedding for each token."""
    return save_tiny(
        tmp_path_factory.mktemp("base"), tokenizer=llama3(), **SHAPE, vocab_size=len(llama3()), tie_word_embeddings=True
    )


@pytest.fixture(scope="module")
def vllm(base: Model) -> Iterator[VllmEngine]:
    engine = VllmEngine(Path(base.path), settings(load_encoder(base)))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def worker(base: Model) -> Iterator[ProcessEngine]:
    engine = ProcessEngine(Path(base.path), settings(load_encoder(base)))
    yield engine
    engine.close()


@pytest.fixture(params=[pytest.param("vllm", marks=MARKS), pytest.param("worker", marks=MARKS), "transformers"])
def engine(request: pytest.FixtureRequest, base: Model) -> RolloutEngine:
    """Every engine, with the base's weights."""
    if request.param == "transformers":
        return TransformersEngine(load_policy(base), load_encoder(base), max_length=192, shared=False)
    found: RolloutEngine = request.getfixturevalue(request.param)
    found.load_weights(sync.weights_of(load_policy(base), version=0))
    return found


def changed(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """Another step of training, so to say."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return model


def test_samples_follow_the_seed_and_differ(engine: RolloutEngine) -> None:
    """The same seed repeats, another one does not, and the samples of a prompt differ."""
    once, again = engine.generate(PROMPTS, DRAW), engine.generate(PROMPTS, DRAW)
    other = engine.generate(PROMPTS, Sampling(max_new_tokens=12, n=3, seed=6))
    assert [len(answers) for answers in once] == [3, 3, 3]
    assert once == again
    assert once != other
    assert all(len({c.ids for c in answers}) > 1 for answers in once)
    assert engine.generate([], DRAW) == []


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_trainers_under_the_sampling_temperature(
    engine: RolloutEngine, base: Model, temperature: float
) -> None:
    """Of the very ids that were sampled."""
    sampled = engine.generate(PROMPTS, Sampling(max_new_tokens=12, n=2, seed=1, temperature=temperature))
    expected = sync.policy_logprobs(load_policy(base), PROMPTS, sampled, temperature=temperature)
    found = [np.array(c.logprobs) for answers in sampled for c in answers]
    assert max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True)) < 1e-4


def test_what_was_sampled_before_has_no_say(engine: RolloutEngine) -> None:
    """Long prompts that begin alike, more than are read at a time: neither a warm cache nor an earlier call changes a
    draw."""
    shared = list(range(3, 99)) + list(range(3, 41))
    long = [[*shared, 100 + i] for i in range(24)]
    draw = Sampling(max_new_tokens=4, n=2, seed=9)
    once = engine.generate(long, draw)
    engine.generate([shared], draw)
    assert engine.generate(long, draw) == once


def test_greedy_is_the_likeliest_token(engine: RolloutEngine, base: Model) -> None:
    """Temperature 0 is defined, and the same everywhere."""
    (only,) = engine.generate([PROMPTS[0]], Sampling(max_new_tokens=6, temperature=0.0))
    model, path = load_policy(base), list(PROMPTS[0])
    for token in only[0].ids:
        assert int(model(torch.tensor([path]), use_cache=False).logits[0, -1].argmax()) == token
        path.append(token)


def test_an_answer_ends_with_a_stop_id_or_at_the_limit(engine: RolloutEngine, base: Model) -> None:
    """What ended by itself ends with a stop id, and nothing follows it."""
    stops = load_encoder(base).stop_ids
    many = engine.generate(PROMPTS, Sampling(max_new_tokens=60, n=16, seed=2, temperature=1.5))
    answers = [c for group in many for c in group]
    assert {c.finish_reason for c in answers} == {"stop", "length"}
    for c in answers:
        assert (c.ids[-1] in stops) == c.finished
        assert not set(c.ids[:-1]) & set(stops)
        assert c.finished or len(c.ids) == 60
        assert c.logprobs is not None and len(c.logprobs) == len(c.ids)


def test_a_prompt_without_room_is_refused(engine: RolloutEngine) -> None:
    """Said before anything is sampled."""
    with pytest.raises(InputError, match=r"prompt \d+ of \d+ has .* no room for"):
        engine.generate([list(range(5, 155))], Sampling(max_new_tokens=60))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_new_weights_arrive_and_are_proved(engine: RolloutEngine, base: Model, kind: str) -> None:
    """Three syncs in a row; log-probs are the new policy's to 1e-4, completions carry the version, greedy text
    changes with it."""
    if isinstance(engine, TransformersEngine) and kind == "lora":
        pytest.skip("shares the trained model")
    greedy = Sampling(max_new_tokens=12, temperature=0.0)
    before = engine.generate(PROMPTS, greedy)
    model: nn.Module = load_policy(base)
    if kind == "lora":
        model = add_lora(model, Lora(rank=4))  # type: ignore[arg-type]
    for version in (1, 2, 3):
        proof = sync.push(engine, changed(model, 0.1), version=version, canaries=PROMPTS)
        assert proof.version == version and proof.tokens >= 8 and proof.max_difference < 1e-4
    after = engine.generate(PROMPTS, greedy)
    assert {c.version for answers in after for c in answers} == {3}
    assert [a[0].ids for a in after] != [b[0].ids for b in before]


@pytest.mark.parametrize("which", ["vllm", "worker"])
@needs_vllm
def test_a_tensor_that_did_not_arrive_is_named(
    which: str, base: Model, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tied LM head trap: without a name of its own vLLM keeps the old one, and would sample from half a policy."""
    engine: RolloutEngine = request.getfixturevalue(which)
    sent = sync.policy_weights
    monkeypatch.setattr(sync, "policy_weights", lambda model: ((n, t) for n, t in sent(model) if n != "lm_head.weight"))
    with pytest.raises(TrainingFault, match=r"does not hold .*: lm_head\.weight \(off by"):
        sync.push(engine, changed(load_policy(base), 0.1), version=1, canaries=PROMPTS)


def test_an_engine_with_other_weights_is_found(engine: RolloutEngine, base: Model) -> None:
    """Canary log-probs differ, whatever the reason."""
    with pytest.raises(TrainingFault, match="does not sample from the trained weights"):
        sync.prove(engine, changed(load_policy(base), 0.1), version=0, canaries=PROMPTS)
    with pytest.raises(TrainingFault, match="version 0 of the weights, version 7 was pushed"):
        sync.prove(engine, load_policy(base), version=7, canaries=PROMPTS)


@needs_vllm
def test_the_trainers_process_is_left_as_it_was(vllm: VllmEngine, base: Model) -> None:
    """Random state, threads, process groups and compiler are what they were, around every call."""
    threads, setter, compiler = torch.get_num_threads(), torch.set_num_threads, torch._dynamo.config.disable
    states = []
    for work in (False, True):
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)
        if work:
            vllm.generate(PROMPTS, DRAW)
            sync.push(vllm, load_policy(base), version=0, canaries=PROMPTS)
        states.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert states[0] == states[1]
    assert torch.get_num_threads() == threads and torch.set_num_threads is setter
    assert torch._dynamo.config.disable == compiler
    assert not torch.distributed.is_initialized()


@needs_vllm
def test_there_is_one_vllm_in_a_process(vllm: VllmEngine, base: Model) -> None:
    """Two would share vLLM's process groups: the second one is refused, and opened in a process of its own."""
    encoder = load_encoder(base)
    with pytest.raises(EnvironmentFault, match="already"):
        VllmEngine(Path(base.path), settings(encoder))
    assert vllm.generate(PROMPTS, DRAW)


@needs_vllm
def test_a_worker_that_dies_is_an_error_with_its_reason(base: Model) -> None:
    """Killed between two requests."""
    engine = ProcessEngine(Path(base.path), settings(load_encoder(base)))
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EnvironmentFault, match=r"worker died \(killed by signal 9\)"):
        engine.generate(PROMPTS, DRAW)
    engine.close()


@needs_vllm
def test_a_model_that_vllm_does_not_know_is_served_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Glm runs on transformers' classes, which vLLM changes: the trainer's own forward must go on working."""
    glm = save_tiny(
        tmp_path / "glm",
        "glm",
        tokenizer=llama3(),
        **SHAPE,
        head_dim=32,
        vocab_size=len(llama3()),
        tie_word_embeddings=False,
    )
    model, encoder = load_policy(glm), load_encoder(glm)
    with open_engine(
        AutoRollout(cache_gb=0.1), glm, encoder, max_length=128, cache=tmp_path, resolve=Path, live=model
    ) as engine:
        assert isinstance(engine, ProcessEngine)
        assert sync.prove(engine, model, version=0, canaries=PROMPTS).max_difference < 1e-4
        assert sync.push(engine, changed(model), version=1, canaries=PROMPTS).max_difference < 1e-4
        model.set_attn_implementation("sdpa")
        model(torch.tensor([PROMPTS[0]])).logits.sum().backward()
        pid = engine.pid
    assert not Path(f"/proc/{pid}").exists()


@needs_vllm
def test_an_adapters_folder_is_sampled_with_its_adapter(tmp_path: Path, base: Model) -> None:
    """A saved LoRA policy: vLLM loads its base, and gets the rest."""
    policy = changed(add_lora(load_policy(base), Lora(rank=4)), 0.1)
    encoder = load_encoder(base)
    save_policy(policy, encoder, tmp_path / "adapter", base=base)
    saved = Model(path=str(tmp_path / "adapter"))
    with open_engine(AutoRollout(cache_gb=0.1), saved, encoder, max_length=128, cache=tmp_path, resolve=Path) as engine:
        assert sync.prove(engine, policy, version=0, canaries=PROMPTS).max_difference < 1e-4


ORPHAN = """
import sys, time
from pathlib import Path
from align.rollout.process import ProcessEngine
from align.rollout.vllm import VllmSettings
settings = VllmSettings(stop_ids=[2], vocabulary=400, dtype="fp32", max_length=64, cache_bytes=10**8, max_sequences=4)
engine = ProcessEngine(Path(sys.argv[1]), settings)
print(engine.pid, flush=True)
time.sleep(600)
"""


@needs_vllm
def test_a_worker_dies_with_its_parent(base: Model) -> None:
    """Also when the parent was killed and could clean nothing up."""
    with subprocess.Popen([sys.executable, "-c", ORPHAN, base.path], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < deadline, "the worker outlived its parent by 10 s"
        time.sleep(0.1)


def test_weights_are_all_there_under_transformers_names(base: Model) -> None:
    """Full or with an adapter: the names of the model's own state, the tied head included, and the merged values."""
    model = load_policy(base)
    plain = dict(sync.policy_weights(model))
    assert set(plain) == set(model.state_dict())
    policy = changed(add_lora(copy.deepcopy(model), Lora(rank=4)), 0.1)
    merged = dict(sync.policy_weights(policy))
    assert set(merged) == set(plain)
    layer = policy.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    expected = layer.base_layer.weight + layer.get_delta_weight("default")  # type: ignore[union-attr,operator]
    torch.testing.assert_close(merged["model.layers.0.self_attn.q_proj.weight"], expected.detach())
