"""The training steps of every kind on a GPU that is not there: ``python -m tests.sim.cases OUT.json [NAME ...]`` runs the
cases of these names (all, when none is given; every second one from the first or second on for ``1/2`` or ``2/2``) and
writes what each took, or where it failed.

A process of its own, because the simulated device has to be there before torch is.
"""

from __future__ import annotations

from tests.sim import guard

guard.load()

import json  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Iterator, Mapping, Sequence  # noqa: E402
from dataclasses import replace  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

from align.batching.batch import Batch  # noqa: E402
from align.batching.tree import build  # noqa: E402
from align.models import canary  # noqa: E402
from align.models.compute.forward import batch_logprobs_and_entropy  # noqa: E402
from align.models.load import DTYPES, without_lm_head  # noqa: E402
from align.models.scalar.heads import ScalarModel, score_trees  # noqa: E402
from align.recipe.blocks.estimators import ESTIMATORS  # noqa: E402
from align.recipe.blocks.pair_losses import PAIR_LOSSES  # noqa: E402
from align.sizing.shapes import Shape  # noqa: E402
from align.stages import dpo as dpo_stage  # noqa: E402
from align.stages.sft import SftTrainer  # noqa: E402
from align.training.metrics import Mean  # noqa: E402
from align.training.precision import autocast  # noqa: E402
from align.training.reference_logprobs import ReferenceLogprobs, reference_for, weights_digest  # noqa: E402
from tests.sim import kernels  # noqa: E402
from tests.sim.device import CUDA, Simulation, join  # noqa: E402
from tests.sim.runs import GRADES, KINDS, Setting, SimulatedRanks, examples, glm4, ppo, second_step, sft  # noqa: E402

NARROW = Shape(2, 64, 4, 2, 16, 96, 512, tied=False, norms=4, fused_mlp=True)
"""For what copies whole models to the CPU."""
WORLDS = (1, 8, 64, 512)
"""Numbers of processes."""


def step(sim: Simulation, kind: str, setting: Setting, *, evaluated: bool = False) -> dict[str, Any]:
    """Two steps of one kind, and with ``evaluated`` the held-out data before."""
    join(setting.world)
    run = KINDS[kind](setting)
    if evaluated:
        run.evaluate()
    return second_step(sim, run).as_json()


def reference(sim: Simulation) -> dict[str, Any]:
    """The reference's log-probs of trees that are computed whole and of one that is cut."""
    setting = Setting(rejected=4)
    run = KINDS["dpo"](setting)
    batches = run.loader.batches(range(4))  # type: ignore[attr-defined]
    sim.reset()
    reference_for(
        run.model,
        batches,
        [5] * 4,
        key="k",
        cache=Path(tempfile.mkdtemp()),
        ranks=SimulatedRanks(),
        autocast=autocast(run.train, CUDA),
        own_attention=False,
        microbatch_tokens=200,
    )
    return {"syncs": dict(sim.account.syncs), "microbatches": len(batches)}


def looked_at(sim: Simulation) -> dict[str, Any]:
    """What else passes through a model: canaries, scoring, entropy, the digest of its weights."""
    setting = Setting(shape=NARROW)
    canary._TOLERANCE |= dict.fromkeys(DTYPES.values(), 1.0)  # a difference without numbers is 1
    for layout in ("tree", "padded"):
        canary.require_own_logprobs(glm4(setting), list(range(3, 15)), layout)  # type: ignore[arg-type]
        canary.require_own_states(without_lm_head(glm4(setting)), list(range(3, 15)), layout)  # type: ignore[arg-type]
    trees = examples(setting, 2, 3)
    score_trees(ScalarModel(without_lm_head(glm4(setting))), trees, microbatch_tokens=1024, layout="tree", pad_id=0)
    batch_logprobs_and_entropy(glm4(setting), build(trees, [0, 1], layout="tree").to(CUDA))
    return {"digest": weights_digest(glm4(setting))}


def pushed(sim: Simulation) -> dict[str, Any]:
    """A whole PPO run whose engine gets the weights, adapters merged in, before each iteration."""
    run = ppo(Setting(shape=NARROW, rows=64, stage={"iterations": 2}), proved=True)
    run.fit()
    engine: Any = run.parts.rollouts.engine
    return {"received": engine.received, "version": engine.version, "steps": run.progress.step}


def resumed(sim: Simulation, kind: str) -> dict[str, Any]:
    """A run that saves, ends early, and goes on: weights, optimiser and progress go to the disk and come back."""
    setting = Setting(shape=NARROW, rows=64, train={"save_steps": 1})
    work = Path(tempfile.mkdtemp())
    first = KINDS[kind](setting, work)
    first.fit()
    again = KINDS[kind](setting, work)
    again.resume()
    went_on_from = again.progress.step
    again.fit()
    devices = {value.device.type for state in again.optimizer.state.values() for value in state.values()}
    return {"saved": went_on_from, "steps": again.progress.step, "optimizer": sorted(devices)}


class Idle(SftTrainer):
    """A process that gets no micro-batch, while the others have one between them."""

    def steps(self) -> Iterator[Sequence[Batch]]:
        """None for this process, in every step."""
        return iter([(), ()])

    def _global_counts(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        return {"sft": 512.0}

    def _sum_over_ranks(self, outputs: Sequence[Mapping[str, Mean]]) -> dict[str, Mean]:
        return {"loss/sft": Mean(512.0, 512), "tokens": Mean(512.0, 1)}


def idle(sim: Simulation) -> dict[str, Any]:
    """A process without a micro-batch adds zeros to the others' gradients."""
    setting = Setting(world=8)
    join(setting.world)
    run = sft(setting)
    run.__class__ = Idle
    return second_step(sim, run).as_json()


# Two bugs of devices, planted to show that they are found


def without_device(values: torch.Tensor, segment: torch.Tensor, num_segments: int) -> torch.Tensor:
    """A sum over segments whose result is made on the CPU."""
    return torch.zeros(num_segments, dtype=values.dtype).index_add(0, segment, values)


def indexed_on_device(self: ReferenceLogprobs, batch: Any) -> torch.Tensor:
    """Reference log-probs, which lie on the CPU, indexed by what lies on the GPU."""
    return self._sums[self._first_branch[batch.branch_tree] + batch.branch_slot].to(batch.branch.device)


def planted(sim: Simulation, owner: Any, name: str, bug: Any) -> dict[str, Any]:
    """A step with ``bug`` in place of what is right."""
    right = getattr(owner, name)
    setattr(owner, name, bug)
    try:
        return step(sim, "dpo", Setting())
    finally:
        setattr(owner, name, right)


FULL = Setting(lora=False)
CASES: dict[str, Callable[[Simulation], dict[str, Any]]] = {
    "sft": partial(step, kind="sft", setting=Setting(), evaluated=True),
    "sft sequence_mean": partial(step, kind="sft", setting=Setting(stage={"loss": "sequence_mean"})),
    "sft packed": partial(step, kind="sft", setting=Setting(train={"layout": "packed"})),
    "sft padded": partial(step, kind="sft", setting=Setting(train={"layout": "padded"})),
    "sft checkpointed": partial(step, kind="sft", setting=Setting(train={"gradient_checkpointing": True})),
    "sft without autocast": partial(step, kind="sft", setting=Setting(train={"autocast": None})),
    "sft full": partial(step, kind="sft", setting=FULL),
    "sft full bf16": partial(step, kind="sft", setting=replace(FULL, train={"dtype": "bf16", "autocast": None})),
    **{
        f"dpo {loss}": partial(step, kind="dpo", setting=Setting(stage={"loss": loss}), evaluated=True)
        for loss in PAIR_LOSSES
    },
    "dpo padded": partial(step, kind="dpo", setting=Setting(train={"layout": "padded"})),
    "dpo with sft": partial(step, kind="dpo", setting=Setting(stage={"sft_weight": 0.1})),
    "dpo streamed": partial(
        step,
        kind="dpo",
        setting=Setting(rejected=4, microbatches=1, train={"microbatch_tokens": 200}, stage={"sft_weight": 0.1}),
    ),
    "dpo full": partial(step, kind="dpo", setting=FULL),
    "reward": partial(step, kind="reward", setting=Setting(), evaluated=True),
    "reward padded": partial(step, kind="reward", setting=Setting(train={"layout": "padded"})),
    "reward grades": partial(step, kind="reward", setting=Setting(stage={"grades": GRADES}), evaluated=True),
    "reward full": partial(step, kind="reward", setting=FULL),
    **{f"ppo {name}": partial(step, kind="ppo", setting=Setting(stage={"estimator": name})) for name in ESTIMATORS},
    "ppo with sft and entropy": partial(
        step,
        kind="ppo",
        setting=Setting(stage={"sft_weight": 0.1, "sft_data": "unused.jsonl", "entropy_weight": 0.01}),
    ),
    "ppo full": partial(step, kind="ppo", setting=FULL),
    **{
        f"{kind} at {world}": partial(step, kind=kind, setting=Setting(world=world))
        for kind in KINDS
        for world in WORLDS[1:]
    },
    "sft full at 8": partial(step, kind="sft", setting=replace(FULL, world=8)),
    "reference": reference,
    "looked at": looked_at,
    "pushed": pushed,
    **{f"resumed {kind}": partial(resumed, kind=kind) for kind in KINDS},
    "idle": idle,
    "planted: a device left out": partial(planted, owner=dpo_stage, name="segment_sum", bug=without_device),
    "planted: a CPU tensor indexed by CUDA": partial(
        planted, owner=ReferenceLogprobs, name="__call__", bug=indexed_on_device
    ),
}


def main(out: str, *names: str) -> None:
    """See the module's docstring."""
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    chosen = list(names or CASES)
    if names in (("1/2",), ("2/2",)):
        chosen = list(CASES)[names == ("2/2",) :: 2]
    for name in chosen:
        began = time.perf_counter()
        with Simulation() as sim:
            kernels.install(sim)
            try:
                found[name] = CASES[name](sim)
            except Exception as error:
                trace = "".join(traceback.format_exception(error))
                found[name] = {"error": f"{type(error).__name__}: {error}", "trace": trace}
            finally:
                join(1)
        found[name]["took"] = round(time.perf_counter() - began, 2)
        print(name, found[name]["took"], found[name].get("error", ""), flush=True)
    Path(out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
