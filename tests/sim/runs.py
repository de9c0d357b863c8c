"""The package's own trainers on the simulated GPU: GLM-4 of any number of layers, data of exact sizes, and what one
optimiser step took."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Glm4Config

from align.batching.batch import Batch
from align.batching.loader import Loader, plan_steps
from align.data.tree import Branch, Tree
from align.models.adapters import add_lora
from align.models.load import DTYPES, without_lm_head
from align.models.scalar.heads import ScalarModel
from align.recipe.schema import DpoStage, PpoStage, RewardStage, SftStage, Train
from align.sizing.shapes import GLM_4_9B, Shape
from align.stages.dpo import DpoTrainer
from align.stages.ppo.trainer import PpoTrainer
from align.stages.reward.regression import GradesTrainer
from align.stages.reward.run import RewardTrainer
from align.stages.sft import SftTrainer
from align.stages.shared.training_run import make_loader
from align.training.launch import Ranks
from align.training.reference_logprobs import ReferenceLogprobs
from align.training.trainer import Trainer, TrainerArguments
from tests.sim.device import CUDA, Account, Simulation
from tests.support.rollouts import ENCODER, FixedAnswers, prompts
from tests.support.rollouts import trainer as ppo_trainer

GRADES = {"helpfulness": 0.65, "correctness": 0.8}


@dataclass(frozen=True)
class SimulatedRanks(Ranks):
    """The first of ``world`` processes, on a GPU. Every other process has what this one has; of numbers that each
    computes a share of, they have what is missing here."""

    @property
    def device(self) -> torch.device:
        """The GPU."""
        return CUDA

    def barrier(self) -> None:
        """Nobody is waited for."""

    def broadcast_object(self, value: Any) -> Any:
        """This is the process that says."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """See the class."""
        shared = isinstance(value, Tensor) and value.is_floating_point()
        return [value, *([torch.ones_like(value) if shared else value] * (self.world - 1))]


@dataclass(frozen=True)
class Setting:
    """What differs between simulated runs."""

    rows: int = 512
    """Tokens in a micro-batch; each is full."""
    microbatches: int = 2
    """Of each process and step."""
    world: int = 1
    lora: bool = True
    train: dict[str, Any] = field(default_factory=dict)
    """Keys of the recipe's ``train`` block."""
    stage: dict[str, Any] = field(default_factory=dict)
    """Keys of the recipe's stage."""
    rejected: int = 1
    """Rejected answers to each prompt."""
    shape: Shape = GLM_4_9B
    layers: int = 2

    @property
    def keys(self) -> dict[str, Any]:
        """The stage's keys; a batch is what fills the micro-batches of all processes."""
        train = {
            "learning_rate": 1e-4,
            "microbatch_tokens": self.rows,
            "batch_size": self.world * self.microbatches,
            "dtype": "bf16" if self.lora else "fp32",
            "autocast": "bf16",
            **self.train,
        }
        return {**({"lora": {"rank": 32, "alpha": 64}} if self.lora else {}), **self.stage, "train": train}


def glm4(setting: Setting) -> Any:
    """A language model of the setting's shape on the GPU, adapters included."""
    shape, keys = setting.shape, setting.keys
    config = Glm4Config(
        num_hidden_layers=setting.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        attention_bias=shape.qkv_bias,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=2**20,
        pad_token_id=None,
    )
    with CUDA:
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[keys["train"]["dtype"]])


def trained(model: Any, setting: Setting, spec: Any) -> nn.Module:
    """As a stage makes it ready."""
    return model if spec.lora is None else add_lora(model, spec.lora)


# Data: every example fills one micro-batch


def tokens(count: int) -> Any:
    """Random ones."""
    return np.random.default_rng(count).integers(3, 200, count, dtype=np.int32)


def answer(count: int, **marks: Any) -> Branch:
    """All of it is trained on."""
    return Branch(tokens(count), np.ones(count, dtype=np.bool_), **marks)


def examples(setting: Setting, answers: int, count: int = 0, **marks: Any) -> list[Tree]:
    """Prompts of a quarter of a micro-batch and ``answers`` that share the rest; as many as two steps take. In the
    layout ``padded`` each answer has a row of its own, with the prompt, and the rows fill the micro-batch."""
    prompt = setting.rows // 4
    each = (setting.rows - prompt) // answers
    if setting.train.get("layout", "tree") != "tree":
        prompt = setting.rows // answers // 4
        each = setting.rows // answers - prompt
    return [
        Tree(f"t{number}", tokens(prompt), tuple(answer(each, **marks) for _ in range(answers)))
        for number in range(count or 2 * setting.world * setting.microbatches)
    ]


def loader(trees: Sequence[Tree], train: Train, setting: Setting) -> Loader:
    """As a stage makes it."""
    plan = plan_steps([tree.size for tree in trees], seed=1, batch_size=train.batch_size)
    return make_loader(train, ENCODER, SimulatedRanks(0, setting.world), trees.__getitem__, plan)


def arguments(model: nn.Module, train: Train, setting: Setting, work: Path | None) -> TrainerArguments:
    """Of a process that prints nothing."""
    return TrainerArguments(
        model=model,
        train=train,
        work=work or Path(tempfile.mkdtemp()),
        name="simulated",
        seed=1,
        console=Console(quiet=True),
        ranks=SimulatedRanks(0, setting.world),
        placement=SimulatedRanks(0, setting.world).placement_for(train.sharding),
    )


# Trainers


def sft(setting: Setting, work: Path | None = None) -> Trainer:
    """Of conversations."""
    spec = SftStage.model_validate({"kind": "sft", "data": "unused.jsonl", **setting.keys})
    loads = loader(examples(setting, 1), spec.train, setting)
    net = trained(glm4(setting), setting, spec)
    return SftTrainer(arguments(net, spec.train, setting, work), loads, loads.batches(range(2)), spec.loss)


def dpo(setting: Setting, work: Path | None = None) -> Trainer:
    """Of preferences."""
    spec = DpoStage.model_validate({"kind": "dpo", "data": "unused.jsonl", **setting.keys})
    trees = examples(setting, 1 + setting.rejected)
    loads = loader(trees, spec.train, setting)
    first = torch.tensor([0, *(len(tree.branches) for tree in trees)]).cumsum(0)
    reference = ReferenceLogprobs(torch.zeros(int(first[-1])), first[:-1])
    net = trained(glm4(setting), setting, spec)
    held_out = loads.batches(range(2))
    return DpoTrainer(arguments(net, spec.train, setting, work), loads, held_out, spec, reference, reference)


def reward(setting: Setting, work: Path | None = None) -> Trainer:
    """Of preferences, or with ``grades`` of graded answers."""
    spec = RewardStage.model_validate({"kind": "reward", "data": "unused.jsonl", **setting.keys})
    if spec.grades:
        trees = examples(setting, 1, grades=tuple(1.0 for _ in spec.grades))
    else:
        trees = examples(setting, 1 + setting.rejected)
    loads = loader(trees, spec.train, setting)
    backbone: Any = trained(without_lm_head(glm4(setting)), setting, spec)
    net = ScalarModel(backbone, spec.grades)
    kind = GradesTrainer if spec.grades else RewardTrainer
    return kind(arguments(net, spec.train, setting, work), loads, loads.batches(range(2)), spec)


def ppo(setting: Setting, work: Path | None = None, *, proved: bool = False) -> PpoTrainer:
    """Of prompts of a quarter of a micro-batch whose answers fill it. ``proved``: the engine gets all weights."""
    answers = setting.stage.get("samples_per_prompt", 2)
    length = (setting.rows - setting.rows // 4) // answers
    defaults = {
        "kind": "ppo",
        "reward": "unused/unused",
        "prompts": "unused.jsonl",
        "iterations": 2,
        "samples_per_prompt": answers,
        "max_new_tokens": length,
    }
    if setting.stage.get("estimator", "gae") == "gae":
        defaults["value_init"] = "policy"
    spec = PpoStage.model_validate({**defaults, **setting.keys})
    group = SimulatedRanks(0, setting.world)
    run = ppo_trainer(
        work or Path(tempfile.mkdtemp()),
        spec,
        net=trained(glm4(setting), setting, spec),
        score=lambda given: float(len(given.ids) % 3),
        data=prompts(spec.train.prompts, setting.rows // 4),
        sft=examples(setting, 1) if spec.sft_weight else (),
        held_out=prompts(2, 16),
        engine=FixedAnswers(length),
        proved=proved,
        group=group,
    )
    run.parts.rollouts._ranks = Ranks()  # what the other processes sample is not made up
    return run


KINDS = {"sft": sft, "dpo": dpo, "reward": reward, "ppo": ppo}


# What a step took


@dataclass
class Step:
    """One optimiser step after the first, which makes the optimiser's state."""

    account: Account
    batches: Sequence[Batch]
    at_rest: int
    """Bytes that were allocated before it."""

    def as_json(self) -> dict[str, Any]:
        """What the tests look at."""
        account = self.account
        return {
            "peak": account.peak,
            "at_rest": self.at_rest,
            "flops": dict(account.flops),
            "fp32_at": {where: n for (kind, where), n in account.flops_at.items() if kind == "fp32"},
            "syncs": dict(account.syncs),
            "compiled": len(account.compiled),
            "messages": {name: size for (name, _), size in account.messages.items()},
            "microbatches": len(self.batches),
            "tokens": sum(batch.input_ids.numel() for batch in self.batches),
            "kernels": account.kernels,
            "seconds": account.seconds,
        }


def second_step(sim: Simulation, run: Trainer) -> Step:
    """Two steps of a trainer; what the second one took."""
    run.model.train()
    for batches in islice(run.steps(), 2):
        at_rest = sim.account.live
        sim.reset()
        run.optimizer_step(batches)
    return Step(sim.account, batches, at_rest)
