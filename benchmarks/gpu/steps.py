"""Our trainers, as they are, on models of random weights that are made on the device: what a step takes.

Every step trains on the same examples, so that kernels are compiled in the first step and never in a timed one.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from align.data.tree import Branch, Tree
from align.sizing.shapes import GLM_4_9B, Shape
from benchmarks import ours
from benchmarks.gpu.parts import Skipped
from benchmarks.harness import Work
from benchmarks.measure import Recorder, peak_memory

TIMED = 3
"""Steps between the first, which warms up, and the last, which is profiled and not timed."""
PAIRS = 4
"""Prompts of a step are a multiple of it: TRL's micro-batches of as many pairs then do not reach into the next step."""
LLAMA_1B = Shape(16, 2048, 32, 8, 64, 8192, 128256, tied=True)
"""The shape of Llama-3.2-1B: 1.24 billion parameters."""
NOT_HERE = {"reward model", "rollout engine", "rollout cache"}
"""Terms of a plan for what does not run in these parts: scores are a function, answers are made up."""
NOT_TENSORS = {"runtime", "slack"}
"""Terms of a plan for what a GPU's memory holds besides tensors."""


@dataclass(frozen=True)
class Size:
    """How much is trained on. Lengths are drawn evenly, ends included."""

    microbatch: int = 8192
    """Tokens."""
    step: int = 32768
    """Tokens of a step, at least; a prompt with its answers counts once."""
    prompt: tuple[int, int] = (64, 512)
    answer: tuple[int, int] = (64, 448)


TINY = Size(microbatch=256, step=384, prompt=(4, 16), answer=(4, 24))


@dataclass(frozen=True)
class Setting:
    """A model, how it is trained, and on what."""

    family: str
    shape: Shape
    keys: dict[str, Any]
    """Keys of the recipe's stage."""
    size: Size = Size()


def setting(model: str, *, tiny: bool) -> Setting:
    """Of ``llama`` (all weights in fp32, bf16 autocast) or ``glm`` (LoRA on weights in bf16, gradient checkpointing).

    ``tiny``: two small layers in fp32, which a CPU computes exactly enough to compare losses.
    """
    made = {
        "llama": Setting("llama", LLAMA_1B, {"train": {"dtype": "fp32", "autocast": "bf16"}}),
        "glm": Setting(
            "glm4",
            GLM_4_9B,
            {
                "lora": {"rank": 32, "alpha": 64},
                "train": {"dtype": "bf16", "autocast": "bf16", "gradient_checkpointing": True},
            },
            Size(step=16384),
        ),
    }[model]
    if not tiny:
        return made
    shape = replace(made.shape, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=32, intermediate=96, vocab=512)
    exact = {**made.keys["train"], "dtype": "fp32", "autocast": None}
    return replace(made, shape=shape, keys={**made.keys, "train": exact}, size=TINY)


def language_model(chosen: Setting) -> Any:
    """The model with random weights, the same for everybody in every process, on the device."""
    import torch
    from transformers import AutoModelForCausalLM, Glm4Config, LlamaConfig

    from align.models.load import DTYPES
    from align.training.launch import ranks

    shape = chosen.shape
    config = {"llama": LlamaConfig, "glm4": Glm4Config}[chosen.family](
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        attention_bias=shape.qkv_bias,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=16384,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    with ranks().device:
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[chosen.keys["train"]["dtype"]])


def work(size: Size, answers: int, steps: int) -> Work:
    """``steps`` times the same step, of prompts with so many answers each; the tokens are random."""
    rng = np.random.default_rng(answers)

    def tokens(bounds: tuple[int, int]) -> Any:
        return rng.integers(3, 400, rng.integers(*bounds, endpoint=True), dtype=np.int32)

    def branch() -> Branch:
        ids = tokens(size.answer)
        return Branch(ids, np.ones(len(ids), dtype=np.bool_))

    trees: list[Tree] = []
    while sum(tree.size for tree in trees) < size.step or len(trees) % PAIRS:
        trees.append(Tree(str(len(trees)), tokens(size.prompt), tuple(branch() for _ in range(answers))))
    lengths = f"prompts of {size.prompt[0]} to {size.prompt[1]}, answers of {size.answer[0]} to {size.answer[1]}"
    return Work(trees, [list(range(len(trees)))] * steps, f"random tokens, {lengths}")


def measured(kind: str, model: str, rejected: int, tiny: bool) -> dict[str, Any]:
    """What an optimiser step of a stage takes: seconds, tokens, operations, memory beside the plan's, kinds of kernels.

    Args:
        kind: ``sft``, ``dpo``, ``reward`` or ``ppo``.
        model: see :func:`setting`.
        rejected: rejected answers to each prompt, of ``dpo`` and ``reward``.

    Raises:
        Skipped: torch cannot compile the attention of trees for a GPU as it has to be.
    """
    import inspect

    import torch

    from align.recipe.schema import Lora

    if torch.cuda.is_available() and "recompile_limit" not in inspect.signature(torch.compile).parameters:
        raise Skipped(f"needs a torch.compile with recompile_limit, as in torch 2.13; this is {torch.__version__}")

    torch.manual_seed(0)
    chosen, recorder = setting(model, tiny=tiny), Recorder()
    run, spec = trainer_of(kind, chosen, rejected, Path(tempfile.mkdtemp(prefix="align-bench-")), recorder)
    run.model.train()
    steps = iter(run.steps())
    for _ in range(1 + TIMED):
        batches = next(steps)
        run.optimizer_step(batches)
    found = recorder.result()
    memory = _memory(kind, chosen, spec, batches, found)
    batches = next(steps)
    lora: Lora | None = spec.lora
    shares = _profiled(super(type(run), run).optimizer_step, batches)
    seconds = statistics.median(found["seconds"])
    tokens = sum(batch.num_tokens for batch in batches if not _of_value_model(batch))
    return {
        "seconds": found["seconds"],
        "warm_up_seconds": found["warm_up_seconds"],
        "losses": found["losses"],
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "flops": sum(
            _flops(chosen.shape, lora, batch, lm_head=kind != "reward" and not _of_value_model(batch))
            for batch in batches
        ),
        "microbatches": len(batches),
        **memory,
        **shares,
    }


def _flops(shape: Shape, lora: Any, batch: Any, *, lm_head: bool) -> float:
    from benchmarks.gpu.counts import model_flops

    return model_flops(shape, lora, [batch], lm_head=lm_head)


def _of_value_model(batch: Any) -> bool:
    from align.stages.ppo.experience import ValueBatch

    return isinstance(batch, ValueBatch)


# Trainers


def _arguments(chosen: Setting, net: Any, train: Any, folder: Path) -> Any:
    from rich.console import Console

    from align.training.launch import ranks
    from align.training.trainer import TrainerArguments

    return TrainerArguments(
        model=net, train=train, work=folder, name="gpu", seed=0, console=Console(quiet=True), ranks=ranks()
    )


def _trained(net: Any, spec: Any) -> Any:
    from align.models.adapters import add_lora

    return net if spec.lora is None else add_lora(net, spec.lora)


def _loader(chosen: Setting, spec: Any, trees: Work) -> Any:
    from align.batching.loader import StepPlan
    from align.stages.shared.training_run import make_loader
    from align.training.launch import ranks
    from tests.support.rollouts import ENCODER

    per_step = len(trees.trees)
    order = np.array([i for step in trees.steps for i in step])
    plan = StepPlan(order, np.arange(0, len(order) + 1, per_step), steps_per_epoch=1)
    return make_loader(spec.train, ENCODER, ranks(), trees.trees.__getitem__, plan)


def _keys(chosen: Setting, kind: str, trees: Work, **more: Any) -> dict[str, Any]:
    train = {
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "microbatch_tokens": chosen.size.microbatch,
        "batch_size": len(trees.trees),
    }
    return {"kind": kind, "data": "given", **more, **chosen.keys, "train": {**train, **chosen.keys["train"]}}


def _sft(chosen: Setting, rejected: int, folder: Path, recorder: Recorder) -> Any:
    from align.recipe.schema import SftStage
    from align.stages.sft import SftTrainer

    trees = work(chosen.size, 1, TIMED + 2)
    spec = SftStage.model_validate(_keys(chosen, "sft", trees))
    net = _trained(language_model(chosen), spec)
    arguments = _arguments(chosen, net, spec.train, folder)
    return ours.timed(SftTrainer, recorder)(arguments, _loader(chosen, spec, trees), (), spec.loss), spec


def _dpo(chosen: Setting, rejected: int, folder: Path, recorder: Recorder) -> Any:
    from align.recipe.schema import DpoStage
    from align.stages.dpo import DpoTrainer
    from align.training.precision import autocast
    from align.training.reference_logprobs import reference_for

    trees = work(chosen.size, 1 + rejected, TIMED + 2)
    spec = DpoStage.model_validate(_keys(chosen, "dpo", trees, beta=0.1))
    net = _trained(language_model(chosen), spec)
    arguments, loader = _arguments(chosen, net, spec.train, folder), _loader(chosen, spec, trees)
    reference = reference_for(
        net,
        loader.batches(range(len(trees.trees))),
        [len(tree.branches) for tree in trees.trees],
        key="reference",
        cache=folder,
        ranks=arguments.ranks,
        autocast=autocast(spec.train, arguments.ranks.device),
        own_attention=False,
        microbatch_tokens=spec.train.microbatch_tokens,
    )
    return ours.timed(DpoTrainer, recorder)(arguments, loader, (), spec, reference, None), spec


def _reward(chosen: Setting, rejected: int, folder: Path, recorder: Recorder) -> Any:
    from align.models.load import without_lm_head
    from align.models.scalar.heads import ScalarModel
    from align.recipe.schema import RewardStage
    from align.stages.reward.run import RewardTrainer

    trees = work(chosen.size, 1 + rejected, TIMED + 2)
    spec = RewardStage.model_validate(_keys(chosen, "reward", trees))
    net = ScalarModel(_trained(without_lm_head(language_model(chosen)), spec))
    arguments = _arguments(chosen, net, spec.train, folder)
    return ours.timed(RewardTrainer, recorder)(arguments, _loader(chosen, spec, trees), (), spec), spec


def _ppo(chosen: Setting, rejected: int, folder: Path, recorder: Recorder) -> Any:
    """The answers are random and of one length: no engine samples. Scores are a function."""
    from align.recipe.schema import PpoStage
    from tests.support.rollouts import FixedAnswers, prompts, trainer

    prompt, answer, each = chosen.size.prompt[1], chosen.size.answer[1], 2
    count = max(1, chosen.size.step // (prompt + each * answer))
    keys = _keys(chosen, "ppo", Work([], [], ""), reward="given/given", prompts="given", value_init="policy")
    del keys["data"]
    keys |= {"iterations": TIMED + 2, "samples_per_prompt": each, "max_new_tokens": answer}
    keys["train"]["batch_size"] = count
    spec = PpoStage.model_validate(keys)
    run = trainer(
        folder,
        spec,
        net=_trained(language_model(chosen), spec),
        score=lambda given: float(len(given.ids) % 3),
        data=prompts(spec.train.prompts, prompt),
        engine=FixedAnswers(answer),
        proved=False,
    )
    run.__class__ = ours.timed(type(run), recorder)
    return run, spec


def trainer_of(kind: str, chosen: Setting, rejected: int, folder: Path, recorder: Recorder) -> tuple[Any, Any]:
    """A stage's trainer whose steps are recorded, and the stage; arguments as of :func:`measured`."""
    made: tuple[Any, Any] = _TRAINERS[kind](chosen, rejected, folder, recorder)
    return made


_TRAINERS = {"sft": _sft, "dpo": _dpo, "reward": _reward, "ppo": _ppo}


# What a step took


def _memory(kind: str, chosen: Setting, spec: Any, batches: Sequence[Any], found: dict[str, Any]) -> dict[str, Any]:
    """Peak memory in bytes, and what ``align plan`` says of the same stage with its largest micro-batch: of the tensors
    on a GPU; of the whole process on a CPU."""
    import torch

    from align.sizing import needs, ppo_needs

    device = "cuda" if torch.cuda.is_available() else "cpu"
    largest = needs.Pass(max(batch.input_ids.numel() for batch in batches), "largest micro-batch")
    if kind == "ppo":
        terms = ppo_needs.memory(chosen.shape, spec, device=device, largest=largest)
    else:
        shape = replace(chosen.shape, lm_head=kind != "reward")
        terms = needs.memory(shape, spec.train, spec.lora, device=device, largest=largest)
    left_out = NOT_HERE | (NOT_TENSORS if device == "cuda" else set())
    counted = {term.name: term.amount for term in terms if term.name not in left_out}
    return {
        "peak_bytes": found["gpu_peak_bytes"] if device == "cuda" else peak_memory(),
        "reserved_bytes": torch.cuda.max_memory_reserved() if device == "cuda" else None,
        "plan_bytes": sum(counted.values()),
        "plan_terms": counted,
    }


def _profiled(step: Any, batches: Sequence[Any]) -> dict[str, Any]:
    """One more step, which is not timed: the share of each kind of kernel in the time that all kernels took (on a CPU
    of each kind of operation, each without those inside it)."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.gpu.counts import KINDS, kernel_kind

    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]) as profiler:
        step(batches)
        if gpu:
            torch.cuda.synchronize()
    seconds, names = dict.fromkeys(KINDS, 0.0), dict[str, float]()
    for event in profiler.events() or ():
        if (event.device_type == DeviceType.CUDA) != gpu or getattr(event, "is_user_annotation", False):
            continue
        took = (event.time_range.elapsed_us() if gpu else event.self_cpu_time_total) / 1e6
        kind = kernel_kind(event.name)
        seconds[kind] += took
        if kind == "other":
            names[event.name[:80]] = names.get(event.name[:80], 0.0) + took
    total = sum(seconds.values())
    return {
        "kernel_seconds": total,
        "kernel_shares": {kind: value / total for kind, value in seconds.items()} if total else {},
        "largest_other": sorted(names, key=names.__getitem__, reverse=True)[:5],
    }
