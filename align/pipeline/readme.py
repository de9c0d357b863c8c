"""The run folder's README, which explains every file that a run writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from align.recipe.schema import Stage

_RUN = {
    "README.md": "this file",
    "recipe.yaml": "the recipe as it was run last, overrides included; `align run recipe.yaml` makes the same",
    "run.json": "command, time and folder of the last start, and the versions of Python and the packages",
    "history.jsonl": (
        "one line for each stage that started, finished, failed or was interrupted, with the time and the reason"
    ),
    "report.html": "what came of it; opens in a browser, from disk",
    "stages/NAME/": "the result of stage NAME, all of it or none",
    "work/NAME/": (
        "checkpoints, metrics and answers of a stage that has not finished (`nan.json`: the examples of a step whose"
        " loss was no number); deleting it loses that progress and nothing else"
    ),
}

_RESULT: dict[str, Mapping[str, str]] = {
    "Every stage": {
        "manifest.json": "what the result was made from, its headline numbers, and the sha256 of every other file",
        "report.json": "all numbers, before and after, and the account of the data",
        "answers.jsonl": (
            "one line for each sampled answer: prompt, policy, text, scores, and after how many optimiser steps; of"
            " stages that sample, or that answer prompts before and after training"
        ),
        "rejects.jsonl": "rows of the data that could not be used, with file, line and reason",
        "metrics.jsonl": "one line for each optimiser step, and for each evaluation (`eval/...`)",
        "trackers/": "the same for tensorboard and others, where `report_to` asks for them",
    },
    "Models, that is policies and reward models": {
        "*.safetensors": (
            "weights; `adapter_model.safetensors` those of an adapter, `reward_head.safetensors` a reward model's head"
        ),
        "*.safetensors.index.json": "which weights are in which file",
        "config.json": "architecture",
        "generation_config.json": "how to sample, with all ids that end an answer",
        "adapter_config.json": "rank and places of the adapter, and the model that it belongs to",
        "align.json": (
            "what this package has to know to load the model again: base, template settings, ids that end an answer"
        ),
        "tokenizer*": "the tokenizer, and which class reads it",
        "special_tokens_map.json": "the tokenizer's special tokens",
        "added_tokens.json": "tokens that were added to the tokenizer",
        "vocab.*": "the tokenizer's vocabulary, in its older form",
        "merges.txt": "the tokenizer's merges, in their older form",
        "chat_template.jinja": "the chat template of training",
        "additional_chat_templates/": (
            "the model's other chat templates, by name (`tool_use`: for conversations with tools)"
        ),
        "merged/": "the whole model with its adapter merged in, where `save_merged` asks for it",
    },
    "Preferences, prompts and comparisons": {
        "data.jsonl": "the result: preferences, prompts, or each prompt with every policy's numbers",
    },
}


def readme(name: str, stages: Iterable[Stage]) -> str:
    """The README of run ``name``, whose recipe has these stages."""
    sections = [
        (
            f"# {name}\n\nMade by `align run`. The same command goes on where it stopped, and does nothing when all is"
            " up to date."
        ),
        f"`align show {name}` tells how it went, `align verify {name}` whether all of it is as it was written.",
        _table(_RUN),
        "## In a stage's result",
    ]
    own = {f"Besides that, {spec.kind}": type(spec).files for spec in stages if type(spec).files}
    sections += [f"{what}:\n\n{_table(files)}" for what, files in (_RESULT | own).items()]
    return "\n\n".join(sections) + "\n"


def _table(files: Mapping[str, str]) -> str:
    return "\n".join(
        ["| file | what it is |", "|---|---|", *(f"| `{name}` | {words} |" for name, words in files.items())]
    )


def unexplained(result: Path, kind: type[Stage]) -> Iterator[str]:
    """Files and folders at the top of a stage's result that the README does not explain."""
    known = [name for files in (*_RESULT.values(), kind.files) for name in files]
    for path in sorted(result.iterdir()):
        name = f"{path.name}/" if path.is_dir() else path.name
        if not any(fnmatchcase(name, pattern) for pattern in known):
            yield name
