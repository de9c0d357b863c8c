"""``kind: trl``: runs one of TRL's trainers, with the data, artefacts, caching and report of the other stages.

The loop, the loss and the sampling are TRL's. The inputs (tokens, weights, scores) and the outputs (policy, metrics,
checkpoints) are like those of other stages.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import trl
from torch import nn
from transformers import PrinterCallback, set_seed

from align import files
from align.data.answer_file import AnswerRow, write_answers
from align.data.chat.encoder import Encoder
from align.errors import InputError, Interrupted, Problem
from align.models.adapters import is_lora, lora_config, trainable_parameters
from align.models.files.quiet import no_progress_bars
from align.models.generate import answer, embedding_rows
from align.models.load import load_encoder, load_policy
from align.models.save import save_policy, save_weights
from align.recipe.kinds.trl_source import config_name
from align.recipe.schema import TrlStage
from align.scoring.open import open_scorer
from align.scoring.scorer import Answer, Scorer
from align.signals import stop_requested
from align.stages.context import StageContext
from align.stages.shared.training_run import (
    before_and_after,
    greedy_answers,
    keep_logs,
    remembered,
    say_adapters,
    trained,
)
from align.stages.trl import data as trl_data
from align.stages.trl.callback import TrlCallback, TrlCheckpoint, held_out, newest_checkpoint, sealed
from align.stages.trl.data import TrlData
from align.terminal import byte_size
from align.training.launch import ranks
from align.training.memory import keep_freed_memory, peak_memory_bytes


def run(spec: TrlStage, ctx: StageContext) -> None:
    """Train with TRL and save the policy; resumes from its checkpoint after an interruption."""
    group = ranks()
    if group.world > 1:
        raise InputError(f"{ctx.name}: `kind: trl` runs in one process", hint="leave --nproc out")
    config = _config(spec, ctx, group.device)
    base = ctx.policy(spec.policy)
    encoder = load_encoder(base, cache=ctx.cache)
    ctx.encoder_digest = encoder.digest
    data = trl_data.read(spec, ctx, encoder)
    for line in data.lines():
        ctx.console.print(line, highlight=False, markup=False, soft_wrap=True)
    policy = load_policy(base, dtype=spec.dtype, device=group.device, cache=ctx.cache)
    if is_lora(policy) and spec.lora is not None:
        message = "the policy is an adapter, and TRL would take its base as the reference"
        hint = "leave `lora` out: the adapter is merged and all weights are trained"
        raise InputError(Problem(message, key=f"stages.{ctx.name}.lora", hint=hint))
    if group.device.type == "cpu":
        keep_freed_memory()
    own_adapter = is_lora(policy)
    model: Any = trained(policy, None, ctx.seed)
    scorer = None if spec.reward is None else _open(spec, ctx)
    with no_progress_bars(), sealed(), _its_own_name(model):
        trainer, callback, since = _build(spec, ctx, model, encoder, data, config, scorer)
        say_adapters(ctx, trainer.model, new=spec.lora is not None, own=own_adapter)
        before = remembered(ctx, "answers-before", lambda: _answers(model, encoder, data), group)
        first = remembered(ctx, "eval-before", lambda: _evaluate(trainer, data), group)
        if (signum := stop_requested()) is not None:
            raise Interrupted(signum, f"{ctx.name}: stopped before training; the same command goes on")
        set_seed(ctx.seed)  # so that the samples do not depend on whether something was evaluated before
        trainer.train(resume_from_checkpoint=None if since is None else str(since.folder))
        _require_the_end(ctx, trainer)
        last = _evaluate(trainer, data)
        result: nn.Module = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    merged = spec.lora is not None and spec.lora.save_merged
    saved = save_policy(result, encoder, ctx.out, base=base, save_merged=merged)
    keep_logs(ctx)
    outcome = {
        "trainer": spec.trainer,
        "trl": trl.__version__,
        "steps": trainer.state.global_step,
        "tokens": callback.tokens,
        "seconds": round(callback.seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "trainable_parameters": sum(p.numel() for p in trainable_parameters(result).values()),
        "eval_before": first,
        "eval_after": last,
        **saved,
    }
    versions = {0: before, trainer.state.global_step: _answers(result, encoder, data)}
    answers = greedy_answers(ctx.name, encoder, data.shown, versions)
    write_answers(ctx.out, answers)
    files.write_json(ctx.out / "report.json", {**outcome, "data": data.report.as_json()})
    ctx.note(outcome)
    _show(ctx, outcome, answers)


# Inputs for TRL


def _config(spec: TrlStage, ctx: StageContext, device: torch.device) -> Any:
    """The trainer's config. Raises InputError for arguments that contradict each other."""
    cls = getattr(_import(spec.method.module.removesuffix("_trainer") + "_config"), config_name(spec.trainer))
    known = cls.__dataclass_fields__
    evaluates = spec.eval_data is not None
    defaults: dict[str, Any] = {
        "bf16": False,  # TRL's default is true, even on a CPU
        "logging_steps": 1,
        "save_strategy": "steps" if "save_steps" in spec.args else "no",  # an interruption saves in any case
        "save_total_limit": 2,
        "eval_strategy": "steps" if evaluates and "eval_steps" in spec.args else "no",
        "dataloader_pin_memory": device.type == "cuda",
    }
    if spec.method.rows == "prompts" and evaluates:  # whole groups of answers in a batch
        defaults["per_device_eval_batch_size"] = spec.argument("num_generations_eval") or spec.argument(
            "num_generations"
        )
    own: dict[str, Any] = {
        "output_dir": str(ctx.work / "trl"),
        "seed": ctx.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # otherwise a loss that is NaN is logged as the mean of those before it
        "use_cpu": device.type == "cpu",
        "max_length": spec.max_length,
        "remove_unused_columns": spec.method.rows == "answers",
    }
    try:
        return cls(**defaults | spec.args | {name: value for name, value in own.items() if name in known})
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise _refused(ctx, error) from error


def _import(module: str) -> Any:
    """Import a module of TRL, hiding an installed vLLM: TRL would import it for an option that the stage does not
    offer."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # the manual says which trainers are experimental
    utils: Any = importlib.import_module("trl.import_utils")
    available, utils.is_vllm_available = utils.is_vllm_available, lambda min_version=None: False
    try:
        return importlib.import_module(module)
    finally:
        utils.is_vllm_available = available


def _refused(ctx: StageContext, error: Exception) -> InputError:
    """An error about arguments that TRL refuses, as one line that names the recipe key."""
    return InputError(Problem(" ".join(str(error).split())[:400], key=f"stages.{ctx.name}.args"))


def _open(spec: TrlStage, ctx: StageContext) -> Scorer:
    assert spec.reward is not None
    return open_scorer(
        spec.reward, resolve=ctx.resolve, cache=ctx.cache, device=ranks().device, ids_from=ctx.encoder_digest
    )


def _build(
    spec: TrlStage, ctx: StageContext, model: Any, encoder: Encoder, data: TrlData, config: Any, scorer: Scorer | None
) -> tuple[Any, TrlCallback, TrlCheckpoint | None]:
    """The trainer, its callback, and the checkpoint to resume from."""
    output = Path(config.output_dir)
    since = newest_checkpoint(output)
    callback = TrlCallback(ctx, since)
    model.generation_config.eos_token_id = list(encoder.stop_ids)
    more: dict[str, Any] = {}
    if spec.lora is not None:
        more["peft_config"] = lora_config(model, spec.lora)
    elif spec.method.reference and getattr(config, "beta", 1.0) != 0.0:
        # TRL loads the reference from the path that the policy names as its origin. A GGUF file or a merged adapter
        # cannot be loaded from there.
        save_weights(model, files.make_folder(ctx.work / "start"))
        model.config._name_or_path = str(ctx.work / "start")
    if scorer is not None:
        more["reward_funcs"] = [_reward(scorer, encoder, data)]
        if unknown := list(range(encoder.vocabulary, embedding_rows(model))):  # embedding rows without a token
            config.generation_kwargs = {"suppress_tokens": unknown, **(config.generation_kwargs or {})}
    cls = getattr(_import(spec.method.module), spec.trainer)
    try:
        trainer = cls(
            model=model,
            args=config,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            processing_class=data.text_ids.tokenizer(),
            callbacks=[callback],
            **more,
        )
    except (ValueError, NotImplementedError, ImportError) as error:
        raise _refused(ctx, error) from error
    trainer.remove_callback(PrinterCallback)
    if since is not None:
        ctx.console.print(f"{ctx.name}  continues from step {since.step}", highlight=False)
    return trainer, callback, since


class TrlReward(Protocol):
    """A reward function as TRL calls it: with columns of the data and of the answers, one entry for each answer."""

    def __call__(self, *, row: Sequence[int], completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        """The reward of each answer. ``row`` is its prompt's index in ``TrlData.asked``."""
        ...


def _reward(scorer: Scorer, encoder: Encoder, data: TrlData) -> TrlReward:
    """The scorer as a reward function of TRL."""

    def reward(*, row: Sequence[int], completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        # Some trainers pass an answer with its padding, which is not part of the answer.
        return scorer.score(
            [
                Answer.sampled(data.asked[int(place)], ids, encoder)
                for place, ids in zip(row, completion_ids, strict=True)
            ]
        )

    return reward


@contextmanager
def _its_own_name(model: Any) -> Iterator[None]:
    """Inside, the name that the model gives as its origin may be changed; afterwards it is restored."""
    name = model.config._name_or_path
    try:
        yield
    finally:
        model.config._name_or_path = name


# Results


def _require_the_end(ctx: StageContext, trainer: Any) -> None:
    """Raises Interrupted when a signal stopped the training, and InputError when there was none."""
    state, signum = trainer.state, stop_requested()
    if signum is not None and state.global_step < state.max_steps:
        raise Interrupted(
            signum, f"{ctx.name}: saved at step {state.global_step} of {state.max_steps}; the same command goes on"
        )
    if state.global_step == 0:
        prompts = getattr(trainer.args, "generation_batch_size", 0) // getattr(trainer.args, "num_generations", 1)
        hint = (
            f"a batch takes {prompts} prompts (generation_batch_size / num_generations)"
            if prompts
            else "lower the batch size"
        )
        raise InputError(Problem("the data are too few for a single step", key=f"stages.{ctx.name}.data", hint=hint))


def _evaluate(trainer: Any, data: TrlData) -> dict[str, float] | None:
    """TRL's evaluation on the held-out data, if there are any."""
    return None if data.held_out is None else held_out(trainer.evaluate())


def _answers(model: nn.Module, encoder: Encoder, data: TrlData) -> list[list[int]]:
    """Greedy answers to the prompts of the report, as token ids."""
    return answer(model, encoder, [ids for _, ids in data.shown], max_new_tokens=64)


def _show(ctx: StageContext, outcome: Mapping[str, Any], answers: Sequence[AnswerRow]) -> None:
    before_and_after(ctx, outcome["eval_before"], outcome["eval_after"], answers)
    memory = byte_size(outcome["peak_memory_bytes"])
    ctx.console.print(
        f"{ctx.name}  {outcome['steps']} steps of {outcome['trainer']}, {outcome['seconds']} s, peak memory {memory}",
        highlight=False,
    )
