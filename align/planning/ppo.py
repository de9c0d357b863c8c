"""The plan of a PPO stage, which samples the answers that it trains on: the number of prompts, and at most how many
tokens are sampled and trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import AlignError
from align.pipeline.folder import RunFolder
from align.planning.data_size import EXACT_BYTES, data_faults, locate
from align.planning.planner import DataSize, PlanRow, ToPlan
from align.planning.training import Training, TrainingPlanner
from align.recipe.kinds.ppo import PpoStage
from align.recipe.load import LoadedRecipe
from align.recipe.schema import Model
from align.sizing import ppo_needs
from align.sizing.moments import Pass, Term

if TYPE_CHECKING:
    from align.data.trees.prompts import EncodedPrompt


def prompts_of(loaded: LoadedRecipe, name: str, spec: PpoStage, model: Model | None, run: RunFolder) -> DataSize:
    """The prompts of stage ``name``: counted with the model's tokenizer if that is quick; otherwise their number is
    unknown.

    Args:
        model: the model whose tokenizer counts, with a local path; None when it is not on this machine.
    """
    texts = [source.path for source in spec.prompts]
    bound = f"at most {spec.max_prompt_length:,} tokens each (max_prompt_length)"
    try:
        locations = [locate(loaded, run, text) for text in texts]
    except AlignError:  # a stage that has not run yet
        return DataSize(f"from {', '.join(texts)}", bound=bound)
    local = [location for location in locations if isinstance(location, Path)]
    size = sum(
        file.stat().st_size
        for path in local
        for file in ([path] if path.is_file() else path.rglob("*"))
        if file.is_file()
    )
    if model is None or len(local) < len(locations) or size > EXACT_BYTES:
        return DataSize(f"from {', '.join(texts)}", bound=bound)
    encoded = _encoded(loaded, name, spec, model, run)
    lengths = [len(prompt.ids) for prompt in encoded]
    return DataSize("encoded with the model's tokenizer", len(lengths), sum(lengths), longest=max(lengths, default=0))


def _encoded(loaded: LoadedRecipe, name: str, spec: PpoStage, model: Model, run: RunFolder) -> list[EncodedPrompt]:
    """The prompts, encoded as the stage will do it, in a temporary folder."""
    from align.data.trees.prompts import load_prompts
    from align.models.load import load_encoder

    encoder = load_encoder(model, cache=run.cache if (run.cache / "gguf").is_dir() else None)
    with data_faults():
        prompts, _ = load_prompts(
            spec.prompts,
            resolve=lambda text: locate(loaded, run, text),
            encoder=encoder,
            max_length=spec.max_prompt_length,
            limit="max_prompt_length",
            seed=loaded.recipe.seed if spec.seed is None else spec.seed,
            rejects=None,
        )
    return prompts


def sampled_tokens(spec: PpoStage) -> int:
    """The largest number of tokens that may be sampled in training."""
    return spec.iterations * spec.train.prompts * spec.samples_per_prompt * spec.max_new_tokens


def trained_tokens(spec: PpoStage, prompts: DataSize) -> int:
    """The largest number of tokens in training steps: prompts and answers, in every pass, for policy and value
    model."""
    length = (
        spec.max_prompt_length if not prompts.examples or prompts.tokens is None else prompts.tokens / prompts.examples
    )
    read = spec.iterations * spec.train.prompts * length
    models = 2 if spec.advantages.has_value_model else 1
    return int((read + sampled_tokens(spec)) * spec.ppo_epochs * models)


def rows(spec: PpoStage, prompts: DataSize) -> Iterator[PlanRow]:
    """Rows about the prompts of an iteration and the number of iterations."""
    if prompts.examples is None:
        yield PlanRow("prompts", prompts.source, prompts.bound)
    else:
        yield PlanRow("prompts", f"{prompts.examples:,} prompts, {prompts.tokens:,} tokens", prompts.source)
    answers = (
        f"{spec.samples_per_prompt} answer{'s' * (spec.samples_per_prompt > 1)} of at most {spec.max_new_tokens:,}"
        " tokens"
    )
    yield PlanRow(
        "an iteration takes",
        f"{spec.train.prompts} prompts x {answers}",
        "train.batch_size, samples_per_prompt, max_new_tokens",
    )
    steps = f"iterations {spec.iterations:,} x ppo_epochs {spec.ppo_epochs} x minibatches {spec.minibatches}"
    yield PlanRow("steps", f"{spec.total_steps:,}", steps)
    if spec.uses_baseline:
        yield PlanRow(
            "reference answers",
            f"{spec.baseline_samples} to each prompt, before training",
            "reference_baseline, baseline_samples",
        )
    yield PlanRow("sampled in all", f"at most {sampled_tokens(spec):,} tokens", "the four of them")
    words = "prompts and answers, in every pass" + (
        ", for policy and value model" if spec.advantages.has_value_model else ""
    )
    yield PlanRow("tokens in all", f"at most {trained_tokens(spec, prompts):,}", f"{words}; conversations come on top")


class SamplingPlan(Training):
    """The planned numbers of a stage that samples what it trains on."""

    spec: PpoStage
    most = "at most about"
    not_counted = "loading, scoring and above all sampling come on top"

    def _terms(self, largest: Pass) -> list[Term]:
        if self.shape is None:
            return []
        device = self.machine.device
        run: dict[str, Any] = {"processes": self.processes, "of_machine": self.of_machine, "largest": largest}
        budget = self.machine.memory if device == "cuda" else None
        return ppo_needs.memory(self.shape, self.spec, device=device, budget=budget, **run)

    def _disk(self) -> list[Term]:
        return (
            []
            if self.shape is None
            else ppo_needs.disk(self.shape, self.spec, tokens=None, dequantises=self.origin.gguf)
        )

    def _largest(self, *, certain: bool = False) -> Pass:
        """A forward pass contains a prompt and as many of its answers as fit; a prompt with one answer is never cut.
        The lengths of the answers are not known beforehand."""
        spec, limit = self.spec, self.train.microbatch_tokens
        longest = (self.data.longest or spec.max_prompt_length) + spec.max_new_tokens
        if longest > limit and not certain:
            return Pass(self._padded(longest), "a prompt with its answer, max_new_tokens long")
        step = trained_tokens(spec, self.data) // (2 if spec.advantages.has_value_model else 1) // spec.total_steps
        filled = limit if certain is False or step > limit else step
        return Pass(self._padded(min(limit, filled)), "train.microbatch_tokens" if filled == limit else "a whole step")

    def _data_rows(self) -> list[PlanRow]:
        return []

    def _step_rows(self) -> list[PlanRow]:
        micro = f"{self.train.microbatch_tokens:,} tokens x {self.processes} process{'es' * (self.processes > 1)}"
        return [
            *rows(self.spec, self.data),
            PlanRow("a forward pass takes", micro, f"train.microbatch_tokens; on {self.machine.name}"),
        ]

    def _steps_and_tokens(self) -> tuple[int | None, int | None]:
        return self.spec.total_steps, trained_tokens(self.spec, self.data)


class PpoPlanner(TrainingPlanner):
    """Plans a stage that samples what it trains on."""

    def training(self, stage: ToPlan) -> SamplingPlan:
        """See :meth:`TrainingPlanner.training`."""
        return SamplingPlan(stage, prompts_of(stage.loaded, stage.name, stage.spec, stage.origin.local, stage.run))
