"""What is known about a source by its origin: whether it is a public test set, and the licence on its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from align.data.strict_json import clip, one_line
from align.recipe.schema import DataSource

TEST_SETS: dict[str, tuple[str, ...]] = {
    "allenai/reward-bench": (),
    "allenai/reward-bench-2": (),
    "THU-KEG/RM-Bench": (),
    "ScalerLab/JudgeBench": (),
    "lmsys/mt_bench_human_judgments": (),
    "HuggingFaceH4/mt_bench_prompts": (),
    "lmarena-ai/arena-hard-auto": (),
    "tatsu-lab/alpaca_eval": (),
    "google/IFEval": (),
    "HuggingFaceH4/MATH-500": (),
    "HuggingFaceH4/aime_2024": (),
    "Maxwell-Jia/AIME_2024": (),
    "openai/gsm8k": ("test",),
    "EleutherAI/hendrycks_math": ("test",),
    "hendrycks/competition_math": ("test",),
    "openai/openai_humaneval": (),
    "evalplus/humanevalplus": (),
    "google-research-datasets/mbpp": ("test",),
    "cais/mmlu": ("test",),
    "TIGER-Lab/MMLU-Pro": ("test",),
    "Idavidrein/gpqa": (),
    "truthfulqa/truthful_qa": (),
}
"""Hub ids of test sets, with their test splits; empty: all splits."""

TEST_SET = "a test set of the field: a model that was trained on it must not be measured by it"


def is_test_set(source: DataSource, location: Path | str) -> bool:
    """Is the source a test set, by its hub id or by the name of its folder or file (such as ``datasets--org--name`` in
    the hub's cache)?"""
    parts = (
        [location]
        if isinstance(location, str)
        else [part for part in (*location.parts[:-1], location.name.split(".")[0])]
    )
    for id, splits in TEST_SETS.items():
        names = (id, f"datasets--{id.replace('/', '--')}", f"{id.replace('/', '--')}", id.partition("/")[2])
        if not any(part.lower() == name.lower() for part in parts for name in names):
            continue
        if not splits or source.split in splits:
            return True
        if not isinstance(location, str) and location.is_file() and location.name.lower().startswith(splits):
            return True
    return False


def card_of(source: DataSource, location: Path | str) -> dict[str, Any]:
    """The metadata at the top of a data set's card: of a hub data set if it is cached on this machine, or of a
    downloaded folder."""
    if isinstance(location, str):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(location, "README.md", revision=source.revision, repo_type="dataset")
        path = Path(found) if isinstance(found, str) else None
    else:
        path = location / "README.md" if location.is_dir() else None
    if path is None or not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return {}
    try:
        card = yaml.safe_load(text[3:].split("\n---", 1)[0])
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, dict) else {}


def licence_of(source: DataSource, location: Path | str) -> str | None:
    """``licence cc-by-nc-4.0 (not for commercial use), gated``; None when no card says it."""
    card = card_of(source, location)
    given = card.get("license_name") or card.get("license")
    names = [str(one) for one in (given if isinstance(given, list) else [given]) if one]
    parts = [f"licence {clip(one_line(', '.join(names)), 100)}"] if names else []
    if any("-nc" in name.lower() or "noncommercial" in name.lower() for name in names):
        parts[-1] += " (not for commercial use)"
    if any(str(key).startswith("extra_gated") for key in card):
        parts.append("gated: its card asks readers to agree to terms before they use it")
    return ", ".join(parts) or None
