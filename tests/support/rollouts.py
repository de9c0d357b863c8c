"""Reinforcement learning on tiny models: an exact engine, scorers that are functions, and a PPO trainer put together
from them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from align.batching.loader import StepPlan, plan_steps
from align.data.chat.encoder import Encoder
from align.data.records import Origin, Prompt
from align.data.tree import Tree
from align.data.trees.prompts import EncodedPrompt
from align.models.adapters import add_lora
from align.models.generate import generating
from align.models.placement import Placement
from align.models.scalar.critic import ActorCritic, actor_critic
from align.models.scalar.heads import ScalarModel
from align.recipe.schema import PpoStage
from align.rollout.engine import Sample, Sampling, WeightSource, sample_seed
from align.scoring.scorer import Answer
from align.stages.ppo.collect import PpoContext
from align.stages.ppo.rollouts import Rollouts
from align.stages.ppo.trainer import PpoTrainer
from align.stages.shared.clock import Clock
from align.stages.shared.training_run import make_loader
from align.training.launch import Ranks
from align.training.trainer import TrainerArguments
from tests.support.saved import rows
from tests.support.tiny import tiny
from tests.support.tokenizers import chatml

ENCODER = Encoder(chatml())
VOCAB = rows(chatml())
STOP = ENCODER.stop_ids[0]


class ExactEngine:
    """Samples from the live model by plain forward passes, without cache or padding: prompts of one length go
    together."""

    together = 1000

    def __init__(self, model: nn.Module, stops: Sequence[int] = ENCODER.stop_ids) -> None:
        self.model, self.stops, self.version = model, stops, 0
        self.pushed: list[int] = []

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Sample]]:
        """As the protocol says."""
        made: dict[tuple[int, int], Sample] = {}
        with generating(self.model) as lm:
            for length in sorted({len(prompt) for prompt in prompts}):
                places = [
                    (p, s) for p, prompt in enumerate(prompts) if len(prompt) == length for s in range(sampling.n)
                ]
                made |= dict(
                    zip(places, self._rows(lm, [prompts[p] for p, _ in places], places, sampling), strict=True)
                )
        return [[made[p, s] for s in range(sampling.n)] for p in range(len(prompts))]

    def _rows(
        self, lm: Any, prompts: Sequence[Sequence[int]], places: Sequence[tuple[int, int]], sampling: Sampling
    ) -> list[Sample]:
        generators = [torch.Generator().manual_seed(sample_seed(sampling.seed, *place)) for place in places]
        ids = torch.tensor([list(prompt) for prompt in prompts])
        logprobs: list[list[float]] = [[] for _ in places]
        begin = ids.shape[1]
        for _ in range(sampling.max_new_tokens):
            logits = lm(ids, use_cache=False).logits[:, -1].float()
            logs = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
            if sampling.temperature:
                chosen = torch.stack(
                    [torch.multinomial(row.exp(), 1, generator=g) for row, g in zip(logs, generators, strict=True)]
                )
            else:
                chosen = logs.argmax(-1, keepdim=True)
            for row, value in zip(logprobs, logs.gather(1, chosen).squeeze(1).tolist(), strict=True):
                row.append(value)
            ids = torch.cat([ids, chosen], dim=1)
        return [self._completion(row, values) for row, values in zip(ids[:, begin:].tolist(), logprobs, strict=True)]

    def _completion(self, ids: list[int], logprobs: list[float]) -> Sample:
        end = next((place + 1 for place, token in enumerate(ids) if token in self.stops), None)
        return Sample(tuple(ids[:end]), tuple(logprobs[:end]), "length" if end is None else "stop", self.version)

    def load_weights(self, weights: WeightSource) -> None:
        """The model is the live one; only the version counts."""
        self.version = weights.version
        self.pushed.append(weights.version)

    def close(self) -> None:
        """Nothing to close."""


class FixedAnswers:
    """An engine whose answers are random tokens, all of one length, the last of them an end token; its log-probs are
    made up: 1, which is also what the simulated GPU says of every number."""

    together = 2**30

    def __init__(self, length: int) -> None:
        self.length, self.version, self.received = length, 0, 0

    def generate(self, asked: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Sample]]:
        """As the protocol says."""
        length = min(self.length, sampling.max_new_tokens)
        logprobs = (1.0,) * length
        rng = np.random.default_rng(sampling.seed)
        return [
            [
                Sample((*rng.integers(3, 200, length - 1).tolist(), STOP), logprobs, "stop", self.version)
                for _ in range(sampling.n)
            ]
            for _ in asked
        ]

    def load_weights(self, weights: WeightSource) -> None:
        """Every tensor arrives on the CPU, as at an engine in another process."""
        self.version = weights.version
        self.received = sum(tensor.detach().cpu().numel() for _, tensor in weights)

    def close(self) -> None:
        """Nothing to close."""


class ByRule:
    """A scorer that is a function of an answer."""

    name = "rule"

    def __init__(self, rule: Callable[[Answer], float]) -> None:
        self.rule = rule
        self.seen: list[Answer] = []

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """As the protocol says."""
        self.seen += answers
        return [self.rule(answer) for answer in answers]


def ends_early(answer: Answer) -> float:
    """1 for an answer of one token, less for longer ones."""
    return 1.0 - 0.1 * len(answer.ids)


def stage(train: dict[str, Any] | None = None, **options: Any) -> PpoStage:
    """A PPO stage for tiny models; ``sft_data`` and the like are given to :func:`trainer` directly."""
    defaults: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": 4, "microbatch_tokens": 64, "max_grad_norm": None}
    settings: dict[str, Any] = {
        "iterations": 3,
        "max_new_tokens": 6,
        "kl_coefficient": 0.1,
        "value_init": "policy",
        **options,
    }
    if settings.get("estimator", "gae") != "gae":
        del settings["value_init"]
    return PpoStage.model_validate(
        {
            "kind": "ppo",
            "reward": "unused/unused",
            "prompts": "unused.jsonl",
            **settings,
            "train": {**defaults, **(train or {})},
        }
    )


def prompts(count: int, length: int | None = None) -> list[EncodedPrompt]:
    """Prompts of random tokens: of 3 to 7, or all of ``length``."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for i in range(count):
        size = length or 3 + i % 5
        ids = torch.randint(5, 250, (size,), generator=generator).tolist()
        record = Prompt(({"role": "user", "content": f"prompt {i}"},), f"p{i}", Origin("prompts.jsonl", i + 1))
        made.append(EncodedPrompt(record, tuple(ids)))
    return made


def policy(spec: PpoStage, **changes: Any) -> nn.Module:
    """The tiny policy to train, the same every time; quiet enough that answers differ, and every eighth token or so is
    an end."""
    torch.manual_seed(3)
    net: Any = tiny("llama", vocab_size=VOCAB, **{"initializer_range": 0.1, **changes})
    net.lm_head.bias = nn.Parameter(torch.zeros(VOCAB).index_fill_(0, torch.tensor(STOP), 4.0))
    return net if spec.lora is None else add_lora(net, spec.lora)


def trainer(
    work: Path,
    spec: PpoStage,
    *,
    score: Callable[[Answer], float] = ends_early,
    net: nn.Module | None = None,
    value: ScalarModel | None = None,
    data: Sequence[EncodedPrompt] | None = None,
    baselines: Tensor | None = None,
    sft: Sequence[Tree] = (),
    held_out: Sequence[EncodedPrompt] = (),
    engine: Any = None,
    proved: bool = True,
    text: io.StringIO | None = None,
    group: Ranks | None = None,
    seed: int = 5,
    placement: Placement | None = None,
) -> PpoTrainer:
    """A trainer on ``net`` with everything real but the files. ``proved``: the engine's log-probs must be the
    trainer's. ``placement``: how the processes hold the models."""
    work.mkdir(parents=True, exist_ok=True)
    group = group or Ranks()
    data = prompts(8) if data is None else data
    net = policy(spec) if net is None else net
    reference = None if spec.lora is not None else copy.deepcopy(net).requires_grad_(False).eval()
    models = actor_critic(net, value, spec.lora) if spec.estimator == "gae" else ActorCritic(net, None)
    clock = Clock()
    rollouts = Rollouts(
        models,
        ENCODER,
        engine or ExactEngine(net),
        ByRule(score),
        precision="fp32" if proved else None,
        canaries=[prompt.ids for prompt in data[:2]],
        seed=seed,
        ranks=group,
        clock=clock,
        samples_live=True,
    )
    plan = plan_steps(
        [1] * len(data), seed=seed, epochs=spec.iterations * 4, batch_size=spec.train.prompts, max_steps=spec.iterations
    )
    train = spec.train.model_copy(update={"sharding": "none" if placement is None else "full"})
    loader = partial(make_loader, train, ENCODER, group)
    if spec.uses_baseline and baselines is None:
        baselines = torch.linspace(-0.2, 0.3, len(data))
    parts = PpoContext(
        spec=spec,
        models=models,
        reference=reference,
        rollouts=rollouts,
        prompts=data,
        baselines=baselines,
        plan=plan,
        loader=loader,
        sft=loader(list(sft).__getitem__, conversations_plan(len(sft), spec.total_steps)) if sft else None,
        eval_prompts=held_out,
        eval_sft=[],
        ranks=group,
        clock=clock,
    )
    console = Console(file=text, width=200) if text else Console(quiet=True)
    arguments = TrainerArguments(
        model=models,
        train=spec.train,
        work=work,
        name="ppo",
        seed=seed,
        console=console,
        ranks=group,
        placement=placement,
    )
    return PpoTrainer(arguments, parts)


def conversations_plan(count: int, steps: int) -> StepPlan:
    """Two conversations a step."""
    return plan_steps([1] * count, seed=1, epochs=2 * steps, batch_size=2, max_steps=steps)
