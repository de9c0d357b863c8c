"""What a recipe may say of a TRL trainer: checked against TRL's own sources, without importing them, each mistake at
its place."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path

import pytest

from align.errors import InputError
from align.planning import trl
from align.recipe.kinds import trl_source
from align.recipe.kinds.trl import OWNED
from align.recipe.kinds.trl_source import OTHERS, TRAINERS, config_name
from align.recipe.load import load_recipe
from align.recipe.schema import TrlStage

HEAD = "name: r\nmodel: ./model\nstages:\n"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_text('{"prompt": "hi", "chosen": "yes", "rejected": "no"}\n')
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")


def load(stage: str) -> TrlStage:
    Path("r.yaml").write_text(HEAD + textwrap.indent(f"t: {{kind: trl, data: d.jsonl, {stage}}}\n", "  "))
    spec = load_recipe("r.yaml").recipe.stages["t"]
    assert isinstance(spec, TrlStage)
    return spec


def problems(stage: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(stage)
    return [str(problem) for problem in caught.value.problems]


def test_a_trainer_by_any_of_its_names() -> None:
    assert {load(f"trainer: {name}").trainer for name in ("kto", "KTO", "KTOTrainer")} == {"KTOTrainer"}
    online = "reward: {rule: json}"
    assert (
        load(f"trainer: online_dpo, {online}").trainer
        == load(f"trainer: OnlineDPOTrainer, {online}").trainer
        == "OnlineDPOTrainer"
    )


def test_every_mistake_of_the_arguments_at_its_place() -> None:
    """A misspelt name, a wrong type, a text that is none of the choices, and what belongs to the stage."""
    found = problems(
        "trainer: kto, args: {betta: 1, beta: much, loss_type: kta, bf16: 3, use_vllm: true, hub_token: x,"
        " eval_steps: 5}"
    )
    assert found == [
        "r.yaml:4:54 stages.t.args.betta: KTOConfig has no such argument; did you mean `beta`?",
        "r.yaml:4:70 stages.t.args.beta: expected float, as in KTOConfig; got the text `much`",
        "r.yaml:4:87 stages.t.args.loss_type: must be one of kto, apo_zero_unpaired; got `kta`; did you mean `kto`?",
        "r.yaml:4:98 stages.t.args.bf16: expected bool | None, as in KTOConfig; got the number `3`",
        f"r.yaml:4:101 stages.t.args.use_vllm: belongs to the stage: {OWNED['use_vllm']}",
        "r.yaml:4:117 stages.t.args.hub_token: belongs to the stage: nothing is uploaded",
        "r.yaml:4:131 stages.t.args.eval_steps: needs `eval_data`",
    ]


@pytest.mark.parametrize(
    ("stage", "problem"),
    [
        ("trainer: sft", "stages.t.trainer: SFTTrainer is what `kind: sft` does"),
        ("trainer: dpo", "stages.t.trainer: DPOTrainer is what `kind: dpo` does"),
        (
            "trainer: RewardTrainer",
            "stages.t.trainer: RewardTrainer makes a reward model, which is what `kind: reward` does",
        ),
        (
            "trainer: GKDTrainer",
            "stages.t.trainer: GKDTrainer needs a second model as its teacher, which a stage has no key for",
        ),
        ("trainer: grop", "did you mean `grpo`?"),
        ("trainer: grpo", "stages.t.trainer: GRPOTrainer samples answers and needs `reward`, the scorer of them"),
        ("trainer: kto, reward: {rule: json}", "stages.t.reward: has no effect with KTOTrainer: it samples no answers"),
        (
            "trainer: kto, lora: {quantize: nf4}",
            "stages.t.lora.quantize: `kind: trl` trains no adapters on 4-bit weights",
        ),
        (
            "trainer: grpo, reward: {rule: json}, max_length: 200",
            "stages.t.max_length: max_completion_length (512) leaves no room",
        ),
        (
            "trainer: online_dpo, reward: {rule: json}, eval_data: d.jsonl",
            "stages.t.eval_data: has no effect with OnlineDPO",
        ),
    ],
)
def test_what_a_trainer_cannot_do(stage: str, problem: str) -> None:
    assert problem in problems(stage)[0]
    assert len(problems(stage)) == 1


def test_yaml_values_that_fit() -> None:
    """A whole number for a float, null for an optional, text for an enumeration, a list, a mapping."""
    args = (
        "{learning_rate: 1, pad_to_multiple_of: null, lr_scheduler_type: cosine, lr_scheduler_kwargs: {num_cycles: 2},"
        " optim_args: a=b}"
    )
    assert load(f"trainer: kto, args: {args}").args["learning_rate"] == 1
    assert load("trainer: rloo, reward: {rule: json}, args: {reward_clip_range: [-1, 1.5]}").argument("beta") == 0.05
    assert (
        "expected tuple[float, float] | None"
        in problems("trainer: rloo, reward: {rule: json}, args: {reward_clip_range: [a, 1]}")[0]
    )


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_sources_say_what_the_classes_say(trainer: str) -> None:
    """Names and plain defaults of every config class, read without importing it, are those of the class."""
    from align.stages.trl.run import _import

    module = _import(TRAINERS[trainer].module.removesuffix("_trainer") + "_config")
    fields = {
        field.name: field
        for field in dataclasses.fields(getattr(module, config_name(trainer)))
        if not field.name.startswith("_")
    }
    read = trl_source.arguments(trainer)
    assert read.keys() == fields.keys()
    for name, argument in read.items():
        default = fields[name].default
        if isinstance(default, (bool, int, float)):
            assert argument.default == default, name
        if type(default) in (bool, int, float, str):
            assert argument.takes(default), name


def test_every_trainer_of_the_installed_trl_is_known() -> None:
    """One that runs, or one with a reason why not: a new TRL must not bring one that nobody has looked at."""
    root = Path(trl_source._package("trl"))
    found = {path.name for path in root.rglob("*_trainer.py")}
    known = {f"{Path(trainer.path).name}_trainer.py" for trainer in TRAINERS.values()}
    others = {name.removesuffix("Trainer").lower() for name in OTHERS}
    assert {name for name in found - known if name.removesuffix("_trainer.py").replace("_", "") not in others} == {
        "base_trainer.py"
    }


def test_owned_arguments_exist() -> None:
    """A reason for an argument that no config class has would never be read."""
    everything = {name for trainer in TRAINERS for name in trl_source.arguments(trainer)}
    assert OWNED.keys() <= everything


def test_the_plan_says_what_the_arguments_say() -> None:
    rows = {row.name: (row.value, row.source) for row in trl.rows(load("trainer: kto, args: {max_steps: 5}"))}
    assert rows["steps"] == ("5", "args.max_steps")
    assert rows["learning rate"] == ("1e-06", "default of KTOConfig")
    assert rows["a step takes"][0] == "8 answers, each with its label"
    rows = {row.name: (row.value, row.source) for row in trl.rows(load("trainer: grpo, reward: {rule: json}"))}
    assert rows["passes over the data"] == ("3", "default of GRPOConfig")
    assert rows["a step takes"][0] == "8 sampled answers, 8 to each prompt"
    assert rows["longest answer"] == ("512 tokens", "default of GRPOConfig")
