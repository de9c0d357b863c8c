"""Everything unhealthy that is looked for, with the words that a person reads, and silence where all is well."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from align.errors import TrainingFault
from align.stages.ppo.health import first_ratio_bound, of_first_step, of_rollouts, of_training
from tests.support.rollouts import stage, trainer

WELL = {
    "answers": 8.0,
    "score_std": 0.4,
    "finished": 0.9,
    "distinct": 1.0,
    "entropy": 2.0,
    "kl": 0.01,
    "mismatch": 1e-5,
    "explained_variance": 0.3,
    "reward": 0.0,
}


def kinds(history: list[dict[str, float]], **options: Any) -> set[str]:
    return {finding.kind for finding in of_rollouts(stage(**options), history)}


def test_a_healthy_run_is_silent() -> None:
    assert kinds([WELL] * 10) == set()
    assert of_training(stage(), [WELL] * 3, 0.1, [2.0, 2.1, 2.2]) == []
    assert of_first_step(stage(), {"ratio/largest_log": 1e-5}) == []


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("equal_scores", {"score_std": 0.0}, "all answers of the iteration score the same"),
        ("unfinished", {"finished": 0.02}, "98% of the answers do not end within max_new_tokens (6)"),
        ("distinct", {"distinct": 0.1}, "only 10% of the answers differ"),
        ("entropy", {"entropy": 0.1}, "the policy's entropy fell from 2 to 0.1 nats per token"),
        ("kl", {"kl": 0.7}, "the KL from the reference is 0.7 nats per token, more than 0.5"),
        ("mismatch", {"mismatch": 0.3}, "the engine's log-probs are off by 0.3 nats per token"),
    ],
)
def test_one_iteration_is_enough(kind: str, change: dict[str, float], words: str) -> None:
    (finding,) = of_rollouts(stage(), [WELL, {**WELL, **change}])
    assert finding.kind == kind and words in finding.message
    assert any(key in finding.message for key in ("kl_coefficient", "max_new_tokens", "rollout", "rollouts file")), (
        "it says what to do"
    )


def test_a_bound_itself_is_allowed() -> None:
    """What a recipe names is still healthy; the next number is not."""
    health = stage().health
    at = {"finished": 1 - health.unfinished, "distinct": health.distinct, "kl": health.kl, "mismatch": health.mismatch}
    assert kinds([WELL, {**WELL, **at, "entropy": health.entropy * WELL["entropy"]}]) == set()
    past = {
        "finished": 0.9 - health.unfinished,
        "distinct": health.distinct - 0.01,
        "kl": health.kl + 0.01,
        "mismatch": health.mismatch + 0.01,
    }
    assert kinds([WELL, {**WELL, **past, "entropy": 0.0}]) == {"unfinished", "distinct", "kl", "mismatch", "entropy"}
    low = {"kl": -health.negative_kl, "explained_variance": health.explained_variance}
    assert kinds([WELL, WELL, WELL, *[{**WELL, **low}] * 3]) == set()
    assert of_first_step(stage(), {"ratio/largest_log": first_ratio_bound(stage())}) == []
    assert of_training(stage(), [WELL] * 3, health.clip_fraction, []) == []
    assert [found.kind for found in of_training(stage(), [WELL] * 3, health.clip_fraction + 0.01, [])] == [
        "clip_fraction"
    ]


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("negative_kl", {"kl": -0.02}, "negative (-0.02 nats per token) in 3 iterations in a row"),
        ("explained_variance", {"explained_variance": -2.0}, "explains -2.00 of the returns' variance"),
    ],
)
def test_three_in_a_row(kind: str, change: dict[str, float], words: str) -> None:
    """A mean KL below zero once is chance; a value model has four iterations to learn."""
    bad = {**WELL, **change}
    assert kinds([WELL] * 6 + [bad] * 2) == set()
    assert kinds([WELL] * 5 + [bad, WELL, bad, bad]) == set()
    (finding,) = of_rollouts(stage(), [WELL] * 6 + [bad] * 3)
    assert finding.kind == kind and words in finding.message


def test_a_young_value_model_is_given_time() -> None:
    bad = {**WELL, "explained_variance": -5.0}
    assert kinds([bad] * 6) == set() and kinds([bad] * 7) == {"explained_variance"}


def test_the_first_ratio() -> None:
    """In fp32 a thousandth of a nat, in bf16 what rounding does."""
    (finding,) = of_first_step(stage(), {"ratio/largest_log": 0.02})
    assert finding.kind == "first_ratio" and "off by 0.02 nats, 0.001 is allowed" in finding.message
    assert first_ratio_bound(stage(train={"autocast": "bf16"})) == 0.5
    assert first_ratio_bound(stage(health={"first_ratio": 0.1})) == 0.1


def test_too_large_steps_and_forgetting() -> None:
    (clip,) = of_training(stage(), [WELL], 0.6, [])
    assert clip.kind == "clip_fraction" and "the clip holds back 60% of the tokens" in clip.message
    better = [WELL] * 4 + [{**WELL, "reward": 1.5}] * 4
    (forgets,) = of_training(stage(), better, 0.1, [2.0] * 4 + [3.0] * 4)
    assert (
        forgets.kind == "sft_loss"
        and "the reward rose by 1.5 while the loss on sft_data rose from 2 to 3" in forgets.message
    )
    assert of_training(stage(), better[::-1], 0.1, [2.0] * 4 + [3.0] * 4) == [], "the reward did not rise"


def test_the_reward_of_equally_many_iterations_is_compared() -> None:
    """Of the first and of the last k: each of them counts, and no other."""
    rises = [2.0] * 3 + [2.5] + [3.0] * 3  # of seven, three are compared with three
    rewards = {
        "the last three": [0, 0, 0, 9, -4, 1, 1],
        "the first three": [4, 0, 0, -9, 1, 1, 1],
        "neither": [0, 0, 0, 0, 0, 0, 0],
    }
    for numbers in rewards.values():
        assert of_training(stage(), [{**WELL, "reward": float(number)} for number in numbers], 0.1, rises) == []
    (found,) = of_training(
        stage(), [{**WELL, "reward": float(number)} for number in (0, 0, 0, -9, -1, 1, 1)], 0.1, rises
    )
    assert "the reward rose by 0.333" in found.message


def test_a_long_run_is_judged_by_its_first_and_last_four_iterations() -> None:
    """What lies between has no say, whichever way it went."""
    rises = [2.0] * 6 + [3.0] * 6
    for between in (-50.0, 0.0, 50.0):
        rewards = [0.0] * 4 + [between] + [-between] * 2 + [between] + [1.5] * 4
        (found,) = of_training(stage(), [{**WELL, "reward": reward} for reward in rewards], 0.1, rises)
        assert "the reward rose by 1.5 " in found.message and "the first and the last 4 iterations" in found.message


def test_small_steps_of_conversations_that_differ_are_no_forgetting() -> None:
    """A real run's losses, of four conversations a step: up by 0.68, of which 2 * 0.16 are noise, and its held-out loss
    did not move."""
    better, seen = [WELL] * 3 + [{**WELL, "reward": 1.5}] * 3, [1.268, 1.275, 1.332, 1.901, 1.912, 2.103]
    assert of_training(stage(), better, 0.1, seen) == []
    assert of_training(stage(), better[:2], 0.1, seen[:2]) == []
    (forgets,) = of_training(stage(), better, 0.1, [*seen[:3], 2.901, 2.912, 3.103])
    assert forgets.kind == "sft_loss"


def test_warned_once_and_counted(tmp_path: Path) -> None:
    """`warn`: the run goes on; each kind is told once, and how often it happened is kept."""
    text = io.StringIO()
    run = trainer(tmp_path, stage(iterations=3), score=lambda answer: 1.0, text=text)
    run.fit()
    assert text.getvalue().count("unhealthy: all answers of the iteration score the same") == 1
    assert run.unhealthy["equal_scores"]["times"] == 3 and run.unhealthy["equal_scores"]["step"] == 0


def test_stopped_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    """`stop`: the run ends before the unhealthy step is saved; with another bound the same command goes on from the
    checkpoint."""
    scores = iter([0.0, 1.0] * 4)
    options: dict[str, Any] = {
        "iterations": 4,
        "on_unhealthy": "stop",
        "train": {"save_steps": 1},
        "health": {"unfinished": 1.0},
    }

    def then_equal(answer: Any) -> float:
        return next(scores, 0.5)

    with pytest.raises(
        TrainingFault, match="unhealthy at step 2: all answers of the iteration score the same"
    ) as caught:
        trainer(tmp_path, stage(**options), score=then_equal).fit()
    assert "goes on from it" in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    again = trainer(tmp_path, stage(**{**options, "on_unhealthy": "warn"}), score=lambda answer: 0.5)
    assert again.fit().step == 4
