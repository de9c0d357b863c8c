"""LoRA: what is trained, what the reference is, what merging and joining keep."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from align.errors import InputError
from align.models.adapters import START, TRAINED, activate, adapter_off, add_lora, is_lora, trainable_parameters, unwrap
from align.models.load import load_encoder, load_policy
from align.models.merging import merged_copy
from align.models.save import save_policy
from align.recipe.schema import Lora, Model
from align.rollout.sync import policy_weights
from tests.support.saved import LORA, save_tiny
from tests.support.tiny import tiny

IDS = torch.arange(3, 23).reshape(2, 10)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def train(model: nn.Module, steps: int = 3) -> None:
    """A few large steps, so that adapters are far from zero."""
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()


def randomised(model: nn.Module, seed: int = 1) -> nn.Module:
    """B is zero at first: give the trained adapter an effect without training."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.fixture
def stacked(tmp_path: Path) -> nn.Module:
    """An adapter on top of a saved adapter, both with an effect. The first has fewer targets, another rank and another
    scale."""
    base = save_tiny(tmp_path / "base")
    first = randomised(add_lora(load_policy(base), Lora(rank=2, alpha=6, target_modules=["q_proj", "down_proj"])))
    save_policy(first, load_encoder(base), tmp_path / "first", base=base)
    return randomised(add_lora(load_policy(Model(path=str(tmp_path / "first"))), LORA), seed=2)


@pytest.mark.parametrize(("family", "layers"), [("llama", 7), ("gpt2", 4), ("phi", 6)])
def test_all_linear_layers_but_the_head(family: str, layers: int) -> None:
    """The default covers every linear layer of a block (GPT-2's are Conv1D) and never the LM head; only fp32 adapters
    are trained."""
    model = add_lora(tiny(family), LORA)
    wrapped = {name.split(".lora_A")[0] for name in trainable_parameters(model) if "lora_A" in name}
    assert len(wrapped) == 2 * layers
    assert not any("lm_head" in name for name in wrapped)
    assert all(".lora_" in name for name in trainable_parameters(model))


def test_adapters_stay_fp32_on_a_bf16_base() -> None:
    """Small steps must not be swallowed, so adapters are fp32 whatever the base is."""
    model = add_lora(tiny("llama").to(torch.bfloat16), LORA)
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    assert model.get_base_model().model.embed_tokens.weight.dtype == torch.bfloat16


def test_a_new_adapter_changes_nothing() -> None:
    model = tiny("llama")
    before = logits(model)
    assert_close(logits(add_lora(model, LORA)), before, atol=0, rtol=0)


def test_named_targets() -> None:
    model = add_lora(tiny("llama"), Lora(target_modules=["q_proj", "mlp.up_proj"]))
    assert {name.split(".")[-4] for name in trainable_parameters(model)} == {"q_proj", "up_proj"}


@pytest.mark.parametrize("name", ["qproj", "lm_head", "embed_tokens"])
def test_targets_that_do_not_exist(name: str) -> None:
    """A misspelt target would train nothing; an adapter on the head would be bypassed by the chunked log-probs."""
    with pytest.raises(
        InputError,
        match=rf"lora.target_modules: no linear layer inside the model is called '{name}'; choose from .*q_proj",
    ):
        add_lora(tiny("llama"), Lora(target_modules=["q_proj", name]))


@pytest.mark.parametrize("names", [["one"], ["one", "two"], ["one", "two", "three"]], ids=len)
def test_every_target_that_does_not_exist_is_named_once(names: list[str]) -> None:
    """And what there is to choose from stands at the end."""
    with pytest.raises(InputError) as caught:
        add_lora(tiny("llama"), Lora(target_modules=["q_proj", *names]))
    said = str(caught.value).splitlines()
    assert [name for line in said for name in names if f"is called '{name}'" in line] == names
    assert [("choose from" in line) for line in said] == [False] * (len(names) - 1) + [True]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_adapter_gets_a_gradient(checkpointing: bool) -> None:
    """With gradient checkpointing, whose inputs need no gradient, adapters must still get theirs, and the same."""
    plain = randomised(add_lora(tiny("llama"), LORA)).train()
    model = copy.deepcopy(plain)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable()
    for each in (plain, model):
        each(IDS, labels=IDS, use_cache=False).loss.backward()
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert_close(parameter.grad, trainable_parameters(plain)[name].grad, atol=1e-5, rtol=1e-5)


def test_adapter_off_is_the_base() -> None:
    """Bit-equal before and after training, in training mode, with adapter dropout, and leaving gradients as they
    were."""
    model = add_lora(tiny("llama"), Lora(rank=4, dropout=0.5)).train()
    start = logits(tiny("llama").train())
    train(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with adapter_off(model):
        assert_close(logits(model), start, atol=0, rtol=0)
    assert (logits(model) - start).abs().max() > 0.1
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_adapter_off_comes_back_after_an_error() -> None:
    model = randomised(add_lora(tiny("llama"), LORA))
    before = logits(model)
    with pytest.raises(KeyError), adapter_off(model):
        raise KeyError
    assert_close(logits(model), before, atol=0, rtol=0)


def test_adapter_off_between_forward_and_backward() -> None:
    """A reference pass between a policy's forward and its backward must not cost the policy its gradients."""
    model = randomised(add_lora(tiny("llama"), LORA))
    loss = model(IDS, labels=IDS, use_cache=False).loss
    with adapter_off(model):
        logits(model)
    loss.backward()
    assert all(p.grad is not None for p in trainable_parameters(model).values())


def test_adapter_off_under_ddp(tmp_path: Path) -> None:
    """Wrappers hide the adapters from a type check."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(add_lora(tiny("llama"), LORA))
        assert is_lora(wrapped) and unwrap(wrapped) is wrapped.module
        assert all(not name.startswith("module.") for name in trainable_parameters(wrapped))
        train(wrapped)
        with adapter_off(wrapped):
            assert_close(logits(wrapped), logits(tiny("llama")), atol=0, rtol=0)
        assert (logits(wrapped) - logits(tiny("llama"))).abs().max() > 0.1
    finally:
        torch.distributed.destroy_process_group()


def test_adapter_off_needs_an_adapter() -> None:
    """Without one, the starting policy is gone: an error, never the trained policy as its own reference."""
    with pytest.raises(ValueError, match="no adapter in training"), adapter_off(tiny("llama")):
        pass


def test_reference_of_a_stacked_adapter_is_the_first_one(stacked: nn.Module, tmp_path: Path) -> None:
    """On top of an adapter policy, the reference is that policy, bit for bit, and not the base; it stays so in
    training."""
    start = logits(load_policy(Model(path=str(tmp_path / "first"))))
    assert (start - logits(load_policy(Model(path=str(tmp_path / "base"))))).abs().max() > 0.1
    assert all(f".{TRAINED}." in name for name in trainable_parameters(stacked))
    frozen = {name: p.clone() for name, p in stacked.named_parameters() if f".{START}." in name}
    train(stacked)
    with adapter_off(stacked):
        assert_close(logits(stacked), start, atol=0, rtol=0)
    assert (logits(stacked) - start).abs().max() > 0.1
    for name, before in frozen.items():
        assert torch.equal(stacked.get_parameter(name), before), name


def test_stacked_adapters_are_saved_as_one(stacked: nn.Module, tmp_path: Path) -> None:
    """Joining is exact: the two together, the one that is saved and loaded, and PEFT's own loading of it agree."""
    expected = logits(stacked)
    base = Model(path=str(tmp_path / "first"))
    save_policy(stacked, load_encoder(base), tmp_path / "second", base=base)
    loaded = load_policy(Model(path=str(tmp_path / "second")))
    assert list(loaded.peft_config) == [START] and loaded.peft_config[START].r == 6
    assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
    plain = PeftModel.from_pretrained(load_policy(Model(path=str(tmp_path / "base"))), tmp_path / "second")
    assert_close(logits(plain), expected, atol=1e-5, rtol=1e-5)


def test_only_one_adapter_is_trained() -> None:
    with pytest.raises(ValueError, match="being trained already"):
        add_lora(add_lora(tiny("llama"), LORA), LORA)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_merged_copy(family: str) -> None:
    """Merged in fp32, close to 1e-5; the adapter model is not touched; the copy is a plain model that can be
    trained."""
    model = randomised(add_lora(tiny(family), LORA))
    expected, weights = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    merged = merged_copy(model)
    assert not is_lora(merged) and not any("lora" in name for name, _ in merged.named_parameters())
    assert_close(logits(merged), expected, atol=2e-5, rtol=1e-5)
    assert all(p.requires_grad for p in merged.parameters())
    assert_close(logits(model), expected, atol=0, rtol=0)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_merged_copy_of_stacked_adapters(stacked: nn.Module) -> None:
    assert_close(logits(merged_copy(stacked)), logits(stacked), atol=2e-5, rtol=1e-5)


def test_the_engine_gets_every_active_adapter(stacked: nn.Module, tmp_path: Path) -> None:
    """What is sent to an engine: a plain model with these weights answers as the policy does. With both of its
    adapters, each alone, and none."""
    for active in ((START, TRAINED), (TRAINED,), (START,), ()):
        activate(stacked, active)
        plain = load_policy(Model(path=str(tmp_path / "base")))
        plain.load_state_dict(dict(policy_weights(stacked)))
        assert_close(logits(plain), logits(stacked), atol=2e-5, rtol=1e-5)
    activate(stacked, (START, TRAINED))
    assert (logits(plain) - logits(stacked)).abs().max() > 0.1


def test_merging_in_bf16_adds_in_fp32() -> None:
    """Each merged weight is the fp32 sum, rounded once. Adding a rounded update instead is wrong in the last
    bits."""
    model = randomised(add_lora(tiny("llama").to(torch.bfloat16), LORA))
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    a, b = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
    expected = (layer.get_base_layer().weight.float() + (b @ a) * 2.0).to(torch.bfloat16)  # alpha / rank = 8 / 4
    assert torch.equal(merged_copy(model).model.layers[0].mlp.up_proj.weight, expected)


def test_merged_copy_needs_an_adapter() -> None:
    with pytest.raises(TypeError, match="expected a model with adapters"):
        merged_copy(tiny("llama"))


def test_merging_into_four_bits_is_refused() -> None:
    """Packed weights have no room for the sum."""
    model = add_lora(tiny("llama"), LORA)
    layer = model.get_base_model().model.layers[0].mlp.up_proj.get_base_layer()
    layer.weight = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="the base is quantised"):
        merged_copy(model)
