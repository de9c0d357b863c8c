"""What `--nnodes`, `--node-rank` and `--rendezvous` say together."""

from __future__ import annotations

import pytest

from align.errors import InputError
from align.machines import Machines, machines_of


@pytest.mark.parametrize(
    ("rendezvous", "address", "port", "loopback"),
    [
        ("10.0.0.1:29500", "10.0.0.1", 29500, False),
        ("gpu-003.cluster:80", "gpu-003.cluster", 80, False),
        ("[fe80::1]:29500", "fe80::1", 29500, False),
        ("127.0.0.1:29500", "127.0.0.1", 29500, True),
        ("localhost:1", "localhost", 1, True),
    ],
)
def test_machine_0_is_named_once(rendezvous: str, address: str, port: int, loopback: bool) -> None:
    machines = machines_of(3, 2, rendezvous)
    assert machines == Machines(3, 2, address, port) and machines.loopback == loopback


def test_one_machine_needs_no_words() -> None:
    assert machines_of(1, None, None) == Machines() and Machines().loopback


@pytest.mark.parametrize(
    ("nnodes", "node_rank", "rendezvous", "words"),
    [
        (2, None, None, "--nnodes 2 without --node-rank and --rendezvous"),
        (2, 0, None, "--nnodes 2 without --rendezvous"),
        (2, None, "a:1", "--nnodes 2 without --node-rank"),
        (2, 2, "a:1", "--node-rank 2 of --nnodes 2"),
        (1, 0, None, "--node-rank without --nnodes"),
        (1, None, "a:1", "--rendezvous without --nnodes"),
        (2, 0, "a", "'a' is no address with a port"),
        (2, 0, ":1", "':1' is no address with a port"),
        (2, 0, "a:0", "'a:0' is no address with a port"),
        (2, 0, "a:65536", "'a:65536' is no address with a port"),
        (2, 0, "tcp://a:1", "'tcp://a:1' is no address with a port"),
    ],
)
def test_what_does_not_fit_together_is_one_line(
    nnodes: int, node_rank: int | None, rendezvous: str | None, words: str
) -> None:
    with pytest.raises(InputError) as caught:
        machines_of(nnodes, node_rank, rendezvous)
    (problem,) = caught.value.problems
    assert words in problem.message and "HOST:PORT" in (problem.hint or "")
