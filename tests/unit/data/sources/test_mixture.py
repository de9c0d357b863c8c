"""Reading many sources: bad rows told once and in full, `where`, `limit`, exact shares, leakage.

; METHODS 5.2.
"""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.data.formats.formats import Want
from align.data.records import Conversation, Origin, Preference, Prompt, Record
from align.data.sources.mixture import Records, prompt_digest, read_records, share_out, shared_prompts
from align.errors import InputError
from align.recipe.schema import DataSource

Sources = Callable[..., Records]


def row(number: int, **columns: Any) -> dict[str, Any]:
    return {
        "id": str(number),
        "messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "a"}],
        **columns,
    }


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join((item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)) + "\n" for item in rows)
    )
    return path


def read(*sources: DataSource, want: Want = "conversation", seed: int = 1, rejects: Path | None = None) -> Records:
    return read_records(sources, [Path(source.path) for source in sources], want, seed=seed, rejects=rejects)


def ids(records: Records) -> list[str]:
    return [record.id for record in records]


# Bad rows


def test_the_first_ten_bad_rows_and_their_number_in_one_error(tmp_path: Path) -> None:
    """Of all kinds, of all sources, each with file and line; nothing is given after the first."""
    rows: list[Any] = [row(i) for i in range(1, 41)]
    rows[2] = '{"id": '
    rows[4] = row(5, messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}])
    for i in range(20, 30):
        rows[i] = row(i, messages=[])
    one = write(tmp_path / "one.jsonl", rows)
    other = write(tmp_path / "other.jsonl", [row(1), "nonsense"])
    given = []
    with pytest.raises(InputError) as caught:
        for record in read(DataSource(path=str(one)), DataSource(path=str(other))):
            given.append(record.id)
    problems = [str(problem) for problem in caught.value.problems]
    assert given == ["1", "2"]
    assert len(problems) == 11
    assert problems[0] == f"{one}:3: invalid JSON (col 7); Expecting value"
    assert problems[1] == f"{one}:5 messages.1.content: is empty"
    assert problems[2] == f"{one}:21 messages: is empty"
    assert (
        problems[-1]
        == "13 bad rows in all, the first 10 are listed; mend them, or leave them out with `on_bad_row: skip`"
    )
    assert caught.value.exit_code == 2


def test_skipped_rows_are_written_down_and_counted(tmp_path: Path) -> None:
    """Source, line, field, reason and the beginning of the content; a lone surrogate survives as an
    escape."""
    long = [{"role": "alien", "content": "中" * 1000}]
    path = write(tmp_path / "x.jsonl", [row(1), "{broken", row(3, messages=long), r'{"messages": "\ud800"}', row(5)])
    rejects = tmp_path / "new" / "rejects.jsonl"
    records = read(DataSource(path=str(path), on_bad_row="skip"), rejects=rejects)
    assert ids(records) == ["1", "5"]
    entries = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [(e["source"], e["line"], e["field"]) for e in entries] == [
        (str(path), 2, None),
        (str(path), 3, "messages.0.role"),
        (str(path), 4, "messages"),
    ]
    assert entries[0]["reason"] == "invalid JSON (col 2)"
    assert entries[0]["content"] == "{broken"
    assert entries[1]["reason"].startswith("unknown role 'alien'")
    assert len(entries[1]["content"]) == 200
    assert "中中" in rejects.read_text()
    report = records.report.sources[0]
    assert (report.read, report.kept, report.bad, report.given) == (5, 2, 3, 2)
    assert records.report.lines() == [
        f"{path} (messages): 5 rows read, 2 kept, 3 bad (first: {path}:2: invalid JSON (col 2); "
        "Expecting property name enclosed in double quotes)"
    ]
    json.dumps(records.report.as_json())


def test_rejects_of_an_earlier_reading_are_removed(tmp_path: Path) -> None:
    """A file of rejects means that there are some."""
    rejects = tmp_path / "rejects.jsonl"
    path = write(tmp_path / "x.jsonl", [row(1), "{"])
    assert len(ids(read(DataSource(path=str(path), on_bad_row="skip"), rejects=rejects))) == 1
    assert rejects.exists()
    write(path, [row(1)])
    assert len(ids(read(DataSource(path=str(path), on_bad_row="skip"), rejects=rejects))) == 1
    assert not rejects.exists()


def test_each_source_has_its_own_rule(tmp_path: Path) -> None:
    """One source skips, the other stops."""
    skipping = DataSource(path=str(write(tmp_path / "a.jsonl", [row(1), "{"])), on_bad_row="skip")
    strict = DataSource(path=str(write(tmp_path / "b.jsonl", ["[", row(2)])))
    with pytest.raises(InputError) as caught:
        ids(read(skipping, strict))
    (only,) = caught.value.problems  # one bad row is one line, with what to do
    assert only.line == 1
    assert str(only).endswith("; mend it, or leave it out with `on_bad_row: skip`")


def test_equal_answers_are_told_with_their_line(tmp_path: Path) -> None:
    """Both kinds of row in a preference file."""
    rows = [{"prompt": "q", "chosen": "a", "rejected": r} for r in ("b", "a ", "c", " ")]
    path = write(tmp_path / "p.jsonl", rows)
    records = read(DataSource(path=str(path), on_bad_row="skip"), want="preference")
    assert len(ids(records)) == 2
    assert [str(bad) for bad in records.report.sources[0].first_bad] == [
        f"{path}:2 rejected: chosen and rejected are equal",
        f"{path}:4 rejected: is empty",
    ]


def test_a_later_row_of_another_shape_is_a_bad_row(tmp_path: Path) -> None:
    """A missing column is an error with line and field, never a None; a list among strings is not retyped."""
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a"},
        {"prompt": "q", "chosen": {"x": 1}, "rejected": "b"},
    ]
    path = write(tmp_path / "p.jsonl", rows)
    with pytest.raises(InputError) as caught:
        ids(read(DataSource(path=str(path)), want="preference"))
    assert [str(p) for p in caught.value.problems][:2] == [
        f"{path}:2 rejected: missing",
        f"{path}:3 chosen.role: missing",
    ]


# Nothing left


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    """Whichever way the rows went."""
    path = write(tmp_path / "x.jsonl", [row(1, lang="en"), row(2, lang="zh"), "{"])
    with pytest.raises(InputError, match=r"x\.jsonl: 0 rows left of 3 read: 2 left out by `where`, 1 bad$"):
        ids(read(DataSource(path=str(path), where={"lang": "de"}, on_bad_row="skip")))
    with pytest.raises(InputError, match=r"2 left out by `where`, 1 bad; no row has a field langue$"):
        ids(read(DataSource(path=str(path), where={"langue": "en"}, on_bad_row="skip")))
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(InputError, match=r"empty\.jsonl: 0 rows$"):
        ids(read(DataSource(path=str(path), on_bad_row="skip"), DataSource(path=str(empty))))


# where and limit


def test_where_and_limit(tmp_path: Path) -> None:
    """The first N of those that `where` keeps; bad rows do not count, and rows beyond the limit are not looked at."""
    rows: list[Any] = [row(i, lang="en" if i % 2 else "zh") for i in range(1, 21)]
    rows[2] = "{"
    rows[18] = "{"
    path = write(tmp_path / "x.jsonl", rows)
    records = read(DataSource(path=str(path), where={"lang": "en"}, limit=3, on_bad_row="skip"))
    assert ids(records) == ["1", "5", "7"]
    report = records.report.sources[0]
    assert (report.read, report.left_out, report.bad, report.kept) == (7, 3, 1, 3)
    assert ids(read(DataSource(path=str(path), where={"lang": "zh"}, limit=2, on_bad_row="skip"))) == ["2", "4"]


@pytest.mark.parametrize(
    ("value", "wanted", "kept"),
    [
        (True, True, True),
        ("True", True, True),
        ("true", True, True),
        (1, True, False),
        (3, 3, True),
        ("3", 3, True),
        (3, "3", True),
        (3.0, 3, True),
        ([3], 3, False),
        (None, "None", False),
        ("en", "EN", False),
        (False, True, False),
    ],
)
def test_where_compares_text_and_numbers(tmp_path: Path, value: Any, wanted: Any, kept: bool) -> None:
    """A CSV cell is always text."""
    path = write(tmp_path / "x.jsonl", [row(1, f="no"), row(2, f=value), row(3, f=wanted)])
    assert ids(read(DataSource(path=str(path), where={"f": wanted}))) == (["2", "3"] if kept else ["3"])


# Mixtures


def test_without_weights_every_row_comes_once_in_order(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [row(1), row(2)])
    b = write(tmp_path / "b.jsonl", [row(3), row(4)])
    assert ids(read(DataSource(path=str(b)), DataSource(path=str(a)))) == ["3", "4", "1", "2"]


def mixed(tmp_path: Path, sizes: list[int], weights: list[float], seed: int = 1) -> Records:
    sources = []
    for i, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        path = write(tmp_path / f"{i}.jsonl", [row(1000 * i + j) for j in range(size)])
        sources.append(DataSource(path=str(path), weight=weight))
    return read(*sources, seed=seed)


def test_shares_are_exact_and_small_sources_repeat(tmp_path: Path) -> None:
    """METHODS 5.2: eta 0.2 over 10 agent rows and 90 general ones: 20 and 80 of 100; each agent row twice, no general
    row twice."""
    records = mixed(tmp_path, [10, 90], [0.2, 0.8])
    counts = Counter(ids(records))
    agent = {id: n for id, n in counts.items() if int(id) < 1000}
    general = {id: n for id, n in counts.items() if int(id) >= 1000}
    assert (sum(agent.values()), sum(general.values())) == (20, 80)
    assert set(agent.values()) == {2} and len(agent) == 10
    assert set(general.values()) == {1} and len(general) == 80
    line = records.report.lines()[0]
    assert line.endswith("10 rows read, 10 kept; 20 in the mixture, 0.2000 of it (asked: 0.2000), 2.00 passes")
    assert records.report.as_json()["sources"][1]["share"] == 0.8


def test_a_part_of_a_pass_is_a_random_sample(tmp_path: Path) -> None:
    """METHODS 5.2: 15 of 10 rows are one pass and 5 of them again, seeded."""
    first = ids(mixed(tmp_path, [10, 20], [1, 1], seed=1))
    assert ids(mixed(tmp_path, [10, 20], [1, 1], seed=1)) == first
    counts = Counter(id for id in first if int(id) < 1000)
    assert sorted(counts.values()) == [1] * 5 + [2] * 5
    others = [ids(mixed(tmp_path, [10, 20], [1, 1], seed=seed)) for seed in range(2, 5)]
    assert all(len(other) == 30 for other in others)
    assert any(other != first for other in others)


def test_weights_are_relative(tmp_path: Path) -> None:
    assert ids(mixed(tmp_path, [10, 90], [2, 8])) == ids(mixed(tmp_path, [10, 90], [0.2, 0.8]))


def test_whole_numbers_of_shares() -> None:
    """Largest remainders: 10 in thirds are 4, 3 and 3; always the sum, always within one of the share."""
    assert share_out(10, [1 / 3, 1 / 3, 1 / 3]) == [4, 3, 3]
    assert share_out(7, [0.5, 0.5]) == [4, 3]
    assert share_out(100, [0.2, 0.8]) == [20, 80]
    for total in range(40):
        parts = share_out(total, [0.1, 0.25, 0.65])
        assert sum(parts) == total
        assert all(abs(part - total * share) < 1 for part, share in zip(parts, [0.1, 0.25, 0.65], strict=True))


def test_a_weight_that_gives_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its weight gives it none of the mixture's records"):
        ids(mixed(tmp_path, [2, 2], [0.001, 1]))


def test_bad_rows_of_a_mixture_are_told_before_anything_is_given(tmp_path: Path) -> None:
    """And once: the second pass does not write the rejects again."""
    a = write(tmp_path / "a.jsonl", [row(1), "{", row(2)])
    b = write(tmp_path / "b.jsonl", [row(3)])
    with pytest.raises(InputError, match=r"a\.jsonl:2: invalid JSON"):
        next(read(DataSource(path=str(a), weight=1), DataSource(path=str(b), weight=2)))
    rejects = tmp_path / "rejects.jsonl"
    records = read(
        DataSource(path=str(a), weight=1, on_bad_row="skip"), DataSource(path=str(b), weight=2), rejects=rejects
    )
    counts = Counter(ids(records))
    assert (counts["3"], counts["1"] + counts["2"]) == (2, 1)
    assert len(rejects.read_text().splitlines()) == 1
    assert records.report.sources[0].bad == 1


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    """Records are given as they are read, with weights too."""
    path = write(tmp_path / "x.jsonl", [row(i, pad="x" * 20_000) for i in range(500)])
    for weight in (None, 1.0):
        tracemalloc.start()
        assert sum(1 for _ in read(DataSource(path=str(path), weight=weight))) == 500
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 << 20


# Leakage


def test_prompts_in_two_sets_are_found(tmp_path: Path) -> None:
    """Across record types, whatever the answers, the spacing and the way a character is composed."""
    origin = Origin("a.jsonl", 1)
    asked = ({"role": "user", "content": "Où est-il ?"},)
    train: list[Record] = [
        Conversation((*asked, {"role": "assistant", "content": "x"}), "1", origin),
        Prompt(({"role": "user", "content": "other"},), "2", Origin("a.jsonl", 2)),
    ]
    test: list[Record] = [
        Preference(
            ({"role": "user", "content": " Ou\u0300  est-il ?\n"},),
            ({"role": "assistant", "content": "y"},),
            (({"role": "assistant", "content": "z"},),),
            "3",
            Origin("b.jsonl", 5),
        ),
        Prompt(({"role": "user", "content": "new"},), "4", Origin("b.jsonl", 6)),
        Prompt(({"role": "system", "content": "S"}, *asked), "5", Origin("b.jsonl", 7)),
    ]
    assert shared_prompts(train, test) == [(Origin("a.jsonl", 1), Origin("b.jsonl", 5))]
    assert shared_prompts(train, test[1:]) == []


def test_the_digest_does_not_depend_on_the_process() -> None:
    """A digest that is compared with a stored one must not use Python's salted hash."""
    record = Prompt(({"role": "user", "content": "hi"},), "1", Origin("a", 1))
    assert prompt_digest(record) == hashlib.sha256(b'[["user", "hi"]]').hexdigest()
