"""Groups and trees of rows larger than memory: they wait on disk, in the order in which they first came."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from typing import Any

import pytest

from align.data.mapping.grouped import by_key, by_parent
from align.data.records import Origin
from align.data.rows import Row

_SCRIPT = """
import re, sys
from align.data.mapping.grouped import by_key, by_parent
from align.data.records import Origin
from align.data.rows import Row

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def rows(count):
    for i in range(count):
        yield i, Row({"text": f"{i} " + "x" * 4000}, Origin("rows", i + 1))

kind = sys.argv[1]
run = {
    "groups": lambda n: by_key((str(i * 7919 % (n // 4)), row) for i, row in rows(n)),
    "trees": lambda n: by_parent((str(i), None if i % 4 == 0 else str(i - i % 4), row) for i, row in rows(n)),
}[kind]
sum(1 for _ in run(400))  # everything is imported, and the database is known
before = peak()
found = sum(1 for _ in run(10_000))
print(found, peak() - before)
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="the kernel does not tell the peak of a process's memory"
)
@pytest.mark.parametrize("kind", ["groups", "trees"])
def test_memory_does_not_grow_with_the_rows(kind: str) -> None:
    """40 MB of rows are grouped while the process grows by less than 32 MiB."""
    ended = subprocess.run([sys.executable, "-c", _SCRIPT, kind], capture_output=True, text=True, check=True)
    found, grown = ended.stdout.split()
    assert int(found) == 2_500
    assert float(grown) < 32


def row(number: int, **value: Any) -> Row:
    return Row(value, Origin("rows", number))


def test_groups_are_those_of_a_dictionary_in_the_order_of_their_first_rows() -> None:
    draw = random.Random(3)
    rows = [row(number, key=str(draw.randrange(50))) for number in range(1000)]
    expected: dict[str, list[Row]] = {}
    for one in rows:
        expected.setdefault(one.value["key"], []).append(one)
    assert list(by_key((one.value["key"], one) for one in rows)) == list(expected.values())


def test_siblings_and_the_path_to_them() -> None:
    links = {"r": None, "a": "r", "b": "r", "c": "a", "d": "a", "lost": "gone", "x": "y", "y": "x"}
    rows = {id: row(number, id=id) for number, id in enumerate(links, 1)}
    found = {
        tuple(one.value["id"] for one in siblings): None if path is None else [one.value["id"] for one in path]
        for path, siblings in by_parent((id, parent, rows[id]) for id, parent in links.items())
    }
    assert found == {("a", "b"): ["r"], ("c", "d"): ["r", "a"], ("lost",): None, ("x",): None, ("y",): None}
