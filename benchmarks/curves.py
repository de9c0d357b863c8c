"""Training curves of tiny models, recorded to the last bit: to show that a change of the code changes no number.

python -m benchmarks.curves --out before.json            train; keep the metrics of every step and the weights' hashes
python -m benchmarks.curves --compare before.json after.json

The same file has to work before and after modules of align have moved. So it imports nothing of align, nor what imports
it, and knows only the command line, recipes, and the files that a run leaves. Which align is run is decided by
PYTHONPATH; where that is not set, it is the one beside this file.

Two recordings are comparable on one machine with the same packages: other processors and other versions of torch add up
in another order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import machine, package_versions

STEPS = 20
CLOCK = ("step_seconds", "tokens_per_second")
"""Metrics of a step that differ from run to run."""

WORDS = (
    "tea",
    "rain",
    "sun",
    "snow",
    "river",
    "stone",
    "green",
    "quiet",
    "seven",
    "always",
    "window",
    "table",
    "winter",
    "garden",
)
MARKS = ("<|endoftext|>", "<|start|>", "<|end|>")
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def save_model(folder: Path) -> None:
    """A random Llama of two layers and a tokenizer whose tokens are bytes; the same weights every time."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=MARKS[1], eos_token=MARKS[2], pad_token=MARKS[0]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.25,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def save_data(folder: Path) -> None:
    """Conversations, preferences with one and with six rejected answers, prompts, and a script of answers; the same
    rows every time."""
    rng = random.Random(5)

    def text(longest: int = 8) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest))) + "."

    def turns() -> list[dict[str, str]]:
        pairs = rng.randint(1, 2)
        return [{"role": role, "content": text()} for _ in range(pairs) for role in ("user", "assistant")]

    def preference(n: int, rejected: int) -> dict[str, Any]:
        answers: list[str] = []
        while len(answers) <= rejected:
            if (answer := text()) not in answers:
                answers.append(answer)
        return {"prompt": f"{n}: {text()}", "chosen": answers[0], "rejected": answers[1:]}

    rows = {
        "conversations": [{"messages": turns()} for _ in range(36)],
        "preferences": [preference(n, 1) for n in range(36)],
        "six": [preference(n, 6) for n in range(36)],
        "prompts": [{"prompt": f"{n}: {text()}"} for n in range(18)],
        "script": [{"completion": text(4)} for _ in range(12)],
    }
    for name, made in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


def recipe() -> dict[str, Any]:
    """A stage for each curve. 36 rows in steps of 4: the third pass begins inside the twenty steps, so shuffling is in
    the curves too."""
    train = {"learning_rate": 1e-3, "batch_size": 4, "epochs": 3, "max_steps": STEPS, "microbatch_tokens": 256}
    lora = {"rank": 4, "alpha": 8}
    dropped = {**lora, "dropout": 0.1}  # random numbers while training are in the curves too
    sft = {"kind": "sft", "data": "conversations.jsonl", "samples": 0, "train": train}
    dpo = {"kind": "dpo", "data": "preferences.jsonl", "samples": 0, "train": train}
    reward = {"kind": "reward", "data": "preferences.jsonl", "train": train}
    ppo = {
        "kind": "ppo",
        "prompts": "prompts.jsonl",
        "sft_data": "conversations.jsonl",
        "sft_weight": 0.1,
        "iterations": STEPS // 4,
        "ppo_epochs": 2,
        "minibatches": 2,
        "samples_per_prompt": 2,
        "max_new_tokens": 32,
        "value_learning_rate": 1e-3,
        "rollout": {"engine": "scripted", "script": "script.jsonl"},
        "samples": 0,
        "train": {"learning_rate": 1e-3, "batch_size": 4, "microbatch_tokens": 256},
    }
    stages = {
        "sft": sft,
        "sft-lora": {**sft, "lora": dropped},
        "dpo": dpo,
        "dpo-six-rejected": {**dpo, "data": "six.jsonl"},
        "dpo-lora": {**dpo, "lora": dropped},
        "reward": reward,
        "reward-lora": {**reward, "lora": lora},  # for ppo-lora: policy, reference, reward and value model on one base
        "ppo": {**ppo, "reward": "stage:reward"},
        "ppo-lora": {**ppo, "reward": "stage:reward-lora", "lora": lora},
    }
    return {"name": "curves", "seed": 17, "model": "./model", "stages": stages}


def record() -> dict[str, Any]:
    """Run the recipe in a temporary folder; what it was run with, and of every stage the steps and the hashes of the
    weights.

    Raises:
        SystemExit: the run failed, or a stage did not take twenty steps.
    """
    with tempfile.TemporaryDirectory(prefix="align-curves-") as scratch:
        folder = Path(scratch)
        save_model(folder / "model")
        save_data(folder)
        made = recipe()
        (folder / "recipe.yaml").write_text(json.dumps(made, indent=1))  # JSON is YAML
        done = _python(folder, "-m", "align", "run", "recipe.yaml")
        if done.returncode:
            raise SystemExit(f"{done.stdout}{done.stderr}align run ended with code {done.returncode}")
        stages = folder / "runs" / made["name"] / "stages"
        curves = {name: {"steps": _steps(stages / name), "weights": _weights(stages / name)} for name in made["stages"]}
        for name, curve in curves.items():
            if len(curve["steps"]) != STEPS or not curve["weights"]:
                raise SystemExit(
                    f"{name}: {len(curve['steps'])} steps with a loss and {len(curve['weights'])} files of weights were"
                    " found"
                )
        return {"made_with": _made_with(folder), "curves": curves}


def _python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in ``folder``: on the CPU, and with one thread, since sums over several threads would depend on the
    machine's load."""
    places = os.environ.get("PYTHONPATH") or str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in places.split(os.pathsep)),
    }
    environment |= {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def _steps(stage: Path) -> list[dict[str, Any]]:
    """The optimiser steps among a stage's metrics: everything but what the clock says."""
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: float(value).hex() for name, value in row.items() if name not in (*CLOCK, "step")}
        | {"step": row["step"]}
        for row in rows
        if "grad_norm" in row
    ]


def _weights(stage: Path) -> dict[str, str]:
    """The sha256 of every file of weights below a stage's result."""
    files = sorted(stage.rglob("*.safetensors"))
    return {str(file.relative_to(stage)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _made_with(folder: Path) -> dict[str, str | None]:
    """The commit of align (None where it is not in a git checkout), and all else that bits depend on."""
    return {
        "align": _commit(folder),
        "cpu": machine()["cpu"],
        "python": platform.python_version(),
        **package_versions(),
    }


def _commit(folder: Path) -> str | None:
    asked = "import importlib.util; print(importlib.util.find_spec('align').origin)"
    package = Path(_python(folder, "-c", asked).stdout.strip()).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    if not git("ls-files", "--", "__init__.py"):  # installed, perhaps inside another repository
        return None
    return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "--", ".") else "")


def compare(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Each curve of either recording, and its first difference; None where there is none."""
    curves, others = one["curves"], other["curves"]
    for name in [*curves, *(name for name in others if name not in curves)]:
        if name not in curves or name not in others:
            yield name, f"only in the {'first' if name in curves else 'second'} recording"
        else:
            yield name, _first_difference(curves[name], others[name])


def _first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    for left, right in zip(one["steps"], other["steps"], strict=False):
        # The loss and the gradient norm first: the other metrics follow from them, or explain them.
        for metric in sorted(left.keys() | right.keys(), key=lambda name: (name != "loss", name != "grad_norm", name)):
            if left.get(metric) != right.get(metric):
                return f"step {left['step']}, {metric}: {_shown(left.get(metric))} and {_shown(right.get(metric))}"
    if len(one["steps"]) != len(other["steps"]):
        return f"{len(one['steps'])} and {len(other['steps'])} steps"
    for file in sorted(one["weights"].keys() | other["weights"].keys()):
        if one["weights"].get(file) != other["weights"].get(file):
            return (
                f"the steps are equal, the weights are not: {file}: {one['weights'].get(file)} and"
                f" {other['weights'].get(file)}"
            )
    return None


def _shown(value: str | int | None) -> str:
    return f"{value} ({float.fromhex(value)!r})" if isinstance(value, str) else str(value)


def _read(parser: argparse.ArgumentParser, file: Path) -> dict[str, Any]:
    """A recording. Ends the program with a line and exit code 2 for anything else."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{file}: {error}")
    if not (isinstance(found, dict) and found.get("curves") and "made_with" in found):
        parser.error(f"{file}: no recording; make one with --out")
    return dict(found)


def main(arguments: Sequence[str]) -> int:
    """Record, or compare: 1 when a curve differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--out", type=Path, metavar="FILE.json", help="train, and write the recording here")
    wanted.add_argument("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="two recordings")
    chosen = parser.parse_args(arguments)
    if chosen.out:
        if chosen.out.is_dir() or not chosen.out.absolute().parent.is_dir():
            parser.error(f"{chosen.out}: cannot be written; name a file in a folder that exists")
        recording = record()
        chosen.out.write_text(json.dumps(recording, indent=1) + "\n")
        print(
            f"{len(recording['curves'])} curves of {STEPS} steps in {chosen.out}, of align"
            f" {recording['made_with']['align']}"
        )
        return 0
    one, other = (_read(parser, file) for file in chosen.compare)
    for key in sorted(one["made_with"].keys() | other["made_with"].keys()):
        if one["made_with"].get(key) != other["made_with"].get(key):
            print(f"made with {key}: {one['made_with'].get(key)} and {other['made_with'].get(key)}")
    differing = 0
    for name, difference in compare(one, other):
        print(f"{name}: {difference or 'equal to the last bit'}")
        differing += difference is not None
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
