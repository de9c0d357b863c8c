"""RewardBench's numbers by the functions of AI2's own package `rewardbench`, where it is installed, from the same
scores."""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from align.evaluation.reward_bench import rewardbench1, rewardbench2
from tests.support import reward_benches as made

PACKAGE = importlib.util.find_spec("rewardbench")
if PACKAGE is None or PACKAGE.submodule_search_locations is None:
    pytest.skip("the package rewardbench is not installed", allow_module_level=True)


def module_of(name: str) -> Any:
    """One of the package's files by itself. The package as a whole imports model code that only old versions of
    transformers have, and the functions that count scores need none of it."""
    assert PACKAGE is not None and PACKAGE.submodule_search_locations is not None
    spec = importlib.util.spec_from_file_location(
        f"_rewardbench_{name}", Path(PACKAGE.submodule_search_locations[0], f"{name}.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    absent = {"rewardbench.models": "REWARD_MODEL_CONFIG", "fastchat.conversation": "Conversation"}
    with pytest.MonkeyPatch.context() as patch:
        for place, attribute in absent.items():
            stand_in = ModuleType(place)
            setattr(stand_in, attribute, dict)
            patch.setitem(sys.modules, place.partition(".")[0], ModuleType(place.partition(".")[0]))
            patch.setitem(sys.modules, place, stand_in)
        spec.loader.exec_module(module)
    return module


utils, constants = module_of("utils"), module_of("constants")


def drawn(rng: np.random.Generator, answers: int) -> list[float]:
    """Scores of which some are equal."""
    return [float(score) for score in rng.integers(0, 6, answers) / 2]


def test_the_same_subsets_with_the_same_weights() -> None:
    assert {name: list(of) for name, of in rewardbench1.SECTIONS.items()} == constants.SUBSET_MAPPING
    assert {
        subset: count for of in rewardbench1.SECTIONS.values() for subset, count in of.items()
    } == constants.EXAMPLE_COUNTS


@pytest.mark.parametrize("seed", range(10))
def test_sections_of_rewardbench_1(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    subsets = [subset for of in rewardbench1.SECTIONS.values() for subset in of for _ in range(rng.integers(0, 4))]
    scores = [drawn(rng, 2) for _ in subsets]
    right = defaultdict(list)
    for subset, (chosen, rejected) in zip(subsets, scores, strict=True):
        right[subset].append(1 if chosen > rejected else 0)
    metrics = {subset: sum(own) / len(own) for subset, own in right.items()}
    theirs = utils.calculate_scores_per_section(constants.EXAMPLE_COUNTS, constants.SUBSET_MAPPING, metrics)
    ours = made.means(tmp_path / "f.jsonl", [made.rewardbench1(subset, i) for i, subset in enumerate(subsets)], scores)
    for section, value in theirs.items():
        assert ours[f"rewardbench1/{section.lower().replace(' ', '_')}"] == pytest.approx(value)


@pytest.mark.parametrize("seed", range(10))
def test_the_best_of_four(tmp_path: Path, seed: int) -> None:
    from datasets import Dataset

    rng = np.random.default_rng(seed)
    rows = [
        made.rewardbench2(subset, str(i), 1, int(rng.integers(1, 5)))
        for i, subset in enumerate(rewardbench2.SUBSETS * 6)
    ]
    scores = [drawn(rng, 1 + len(row["rejected"])) for row in rows]
    flat = [
        {"text": text, "scores": score, "id": row["id"], "subset": row["subset"]}
        for row, own in zip(rows, scores, strict=True)
        for text, score in zip([*row["chosen"], *row["rejected"]], own, strict=True)
    ]
    theirs = utils.reroll_and_score_dataset(Dataset.from_list(flat), [len(own) for own in scores])
    ours = made.means(tmp_path / "f.jsonl", rows, scores)
    for subset in rewardbench2.SUBSETS:
        results = [row["results"] for row in theirs if row["subset"] == subset]
        assert ours[f"rewardbench2/{subset.lower().replace(' ', '_')}"] == pytest.approx(sum(results) / len(results))


@pytest.mark.parametrize("halves", ["both", "some"])
@pytest.mark.parametrize("seed", range(20))
def test_the_score_of_ties(tmp_path: Path, seed: int, halves: str) -> None:
    """Also where prompts lack their other half, and where right answers score the same."""
    from datasets import Dataset

    rng = np.random.default_rng(seed)
    rows, scores = [], []
    for number in range(9):
        for kind, right in (("ref", 1), ("tied", int(rng.integers(2, 5)))):
            if halves == "both" or rng.random() < 0.8 or number == 0:
                rows.append(made.rewardbench2("Ties", f"{kind}:{number}", right, int(rng.integers(1, 5))))
                good = [score + 2 for score in drawn(rng, right)]
                scores.append([*good, *drawn(rng, len(rows[-1]["rejected"]))])
    scored = [
        {"id": row["id"], "num_correct": row["num_correct"], "scores": own}
        for row, own in zip(rows, scores, strict=True)
    ]
    _, theirs = utils.process_single_model(Dataset.from_list(scored))
    assert made.means(tmp_path / "f.jsonl", rows, scores)["rewardbench2/ties"] == pytest.approx(theirs)
