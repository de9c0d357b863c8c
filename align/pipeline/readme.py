"""The run folder's README: every file that a run leaves, and what it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

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

_RESULT = {
    "Every stage": {
        "manifest.json": "what the result was made from, its headline numbers, and the sha256 of every other file",
        "report.json": "all numbers, before and after, the account of the data, and samples",
        "rejects.jsonl": "rows of the data that could not be used, with file, line and reason",
        "metrics.jsonl": "one line for each optimiser step, and for each evaluation (`eval/...`)",
        "trackers/": "the same for tensorboard and others, where `report_to` asks for them",
    },
    "Models, policies (sft, dpo, ppo) and reward models (reward)": {
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
    "Besides that, ppo": {
        "value/": "the value model, in the form of a reward model",
        "rollouts/": (
            "Parquet: `iteration-N` every answer with its score, KL and length, `held-out-N` the held-out prompts after"
            " step N, `reference` the starting policy's answers"
        ),
    },
    "Data (self_contrast, label, select_prompts) and comparisons (evaluate)": {
        "data.jsonl": "the result: preferences, prompts, or each prompt with every policy's numbers and samples",
        "rewardbench1.jsonl": (
            "each pair of a reward benchmark with every scorer's scores and how they are counted (evaluate)"
        ),
        "rewardbench2.jsonl": "the same of RewardBench 2's prompts",
        "rmbench.jsonl": "the same of RM-Bench's",
        "judgebench.jsonl": "the same of JudgeBench's pairs",
        "samples.jsonl": "every sample, with its score (label, select_prompts)",
        "left_out.jsonl": "what is not in the result, and why (label, select_prompts)",
    },
}


def readme(name: str) -> str:
    """The README of run ``name``."""
    sections = [
        (
            f"# {name}\n\nMade by `align run`. The same command goes on where it stopped, and does nothing when all is"
            " up to date."
        ),
        f"`align show {name}` tells how it went, `align verify {name}` whether all of it is as it was written.",
        _table(_RUN),
        "## In a stage's result",
    ]
    sections += [f"{what}:\n\n{_table(files)}" for what, files in _RESULT.items()]
    return "\n\n".join(sections) + "\n"


def _table(files: Mapping[str, str]) -> str:
    return "\n".join(
        ["| file | what it is |", "|---|---|", *(f"| `{name}` | {words} |" for name, words in files.items())]
    )


def unexplained(result: Path) -> Iterator[str]:
    """The files and folders right in a stage's result that the README says nothing about."""
    known = [name for files in _RESULT.values() for name in files]
    for path in sorted(result.iterdir()):
        name = f"{path.name}/" if path.is_dir() else path.name
        if not any(fnmatchcase(name, pattern) for pattern in known):
            yield name
