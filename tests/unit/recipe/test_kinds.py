"""The checks of a recipe go by what a kind of stage says of itself, whoever wrote the kind."""

from pathlib import Path

import pytest

from align.errors import InputError
from align.recipe.blocks.base import RowUse
from align.recipe.load import load_recipe
from align.recipe.schema import BUILTIN_STAGES

KIND = """
from typing import ClassVar

from align.recipe.schema import ArtifactType, PolicyRef, Stage


class Distil(Stage):
    produces: ClassVar[ArtifactType] = "policy"
    implementation: ClassVar[str] = "third_party_kind:run"
    starts_from: ClassVar[str] = "teacher"
    takes_arguments: ClassVar[str] = "an argument of the tool belongs under `options`"
    teacher: PolicyRef
    options: dict[str, int] = {}

    def refuses_start(self, made_by):
        return None if made_by.kind == "sft" else (f"{self.teacher} is no teacher", "start from sft")


def run(spec, ctx):
    pass
"""
RECIPE = """
name: a
model: some/model
stages:
  sft: {{kind: sft, data: rows.jsonl}}
  dpo: {{kind: dpo, policy: "stage:sft", data: rows.jsonl}}
  small:
    kind: third_party_kind:Distil
    teacher: stage:{teacher}
    {more}
"""


def problems(folder: Path, teacher: str, more: str = "options: {}") -> list[str]:
    (folder / "third_party_kind.py").write_text(KIND)
    (folder / "rows.jsonl").write_text("{}\n")
    recipe = folder / "a.yaml"
    recipe.write_text(RECIPE.format(teacher=teacher, more=more))
    try:
        load_recipe(str(recipe))
    except InputError as error:
        return [str(problem).replace(f"{folder}/", "") for problem in error.problems]
    return []


def test_a_stage_may_refuse_what_it_starts_from(tmp_path: Path) -> None:
    assert problems(tmp_path, "sft") == []
    [problem] = problems(tmp_path, "dpo")
    assert problem == "a.yaml:9:14 stages.small.teacher: stage:dpo is no teacher; start from sft"


def test_a_stage_says_where_arguments_of_its_tool_belong(tmp_path: Path) -> None:
    [problem] = problems(tmp_path, "sft", "per_device_train_batch_size: 1")
    assert problem.endswith("unknown key; an argument of the tool belongs under `options`")


@pytest.mark.parametrize(
    ("kind", "keys", "use"),
    [
        ("sft", {}, RowUse()),
        ("dpo", {}, RowUse()),
        ("dpo", {"offset": 1.0}, RowUse(margins=True, needs_margins="offset")),
        ("dpo", {"soft_labels": True}, RowUse(needs_votes="soft_labels")),
        ("reward", {}, RowUse(filters=True, margins=True)),
        ("reward", {"filters": False, "soft_labels": True}, RowUse(margins=True, needs_votes="soft_labels")),
        ("reward", {"grades": {"help": 1.0, "brevity": 0.5}}, RowUse(grades=("help", "brevity"))),
    ],
)
def test_a_stage_says_what_it_uses_of_its_rows(kind: str, keys: dict[str, object], use: RowUse) -> None:
    spec = BUILTIN_STAGES[kind].model_validate({"kind": kind, "data": "rows.jsonl", **keys})
    assert spec.row_use() == use
