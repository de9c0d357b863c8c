"""``align data convert``: the same records after writing and reading, in every shape; what one cannot say is counted;
all or nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from align import files
from align.commands.convert_data import KINDS, Converted, convert, provenance_of
from align.data.formats import other_tools
from align.data.formats.own_rows import row_of
from align.data.records import Conversation, Messages, Preference, Prompt, Record, Unpaired
from align.data.sources.contents import wanted_of
from align.data.sources.mixture import read_records
from align.errors import InputError
from align.recipe.schema import DataSource
from tests.support.made_records import ORIGIN, records

QUICK = settings(
    max_examples=12, suppress_health_check=list(HealthCheck), deadline=None, phases=(Phase.explicit, Phase.generate)
)
ALL_KINDS = tuple(KINDS)
ASK = [{"role": "user", "content": "Is the sun a star?"}]


def read(path: Path, want: Any, **keys: Any) -> list[Record]:
    """The records of a file, without where they stand in it."""
    found = read_records([DataSource.model_validate({"path": str(path), **keys})], [path], want, seed=0, rejects=None)
    return [replace(record, origin=ORIGIN) for record in found]


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(source: Path, out: Path, to: str = "align", want: Any = None, replace: bool = False, **keys: Any) -> Converted:
    spec = DataSource.model_validate({"path": str(source), **keys})
    return convert(spec, source, out, to=to, want=want or wanted_of(spec, source), replace=replace)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Our own shape


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_records_are_the_same_after_writing_and_reading(kind: type[Record], tmp_path: Path) -> None:
    """Through lines of JSON, from there through Parquet, and back again; the kind and the columns are found without a
    word."""
    want = KINDS[kind]

    @QUICK
    @given(st.lists(records(kind), min_size=2, max_size=5))
    def check(made: list[Record]) -> None:
        first = write(tmp_path / "a.jsonl", [row_of(record, "made.jsonl") for record in made])
        assert read(first, want) == made
        run(first, tmp_path / "b.parquet", replace=True)
        assert read(tmp_path / "b.parquet", want) == made
        run(tmp_path / "b.parquet", tmp_path / "c.jsonl", replace=True)
        assert read(tmp_path / "c.jsonl", want) == made

    check()


@pytest.mark.parametrize("want", ["conversation", "prompt", "preference"])
def test_what_is_read_as_another_kind_is_written_as_that_kind(want: str, tmp_path: Path) -> None:
    row = {"prompt": ASK, "chosen": "Yes.", "rejected": ["No.", "Perhaps."], "lang": "en", "winner": "chosen"}
    source = write(tmp_path / "a.jsonl", [row])
    expected = read(source, want, format="preference")
    run(source, tmp_path / "b.jsonl", want=want, format="preference")
    assert read(tmp_path / "b.jsonl", want) == expected != []
    assert [KINDS[type(record)] for record in expected] == [want]


def test_a_row_says_where_it_comes_from_and_keeps_what_stood_beside(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"question": "2+2?", "reply": "4", "lang": "en", "email": "me@example.org"}])
    run(source, tmp_path / "b.jsonl", columns={"prompt": "question", "completion": "reply"})
    (row,) = lines(tmp_path / "b.jsonl")
    assert row == {
        "id": "a.jsonl:1",
        "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
        "fields": {"lang": "en"},
        "origin": {"source": "a.jsonl", "line": 1},
    }
    assert [record.fields for record in read(tmp_path / "b.jsonl", "conversation", where={"fields.lang": "en"})] == [
        {"lang": "en"}
    ]


def test_a_column_called_origin_of_somebody_else_is_a_column_like_others(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c", "origin": "web", "fields": {"x": 1}}]
    )
    expected = read(source, "preference")
    assert expected[0].fields == {"origin": "web", "fields": {"x": 1}}
    run(source, tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", "preference") == expected


def test_provenance_says_what_was_read_how_and_what_became_of_it(tmp_path: Path) -> None:
    """Its source, given to the command again, gives the same file."""
    text = "question,a,b,best\n2+2?,4,5,A\n3+3?,7,6,B\n1+1?,2,3,same\n"
    source = tmp_path / "own.csv"
    source.write_bytes(text.replace(",", ";").encode())
    better = {"winner": "best", "values": ["A", "B"], "ties": ["same"]}
    out = tmp_path / "out.jsonl"
    run(source, out, format={"prompt": "question", "answers": ["a", "b"], "better": better})
    told = yaml.safe_load(provenance_of(out).read_text())
    assert told["file"] == {"name": "out.jsonl", "sha256": files.sha256_file(out), "rows": 2}
    assert told["source_sha256"] == {"own.csv": files.sha256_file(source)}
    assert told["source_rows"] == {"read": 3, "kept": 2, "a tie": 1}
    assert told["source"]["separator"] == ";"
    again = tmp_path / "again.jsonl"
    keys = {key: value for key, value in told["source"].items() if key != "path"}
    run(source, again, **keys)
    assert again.read_bytes() == out.read_bytes()


# All or nothing


def test_nothing_is_written_when_something_is_wrong(tmp_path: Path) -> None:
    """Neither a file nor a part of one, in any shape."""
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    source = write(tmp_path / "a.jsonl", [good] * 600 + [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    for to in ("align", *other_tools.TARGETS):
        with pytest.raises(InputError, match=r"a\.jsonl:601 rejected: chosen and rejected are equal"):
            run(source, tmp_path / "out.jsonl", to)
    with pytest.raises(InputError, match="equal"):
        run(source, tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert run(source, tmp_path / "out.jsonl", on_bad_row="skip").rows == 600


def test_a_disk_that_fails_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every operation: the old file with its provenance, or the new file with its own."""
    source = write(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    out = write(tmp_path / "out.jsonl", [{"old": 1}])
    old = out.read_bytes()

    class Stop(Exception):
        pass

    for number in range(100):
        left = [number]

        def fail(operation: str, path: Path, left: list[int] = left) -> None:
            left[0] -= operation != "remove"
            if left[0] == -1 and operation != "remove":
                raise Stop

        monkeypatch.setattr(files, "fault", fail)
        try:
            run(source, out, replace=True)
        except Stop:
            monkeypatch.setattr(files, "fault", None)
            whole = out.read_bytes()
            assert (
                whole == old
                or files.sha256_file(out) == yaml.safe_load(provenance_of(out).read_text())["file"]["sha256"]
            )
            assert {path.name for path in tmp_path.iterdir()} <= {"a.jsonl", "out.jsonl", "out.jsonl.provenance.yaml"}
        else:
            break
    monkeypatch.setattr(files, "fault", None)
    assert number > 5
    assert lines(out)[0]["id"] == "a.jsonl:1"


def test_what_exists_is_replaced_only_when_asked(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    out = write(tmp_path / "out.jsonl", [])
    with pytest.raises(InputError, match=r"out\.jsonl exists; write to another file, or replace it with --replace"):
        run(source, out)
    run(source, out, replace=True)
    out.unlink()
    with pytest.raises(InputError, match=r"out\.jsonl\.provenance\.yaml exists"):
        run(source, out)
    for target, message in (
        (source, "is the file that is read"),
        (tmp_path / "x.csv", r"must end in \.jsonl or \.parquet"),
        (tmp_path / "no" / "x.jsonl", "no folder"),
    ):
        with pytest.raises(InputError, match=message):
            run(source, target, replace=True)
    with pytest.raises(InputError, match=r"must end in \.jsonl$"):
        run(source, tmp_path / "x.parquet", "trl")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Five times the rows, the same peak (Python's own allocations; Parquet's buffers are flushed block by block)."""
    import tracemalloc

    peaks = []
    for number, count in enumerate((1_000, 5_000)):
        row = json.dumps({"prompt": "a" * 300, "chosen": "b" * 300, "rejected": "c" * 300}) + "\n"
        source = tmp_path / f"{number}.jsonl"
        source.write_text(row * count)
        run(write(tmp_path / "warm.jsonl", [json.loads(row)]), tmp_path / f"warm{number}.jsonl")
        tracemalloc.start()
        run(source, tmp_path / f"out{number}.jsonl")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] + 100_000


def test_a_source_that_gives_two_kinds_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "completion": "b", "label": True}]
    (tmp_path / "two_kinds.py").write_text("def mixed(row):\n    return row\n")
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(
            InputError, match=r"a\.jsonl:2: gives labelled answers beside preferences; write them apart"
        ):
            run(write(tmp_path / "a.jsonl", rows), tmp_path / "b.jsonl", want="unpaired", format="two_kinds:mixed")
    finally:
        sys.path.remove(str(tmp_path))


# The shapes of other tools


def sayable(record: Record, to: str) -> Record:
    """The record as far as the shape can say it: written here once more, from what the shapes are."""
    drop = {"sampled", "metadata", "finished"} | ({"reasoning"} if to == "openai" else set())
    if to == "llama-factory":
        drop |= {"name", "tool_call_id"}

    def messages(given: Messages, *, weighed: bool) -> Messages:
        kept: list[Any] = []
        for message in given:
            one: dict[str, Any] = {
                key: value for key, value in message.items() if key not in drop and (key != "train" or weighed)
            }
            if to == "llama-factory" and "reasoning" in one:
                one["content"] = f"<think>\n{one.pop('reasoning')}\n</think>\n\n{one['content']}"
            if "tool_calls" in one and to == "llama-factory":
                one["tool_calls"] = [
                    {key: value for key, value in call.items() if key != "id"} for call in one["tool_calls"]
                ]
            kept.append(one)
        return tuple(kept)

    fields = {"answer": record.fields["answer"]} if isinstance(record, Prompt) and "answer" in record.fields else {}
    if isinstance(fields.get("answer"), int):  # a right answer in a column is a text, a list or an object
        fields["answer"] = str(fields["answer"])
    common: dict[str, Any] = {"fields": fields, **({"id": "-"} if to == "openai" else {})}
    if isinstance(record, Conversation):
        return replace(record, messages=messages(record.messages, weighed=to == "openai"), **common)
    prompt = messages(record.prompt, weighed=False)
    if isinstance(record, Preference):
        chosen, rejected = (
            messages(record.chosen, weighed=False),
            tuple(messages(one, weighed=False) for one in record.rejected),
        )
        margins = record.margins if to == "trl" else None
        return replace(record, prompt=prompt, chosen=chosen, rejected=rejected, margins=margins, votes=None, **common)
    if isinstance(record, Unpaired):
        return replace(record, prompt=prompt, completion=messages(record.completion, weighed=False), **common)
    return replace(record, prompt=prompt, **common)


def paired(record: Record) -> list[Record]:
    """A preference with one rejected answer each."""
    if not isinstance(record, Preference) or len(record.rejected) == 1:
        return [record]
    each = range(len(record.rejected))
    return [replace(record.keeping([i == wanted for i in each]), id=f"{record.id}#{wanted + 1}") for wanted in each]


def without_nulls(value: Any) -> bool:
    """In the objects of a table or of a call a null is an absent key."""
    if isinstance(value, dict):
        return all(item is not None and without_nulls(item) for item in value.values())
    return all(map(without_nulls, value)) if isinstance(value, list) else True


def plain(record: Record, to: str) -> bool:
    every = record.messages if isinstance(record, Conversation) else record.prompt
    every += (
        getattr(record, "completion", ()) + getattr(record, "chosen", ()) + sum(getattr(record, "rejected", ()), ())
    )
    arguments = [call["function"]["arguments"] for m in every for call in m.get("tool_calls", []) if "function" in call]
    if (
        isinstance(record, Prompt)
        and "assistant" in [message["role"] for message in record.prompt[:2]]
        and to == "openai"
    ):
        return False  # rows of messages that begin with the assistant are refused
    answer = record.fields.get("answer", "")
    return (
        all(map(without_nulls, [*arguments, *record.tools]))
        and isinstance(answer, (str, int, list))
        and not isinstance(answer, bool)
    )


def readable(columns: Sequence[set[str]], to: str) -> bool:
    """Can the tool read a file with these columns, row by row? Tools may be absent, and for TRL not begin late."""
    begins = [row - {"tools"} for row in columns]
    late = to != "openai" and "tools" not in columns[0] and any("tools" in row for row in columns)
    return all(row == begins[0] for row in begins) and not late


SAID = [
    (to, kind)
    for to, target in other_tools.TARGETS.items()
    for kind in target.takes
    if (to, kind) != ("kto", Preference)
]


@pytest.mark.parametrize(("to", "kind"), SAID)
def test_what_another_shape_says_is_read_again_as_the_same(to: str, kind: type[Record], tmp_path: Path) -> None:
    """Pair by pair; the rows that it cannot say are counted, and so is every part that it has no place for."""

    @QUICK
    @given(st.lists(records(kind).filter(lambda record: plain(record, to)), min_size=1, max_size=3))
    def check(made: list[Record]) -> None:
        out = tmp_path / "out.jsonl"
        source = write(tmp_path / "a.jsonl", [row_of(record, "made.jsonl") for record in made])
        left: list[Record] = []
        columns: list[set[str]] = []
        for record in made:
            try:
                columns += [set(row) for row in other_tools.TARGETS[to].rows(record, lambda what: None)]
            except other_tools.Unsayable:
                left.append(record)
        if len(left) == len(made):
            with pytest.raises(InputError, match="nothing is left that"):
                run(source, out, to, replace=True)
            return
        if not readable(columns, to):
            with pytest.raises(InputError, match="reads this column in all rows or in none"):
                run(source, out, to, replace=True)
            return
        done = run(source, out, to, replace=True)
        assert sum(count.total for count in done.left_out.values()) == len(left)
        expected = [one for record in made if record not in left for one in paired(sayable(record, to))]
        found = read(out, KINDS[kind])
        if to == "openai":
            found = [replace(record, id="-") for record in found]
            expected = [replace(record, id="-") for record in expected]
        assert found == expected
        if any(sayable(record, to) != record for record in made if record not in left):
            assert done.unsaid

    check()


def test_a_labelled_answer_of_several_messages_has_no_place_in_llama_factorys_shape(tmp_path: Path) -> None:
    """It reads the last message as the answer and those before it as prompt, and would not train them."""
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    answer = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Three."},
    ]
    rows = [{"prompt": "How many?", "completion": answer[at:], "label": True} for at in (0, 2)]
    source, out = write(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl"
    done = run(source, out, "llama-factory")
    assert {what: count.total for what, count in done.left_out.items()} == {"an answer of several messages": 1}
    assert len(lines(out)) == 1


def test_answers_that_differ_only_in_what_is_left_out_make_no_pair(tmp_path: Path) -> None:
    """OpenAI's form has no place for reasoning. Without it the two answers are the same text, so the pair is left out."""
    said = [[{"role": "assistant", "content": "Yes.", "reasoning": why}] for why in ("It is.", "Why not.")]
    differ = {"prompt": "Is it?", "chosen": said[0], "rejected": [said[1]]}
    source = write(tmp_path / "a.jsonl", [differ, {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}])
    done = run(source, tmp_path / "out.jsonl", "openai")
    (what,) = done.left_out
    assert what == "answers that differ only in their reasoning"
    assert len(lines(tmp_path / "out.jsonl")) == 1


def test_kto_labels_each_answer_of_a_preference_in_its_direction(tmp_path: Path) -> None:
    row = {"id": "q", "prompt": ASK, "chosen": "Yes.", "rejected": ["No.", "Perhaps."], "margin": 1.5}
    done = run(write(tmp_path / "a.jsonl", [row]), tmp_path / "out.jsonl", "kto")
    found = read(tmp_path / "out.jsonl", "unpaired")
    assert all(isinstance(record, Unpaired) for record in found)
    assert [(r.id, r.completion[0]["content"], r.label) for r in found if isinstance(r, Unpaired)] == [
        ("q#0", "Yes.", True),
        ("q#1", "No.", False),
        ("q#2", "Perhaps.", False),
    ]
    assert list(done.unsaid) == [other_tools.MARGIN]


ROWS = [
    {
        "id": "a",
        "lang": "en",
        "prompt": ASK,
        "chosen": [{"role": "assistant", "content": "Yes."}],
        "rejected": [
            [{"role": "assistant", "content": "No."}],
            [{"role": "assistant", "content": "The sun is", "finished": False}],
        ],
        "margin": [2, 1],
    },
    {"id": "b", "prompt": "Plain?", "chosen": "Strings.", "rejected": "Words.", "margin": 0.5},
]


def test_one_row_for_each_pair_with_the_keys_that_trl_reads(tmp_path: Path) -> None:
    done = run(write(tmp_path / "rows.jsonl", ROWS), tmp_path / "pairs.jsonl", "trl")
    made = lines(tmp_path / "pairs.jsonl")
    assert [(row["id"], row.get("margin"), row["rejected"][0]["content"]) for row in made] == [
        ("a#1", 2.0, "No."),
        ("a#2", 1.0, "The sun is"),
        ("b", 0.5, "Words."),
    ]
    assert all(
        set(message) == {"role", "content"}
        for row in made
        for key in ("prompt", "chosen", "rejected")
        for message in row[key]
    )
    assert {what: count.total for what, count in done.unsaid.items()} == {other_tools.OTHER: 1, other_tools.CUT: 1}
    assert f"not written, trl has no place for it: other columns: 1 ({tmp_path / 'rows.jsonl'}:1)" in done.lines()


def test_trl_takes_the_file(tmp_path: Path) -> None:
    """Its own check of what a preference is, on the loaded data set."""
    from datasets import Dataset
    from trl.data_utils import is_conversational, maybe_extract_prompt

    out = tmp_path / "pairs.jsonl"
    run(write(tmp_path / "rows.jsonl", ROWS), out, "trl")
    loaded = Dataset.from_list(lines(out))
    assert all(is_conversational(row) and maybe_extract_prompt(row)["prompt"] == row["prompt"] for row in loaded)


def test_a_shape_without_a_place_for_such_records_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    with pytest.raises(
        InputError, match="--to openai has no place for labelled answers; it takes conversations, preferences, prompts"
    ):
        run(source, tmp_path / "b.jsonl", "openai")
    run(source, tmp_path / "b.jsonl", "openai", want="prompt")
    assert lines(tmp_path / "b.jsonl") == [{"messages": [{"role": "user", "content": "a"}]}]


TOOL = {"type": "function", "function": {"name": "boil", "parameters": {"type": "object", "properties": {}}}}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("to", "more", "column", "problem"),
    [
        ("trl", [{"margin": 2}, {"margin": 2}, {}], "margin", r"missing, but .*a\.jsonl:1 has it"),
        ("trl", [{}, {"margin": 2}], "margin", r".*a\.jsonl:1 has none"),
        ("trl", [{}, {}, {"tools": [TOOL]}], "tools", r".*a\.jsonl:1 has none"),
        ("kto", [{}, {"tools": [TOOL]}], "tools", r".*a\.jsonl:1 has none"),
        ("trl", [{"margin": [2, 1], "rejected": ["c", "d"]}, {"margin": 0}], None, ""),
        ("trl", [{"tools": [TOOL]}, {}, {"tools": [TOOL]}], None, ""),
        ("kto", [{"margin": 2}, {}], None, ""),
        ("openai", [{"margin": 2}, {}, {"tools": [TOOL]}], None, ""),
        ("llama-factory", [{"margin": 2}, {}, {"tools": [TOOL]}], None, ""),
        ("align", [{"margin": 2}, {}, {"tools": [TOOL]}], None, ""),
    ],
)
def test_a_column_that_only_some_rows_have_is_refused_where_the_tool_cannot_read_it(
    to: str, more: list[dict[str, Any]], column: str | None, problem: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "a.jsonl", [{**PAIR, **row} for row in more])
    out = tmp_path / "out.jsonl"
    if column is None:
        assert run(source, out, to).records == len(more)
        return
    with pytest.raises(InputError, match=rf"a\.jsonl:{len(more)} {column}: {problem}: {to} reads this column in all"):
        run(source, out, to)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert run(source, out, to, ignore=[column]).records == len(more)


def test_right_answers_of_only_some_prompts_are_refused_too(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "4"}, {"prompt": "b"}])
    for to in ("trl", "openai"):
        with pytest.raises(InputError, match=rf"a\.jsonl:2 answer: missing, but .*:1 has it: {to} reads this column"):
            run(source, tmp_path / "out.jsonl", to, want="prompt", format="prompt")
    assert run(source, tmp_path / "out.jsonl", want="prompt", format="prompt").records == 2


def test_datasets_fails_at_tools_that_begin_late_and_reads_their_absence(tmp_path: Path) -> None:
    """Why TRL's files are refused as they are: what ``datasets`` does with a file larger than what it reads at once."""
    import datasets

    row = json.dumps({"messages": "x" * 1000})
    tools = json.dumps({"messages": "x", "tools": "[]"})
    for lines_, works in (([row] * 50 + [tools], False), ([tools] + [row] * 50, True)):
        path = tmp_path / f"{works}.jsonl"
        path.write_text("\n".join(lines_) + "\n")
        load: Any = datasets.load_dataset
        options = {"data_files": str(path), "split": "train", "cache_dir": str(tmp_path / "cache"), "chunksize": 10_000}
        if works:
            assert load("json", **options)[-1]["tools"] is None
        else:
            with pytest.raises(datasets.exceptions.DatasetGenerationError):
                load("json", **options)
