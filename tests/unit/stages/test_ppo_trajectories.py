"""From trajectories to what is trained on: targets are the sampled tokens and no others, and every number that is known
of a sampled token stands at that token."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from align.batching.tree import Layout, build
from align.rollout.engine import Sample, Sampling
from align.rollout.trajectory import Segment, Trajectory
from align.scoring.scorer import Answer
from align.stages.ppo.collect import make_experience
from align.stages.ppo.experience import Answers, Experience, PolicyBatch, training_batches
from align.stages.ppo.rollouts import Rollouts, ScoredAnswer
from tests.support.rollouts import VOCAB, policy, prompts, stage, trainer

LAYOUTS: tuple[Layout, ...] = ("tree", "packed", "padded")


def logprob(token: int) -> float:
    """Each id has one of its own."""
    return -token / 1024


def trajectory(prompt: Sequence[int], *parts: tuple[bool, Sequence[int]]) -> Trajectory:
    """A prompt and what followed: (was it sampled?, ids)."""
    made = [
        Segment(tuple(ids), sampled, tuple(map(logprob, ids)) if sampled else None, 1 if sampled else None)
        for sampled, ids in parts
    ]
    return Trajectory((Segment(tuple(prompt), sampled=False), *made), "stop")


# Segments


def test_a_single_turn_is_a_prompt_and_a_sample() -> None:
    found = Trajectory.single_turn([1, 2], Sample((3, 4), (-0.5, -0.25), "length", 7))
    assert (found.prompt, found.ids, found.mask) == ((1, 2), (3, 4), (True, True))
    assert found.logprobs == (-0.5, -0.25) and not found.finished
    assert [segment.version for segment in found.segments] == [None, 7]
    assert Trajectory.single_turn([1], Sample((3,), None, "stop", 0)).logprobs is None


def test_what_was_observed_is_no_target_and_has_no_log_probs() -> None:
    found = trajectory([1], (True, [2, 3]), (False, [4]), (True, [5]))
    assert (found.ids, found.mask) == ((2, 3, 4, 5), (True, True, False, True))
    assert found.logprobs == tuple(map(logprob, (2, 3, 5)))


@pytest.mark.parametrize(
    "segments",
    [
        [],
        [Segment((1,), sampled=True)],
        [Segment((), sampled=False), Segment((1,), sampled=True)],
        [Segment((1,), sampled=False), Segment((2,), sampled=False)],
        [Segment((1,), sampled=False), Segment((), sampled=True)],
        [Segment((1,), sampled=False), Segment((2, 3), True, (-1.0,))],
        [Segment((1,), sampled=False), Segment((2,), True), Segment((3,), False, (-1.0,))],
    ],
)
def test_what_is_no_trajectory(segments: list[Segment]) -> None:
    with pytest.raises(ValueError, match=r"begins with a prompt|nothing was sampled|log-probs are of sampled ids"):
        Trajectory(tuple(segments), "stop")


# Trees of them

PART = st.tuples(st.booleans(), st.integers(1, 3))
SHAPES = st.lists(
    st.tuples(st.integers(1, 3), st.lists(st.lists(PART, min_size=1, max_size=4), min_size=1, max_size=3)),
    min_size=1,
    max_size=3,
)
"""Of each prompt: its length, and of each trajectory: the origins and lengths of what follows, before one last sampled
token."""


def made(shapes: list[tuple[int, list[list[tuple[bool, int]]]]]) -> list[list[Trajectory]]:
    """Trajectories of these shapes, ``[prompt][sample]``, in which no id occurs twice but in a prompt."""
    count = itertools.count(1)

    def take(n: int) -> list[int]:
        return [next(count) for _ in range(n)]

    return [
        [trajectory(prompt, *((sampled, take(n)) for sampled, n in parts), (True, take(1))) for parts in of_prompt]
        for prompt, of_prompt in ((take(length), of_prompt) for length, of_prompt in shapes)
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SHAPES, st.sampled_from(LAYOUTS), st.integers(1, 40))
def test_targets_are_the_sampled_tokens_and_their_numbers_stand_at_them(
    shapes: list[tuple[int, list[list[tuple[bool, int]]]]], layout: Layout, tokens: int
) -> None:
    """Two segments or many, however the trees are cut and laid out."""
    trajectories = made(shapes)
    answers = Answers.of([f"p{p}" for p in range(len(trajectories))], trajectories)
    flat = [one for of_prompt in trajectories for one in of_prompt]
    engine = torch.tensor([value for one in flat for value in one.logprobs or ()])
    pieces = answers.pieces(tokens, layout)
    trees = [pieces.tree(number) for number in range(len(pieces.ranges))]
    branches = [branch for tree in trees for branch in tree.branches]
    assert [tuple(branch.ids.tolist()) for branch in branches] == [one.ids for one in flat]
    assert [tuple(branch.mask.tolist()) for branch in branches] == [one.mask for one in flat]

    batch = build(trees, list(range(len(trees)))[::-1], layout=layout)
    at = pieces.places(batch)
    assert sorted(at.tolist()) == list(range(len(engine))), "every sampled token once"
    assert engine[at].tolist() == [logprob(token) for token in batch.target_ids.tolist()]
    of_answer = [number for number, one in enumerate(flat) for _ in one.logprobs or ()]
    assert answers.branch.tolist() == of_answer and answers.sampled.tolist() == [sum(one.mask) for one in flat]


# Trained


class TwoTurns(Rollouts):
    """Samples of two turns, with something observed between them; the score is 1 and 0 in turn."""

    def sync(self, step: int) -> None:
        """The engine is not asked."""

    def sample(self, prompts: Any, sampling: Sampling, *place: int) -> list[list[ScoredAnswer]]:
        """Of random ids."""
        random = torch.Generator().manual_seed(place[0])

        def ids(n: int) -> list[int]:
            return torch.randint(5, VOCAB, (n,), generator=random).tolist()

        return [
            [
                ScoredAnswer(
                    Answer((), "x"),
                    trajectory(prompt.ids, (True, ids(2 + s)), (False, ids(3)), (True, ids(2))),
                    float(s % 2),
                )
                for s in range(sampling.n)
            ]
            for prompt in prompts
        ]


def experience_of(folder: Path, layout: Layout, **options: Any) -> tuple[Any, Experience]:
    """A trainer and the experience of its first iteration."""
    spec = stage({"layout": layout}, samples_per_prompt=3, **options)
    run = trainer(folder, spec, data=prompts(4))
    run.parts = replace(run.parts, rollouts=copy.copy(run.parts.rollouts))
    run.parts.rollouts.__class__ = TwoTurns
    return run, make_experience(run.parts, 0, step=0, coefficient=0.1, rollouts=folder)


def plainly(net: nn.Module, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """The model's own log-probs of ``ids``, by a forward pass of the whole path."""
    lm: Any = copy.deepcopy(net)
    lm.set_attn_implementation("eager")
    path = torch.tensor([*prompt, *ids])
    with torch.no_grad():
        logs = lm(path[None], use_cache=False).logits[0].log_softmax(-1)
    return logs[len(prompt) - 1 : -1].gather(1, path[len(prompt) :, None])[:, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_old_log_probs_stand_at_the_sampled_tokens(layout: Layout, tmp_path: Path) -> None:
    """They are the model's own, given all that came before, what was observed included."""
    run, experience = experience_of(tmp_path, layout)
    answers = experience.answers
    assert int((~answers.mask).sum()) == 3 * len(answers) and len(experience.old) == len(answers.branch)
    wanted, net = [], policy(run.spec)
    ends = answers.lengths.cumsum(0).tolist()
    for answer, prompt in enumerate(answers.prompt_of.tolist()):
        place = slice(ends[answer] - int(answers.lengths[answer]), ends[answer])
        every = plainly(net, answers.prompts[prompt], answers.ids[place].tolist())
        wanted.append(every[answers.mask[place]])
    assert_close(experience.old, torch.cat(wanted), atol=1e-5, rtol=0)
    for name in ("advantages", "returns", "values"):
        assert len(getattr(experience, name)) == len(experience.old)
    assert experience.summary["length"] == 5.0, "4, 5 and 6 sampled tokens"


def test_a_step_is_over_sampled_tokens_alone(tmp_path: Path) -> None:
    """Its loss counts them, and an experience comes back from the disk as it was."""
    run, experience = experience_of(tmp_path, "tree", estimator="reinforce", importance_cap=2.0)
    pieces = experience.answers.pieces(64, "tree")
    batch = build([pieces.tree(n) for n in range(len(pieces.ranges))], range(len(pieces.ranges)), layout="tree")
    (of_policy,) = training_batches(experience, pieces, [batch])
    assert isinstance(of_policy, PolicyBatch)
    assert run.counts(of_policy) == {"policy": 5 * len(experience.answers)}
    assert of_policy.weights.shape == of_policy.old.shape == of_policy.target_ids.shape
    experience.save(tmp_path / "iteration-000000")
    again = Experience.load(tmp_path / "iteration-000000")
    assert torch.equal(again.answers.mask, experience.answers.mask) and again.answers.mask.dtype == torch.bool
    assert torch.equal(again.old, experience.old)
