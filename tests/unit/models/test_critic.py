"""A policy and its value model on one base: neither moves the other, and the value model can be saved, loaded and taken
over."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from align.batching.batch import Batch
from align.batching.tree import build
from align.models.adapters import START, TRAINED, VALUE, adapter_off, add_lora, trainable_parameters
from align.models.compute.forward import batch_logprobs
from align.models.load import load_encoder, load_policy
from align.models.scalar.critic import ActorCritic, actor_critic
from align.models.scalar.heads import ScalarModel, ScoreStats, branch_scores, load_scalar, token_values
from align.recipe.schema import Lora, Model
from tests.support.saved import save_tiny
from tests.support.tiny import gradients, random_trees, tiny

LORA = Lora(rank=3, alpha=6)
STATS = ScoreStats(0.0, 1.0, 1)


def move(model: nn.Module, names: tuple[str, ...] = (), scale: float = 0.2, seed: int = 1) -> nn.Module:
    """Change parameters, those with one of ``names`` in their own name, or all that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names) if names else parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def batch() -> Batch:
    trees = random_trees(np.random.default_rng(2), [2, 1, 3])
    return build(trees, [0, 1, 2], layout="tree")


def backbone(**changes: Any) -> Any:
    """The transformer of the tiny model, without its LM head."""
    return tiny("llama", **changes).base_model


def with_start(model: Any) -> Any:
    """A policy as an earlier LoRA stage left it."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"])
    peft = move(get_peft_model(model, config, adapter_name=START), (START,))
    return peft.requires_grad_(False)


def reward_adapter(base: Any, modules: tuple[str, ...] = ("q_proj", "up_proj")) -> ScalarModel:
    """A reward model as a LoRA stage left it: one adapter of its own on ``base``."""
    config = LoraConfig(
        task_type="FEATURE_EXTRACTION", r=2, lora_alpha=6, target_modules=list(modules), lora_dropout=0.1
    )
    peft: Any = move(get_peft_model(base, config, adapter_name=START), (START,))
    return ScalarModel(peft.requires_grad_(False)).eval()


def values(models: ActorCritic, one: Batch) -> Tensor:
    assert models.value is not None
    models.use("value")
    with torch.no_grad():
        found = token_values(models.value, one)
    models.use("policy")
    return found


@torch.no_grad()
def logprobs(models: ActorCritic, one: Batch) -> Tensor:
    models.use("policy")
    return batch_logprobs(models.policy, one)


@pytest.mark.parametrize("started", [False, True], ids=["lora", "lora after lora"])
def test_neither_moves_the_other(started: bool) -> None:
    """With one base the policy's log-probs depend on its own adapter alone, the values on theirs, the reference on
    neither."""
    net = with_start(tiny("llama")) if started else tiny("llama")
    one = batch()
    with torch.no_grad():
        reference = batch_logprobs(net, one)
    models = actor_critic(add_lora(net, LORA), None, LORA).eval()
    assert models.shared and torch.equal(logprobs(models, one), reference)
    assert float(values(models, one).abs().max()) == 0, "nothing is known yet"
    move(models, (f".{TRAINED}.",))
    moved = logprobs(models, one)
    assert not torch.allclose(moved, reference, atol=1e-3)
    assert float(values(models, one).abs().max()) == 0
    move(models, (f".{VALUE}.", "head"), seed=2)
    assert torch.equal(logprobs(models, one), moved)
    assert float(values(models, one).abs().max()) > 0.1
    models.use("policy")
    with adapter_off(models.policy), torch.no_grad():
        assert torch.equal(batch_logprobs(models.policy, one), reference)
    assert torch.equal(logprobs(models, one), moved)


@pytest.mark.parametrize("started", [False, True])
def test_what_is_trained(started: bool) -> None:
    """The two adapters and the head, apart, and nothing of the base or of an earlier adapter."""
    net = with_start(tiny("llama")) if started else tiny("llama")
    models = actor_critic(add_lora(net, LORA), None, LORA)
    parts = models.trainable()
    assert set(parts) == {"policy", "value"}
    assert all(f".{TRAINED}." in name for name in parts["policy"])
    assert all(f".{VALUE}." in name or name == "value.head.weight" for name in parts["value"])
    assert parts["policy"].keys() | parts["value"].keys() == trainable_parameters(models).keys()
    per_adapter = sum(p.numel() for p in parts["policy"].values())
    assert sum(p.numel() for p in parts["value"].values()) == per_adapter + 32


def test_two_whole_models() -> None:
    """Without adapters the value model is a copy without an LM head: other tensors, all trained, values 0."""
    net = tiny("llama", tie_word_embeddings=False)
    models = actor_critic(net, None, None).eval()
    parts = models.trainable()
    assert not models.shared and not any("lm_head" in name for name in parts["value"])
    pointers = {p.data_ptr() for p in parts["policy"].values()}
    assert not pointers & {p.data_ptr() for p in parts["value"].values()}
    one = batch()
    before = logprobs(models, one)
    move(models, ("value.",))
    assert torch.equal(logprobs(models, one), before) and float(values(models, one).abs().max()) > 0.1


def test_gradient_checkpointing_finds_the_right_adapters() -> None:
    """The backward pass of a checkpointed forward pass runs the layers again: with the value model's adapters for the
    value loss."""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(5)
        models = actor_critic(add_lora(with_start(tiny("llama")), LORA), None, LORA)
        move(models)
        models.train()
        if checkpointing:
            models.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert models.value is not None
        models.use("policy")
        policy = gradients(models, batch_logprobs(models.policy, batch()).sum())
        models.use("value")
        value = gradients(models, token_values(models.value, batch()).square().sum())
        found.append((policy, value))
    for plain, again in zip(*found, strict=True):
        for name, gradient in plain.items():
            assert_close(again[name], gradient, atol=1e-5, rtol=1e-4)
    policy, value = found[0]
    assert all(float(g.abs().max()) == 0 for name, g in policy.items() if VALUE in name or "head" in name)
    assert all(float(g.abs().max()) == 0 for name, g in value.items() if f".{TRAINED}." in name)
    assert any(float(g.abs().max()) > 0 for name, g in value.items() if VALUE in name)


@pytest.mark.parametrize("started", [False, True])
def test_a_reward_adapter_moves_onto_the_policys_base(started: bool) -> None:
    """A reward model that is an adapter of the same base costs no second base, and says what it said; dropout is
    off."""
    one = batch()
    reward = reward_adapter(backbone())
    with torch.no_grad():
        expected = token_values(reward, one)
    net = with_start(tiny("llama")) if started else tiny("llama")
    with torch.no_grad():
        before = batch_logprobs(net, one)
    models = actor_critic(add_lora(net, LORA), reward, LORA)
    assert models.shared
    assert torch.equal(logprobs(models.eval(), one), before)
    assert_close(values(models, one), expected, atol=1e-6, rtol=0)
    assert_close(values(models.train(), one), expected, atol=1e-6, rtol=0)
    assert all(f".{VALUE}." in name or "head" in name for name in models.trainable()["value"])


def test_another_base_stays_a_model_of_its_own() -> None:
    """One weight of the base differs: the values would too, so it is not shared. Its adapter is new, on top of the
    reward's own."""
    reward = reward_adapter(move(backbone(), ("norm",), scale=1e-3))
    one = batch()
    with torch.no_grad():
        expected = token_values(reward, one)
    models = actor_critic(add_lora(tiny("llama"), LORA), reward, LORA).eval()
    assert not models.shared
    assert_close(values(models, one), expected, atol=1e-6, rtol=0)
    trained = models.trainable()["value"]
    assert all(f".{TRAINED}." in name or "head" in name for name in trained) and len(trained) > 1


def test_a_whole_reward_model_is_trained_whole() -> None:
    """Without adapters: all weights of the reward model, merged if it was an adapter."""
    one = batch()
    reward = reward_adapter(backbone())
    with torch.no_grad():
        expected = token_values(reward, one)
    models = actor_critic(tiny("llama"), reward, None).eval()
    assert_close(values(models, one), expected, atol=1e-5, rtol=0)
    assert all(p.requires_grad for p in models.value.parameters())  # type: ignore[union-attr]
    assert not any("lora" in name for name in models.trainable()["value"])


@pytest.mark.parametrize("kind", ["lora", "lora after lora", "from reward", "from reward after lora", "full"])
def test_saved_values_are_loaded_again(tmp_path: Path, kind: str) -> None:
    """The value model is saved as a reward model is: loading it gives the same values, and nothing of the policy
    changes."""
    base = save_tiny(tmp_path / "base")
    encoder = load_encoder(base)
    net: Any = load_policy(base)
    if "after lora" in kind:
        net = with_start(net)
        net.requires_grad_(False)
    lora = None if kind == "full" else LORA
    policy = net if lora is None else add_lora(net, lora)
    start = reward_adapter(copy.deepcopy(load_policy(base).base_model)) if "from reward" in kind else None
    models = actor_critic(policy, start, lora).eval()
    move(models, ("value.", f".{VALUE}.", f".{TRAINED}."))
    assert models.shared == (lora is not None)
    one = batch()
    expected, before = values(models, one), logprobs(models, one)
    trained = {name: p.detach().clone() for name, p in models.named_parameters()}
    models.save_value(encoder, tmp_path / "value", base=base, scores=STATS, layout="tree")
    assert torch.equal(logprobs(models, one), before) and torch.equal(values(models, one), expected)
    assert {name for name, _ in models.named_parameters()} == trained.keys()
    again = load_scalar(Model(path=str(tmp_path / "value")))
    with torch.no_grad():
        assert_close(token_values(again, one), expected, atol=1e-5, rtol=0)
        assert branch_scores(again, one).shape == (one.num_branches,)


def test_a_whole_value_model_shares_nothing_with_its_policy() -> None:
    """It starts as the policy's transformer, and is a copy of it: training one leaves the other alone."""
    models = actor_critic(tiny("llama"), None, None)
    assert models.value is not None
    places = {parameter.data_ptr() for parameter in models.policy.parameters()}
    assert not places & {parameter.data_ptr() for parameter in models.value.parameters()}
    value = dict(models.value.backbone.named_parameters())
    for name, parameter in models.policy.base_model.named_parameters():
        assert torch.equal(value[name], parameter), name


def test_a_policy_alone_has_no_value_model_to_save(tmp_path: Path) -> None:
    policy: Any = tiny("llama")
    with pytest.raises(ValueError, match="there is no value model"):
        ActorCritic(policy, None).save_value(None, tmp_path, base=Model(path="model"), scores=STATS, layout="tree")  # type: ignore[arg-type]
