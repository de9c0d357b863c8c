"""``kind: ppo``: reinforcement learning from a reward model, as in ChatGLM-RLHF. Prompts and a reward model in, a
policy out.

This module loads models and data and saves the results; :mod:`align.stages.ppo.trainer` runs the iterations. The
reference is always the stage's starting policy. When adapters are trained, policy, reference and value model share one
base.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from align import files
from align.batching.batch import Batch
from align.batching.loader import Loader, StepPlan, plan_steps
from align.data.chat.encoder import Encoder
from align.data.report import DataReport
from align.data.trees.load import load_trees
from align.data.trees.prompts import EncodedPrompt, digest, load_prompts
from align.data.trees.store import TreeStore
from align.errors import InputError
from align.models.adapters import adapted
from align.models.canary import require_own_logprobs
from align.models.load import load_encoder, load_policy
from align.models.placement import size_of
from align.models.save import save_policy
from align.models.scalar.critic import ActorCritic, actor_critic
from align.models.scalar.heads import ScoreStats, load_scalar, score_notes
from align.recipe.blocks.rollout import Rollout
from align.recipe.blocks.scoring import EnsembleScorer, FunctionScorer, ScorerSpec
from align.recipe.checks import stage_references
from align.recipe.kinds.ppo import PpoStage
from align.recipe.reference_syntax import import_object
from align.recipe.schema import Data, Model
from align.rollout.engine import RolloutEngine, Sampling
from align.rollout.engines import open_engine, precision
from align.rollout.sync import CANARY_TOKENS
from align.scoring.open import open_scorer
from align.stages.context import StageContext
from align.stages.ppo.collect import PpoContext
from align.stages.ppo.report import answers_before_and_after, change_of, held_out, report
from align.stages.ppo.rollouts import Rollouts, parquet, reference_baselines
from align.stages.ppo.trainer import PpoTrainer
from align.stages.shared.clock import Clock
from align.stages.shared.training_run import kept_step, make_loader, trained, trainer_arguments
from align.training.launch import Ranks, ranks
from align.training.reference_logprobs import weights_digest


def run(spec: PpoStage, ctx: StageContext) -> None:
    """Train, and save the policy, its value model, and the sampled answers."""
    group = ranks()
    base = ctx.policy(spec.policy)
    encoder = load_encoder(base, cache=ctx.cache)
    ctx.encoder_digest = encoder.digest
    data = _read(spec, ctx, encoder, group)
    models, reference = _models(spec, ctx, base, encoder, group, [*data.prompts[0].ids, *data.prompts[0].ids][:12])
    clock = Clock()
    places: dict[str, Any] = {"cache": ctx.cache, "resolve": ctx.resolve}
    longest = spec.max_prompt_length + max(spec.max_new_tokens, CANARY_TOKENS)
    with open_engine(spec.rollout, base, encoder, max_length=longest, live=models.policy, **places) as engine:
        rollouts = _rollouts(spec, ctx, models, encoder, engine, data.prompts, group, clock)
        parts = PpoContext(
            spec=spec,
            models=models,
            reference=reference,
            rollouts=rollouts,
            prompts=data.prompts,
            baselines=_baselines(spec, ctx, rollouts, data, group) if spec.uses_baseline else None,
            plan=data.plan,
            loader=partial(make_loader, spec.train, encoder, group),
            sft=data.sft,
            eval_prompts=data.eval_prompts,
            eval_sft=data.eval_sft,
            ranks=group,
            clock=clock,
        )
        trainer = PpoTrainer(trainer_arguments(models, spec.train, ctx, group), parts)
        clock.take()  # the time for the reference's answers belongs to no iteration
        trainer.fit()
    _save(spec, ctx, trainer, encoder, base, data, group)


# Models and data to start from


@dataclass(frozen=True)
class _Data:
    """Prompts and conversations."""

    prompts: list[EncodedPrompt]
    plan: StepPlan
    eval_prompts: list[EncodedPrompt]
    sft: Loader | None
    eval_sft: list[Batch]
    report: DataReport

    @property
    def leaked(self) -> int:
        """Number of held-out prompts that are trained on as well."""
        trained = {tuple(prompt.ids) for prompt in self.prompts}
        return sum(tuple(prompt.ids) in trained for prompt in self.eval_prompts)


def _read(spec: PpoStage, ctx: StageContext, encoder: Encoder, group: Ranks) -> _Data:
    """Read and encode all data; print what was read and what was left out."""
    reading: dict[str, Any] = {"resolve": ctx.resolve, "encoder": encoder, "seed": ctx.seed}
    lines: list[str] = []

    def prompts_of(sources: Data, name: str, rejects: Path | None) -> tuple[list[EncodedPrompt], DataReport]:
        found, report = load_prompts(
            sources, max_length=spec.max_prompt_length, limit="max_prompt_length", rejects=rejects, **reading
        )
        lines.extend(f"{name}{line}" for line in report.lines())
        return found, report

    def conversations_of(sources: Data, name: str) -> TreeStore:
        longest = spec.max_prompt_length + spec.max_new_tokens
        limits: dict[str, Any] = {"max_length": longest, "too_long": "drop", "train_on": "all", "rejects": None}
        store, report = load_trees("conversation", sources, cache=ctx.cache, **limits, **reading)
        lines.extend(f"{name}{line}" for line in report.lines())
        return store

    prompts, report = prompts_of(spec.prompts, "", ctx.out / "rejects.jsonl" if group.first else None)
    plan = _plan([1] * len(prompts), ctx.seed, spec.train.prompts, spec.iterations)
    held_out = [] if spec.eval_prompts is None else prompts_of(spec.eval_prompts, "held out: ", None)[0]
    sft, eval_sft = None, []
    if spec.sft_data is not None:
        store = conversations_of(spec.sft_data, "sft: ")
        size = spec.sft_batch_size or -(-spec.train.prompts // spec.minibatches)
        sft = make_loader(
            spec.train, encoder, group, store.__getitem__, _plan(store.sizes, ctx.seed, size, spec.total_steps)
        )
    if spec.eval_sft_data is not None:
        store = conversations_of(spec.eval_sft_data, "held out: ")
        eval_sft = make_loader(spec.train, encoder, group, store.__getitem__, plan).batches(range(len(store)))
    found = _Data(prompts, plan, held_out, sft, eval_sft, report)
    if group.first:
        for line in lines:
            ctx.console.print(line, highlight=False, markup=False, soft_wrap=True)
        if found.leaked:
            ctx.warn(
                f"{found.leaked:,} of {len(held_out):,} held-out prompts are trained on too: the held-out numbers are"
                " too good"
            )
    return found


def _plan(sizes: Sequence[int] | npt.NDArray[np.int64], seed: int, batch_size: int, steps: int) -> StepPlan:
    """``steps`` steps of ``batch_size`` examples, taken from as many shuffled passes over the data as needed."""
    passes = steps * batch_size / len(sizes)
    return plan_steps(sizes, seed=seed, epochs=passes + 1, batch_size=batch_size, max_steps=steps)


def _models(
    spec: PpoStage, ctx: StageContext, base: Model, encoder: Encoder, group: Ranks, canary: Sequence[int]
) -> tuple[ActorCritic, nn.Module | None]:
    """Policy and value model to train, and the reference, unless it is the policy with its adapter off."""
    quantize = spec.lora.quantize if spec.lora else None
    loading: dict[str, Any] = {
        "dtype": spec.train.dtype,
        "device": group.device,
        "cache": ctx.cache,
        "quantize": quantize,
    }
    loaded = load_policy(base, **loading)
    require_own_logprobs(loaded, canary, spec.train.layout)
    policy = trained(loaded, spec.lora, ctx.seed)
    if group.first and spec.lora is not None:
        ctx.console.print(f"{ctx.name}  {adapted(policy)}", highlight=False, markup=False, soft_wrap=True)
    reference = None if spec.lora is not None else copy.deepcopy(policy).requires_grad_(False).eval()
    if not spec.advantages.has_value_model:
        return ActorCritic(policy, None), reference
    start = None
    if spec.value_start is not None:
        place = Model(path=str(ctx.resolve(spec.value_start)))
        if score_notes(place).encoder != encoder.digest:
            message = (
                f"{spec.value_start} has another tokenizer or chat template than the policy, whose tokens the value"
                " model has to read"
            )
            raise InputError(message, hint="write value_init: policy")
        start = load_scalar(place, **loading)
    models = actor_critic(policy, start, spec.lora)
    if group.first and spec.lora is not None and not models.shared:
        text = "the value model does not start from an adapter on the policy's base, so it is a second model in memory"
        ctx.console.print(f"{ctx.name}  note: {text}", highlight=False, soft_wrap=True)
    return models, reference


def _rollouts(
    spec: PpoStage,
    ctx: StageContext,
    models: ActorCritic,
    encoder: Encoder,
    engine: RolloutEngine,
    prompts: Sequence[EncodedPrompt],
    group: Ranks,
    clock: Clock,
) -> Rollouts:
    return Rollouts(
        models,
        encoder,
        engine,
        open_scorer(spec.reward, resolve=ctx.resolve, cache=ctx.cache, device=group.device, ids_from=encoder.digest),
        precision=precision(spec.rollout),
        canaries=[min((prompt.ids for prompt in prompts), key=len)],
        seed=ctx.seed,
        ranks=group,
        clock=clock,
        samples_live=spec.rollout.engine == "transformers",
    )


def _baselines(spec: PpoStage, ctx: StageContext, rollouts: Rollouts, data: _Data, group: Ranks) -> Tensor:
    """The mean score of the reference's answers to every prompt that will be used, fp32 [number of prompts]; the
    answers are written to a file."""
    used = sorted({int(number) for number in data.plan.order[: data.plan.bounds[-1]]})
    prompts = [data.prompts[number] for number in used]
    sampling = Sampling(spec.max_new_tokens, spec.baseline_samples, spec.temperature)
    key = {
        "policy": weights_digest(rollouts.models.policy),
        "encoder": rollouts.encoder.digest,
        "prompts": digest(prompts),
        "reward": _content(spec.reward, ctx.resolve),
        "sampling": [sampling.max_new_tokens, sampling.n, sampling.temperature, ctx.seed],
        "rollout": _content(spec.rollout.without_neutral(), ctx.resolve),
    }
    found, rows = reference_baselines(
        rollouts,
        prompts,
        sampling,
        penalty=spec.unfinished_penalty,
        key=files.digest_json(key),
        cache=ctx.cache / "baseline",
        ranks=group,
    )
    if group.first:
        files.atomic_write(files.make_folder(ctx.work / "rollouts") / "reference.parquet", parquet(rows))
        text = f"reference answers to {len(prompts)} prompts score {float(found.mean()):.3f} on average"
        ctx.console.print(f"{ctx.name}  {text}", highlight=False, soft_wrap=True)
    baselines = torch.full((len(data.prompts),), torch.nan)
    baselines[used] = found
    return baselines


def _content(part: ScorerSpec | Rollout, resolve: Callable[[str], Path | str]) -> list[Any]:
    """What scores or samples depend on: settings, digests of models and files, and the source code of functions."""
    found: list[Any] = [part.model_dump(mode="json")]
    for referred in stage_references.find(part):
        place = resolve(referred.text)
        found.append(files.digest_path(place) if isinstance(place, Path) else place)
    if isinstance(part, FunctionScorer):
        source = inspect.getsourcefile(import_object(part.function))
        found.append(files.sha256_file(Path(source)) if source else None)
    return [
        *found,
        *(_content(member, resolve) for member in (part.ensemble if isinstance(part, EnsembleScorer) else ())),
    ]


# Results


def _save(
    spec: PpoStage,
    ctx: StageContext,
    trainer: PpoTrainer,
    encoder: Encoder,
    base: Model,
    data: _Data,
    group: Ranks,
) -> None:
    """Save policy, value model, answers of every iteration, and the report."""
    models, last = trainer.models, trainer.history[-1]
    models.use("policy")
    merged = spec.lora is not None and spec.lora.save_merged
    settings: dict[str, Any] = {"base": base, "writes": group.first}
    saved = save_policy(models.policy, encoder, ctx.out, save_merged=merged, **settings)
    if models.value is not None:
        returns = ScoreStats(last["return"], last["return_std"], int(last["answers"]))
        models.save_value(encoder, ctx.out / "value", scores=returns, layout=spec.train.layout, **settings)
    if not group.first:
        return
    outcome = {
        "iterations": len(trainer.history),
        "last_iteration": dict(last),
        "phase_seconds": {phase: round(seconds, 2) for phase, seconds in trainer.seconds.items()},
        "unhealthy": trainer.unhealthy,
        "held_out_leaked": data.leaked,
        **saved,
        "parameters": size_of(models),
    }
    before, after = (held_out(trainer.rollouts_folder, step) for step in (0, kept_step(trainer)))
    answers = answers_before_and_after(ctx.name, before, after)
    report(ctx, trainer, data.report, answers, outcome, change_of(before, after), printed=spec.samples)
