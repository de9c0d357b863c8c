"""Loading policies, tokenizers and encoders: from a folder, a .gguf file, the hub, or an adapter that a stage saved.

No code of a model's folder is ever run (there is no ``trust_remote_code``), and no pickle is opened. A model is read
from the local disk only; :mod:`align.models.files.hub` puts hub models there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.pytorch_utils import Conv1D

from align.data.chat.encoder import Encoder
from align.errors import EnvironmentFault, InputError, Problem
from align.models.adapters import START, is_lora, lora_layers
from align.models.compute.dropout import disable_dropout
from align.models.compute.forward import causal_lm, own_attention_name, transformer_of
from align.models.files import gguf
from align.models.files.bases import adapter_base
from align.models.files.folder import ADAPTER_CONFIG, ModelFolder, Wanted, read_folder, require_tokenizer, tensor_shapes
from align.models.files.hub import local_snapshot
from align.models.files.identity import is_gguf, is_local
from align.models.files.own_code import refuse_own_code
from align.models.files.quiet import no_progress_bars, no_reports
from align.models.files.starts import SCORE, is_classifier
from align.models.intake import attention_of, require_finite, take_in
from align.models.placement import parameters_of
from align.recipe.schema import Model

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LoadModel(Protocol):
    """The signature by which a stage loads the model that it trains: :func:`load_policy`, or a function with the same
    arguments."""

    def __call__(
        self,
        model: Model,
        /,
        *,
        dtype: Literal["fp32", "bf16"],
        device: torch.device,
        cache: Path | None,
        quantize: Literal["nf4"] | None,
    ) -> nn.Module:
        """Load ``model`` onto ``device``."""


def load_policy(
    model: Model,
    *,
    dtype: Literal["fp32", "bf16"] = "fp32",
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    cache: Path | None = None,
    quantize: Literal["nf4"] | None = None,
    merging: bool = False,
) -> PreTrainedModel:
    """The language model at ``model.path``, already resolved: a folder, a .gguf file, or a hub id. Dropout is off.

    An adapter's folder gives its base with the adapter attached, frozen and active (a ``PeftModel``, which passes calls
    on to the base); the base must be, byte for byte, the one that the adapter was trained on. ``cache`` is where
    dequantised GGUF files are kept; without it they are dequantised at every call. ``quantize`` keeps the weights of
    linear layers in 4 bits (QLoRA) and computes in ``dtype``. ``attn_implementation`` None means sdpa, or eager for a
    class that has no other. ``merging`` also accepts adapters that PEFT can merge but that cannot be trained or used
    here.

    Raises:
        InputError: a part is missing, damaged or of the wrong kind, or wants code of its own to be run.
        EnvironmentFault: a hub model is not on this machine and cannot be fetched, or bitsandbytes is missing.
    """
    location = locate(model)
    if is_gguf(location) and cache is None and quantize is None:
        lm = gguf.read_model(location)
        lm.set_attn_implementation(attn_implementation or own_attention_name(lm))
        require_finite(lm, str(location))
    else:
        wanted: Wanted = "mergeable" if merging else "policy"
        folder = read_folder(gguf.dequantised(location, cache) if is_gguf(location) and cache else location, wanted)
        if folder.adapter is not None:
            same: dict[str, Any] = {"attn_implementation": attn_implementation, "cache": cache, "quantize": quantize}
            base = load_policy(adapter_base(folder), dtype=dtype, device=device, **same)
            return _attach(base, folder, merging=merging)
        lm = _load_folder(
            folder,
            AutoModelForCausalLM,
            DTYPES[dtype],
            attn_implementation,
            _four_bits(quantize, DTYPES[dtype], device),
        )
        if not is_gguf(location):
            lm.name_or_path = lm.config.name_or_path = model.path  # a hub model's id, not the cache's folder
    return _ready(lm, dtype, device, quantize)


def load_backbone(
    model: Model,
    *,
    dtype: Literal["fp32", "bf16"] = "fp32",
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    quantize: Literal["nf4"] | None = None,
) -> PreTrainedModel:
    """Load a model without its head: the transformer of a language model, a reward model of this package, or a sequence
    classifier.

    Arguments and errors are those of :func:`load_policy`.
    """
    location = locate(model)
    same: dict[str, Any] = {"dtype": dtype, "device": device, "cache": cache, "quantize": quantize}
    folder = None if is_gguf(location) else read_folder(location, None)
    if folder is None or not (folder.is_reward_model or is_classifier(folder)):
        bare: PreTrainedModel = without_lm_head(load_policy(model, **same))
        return bare
    if folder.adapter is not None:
        read_folder(location, "reward_model")
        return _attach(load_backbone(adapter_base(folder), **same), folder)
    backbone = _load_folder(folder, AutoModel, DTYPES[dtype], None, _four_bits(quantize, DTYPES[dtype], device))
    backbone.name_or_path = backbone.config.name_or_path = model.path
    return _ready(backbone, dtype, device, quantize)


def without_lm_head(model: Any) -> Any:
    """The transformer inside a language model, with its adapters if it has any; the memory of the LM head is freed.

    ``model`` must not be used afterwards: its adapter wrapper is reused around the transformer.
    """
    lm = causal_lm(model)
    backbone: Any = transformer_of(lm)
    backbone.name_or_path = lm.name_or_path
    if not is_lora(model):
        return backbone
    wrapper: Any = model
    wrapper.base_model.model = backbone
    # A bound method of the language model, which would keep its memory alive
    vars(wrapper).pop("base_model_prepare_inputs_for_generation", None)
    return model


def _ready(
    lm: PreTrainedModel, dtype: Literal["fp32", "bf16"], device: torch.device | str, quantize: str | None
) -> PreTrainedModel:
    disable_dropout(lm)
    if quantize is None:  # 4-bit weights are on their device already and cannot be converted
        nn.Module.to(lm, device=device, dtype=DTYPES[dtype])
    layer: Any
    for layer in lm.modules():
        # On processors with bf16 units bitsandbytes repacks a layer in its first forward pass in eval mode, for a
        # kernel that has no gradient, and then uses that kernel in training too. Computing the reference's log-probs
        # first would make all gradients wrong.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return lm


def _four_bits(quantize: Literal["nf4"] | None, compute: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """Arguments of from_pretrained that make it quantise while loading; none without ``quantize``."""
    if quantize is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EnvironmentFault(
            "lora.quantize needs the Python package bitsandbytes", hint="pip install bitsandbytes, or remove the key"
        )
    settings: Any = BitsAndBytesConfig
    config = settings(
        load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_compute_dtype=compute, bnb_4bit_use_double_quant=True
    )
    return {"quantization_config": config, "device_map": {"": torch.device(device)}}


def load_tokenizer(model: Model, *, cache: Path | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with ``model.chat_template`` (a Jinja file) in place of its own template when that is set.

    Raises:
        InputError: missing, damaged, wants code of its own, or has ids for which the model has no embedding.
        EnvironmentFault: as for :func:`load_policy`.
    """
    location = locate(model)
    if is_gguf(location):
        tokenizer = (
            _load_tokenizer(gguf.dequantised(location, cache, weights=False))
            if cache
            else gguf.read_tokenizer(location)
        )
    else:
        folder = read_folder(location, None)
        if folder.adapter is not None and not (location / "tokenizer_config.json").is_file():
            return load_tokenizer(
                adapter_base(folder).model_copy(update={"chat_template": model.chat_template}), cache=cache
            )
        require_tokenizer(location)
        refuse_own_code(folder)
        tokenizer = _load_tokenizer(location)
        if folder.vocabulary is not None:
            require_rows(tokenizer, folder.vocabulary, location)
    if model.chat_template is not None:
        tokenizer.chat_template = _template(Path(model.chat_template).expanduser())
    return tokenizer


def load_encoder(model: Model, *, cache: Path | None = None) -> Encoder:
    """The encoder from chats to tokens of this model: its tokenizer, template and template settings.

    The folder of a policy that a stage saved contains template settings; settings in ``model`` replace them. Raises as
    :func:`load_tokenizer`, and InputError as :class:`Encoder` does.
    """
    tokenizer = load_tokenizer(model, cache=cache)
    location = locate(model)
    notes = read_folder(location, None).notes if location.is_dir() else {}
    settings = model.chat_template_kwargs or notes.get("chat_template_kwargs", {})
    date = model.chat_template_date or (None if model.chat_template else notes.get("chat_template_date"))
    return Encoder(tokenizer, template_kwargs=settings, chat_template_date=date)


def locate(model: Model) -> Path:
    """The model's path on this machine, a folder or a .gguf file. Downloads a hub model that is not here yet; raises as
    :func:`~align.models.files.hub.local_snapshot`."""
    if is_local(model.path):
        return Path(model.path).expanduser()
    return local_snapshot(model.path, model.revision)


def is_adapter(model: Model) -> bool:
    """Is the model's folder that of an adapter?"""
    location = locate(model)
    return location.is_dir() and read_folder(location).adapter is not None


def whole_folder(model: Model, cache: Path) -> Path:
    """A folder with configuration and weights, as other programs load them: the model's own, its base's when it is an
    adapter, or the dequantised copy of a .gguf file in ``cache``. Raises as :func:`load_policy`.
    """
    location = locate(model)
    if is_gguf(location):
        return gguf.dequantised(location, cache)
    folder = read_folder(location)
    return location if folder.adapter is None else whole_folder(adapter_base(folder), cache)


def require_rows(tokenizer: PreTrainedTokenizerBase, rows: int, location: Path | str) -> None:
    """Raises :class:`InputError` when the tokenizer has ids beyond the model's ``rows`` embeddings. More rows than ids
    are fine."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        problem = f"the tokenizer has token {highest} ({str(token)[:40]!r}), the model only {rows} embeddings"
        hint = "resize the model with model.resize_token_embeddings(len(tokenizer)) and save it, or remove the tokens"
        raise InputError(Problem(problem, file=str(location), hint=hint))


# Reward models made by other tools


def load_classifier(
    model: Model, *, dtype: Literal["fp32", "bf16"] = "fp32", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The sequence-classification model at ``model.path``, already resolved. In eval mode, dropout off.

    Raises:
        InputError: as for :func:`load_policy`; or it is an encoder-decoder, which looks for an end token to read its
            score at.
        EnvironmentFault: as for :func:`load_policy`.
    """
    folder = read_folder(locate(model), "classifier")
    classifier = _load_folder(folder, AutoModelForSequenceClassification, DTYPES[dtype], None, {})
    if classifier.config.is_encoder_decoder:
        problem = f"{type(classifier).__name__} finds its score by the id of an end token, which is not safe"
        raise InputError(Problem(problem, file=str(folder.path)))
    disable_dropout(classifier)
    nn.Module.to(classifier, device=device, dtype=DTYPES[dtype])
    return classifier  # already in eval mode, in which transformers loads models


# Adapters


def _attach(base: PreTrainedModel, folder: ModelFolder, *, merging: bool = False) -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    with readable(folder.path / ADAPTER_CONFIG):
        config = LoraConfig.from_pretrained(folder.path)
        config.inference_mode = True
        config.base_model_name_or_path = base.name_or_path or None  # paths may differ; the base was compared by content
        config.lora_dropout = 0.0  # it is frozen: its outputs must be the same in training
        config.init_lora_weights = True  # the weights come from the file, so a costly initialisation would be wasted
        # Whether weights are stored transposed depends on the base, even if the file says otherwise
        config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in base.modules())
        tensors = load_file(folder.weights[0])
        model: Any = get_peft_model(base, config, adapter_name=START)
        loaded = set_peft_model_state_dict(model, tensors, adapter_name=START)
    own = parameters_of(model)  # a tensor that two modules share has one name here
    missing = [name for name in loaded.missing_keys if f".{START}" in name and name in own]
    wrong = (
        [f"no weights for {missing[0]}"]
        if missing
        else [f"{name} fits nothing in the base" for name in loaded.unexpected_keys[:1]]
    )
    wrong += [f"{name} is not finite" for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    wrong += [] if merging else _beyond_layers(model)
    if wrong:
        raise InputError(Problem(wrong[0], file=str(folder.weights[0])))
    model.requires_grad_(False)
    return model  # type: ignore[no-any-return]


def _beyond_layers(model: Any) -> list[str]:
    """Adapters on anything but linear layers inside the transformer: PEFT matches experts of newer model classes by
    names that belonged to layers before."""
    head: Any = causal_lm(model).get_output_embeddings()  # type: ignore[no-untyped-call]
    layers = lora_layers(model)
    for name, layer in layers.items():
        if layer is head or not isinstance(layer.get_base_layer(), (nn.Linear, Conv1D)):
            place = name.removeprefix("base_model.model.")
            return [f"not supported: it adapts {place}, which is no linear layer inside the transformer"]
    return []


# Folders


def _load_folder(
    folder: ModelFolder, auto: Any, dtype: torch.dtype, attn_implementation: str | None, quantization: Mapping[str, Any]
) -> PreTrainedModel:
    """Load through transformers' class ``auto``, which decides whether the model has an LM head, a classifier's head or
    none."""
    refuse_own_code(folder)
    path = str(folder.path)
    with readable(folder.path), no_progress_bars(), no_reports():
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if auto is AutoModelForSequenceClassification and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise InputError(
                Problem(f"transformers has no sequence classifier for {config.model_type} models", file=path)
            )
        if auto is not AutoModelForSequenceClassification and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise InputError(Problem(f"a {config.model_type} model is no causal language model", file=path))
        if auto is AutoModelForSequenceClassification and not {"num_labels", "id2label"} & folder.config.keys():
            config.num_labels = _head_rows(folder)
        if attn_implementation is None and auto is not AutoModelForSequenceClassification:
            attn_implementation = attention_of(config, backbone=auto is AutoModel)
        loaded: Any = auto.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **quantization,
        )
    lm: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise InputError(Problem(f"the weights lack {len(missing)} tensors, such as {missing[0]}", file=path))
    # A caller that asked for the transformer loads the head itself
    elsewhere = {SCORE} if auto is AutoModel and is_classifier(folder) else set()
    take_in(lm, folder, set(loaded[1]["unexpected_keys"]) - elsewhere)
    return lm


def _head_rows(folder: ModelFolder) -> int:
    """The number of a classifier's outputs when its configuration does not say; transformers would assume two."""
    shapes = {name: shape for path in folder.weights for name, shape in tensor_shapes(path).items()}
    if "score.weight" not in shapes:
        outside = [name for name in shapes if "." in name and not any(part.isdigit() for part in name.split("."))]
        problem = (
            f"config.json has no num_labels, and the weights no score.weight ({', '.join(sorted(outside)[:5])} are"
            " there)"
        )
        hint = "save it as transformers' classifier with num_labels: 1, whose head is called score"
        raise InputError(Problem(problem, file=str(folder.path), hint=hint))
    return shapes["score.weight"][0]


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    with readable(folder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    return tokenizer


def _template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(
            Problem(f"cannot read the chat template: {reason}", file=str(path), key="model.chat_template")
        ) from error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what the libraries raise about a folder's content into an InputError of one line that names the folder."""
    try:
        yield
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            Problem(f"cannot be loaded: {reason[:200] or type(error).__name__}", file=str(path))
        ) from error
