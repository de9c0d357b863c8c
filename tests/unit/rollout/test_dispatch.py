"""Samples follow from the seed and the prompts, not from who makes them or in which order."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from align.models.scalar.critic import ActorCritic
from align.rollout.dispatch import CallPieces, of_piece
from align.rollout.engine import Sampling
from align.rollout.transformers import TransformersEngine
from align.stages.ppo.rollouts import Clock, Rollouts, ScoredAnswer
from align.training.launch import Ranks
from tests.support.rollouts import ENCODER, ByRule, ExactEngine, ends_early, policy, prompts, stage


@pytest.mark.parametrize(("count", "each", "together"), [(7, 2, 6), (1, 9, 4), (8, 1, 4), (5, 1, 1000), (0, 1, 4)])
def test_pieces_hold_every_prompt_once_and_every_piece_has_one_maker(count: int, each: int, together: int) -> None:
    pieces = CallPieces.of_samples(count, each=each, together=together)
    assert [number for piece in pieces for number in piece] == list(range(count))
    assert all(len(piece) * each <= together + each - 1 for piece in pieces)
    for world in (1, 2, 3):
        made = [number for rank in range(world) for number in pieces.share(rank, world)]
        assert sorted(made) == list(range(len(pieces)))


def test_pieces_may_be_made_in_any_order() -> None:
    """With transformers' own sampling, which draws a call's samples from one stream."""
    engine = TransformersEngine(policy(stage()), ENCODER, max_length=64, shared=True)
    ids = [prompt.ids for prompt in prompts(10)]
    pieces, sampling = CallPieces.of_samples(len(ids), each=2, together=6), Sampling(5, n=2, seed=4)

    def made(order: list[int]) -> dict[int, Any]:
        return {
            number: engine.generate(ids[pieces[number].start : pieces[number].stop], of_piece(sampling, number))
            for number in order
        }

    forward = made([0, 1, 2, 3])
    assert forward == made([2, 0, 3, 1])
    assert len({one.ids for piece in forward.values() for of_prompt in piece for one in of_prompt}) > 10


class _Group(Ranks):
    """Processes that are threads of this one."""

    def __init__(self, rank: int, world: int, told: list[Any], meet: threading.Barrier) -> None:
        super().__init__(rank, world)
        object.__setattr__(self, "told", told)
        object.__setattr__(self, "meet", meet)

    def gather(self, value: Any) -> list[Any]:
        told, meet = self.told, self.meet  # type: ignore[attr-defined]
        told[self.rank] = value
        meet.wait()
        values = list(told)
        meet.wait()
        return values


class _FewTogether(ExactEngine):
    together = 4


def _sampled(world: int) -> list[list[list[ScoredAnswer]]]:
    """What each of ``world`` processes gets."""
    told, meet, data = [None] * world, threading.Barrier(world), prompts(7)
    found: list[Any] = [None] * world
    # Made one after the other: random weights are drawn from torch's one generator.
    nets = [policy(stage()) for _ in range(world)]

    def sample(rank: int) -> None:
        rollouts = Rollouts(
            ActorCritic(nets[rank], None),
            ENCODER,
            _FewTogether(nets[rank]),
            ByRule(ends_early),
            precision=None,
            canaries=[],
            seed=1,
            ranks=_Group(rank, world, told, meet),
            clock=Clock(),
        )
        found[rank] = rollouts.sample(data, Sampling(6, n=2), 3)

    threads = [threading.Thread(target=sample, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_one_two_and_three_processes_sample_the_same() -> None:
    """In PPO, scores included; and every process gets all of it."""
    (alone,) = _sampled(1)
    for world in (2, 3):
        assert all(found == alone for found in _sampled(world))
    assert len({one.answer.ids for of_prompt in alone for one in of_prompt}) > 7
