"""A reward model that starts from another one: of a stage, a folder, an adapter or a classifier; its head is kept, or
refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from align.errors import InputError
from align.models.load import load_encoder, load_policy, without_lm_head
from align.models.scalar.classifier import export_classifier
from align.models.scalar.heads import ScalarModel, ScoreStats, load_scalar, save_scalar
from align.models.scalar.reward_start import load_start
from align.pipeline.runner import run_recipe
from align.pipeline.selection import Selection
from align.preflight.checks import require
from align.preflight.models_here import refused
from align.recipe.load import LoadedRecipe, load_recipe
from align.recipe.schema import Lora, Model
from align.scoring.reward_model import RewardModelScorer
from align.scoring.scorer import Answer
from align.stages.reward.run import build_reward
from tests.support.saved import save_tiny

ANSWERS = [
    Answer(({"role": "user", "content": f"Question {i}?"},), said)
    for i, said in enumerate(("Paris", "no", "the fox runs"))
]
NO_STEP = {"learning_rate": 1e-20, "max_steps": 1, "batch_size": 2, "microbatch_tokens": 128}
"""A step that moves nothing."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, and a reward model on it in the forms that there are."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model", max_position_embeddings=512)
    rows = [{"prompt": f"Question {i}?", "chosen": "Paris", "rejected": "no"} for i in range(4)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    graded = [{"prompt": row["prompt"], "completion": "no", "grades": {"a": 1, "b": 2}} for row in rows]
    Path("graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in graded))
    stages = {"whole": reward(), "adapter": reward(lora={"rank": 2})}
    run({name: {**spec, "train": {**NO_STEP, "learning_rate": 1e-2}} for name, spec in stages.items()})
    export_classifier(Model(path="runs/r/stages/whole"), tmp_path / "classifier")
    return tmp_path


def reward(**options: Any) -> dict[str, Any]:
    return {"kind": "reward", "data": "train.jsonl", "train": NO_STEP, **options}


def recipe(stages: dict[str, Any], name: str = "r") -> LoadedRecipe:
    Path(f"{name}.yaml").write_text(
        yaml.safe_dump({"name": name, "model": "./model", "stages": stages}, sort_keys=False)
    )
    return load_recipe(f"{name}.yaml")


def run(stages: dict[str, Any], name: str = "r") -> Path:
    return (
        run_recipe(
            recipe(stages, name), console=Console(file=io.StringIO(), width=140), selection=Selection(replace=True)
        ).folder
        / "stages"
    )


def scores(path: str | Path) -> list[float]:
    return RewardModelScorer(Model(path=str(path))).score(ANSWERS)


STARTS = {"whole": "runs/r/stages/whole", "adapter": "runs/r/stages/adapter", "classifier": "./classifier"}


def test_without_a_step_the_scores_are_those_of_the_start(folder: Path) -> None:
    """All weights or adapters on top, saved and loaded again: from each kind of start the same numbers come out."""
    expected = {
        name: scores("runs/r/stages/whole" if name == "classifier" else place) for name, place in STARTS.items()
    }
    kinds = (("full", None), ("lora", {"rank": 2}))
    stages = {f"{name}_{kind}": reward(init=place, lora=lora) for name, place in STARTS.items() for kind, lora in kinds}
    made = run(stages, "again")
    for stage in stages:
        assert scores(made / stage) == pytest.approx(expected[stage.split("_")[0]], abs=1e-4), stage


def test_a_stage_starts_from_the_stage_before_it(folder: Path) -> None:
    """A reference as any other; another head would give other scores."""
    chain = {
        "first": reward(train={**NO_STEP, "learning_rate": 1e-2}),
        "second": reward(init="stage:first"),
        "other": reward(),
    }
    made = run(chain, "chain")
    assert scores(made / "second") == pytest.approx(scores(made / "first"), abs=1e-4)
    assert scores(made / "other") != pytest.approx(scores(made / "first"), abs=1e-2)


def test_grades_are_learned_on(folder: Path) -> None:
    """All outputs are kept, in their order; the weights are the stage's own."""
    grades = {"a": 1.0, "b": 0.5}
    chain = {
        "first": reward(data="graded.jsonl", grades=grades, train={**NO_STEP, "learning_rate": 1e-2}),
        "second": reward(data="graded.jsonl", grades={"a": 0.0, "b": 1.0}, init="stage:first"),
    }
    made = run(chain, "grades")
    one, other = (load_scalar(Model(path=str(made / name)), grades=True) for name in chain)
    torch.testing.assert_close(one.head.weight, other.head.weight)
    assert other.grades == {"a": 0.0, "b": 1.0}
    torch.testing.assert_close(load_scalar(Model(path=str(made / "second"))).head.weight[0], one.head.weight[1])


def refusal(stage: dict[str, Any]) -> str:
    """What is said before anything runs, by check and by the run's own look; and once more where the model is
    loaded."""
    loaded = recipe({"it": stage}, "refused")
    (problem,) = refused(loaded)
    assert problem.key == "stages.it.init" and problem.line
    with pytest.raises(InputError) as caught:
        require(loaded, Path("runs"), nproc=1, selection=Selection(), thorough=False)
    with pytest.raises(InputError) as late:
        load_start(Model(path=stage["init"]), grades=stage.get("grades", {}))
    message = late.value.problems[0].message
    assert message in problem.message and message in str(caught.value)
    return message


def test_a_head_that_cannot_be_kept_is_refused(folder: Path) -> None:
    """Several labels, a bias, another name; ranking from grades and grades from ranking."""
    grades = {"a": 1.0, "b": 0.5}
    encoder = load_encoder(Model(path="model"))
    torch.manual_seed(0)
    several = ScalarModel(without_lm_head(load_policy(Model(path="model"))), grades)
    save_scalar(several, encoder, folder / "several", base=Model(path="model"), scores=ScoreStats(0, 1, 1))
    export_classifier(Model(path="several"), folder / "labels")
    tensors = load_file("classifier/model.safetensors")
    for name, changed in (
        ("bias", {**tensors, "score.bias": torch.zeros(1)}),
        ("other", {("classifier.weight" if key == "score.weight" else key): value for key, value in tensors.items()}),
    ):
        Path(name).mkdir()
        for file in Path("classifier").iterdir():
            (Path(name) / file.name).write_bytes(file.read_bytes())
        save_file(changed, f"{name}/model.safetensors", metadata={"format": "pt"})
    assert refusal(reward(init="./labels")) == "gives 2 numbers; a reward model that another starts from gives one"
    assert "(it has score.bias), which cannot be kept" in refusal(reward(init="./bias"))
    assert "(it has no score.weight), which cannot be kept" in refusal(reward(init="./other"))
    assert "learned the grades a, b, and the stage learns to rank" in refusal(reward(init="./several"))
    of_grades = {"data": "graded.jsonl", "grades": {"b": 1.0}}
    assert "learned to rank, and the stage learns the grades b" in refusal(
        reward(init="runs/r/stages/whole", **of_grades)
    )
    assert "one label, and the stage learns the grades a, b" in refusal(
        reward(init="./classifier", data="graded.jsonl", grades=grades)
    )
    told = r"stages\.b\.init: stage:a learns the grades a, b, and this stage to rank: its head cannot be kept"
    with pytest.raises(InputError, match=told):
        recipe({"a": reward(data="graded.jsonl", grades=grades), "b": reward(init="stage:a")}, "staged")


def test_adapters_of_a_start_are_drawn_the_same_in_every_process(folder: Path) -> None:
    start = Model(path="runs/r/stages/whole")
    made = [build_reward(load_start(start, grades={}), Lora(rank=2), 3).state_dict() for _ in range(2)]
    assert made[0].keys() == made[1].keys() and all(torch.equal(made[0][name], made[1][name]) for name in made[0])
