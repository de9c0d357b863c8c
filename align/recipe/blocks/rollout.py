"""How a stage gets samples from a policy."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from align.recipe.blocks.base import Reference, Strict
from align.recipe.language.effects import Needs


class Rollout(Strict):
    """The engine that samples. With the same engine and seed two runs draw the same samples; with another engine they
    differ."""

    key_needs: ClassVar[tuple[Needs, ...]] = (
        Needs(
            "dtype own_process cache_gb max_sequences",
            lambda rollout: rollout.engine in ("auto", "vllm"),
            "with engine: {engine}; it is vllm's",
        ),
    )

    engine: Literal["auto", "vllm", "transformers", "scripted"] = "auto"
    """`vllm`: fast. `transformers`: slow; its log-probs equal the trainer's to the last bit. `scripted`: answers from a
    file, to try a recipe out. `auto`: vllm if it is installed, else transformers."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Only for `vllm`: precision of its weights; when absent fp32 on a CPU and bf16 on a GPU. bf16 samples faster; its
    log-probs are off by up to about 0.2 nats a token."""
    own_process: bool | None = None
    """Only for `vllm`: run it in a process of its own. When absent, only if this is necessary: if several processes
    train, if vllm has no code of its own for the model, or if this process has an engine already."""
    cache_gb: float | None = Field(default=None, gt=0)
    """Only for `vllm`: memory of its key-value cache, in GB (10^9 bytes); when absent 2 on a CPU and a third of the
    memory of a GPU."""
    max_sequences: int = Field(default=128, ge=1)
    """Only for `vllm`: how many answers it samples at the same time."""
    script: Annotated[str, Reference(hub=False), Field(min_length=1)] | None = None
    """Only for `scripted`: a JSONL file of rows `{"completion": text}`; a row with a `prompt` (the text of the last
    user message) is used only for that prompt."""

    @model_validator(mode="after")
    def _options_belong_to_the_engine(self) -> Rollout:
        if (self.engine == "scripted") != (self.script is not None):
            raise ValueError("engine: scripted needs a `script`, and no other engine takes one")
        return self
