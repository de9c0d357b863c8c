"""What ``align plan`` says of a GPU's memory against the peak of the simulated step:
``python -m tests.sim.memory OUT.json [--layers N ...] [--only WORD ...]`` prints the table and writes it; with ``--found
TABLE.json`` peaks that are in that table are not simulated again, and only the plan is made anew.

``memory.json`` beside this file is that table for the 40 layers of GLM-4-9B, which takes too long for every run of the
tests; they do the same with few layers. Runtime and allocator's slack are left out of the plan: the simulation has
neither. For engines and models that score, which are not simulated either, the plan has terms of their own.
"""

from __future__ import annotations

from tests.sim import guard

guard.load()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

from align.recipe.schema import PpoStage, Train  # noqa: E402
from align.sizing import needs, ppo_needs  # noqa: E402
from align.sizing.moments import Pass, Term  # noqa: E402
from align.sizing.shapes import GLM_4_9B  # noqa: E402
from align.training.optim import load_optimizer_tensors  # noqa: E402
from align.training.trainer import Trainer  # noqa: E402
from tests.sim import kernels  # noqa: E402
from tests.sim.device import Simulation, divided, join  # noqa: E402
from tests.sim.runs import KINDS, Setting  # noqa: E402

ROWS = (512, 2048, 8192, 32768)
"""Tokens in a micro-batch."""
DIVIDED = (
    ("sft", 512, False),
    ("sft", 8192, False),
    ("sft", 32768, False),
    ("sft", 8192, True),
    ("reward", 8192, False),
)
"""Kind, tokens in a micro-batch, and adapters or not, of the models that are divided among processes."""
OF_MACHINE = 8
"""Processes of one machine."""
NOT_SIMULATED = {"runtime", "slack", "loading", "reward model", "rollout engine", "rollout cache"}


def grid() -> Iterator[tuple[str, str, Setting]]:
    """(name, kind, setting) of every row of the table."""
    checkpointed = {"gradient_checkpointing": True}
    for kind in KINDS:
        for rows in ROWS:
            for lora in (True, False):
                words = "lora" if lora else "full"
                yield f"{kind} {words} {rows}", kind, Setting(rows=rows, lora=lora, train=checkpointed)
    for rows in (512, 2048):
        for lora in (True, False):
            words = "lora" if lora else "full"
            yield f"sft {words} {rows} not checkpointed", "sft", Setting(rows=rows, lora=lora)
    for lora in (True, False):
        words, train = "lora" if lora else "full", {**checkpointed, "autocast": None}
        yield f"sft {words} 8192 not autocast", "sft", Setting(rows=8192, lora=lora, train=train)
    bf16 = {**checkpointed, "dtype": "bf16", "autocast": None}
    yield "sft full 8192 bf16", "sft", Setting(rows=8192, lora=False, train=bf16)
    for sharding, worlds in (("full", (8, 64)), ("hybrid", (64,))):
        for world in worlds:
            train = {**checkpointed, "sharding": sharding}
            for kind, rows, lora in DIVIDED:
                name = f"{kind} {'lora' if lora else 'full'} {rows} sharded {sharding} at {world}"
                yield name, kind, Setting(rows=rows, lora=lora, world=world, train=train)
    tied = replace(GLM_4_9B, tied=True)
    yield "sft full 2048 tied", "sft", Setting(rows=2048, lora=False, shape=tied, train=checkpointed)
    yield "sft full 2048 at 8", "sft", Setting(rows=2048, lora=False, world=8, train=checkpointed)


def in_the_middle(run: Trainer) -> None:
    """Bring a trainer to where memory is fullest: the optimiser's state is there since the first step, and all gradients
    since the step's first micro-batch."""
    tensors = {}
    for name, parameter in run.parameters.items():
        parameter.grad = torch.zeros_like(parameter)
        tensors |= {f"{name}/{key}": torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        tensors[f"{name}/step"] = torch.zeros(())
    load_optimizer_tensors(run.optimizer, run.parameters, tensors)


def measured(kind: str, setting: Setting) -> Simulation:
    """Simulates one micro-batch, or for PPO one of each kind."""
    join(setting.world)
    os.environ["LOCAL_WORLD_SIZE"] = str(min(setting.world, OF_MACHINE))
    with Simulation() as sim:
        kernels.install(sim)
        divided(sim)
        run = KINDS[kind](setting)
        run.model.train()
        batches = next(iter(run.steps()))
        if run.train.sharding != "none":
            # torch asks once for each operation on divided tensors what becomes of them, with tensors that the
            # simulation counts and a GPU never sees
            run.optimizer_step(batches)
        in_the_middle(run)
        sim.reset()
        run.optimizer_step(batches)
    join(1)
    return sim


def planned(kind: str, setting: Setting) -> list[Term]:
    """The plan's terms of what is simulated."""
    shape = replace(setting.shape, layers=setting.layers, lm_head=kind != "reward")
    largest, keys = Pass(setting.rows, "a full micro-batch"), setting.keys
    if kind == "ppo":
        fixed = {"kind": "ppo", "reward": "org/reward", "prompts": "unused.jsonl", "value_init": "policy"}
        spec = PpoStage.model_validate({**fixed, **keys})
        terms = ppo_needs.memory(
            shape, spec, device="cuda", processes=setting.world, of_machine=OF_MACHINE, largest=largest
        )
    else:
        lora = needs.Lora.model_validate(keys["lora"]) if setting.lora else None
        train = Train.model_validate(keys["train"])
        terms = needs.memory(
            shape, train, lora, device="cuda", processes=setting.world, of_machine=OF_MACHINE, largest=largest
        )
    return [term for term in terms if term.name not in NOT_SIMULATED]


def compared(name: str, kind: str, setting: Setting, found: dict[str, Any] | None) -> dict[str, Any]:
    """One row of the table; the peak is that of the row ``found``, or simulated."""
    began = time.perf_counter()
    if found is None:
        account = measured(kind, replace(setting, microbatches=1)).account
        places = sorted(account.at_peak.items(), key=lambda item: -item[1])
        alive = {place: size for place, size in places if size > account.peak / 100}
        found = {"simulated": account.peak, "alive": alive, "took": round(time.perf_counter() - began, 1)}
    terms = planned(kind, setting)
    total = sum(term.amount for term in terms)
    return {
        "name": name,
        "layers": setting.layers,
        "simulated": found["simulated"],
        "planned": round(total),
        "off": round(total / found["simulated"] - 1, 4),
        "terms": {term.name: round(term.amount) for term in terms},
        "alive": found["alive"],
        "took": found["took"],
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[40])
    parser.add_argument("--only", nargs="+", default=[""])
    parser.add_argument("--found", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    before = json.loads(chosen.found.read_text()) if chosen.found else []
    known = {(row["name"], row["layers"]): row for row in before}
    table: list[dict[str, Any]] = []
    for name, kind, setting in grid():
        if not any(word in name for word in chosen.only):
            continue
        for layers in chosen.layers:
            row = compared(name, kind, replace(setting, layers=layers), known.get((name, layers)))
            table.append(row)
            print(
                f"{name:<34} {layers:>3} layers  simulated {row['simulated'] / 1e9:8.2f} GB"
                f"  planned {row['planned'] / 1e9:8.2f} GB  {row['off']:+7.1%}  ({row['took']:.0f} s)",
                flush=True,
            )
            chosen.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
