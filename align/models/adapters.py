"""LoRA adapters (https://arxiv.org/abs/2106.09685): adding, switching off, and joining them for saving.

A stage that trains an adapter on top of a policy that is itself an adapter keeps the first one, ``start``: frozen and
active. The stage trains a second one, ``default``. With ``default`` switched off the model is then bit for bit the
policy that the stage began with, in any dtype. Merging the first adapter into the base instead would have changed the
policy by rounding (0.1 in the logits of a bf16 model). Saving joins the two adapters into one of the original base,
whose rank is the sum of their ranks; this is exact.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.errors import InputError, Problem
from align.models.compute.forward import causal_lm
from align.models.placement import WHOLE, parameters_of, size_of
from align.recipe.schema import Lora

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

TRAINED = "default"
"""The adapter that this stage trains. It is the name that PEFT and vLLM give to a model's only adapter."""
START = "start"
"""The adapter that the policy came with; frozen."""
VALUE = "value_model"
"""The adapter of a value model that shares the policy's base. It is trained, and has no effect until it is
activated."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def is_lora(model: nn.Module) -> bool:
    """Has the model adapters (under whatever wrapper)?

    PEFT is not imported here, since that takes seconds and more than 150 MB: a model can have adapters only after PEFT
    was imported to make them.
    """
    return _is(unwrap(model), "peft", "PeftModel")


def is_lora_layer(module: nn.Module) -> bool:
    """Is this a layer with adapters?"""
    return _is(module, "peft.tuners.lora", "LoraLayer")


def _is(module: nn.Module, package: str, name: str) -> bool:
    return package in sys.modules and isinstance(module, getattr(sys.modules[package], name))


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters to optimise, by name without the prefixes of wrappers."""
    return {name: parameter for name, parameter in parameters_of(unwrap(model)).items() if parameter.requires_grad}


def add_lora(model: PreTrainedModel | PeftModel, lora: Lora) -> PeftModel:
    """Add an adapter to train: its weights are fp32 and at first change nothing. All other weights are frozen.

    If the policy already has an adapter, that one stays active and frozen (see the module's docstring).

    Raises:
        InputError: a name of ``lora.target_modules`` fits no linear layer, or is the LM head.
    """
    from peft import PeftModel, get_peft_model

    config = lora_config(model, lora)
    if isinstance(model, PeftModel) and TRAINED in model.peft_config:
        raise ValueError("the model has an adapter that is being trained already")
    try:
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, adapter_name=TRAINED)
        model.add_adapter(TRAINED, config)
    except ValueError as error:  # a kind of layer that PEFT does not adapt
        reason = str(error).splitlines()[0][:200]
        raise InputError(
            Problem(f"PEFT refuses: {reason}", key="lora.target_modules", hint="name other layers there")
        ) from error
    model.base_model.set_adapter([START, TRAINED])
    for name, parameter in parameters_of(model).items():
        parameter.requires_grad_(f".{TRAINED}." in name)
    return model


def lora_config(model: nn.Module, lora: Lora) -> LoraConfig:
    """PEFT's configuration of an adapter for ``model``. Raises InputError as :func:`add_lora`."""
    from peft import LoraConfig

    base = causal_lm(model)
    return LoraConfig(
        task_type="FEATURE_EXTRACTION" if _lm_head(base) is None else "CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(base, lora.target_modules),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
    )


def add_value_adapter(model: PeftModel, config: LoraConfig) -> None:
    """Add the adapter ``VALUE`` to a policy that has adapters, to be trained beside them. The policy's outputs stay the
    same."""
    config.task_type = "FEATURE_EXTRACTION"  # it is saved as a reward model, which has this type
    model.add_adapter(VALUE, config)
    for name, parameter in parameters_of(model).items():
        parameter.requires_grad_(f".{TRAINED}." in name or f".{VALUE}." in name)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The adapters that have an effect now; they are the same in all layers."""
    return tuple(next(iter(lora_layers(model).values())).active_adapters)


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """From now on only the adapters ``names`` have an effect. ``requires_grad`` stays as it is; PEFT's own switch would
    change it."""
    for layer in lora_layers(model).values():
        layer._active_adapter = list(names)


@contextmanager
def value_in_front(model: nn.Module, *, on_start: bool) -> Iterator[None]:
    """Inside, the adapter ``VALUE`` is active and has the name of the policy's adapter, so that the code that saves a
    policy's adapter saves this one. ``on_start`` says whether it builds on ``START``. No weights are copied."""
    peft: Any = unwrap(model)
    active, named = active_adapters(peft), peft.active_adapter
    exchanged = [(VALUE, TRAINED), *([] if on_start else [(START, "aside")])]
    for pair in exchanged:
        _swap_names(peft, *pair)
    activate(peft, (START, TRAINED) if on_start else (TRAINED,))
    peft.active_adapter = TRAINED  # the wrapper looks its settings up by this name
    try:
        yield
    finally:
        peft.active_adapter = named
        activate(peft, active)
        for pair in exchanged:
            _swap_names(peft, *pair)


def _swap_names(peft: Any, one: str, other: str) -> None:
    tables = [
        getattr(layer, name)
        for layer in lora_layers(peft).values()
        for name in (*layer.adapter_layer_names, *layer.other_param_names)
    ]
    for table in [*tables, peft.peft_config]:
        swapped = {new: table.pop(old) for old, new in ((one, other), (other, one)) if old in table}
        table.update(swapped)


def _lm_head(base: PreTrainedModel) -> nn.Module | None:
    """The LM head; None for a backbone without one, as in reward and value models."""
    head: nn.Module | None = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def _linear_layers(base: PreTrainedModel) -> list[str]:
    """Full names of the linear layers inside the text transformer, to which neither the LM head nor a vision tower
    belongs."""
    head, text = _lm_head(base), _text_part(base)
    names = []
    for name, module in base.named_modules():
        inner: Any = module.get_base_layer() if is_lora_layer(module) else module
        inside_adapter = any(part in name.split(".") for part in ("base_layer", "lora_A", "lora_B"))
        inside_text = not text or name.startswith(f"{text}.")
        # For example a router, which returns more than a product
        own_kind = type(inner).__module__.startswith("transformers.models.")
        linear = isinstance(inner, (nn.Linear, Conv1D)) and not own_kind
        if linear and inner is not head and inside_text and not inside_adapter:
            names.append(name)
    return names


def _text_part(base: PreTrainedModel) -> str:
    """Name of the text transformer's module in a model with more parts, such as a vision tower; empty when it is the
    whole model."""
    if base.config.get_text_config() is base.config:
        return ""
    decoder = base.get_decoder()  # type: ignore[no-untyped-call]
    return next((name for name, module in base.named_modules() if module is decoder), "")


def _targets(base: PreTrainedModel, wanted: str | list[str]) -> list[str]:
    layers = _linear_layers(base)
    renamed = _taken_for_experts(base, sorted({name.rsplit(".", 1)[-1] for name in layers}))
    if not isinstance(wanted, str):
        problems = []
        for name in wanted:
            if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
                # Log-probs are computed from the head's weight directly, so an adapter on it would have no effect and
                # no gradient.
                problems.append(
                    Problem(f"no linear layer inside the model is called {name!r}", key="lora.target_modules")
                )
            elif name.rsplit(".", 1)[-1] in renamed:
                problems.append(
                    Problem(
                        f"{name!r}: PEFT would adapt the experts instead, which are no layers",
                        key="lora.target_modules",
                    )
                )
        if problems:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers} - renamed))
            raise InputError(
                [*problems[:-1], Problem(problems[-1].message, key=problems[-1].key, hint=f"choose from {known}")]
            )
        layers = [layer for layer in layers if any(layer == name or layer.endswith(f".{name}") for name in wanted)]
    chosen = [layer for layer in layers if layer.rsplit(".", 1)[-1] not in renamed]
    if not chosen:
        raise InputError(
            f"{type(base).__name__} has no linear layer that could get an adapter",
            hint="train all weights: remove lora",
        )
    if _text_part(base):
        return sorted(chosen)  # full names, since a vision tower's layers have the same last names
    return list(wanted) if not isinstance(wanted, str) else sorted({name.rsplit(".", 1)[-1] for name in chosen})


def _taken_for_experts(base: PreTrainedModel, names: list[str]) -> set[str]:
    """Names of layers that PEFT mistakes for the experts of an older checkpoint; it would adapt the experts instead."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    mistaken = set()
    for name in names:
        probe = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(probe, base, None)
        except ValueError:  # PEFT asks for the other half of a fused matrix as well
            mistaken.add(name)
        if probe.target_parameters:
            mistaken.add(name)
    return mistaken


def adapted(model: nn.Module) -> str:
    """A line for the user: which layers have adapters, and which large parts of the model have none."""
    base = causal_lm(unwrap(model))
    paths = list(lora_layers(base))
    names = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in paths}))
    line = f"adapters on {len(paths)} linear layers: {names}"
    experts = sum(
        p.numel() for name, p in parameters_of(base).items() if ".experts." in f".{name}" and ".lora_" not in name
    )
    without = (
        [f"the experts ({experts:,} parameters)"]
        if experts and not any(".experts." in f".{path}." for path in paths)
        else []
    )
    if text := _text_part(base):
        head = _lm_head(base)
        outside = sum(p.numel() for name, p in parameters_of(base).items() if not name.startswith(f"{text}."))
        outside -= size_of(head) if head is not None else 0
        without += [f"what is outside {text}, such as a vision tower ({outside:,} parameters)"]
    return line + (f"; none on {' and '.join(without)}" if without else "")


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters, by name. Typed Any: PEFT has no types."""
    return {name: module for name, module in unwrap(model).named_modules() if is_lora_layer(module)}


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is the policy that the stage began with: the adapter that the stage trains has no effect.

    Bit-exact, under any wrapper, whether ``model`` is in training mode or not. PEFT's own switch is not used: leaving
    it sets ``requires_grad`` on every adapter, the frozen one included.

    Raises:
        ValueError: the stage trains no adapter, so the policy it began with is gone.
    """
    layers = list(lora_layers(model).values())
    before = [layer._active_adapter for layer in layers]
    if not any(TRAINED in layer.active_adapters for layer in layers):
        raise ValueError("the model has no adapter in training")
    for layer in layers:
        layer._active_adapter = [name for name in layer.active_adapters if name != TRAINED]
    try:
        yield
    finally:
        for layer, names in zip(layers, before, strict=True):
            layer._active_adapter = names


def adapter_to_save(model: nn.Module) -> tuple[dict[str, Tensor], LoraConfig]:
    """Weights (PEFT's names) and configuration of one adapter that does what the active ones do together.

    Low-rank updates are all that an adapter can contain here: :mod:`align.models.files.adapter_features` refuses others
    when they are loaded.
    """
    from peft import get_peft_model_state_dict

    peft: Any = unwrap(model)
    names = [name for name in (START, TRAINED) if name in peft.peft_config]
    configs = [copy.deepcopy(peft.peft_config[name]) for name in names]
    if len(names) == 1:
        state = get_peft_model_state_dict(peft, adapter_name=names[0], save_embedding_layers=False)
        return {name: tensor.cpu().contiguous() for name, tensor in WHOLE.state(state).items()}, configs[0]
    return _joined(peft, names, configs)


def _joined(model: nn.Module, names: list[str], configs: list[LoraConfig]) -> tuple[dict[str, Tensor], LoraConfig]:
    """B1 A1 s1 + B2 A2 s2 = [B1 s1, B2 s2] [A1; A2]. A layer without one of the adapters gets zeros in its place."""
    layers = lora_layers(model)
    ranks = {name: max(layer.r[name] for layer in layers.values() if name in layer.lora_A) for name in names}
    state = {}
    for path, layer in layers.items():
        downs, ups = [], []
        whole = {
            name: (WHOLE.whole(layer.lora_A[name].weight), WHOLE.whole(layer.lora_B[name].weight))
            for name in names
            if name in layer.lora_A
        }
        template_down, template_up = next(iter(whole.values()))
        for name in names:
            down = template_down.new_zeros(ranks[name], template_down.shape[1])
            up = template_up.new_zeros(template_up.shape[0], ranks[name])
            if name in whole:
                down[: layer.r[name]] = whole[name][0]
                up[:, : layer.r[name]] = whole[name][1] * layer.scaling[name]
            downs.append(down)
            ups.append(up)
        state[f"{path}.lora_A.weight"] = torch.cat(downs).cpu().contiguous()
        state[f"{path}.lora_B.weight"] = torch.cat(ups, dim=1).cpu().contiguous()
    joined = copy.deepcopy(configs[-1])
    joined.r = joined.lora_alpha = sum(ranks.values())  # scale alpha / r = 1: the scales are in B
    joined.lora_dropout = 0.0
    joined.use_rslora = False
    joined.rank_pattern = {}
    joined.alpha_pattern = {}
    paths = {path.removeprefix("base_model.model.") for path in layers}
    suffixes = {path.rsplit(".", 1)[-1] for path in paths}
    covered = {path for path in _linear_layers(causal_lm(model)) if path.rsplit(".", 1)[-1] in suffixes}
    joined.target_modules = sorted(suffixes if covered == paths else paths)
    return state, joined
