"""Preference losses: what a recipe may write, and that it is the same stage however it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from align.errors import InputError
from align.pipeline.artifacts import Identity
from align.pipeline.identity import as_of_now, normalised
from align.recipe.blocks.pair_losses import PAIR_LOSSES
from align.recipe.kinds.sft_dpo import FLAT_OPTIONS
from align.recipe.load import load_recipe
from align.recipe.schema import DpoStage

DPO = {"kind": "dpo", "data": "rows.jsonl"}


def stage(**options: Any) -> DpoStage:
    return DpoStage.model_validate({**DPO, **options})


def problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "rows.jsonl"):
        Path(name).mkdir(exist_ok=True)
    recipe = {"name": "r", "model": "./model", "stages": {"it": {**DPO, **options}}}
    Path("r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    with pytest.raises(InputError) as caught:
        load_recipe("r.yaml")
    return str(caught.value)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_loss_without_options_is_in_the_identity_as_its_name(name: str) -> None:
    """As it was before losses had options of their own."""
    config = normalised(stage(loss=name))
    assert config["loss"] == name
    assert {key: config[key] for key in FLAT_OPTIONS} == {
        "label_smoothing": None,
        "offset": 0.0,
        "soft_labels": False,
        "gamma": None,
    }
    assert normalised(stage(loss={"name": name})) == config


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("simpo", {"gamma": 0.5}),
        ("simpo", {"gamma": 0.0}),
        ("sigmoid", {"label_smoothing": 0.1, "offset": 0.5}),
        ("sigmoid", {"soft_labels": True}),
    ],
)
def test_where_an_option_stands_makes_no_other_stage_of_it(name: str, options: dict[str, Any]) -> None:
    beside, inside = stage(loss=name, **options), stage(loss={"name": name, **options})
    assert normalised(beside) == normalised(inside)
    assert beside.pair_loss == inside.pair_loss
    assert {key: getattr(beside.pair_loss, key) for key in options} == options
    old = Identity(kind="dpo", config=normalised(beside), seed=1, model=None, inputs={})
    assert as_of_now(old, inside).config == old.config


def test_every_older_option_belongs_to_a_loss() -> None:
    for name, owner in FLAT_OPTIONS.items():
        assert name in PAIR_LOSSES[owner].model_fields and name in DpoStage.model_fields


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "simpoo"}, "r.yaml:7:11 stages.it.loss: no preference loss `simpoo`; known: sigmoid, ipo"),
        ({"loss": "simpoo"}, "did you mean `simpo`?"),
        ({"loss": {"name": "hing"}}, "r.yaml:8:13 stages.it.loss.name: no preference loss"),
        ({"loss": {"gamma": 1.0}}, "r.yaml:8:7 stages.it.loss: expected one of sigmoid, ipo"),
        ({"loss": {"name": "simpo", "gama": 1.0}}, "stages.it.loss.gama: unknown key; did you mean `gamma`?"),
        ({"loss": {"name": "simpo", "gamma": -1.0}}, "r.yaml:9:14 stages.it.loss.gamma: must be at least 0"),
        ({"loss": {"name": "hinge", "gamma": 1.0}}, "stages.it.loss.gamma: unknown key"),
        ({"loss": {"name": "simpo", "gamma": 1.0}, "gamma": 2.0}, "`gamma` and `loss.gamma` are one option; give one"),
        (
            {"loss": {"name": "sigmoid", "label_smoothing": 0.1}, "soft_labels": True},
            "stages.it.soft_labels: has no effect with label_smoothing",
        ),
    ],
)
def test_mistakes_are_told_where_they_stand(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert message in problem(tmp_path, monkeypatch, **options)
