"""The memory and disk that PPO needs besides those for training one policy: value model, reference, reward models, and
engine.

Bytes; symbols as in :mod:`align.sizing.shapes`. Reward models are taken to be as large as the policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from align.recipe.blocks.scoring import EnsembleScorer, ImplicitScorer, ModelScorer, ScorerSpec
from align.recipe.kinds.ppo import PpoStage
from align.sizing import needs
from align.sizing.moments import Pass, Term, trained_parameters
from align.sizing.needs import count
from align.sizing.shapes import Shape


def memory(
    shape: Shape,
    spec: PpoStage,
    *,
    device: str,
    processes: int = 1,
    of_machine: int | None = None,
    budget: float | None = None,
    largest: Pass | None = None,
) -> list[Term]:
    """Peak memory of one process, as a sum of terms; the last one is the allocator's slack.

    Args:
        device: "cpu" or "cuda".
        processes, of_machine: as of :func:`align.sizing.needs.memory`.
        budget: bytes of the GPU, of which the cache of an engine takes its share.
        largest: the largest forward pass of training; a full micro-batch when None.
    """
    run: dict[str, Any] = {"device": device, "processes": processes, "of_machine": of_machine}
    *used, slack = needs.memory(shape, spec.train, spec.lora, largest=largest, **run)
    parts = needs.parts_of(spec.train, processes, of_machine)
    share = slack.amount / sum(term.amount for term in used)
    used = [term for term in used if term.name != "loading"]
    used += [*_value_model(shape, spec, parts), *_frozen(shape, spec, parts)]
    if parts > 1:
        used += _put_together(shape, spec, sum(term.amount for term in used))
    slack = Term(
        "slack",
        share * sum(term.amount for term in used),
        f"{share:.0%}, held by the allocator; an engine takes what it takes at once",
    )
    engine = [Term(*part) for part in spec.rollout.memory(shape.parameters, device, budget)]
    return [*used, *engine, slack]


def _width(spec: PpoStage) -> int:
    return 4 if spec.train.dtype == "fp32" else 2


def _trained(shape: Shape, spec: PpoStage) -> tuple[int, int]:
    """Number of trained parameters of a value model, and bytes of each."""
    if spec.lora is not None:
        return trained_parameters(shape, spec.lora) + shape.hidden, 4
    return shape.parameters - (0 if shape.tied else shape.vocab * shape.hidden) + shape.hidden, _width(spec)


def _value_model(shape: Shape, spec: PpoStage, parts: int) -> list[Term]:
    if not spec.advantages.has_value_model:
        return []
    trained, width = _trained(shape, spec)
    words = "an adapter on the policy's base" if spec.lora else "a whole model without LM head"
    how = f"{words}: {count(trained)}, with gradients and moments" + _share(parts)
    return [Term("value model", 4 * trained * width / parts, how)]


def _put_together(shape: Shape, spec: PpoStage, divided: float) -> list[Term]:
    """As :func:`align.sizing.needs.memory` has them for the policy: what else is whole for a while in each process.

    Args:
        divided: bytes of everything else.
    """
    width, copies = _width(spec), 1
    terms = []
    if spec.lora is None:
        embeddings = shape.vocab * shape.hidden
        copies += 1 + spec.advantages.has_value_model
        value = embeddings * (width + 8) * spec.advantages.has_value_model
        amount = (shape.parameters - shape.matrices) * width + value
        terms = [Term("other whole embeddings", amount, "of the reference, and of the value model with gradients")]
    beyond = copies * shape.parameters * width - divided - sum(term.amount for term in terms)
    if beyond > 0:
        terms.append(Term("loading", beyond, "what whole models take more, before they are divided"))
    return terms


def _share(parts: int) -> str:
    return f", divided among {parts} processes" if parts > 1 else ""


def _frozen(shape: Shape, spec: PpoStage, parts: int) -> list[Term]:
    of_reference = shape.parameters * _width(spec) / parts
    terms = [] if spec.lora else [Term("reference", of_reference, "a copy of the starting policy" + _share(parts))]
    for model, dtype in _models_in(spec.reward):
        words = f"{model}, taken to be as large as the policy, in {dtype}"
        terms.append(Term("reward model", shape.parameters * (4 if dtype == "fp32" else 2), words))
    return terms


def _models_in(scorer: ScorerSpec) -> Iterator[tuple[str, str]]:
    """Reference and precision of each model that scores."""
    if isinstance(scorer, ModelScorer):
        yield scorer.model, scorer.dtype
    elif isinstance(scorer, ImplicitScorer):
        yield from ((model, scorer.dtype) for model in (scorer.policy, scorer.reference))
    elif isinstance(scorer, EnsembleScorer):
        for member in scorer.ensemble:
            yield from _models_in(member)


def disk(shape: Shape, spec: PpoStage, *, tokens: int | None, dequantises: bool) -> list[Term]:
    """Disk space of the run folder at its fullest; the answers themselves are small."""
    terms = needs.disk(shape, spec.train, spec.lora, tokens=tokens, dequantises=dequantises)
    if not spec.advantages.has_value_model:
        return terms
    trained, width = _trained(shape, spec)
    copies = spec.train.save_total_limit + 1 if spec.train.save_steps else 1
    return [
        *terms,
        Term("value model in checkpoints", 3 * trained * width * copies, "as the policy"),
        Term("saved value model", trained * width, "the folder `value`"),
    ]
