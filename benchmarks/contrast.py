"""Self-Contrast's DPO stage from end to end, against TRL's pairwise trainer on the same samples, expanded to pairs.

Timed is everything from the preferences on disk to the trained model on disk: loading, encoding, reference log-probs,
training, saving.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import model, peer
from benchmarks.dpo import BETA, TRL, expanded
from benchmarks.harness import Benchmark, Contender, Setting, Work
from benchmarks.measure import Recorder
from benchmarks.model import LEARNING_RATE, OUT

PROMPTS = 16
PROMPTS_PER_STEP = 4


def _made() -> Path:
    """The run of the shipped recipe, as far as its preferences; made once."""
    from rich.console import Console

    from align.pipeline.runner import run_recipe
    from align.pipeline.selection import Selection
    from align.recipe.load import load_recipe

    made = Selection(kinds={"sft", "self_contrast"})
    found = run_recipe(load_recipe("self_contrast"), selection=made, runs_dir=OUT / "runs", console=Console())
    return found.folder / "stages"


def _rows(count: int) -> list[dict[str, Any]]:
    lines = (_made() / "contrast" / "data.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def _prepare(quick: bool) -> Work:
    """Prompts with a chosen and eight rejected answers. Contenders do all steps between one ``begin`` and one
    ``end``."""
    from align.data.formats.formats import converter
    from align.data.records import Origin
    from align.data.sources.readers import Row
    from align.data.trees.build import Limits, tree_of
    from align.recipe.schema import DataSource

    convert = converter(DataSource(path="data.jsonl", format="preference"), "preference")
    rows = [
        record
        for i, row in enumerate(_rows(4 if quick else PROMPTS), 1)
        for record in convert(Row(row, Origin("data.jsonl", i)))
    ]
    encoder = model.encoder()
    trees = [tree_of(row, encoder, Limits(2048, "drop", "last"), lambda reason: None) for row in rows]
    return Work(trees, [[0], list(range(len(trees)))], "the first prompts of the shipped recipe self_contrast")


def _ours(work: Work, setting: Setting, recorder: Recorder) -> None:
    from rich.console import Console

    from align.recipe.schema import DpoStage, Model
    from align.stages.context import StageContext
    from align.stages.dpo import run

    folder = Path(tempfile.mkdtemp(prefix="align-bench-"))
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in _rows(len(work.trees))), encoding="utf-8")
    train = {
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "batch_size": PROMPTS_PER_STEP,
    }
    spec = DpoStage.model_validate({"kind": "dpo", "data": str(data), "beta": BETA, "samples": 0, "train": train})
    places = {name: folder / name for name in ("out", "work", "cache")}
    for place in places.values():
        place.mkdir()
    ctx = StageContext(
        "dpo", 0, **places, model=Model(path=str(_made() / "sft")), resolve=Path, console=Console(quiet=True)
    )
    recorder.begin()
    recorder.end()
    recorder.begin()
    run(spec, ctx)
    recorder.end()


def _trl(work: Work, setting: Setting, recorder: Recorder) -> None:
    recorder.begin()
    recorder.end()
    recorder.begin()
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    class Encoded(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # the rows are token ids already

    rows = [
        pair for tree in work.trees for pair in sorted(expanded(tree), key=lambda pair: -sum(map(len, pair.values())))
    ]
    settings = peer.arguments(setting["per_device_batch"], PROMPTS_PER_STEP * (len(work.trees[0].branches) - 1))
    config = DPOConfig(**settings, beta=BETA, loss_type="sigmoid", precompute_ref_log_probs=True, num_train_epochs=1)
    policy = AutoModelForCausalLM.from_pretrained(str(_made() / "sft"), dtype="float32")
    trainer = Encoded(
        model=policy, args=config, train_dataset=Dataset.from_list(rows), processing_class=model.encoder().tokenizer
    )
    trainer.train()
    trainer.save_model()
    recorder.end()


BENCHMARKS = (
    Benchmark(
        "contrast-stage",
        "Self-Contrast's DPO stage, end to end",
        f"{model.NAME}. One pass over prompts with eight rejected answers, {PROMPTS_PER_STEP} prompts a step.",
        "pairs",
        _prepare,
        (
            Contender(
                "ours",
                "align's dpo stage, as a recipe runs it",
                ({"microbatch_tokens": 512},),
                _ours,
                default_counts=True,
            ),
            Contender(
                "TRL",
                "TRL's DPOTrainer on the pairs, reference log-probs precomputed",
                TRL.settings,
                _trl,
                same_loss=False,
            ),
        ),
    ),
)
