"""What a collective that fails says: who waited, for what, and who did not come."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from align import collective
from align.errors import EnvironmentFault


class Board:
    """torch's store, as a dictionary."""

    def __init__(self) -> None:
        self.written: dict[str, bytes] = {}
        self.gone = False

    def set(self, key: str, value: str, /) -> None:
        if self.gone:
            raise RuntimeError("Broken pipe")
        self.written[key] = value.encode()

    def check(self, keys: list[str], /) -> bool:
        if self.gone:
            raise RuntimeError("Broken pipe")
        return all(key in self.written for key in keys)

    def get(self, key: str, /) -> bytes:
        return self.written[key]


@pytest.fixture
def board() -> Iterator[Board]:
    yield Board()
    collective.leave()


def fails(of: collective.Meetings, what: str) -> str:
    with pytest.raises(EnvironmentFault) as failed, of.meet(what):
        raise RuntimeError("Timed out waiting 1800000ms for recv operation to complete")
    assert failed.value.exit_code == 3 and "continues from what was saved" in str(failed.value)
    return str(failed.value)


def test_those_who_did_not_come_are_named(board: Board) -> None:
    """One is behind, one is elsewhere, one never joined; whoever came is not accused."""
    host = socket.gethostname()
    mine, came, behind, elsewhere = (collective.Meetings(board, rank, 5) for rank in range(4))
    for rank in (mine, came, behind, elsewhere):
        with rank.meet("reading the data"):
            pass
    for rank, what in ((came, "publishing"), (elsewhere, "evaluating")):
        with rank.meet(what):
            pass
    said = fails(mine, "publishing")
    assert "rank 0 waited 0 s for the other processes in publishing: " in said
    assert f"rank 2 on {host} did not come, it was last in reading the data" in said
    assert f"rank 3 on {host} is in evaluating instead" in said
    assert "rank 4 never joined" in said and "rank 1" not in said
    assert "Timed out waiting" in said


def test_many_are_counted(board: Board) -> None:
    assert "rank 4 never joined; and 59 more (" in fails(collective.Meetings(board, 0, 64), "publishing")


def test_without_rank_0_there_is_no_list(board: Board) -> None:
    mine = collective.Meetings(board, 3, 4)
    board.gone = True
    assert "rank 0 is gone, and with it the list" in fails(mine, "publishing")


def test_one_that_is_lost_inside_is_told(board: Board) -> None:
    mine, other = (collective.Meetings(board, rank, 2) for rank in range(2))
    with other.meet("publishing"):
        pass
    assert "all came, and one was lost in it" in fails(mine, "publishing")


def test_other_errors_stay_what_they_are(board: Board) -> None:
    with pytest.raises(KeyError), collective.Meetings(board, 0, 2).meet("publishing"):
        raise KeyError("x")


def test_one_process_counts_nothing() -> None:
    with pytest.raises(RuntimeError, match="as it is"), collective.collective("publishing"):
        raise RuntimeError("as it is")


def test_a_place_is_that_of_the_caller(board: Board) -> None:
    """Functions that only hand a collective on are passed over."""

    def hands_on() -> str:
        return collective.place()

    assert hands_on().startswith("hands_on (test_collective.py:")
    code = compile("def inner():\n return place('passes.py')\n", "passes.py", "exec")
    names = {"place": collective.place}
    exec(code, names)
    inner = names["inner"]
    assert inner().startswith("test_a_place_is_that_of_the_caller (test_collective.py:")


def test_the_program_counts_while_it_is_in_a_group(board: Board) -> None:
    collective.join(board, 1, 2)
    with suppress(EnvironmentFault), collective.collective("publishing"):
        pass
    assert board.written["align/at/1"].decode().split(" ", 2)[::2] == ["1", "publishing"]
