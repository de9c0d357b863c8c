"""From sources to cached trees: what is left out is counted, what is cached is right."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.data.chat.encoder import Encoder
from align.data.report import DataReport
from align.data.trees import load as datasets
from align.data.trees.store import TreeStore
from align.errors import InputError
from align.recipe.schema import DataSource
from tests.support import tokenizers

ENCODER = Encoder(tokenizers.chatml())
QUESTION = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "The capital of France is Paris."}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[k % 2], "content": text} for k, text in enumerate(texts)], **more}


def pair(chosen: str, *rejected: str, prompt: str = "The price?") -> dict[str, Any]:
    answers = [[{"role": "assistant", "content": text}] for text in rejected]
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": answers if len(answers) > 1 else answers[0],
    }


Load = Callable[..., tuple[TreeStore, DataReport]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def call(
        *paths: Path, want: str = "conversation", source: dict[str, Any] | None = None, **changes: Any
    ) -> tuple[TreeStore, DataReport]:
        arguments: dict[str, Any] = {
            "resolve": Path,
            "encoder": ENCODER,
            "max_length": 100,
            "too_long": "drop",
            "train_on": "all",
            "seed": 1,
            "cache": tmp_path / "cache",
            "rejects": None,
        }
        sources = [DataSource(path=str(path), **(source or {})) for path in paths]
        return datasets.load_trees(want, sources, **{**arguments, **changes})

    return call


# Trees


def test_a_conversation_is_one_branch_from_its_first_target_to_its_last(tmp_path: Path, load: Load) -> None:
    row = chat("The dog?", "It sleeps.", "The fox?", "It runs.", id="one")
    row["messages"][1]["train"] = False
    store, report = load(write(tmp_path / "a.jsonl", [row, chat("The dog?", "It sleeps.", "The fox?", "It runs.")]))
    muted, whole = store[0], store[1]
    assert muted.id == "one"
    assert ENCODER.spell(muted.branches[0].ids) == "It runs.<|im_end|>"  # the line break behind it is not kept
    assert ENCODER.spell(whole.branches[0].ids).startswith("It sleeps.<|im_end|>\n<|im_start|>user")
    assert ENCODER.spell(whole.branches[0].ids[whole.branches[0].mask]) == "It sleeps.<|im_end|>It runs.<|im_end|>"
    expected = ENCODER.encode(row["messages"])
    assert np.array_equal(np.concatenate([muted.trunk, muted.branches[0].ids]), expected.ids[:-1])
    assert (report.trees, report.tokens, report.targets) == (2, int(store.sizes.sum()), int(store.targets.sum()))
    assert report.longest == int(store.path_lengths.max())


def test_a_preference_has_its_chosen_answer_first(tmp_path: Path, load: Load) -> None:
    row = {**pair("It is $46.", "No idea.", "Ask the dog."), "margin": 0.5}
    store, _ = load(write(tmp_path / "a.jsonl", [row]), want="preference")
    texts = [ENCODER.spell(branch.ids) for branch in store[0].branches]
    assert texts == ["It is $46.<|im_end|>", "No idea.<|im_end|>", "Ask the dog.<|im_end|>"]
    assert np.array_equal(store[0].trunk, ENCODER.encode_prompt(row["prompt"]))
    assert [branch.margin for branch in store[0].branches] == [0.0, 0.5, 0.5]


def test_margins_and_votes_stay_with_their_answers(tmp_path: Path, load: Load) -> None:
    """The second rejected answer repeats the first and goes: what is said of the third is not taken for what was said
    of it."""
    votes = [{"chosen": 1, "rejected": 1}, {"chosen": 9, "rejected": 0}, {"chosen": 3, "rejected": 1}]
    row = {**pair("It is $46.", "No idea.", "No idea.", "Ask the dog."), "margin": [0.5, 7, 2], "votes": votes}
    store, _ = load(write(tmp_path / "a.jsonl", [row]), want="preference")
    assert [(branch.margin, branch.share) for branch in store[0].branches] == [(0.0, 1.0), (0.5, 0.5), (2.0, 0.75)]


def test_a_prompt_is_a_trunk_without_branches(tmp_path: Path, load: Load) -> None:
    rows = [{"prompt": [QUESTION]}, {"prompt": [{"role": "user", "content": "long " * 200}]}]
    store, report = load(write(tmp_path / "a.jsonl", rows), want="prompt")
    assert len(store) == 1 and store[0].branches == ()
    assert np.array_equal(store[0].trunk, ENCODER.encode_prompt([QUESTION]))
    assert report.dropped["longer than max_length"].total == 1


# Drops


@pytest.mark.parametrize(
    ("row", "format", "said"),
    [
        (
            {"q": "Yes?", "a": ["It is.", "", "No."], "w": 0},
            {"answers": "a", "better": {"winner": "w"}},
            "an empty answer, left out",
        ),
        (
            {"q": "Yes?", "a": ["It is.", "A fox.", "No."], "w": [3, None, 1]},
            {"answers": "a", "better": {"score": "w"}},
            "an answer without a score",
        ),
        (
            {"q": "Yes?", "a": ["It is.", "A fox.", "No."], "w": [3, 3, 1]},
            {"answers": "a", "better": {"score": "w"}},
            "an answer as good as the best",
        ),
        (
            {"q": "Yes?", "a": ["It is.", "No.", "No."], "w": [3, 1, 1]},
            {"answers": "a", "better": {"score": "w"}},
            "an answer equal to another",
        ),
        (
            {"q": "Yes?", "a": ["It is.", "No."], "w": 0, "s": ""},
            {"answers": "a", "better": {"winner": "w"}, "system": "s"},
            None,
        ),
    ],
    ids=["empty", "unscored", "as good", "equal", "no note"],
)
def test_what_happened_to_answers_is_kept_with_the_data(
    tmp_path: Path, load: Load, row: dict[str, Any], format: dict[str, Any], said: str | None
) -> None:
    """The account of the rows is written beside the trees, and read again with them."""
    path = write(tmp_path / "a.jsonl", [row, {**row, "q": "No?"}])
    source = {"format": {"prompt": "q", **format}}
    store, report = load(path, want="preference", source=source)
    again, read = load(path, want="preference", source=source)
    assert not report.reused and read.reused and len(store) == len(again) == 2
    assert read.lines()[:1] == report.lines()[:1] and read.sources == report.sources
    notes = read.sources["sources"][0]["notes"]
    assert list(notes.values()) == ([2] if said else []) and all(what.startswith(str(said)) for what in notes)


def test_long_rows_are_dropped_and_counted_with_their_lines(tmp_path: Path, load: Load) -> None:
    path = write(
        tmp_path / "a.jsonl",
        [chat("Hi", "Yes."), chat("Hi", "word " * 300), chat("Hi", "No."), chat("word " * 300, "No.")],
    )
    rejects = tmp_path / "out" / "rejects.jsonl"
    store, report = load(path, rejects=rejects)
    assert len(store) == 2
    assert report.dropped["longer than max_length"].first == [f"{path}:2", f"{path}:4"]
    assert f"dropped, longer than max_length: 2 ({path}:2, 4)" in report.lines()
    written = [json.loads(line) for line in rejects.read_text(encoding="utf-8").splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in written] == [
        (2, "longer than max_length"),
        (4, "longer than max_length"),
    ]


def test_a_limit_is_reached_exactly(tmp_path: Path, load: Load) -> None:
    path = write(tmp_path / "a.jsonl", [chat("Hi", "The quick brown fox.")])
    length = len(ENCODER.encode(chat("Hi", "The quick brown fox.")["messages"]).ids) - 1  # without the last line break
    assert load(path, max_length=length)[1].longest == length
    with pytest.raises(InputError, match="0 rows left of 1: 1 longer than max_length"):
        load(path, max_length=length - 1)


def test_truncation_cuts_the_end_and_invents_no_end_token(tmp_path: Path, load: Load) -> None:
    """Never inside the prompt; the last target is the original token; a prompt that fills the limit is
    dropped."""
    long = chat("Hi", "The fox runs. " * 40)
    path = write(tmp_path / "a.jsonl", [long, chat("word " * 300, "No."), chat("Hi", "No.")])
    store, report = load(path, too_long="truncate", max_length=60)
    original = ENCODER.encode(long["messages"])
    cut = store[0]
    assert cut.size == 60
    assert np.array_equal(np.concatenate([cut.trunk, cut.branches[0].ids]), original.ids[:60])
    assert cut.branches[0].mask.all() and cut.branches[0].ids[-1] not in ENCODER.stop_ids
    assert store[1].branches[0].ids[-1] in ENCODER.stop_ids
    assert report.noted["cut to max_length"].first == [f"{path}:1"]
    assert report.dropped["the prompt alone fills max_length"].first == [f"{path}:2"]


def test_long_rows_can_be_an_error_that_lists_them(tmp_path: Path, load: Load) -> None:
    path = write(tmp_path / "a.jsonl", [chat("Hi", "Yes."), chat("Hi", "word " * 300)])
    with pytest.raises(InputError) as caught:
        load(path, too_long="error")
    assert str(caught.value).splitlines()[0] == f"{path}:2: longer than max_length (100 tokens)"
    assert "1 such rows in all" in str(caught.value)


def test_rows_without_a_target_are_dropped(tmp_path: Path, load: Load) -> None:
    row = chat("Hi", "Yes.")
    row["messages"][1]["train"] = False
    store, report = load(write(tmp_path / "a.jsonl", [row, chat("Hi", "No.")]))
    assert len(store) == 1 and report.dropped["nothing to train on"].total == 1


def test_equal_answers_are_dropped_before_and_after_cutting(tmp_path: Path, load: Load) -> None:
    """The line numbers of both kinds are told."""
    start = "The lazy dog sleeps. " * 20
    rows = [
        pair("Yes.", "No."),
        pair("Yes.", "No.", "No."),
        pair(f"{start}a", f"{start}b"),
        pair(f"{start}a", f"{start}b", "No."),
    ]
    path = write(tmp_path / "a.jsonl", rows)
    store, report = load(path, want="preference", too_long="truncate")
    assert [len(store[i].branches) for i in range(len(store))] == [2, 2, 2]
    assert report.dropped["chosen and rejected are equal once cut to max_length"].first == [f"{path}:3"]
    assert report.noted["a rejected answer left out, equal to another answer"].first == [f"{path}:2", f"{path}:4"]
    # The template strips what tells these two apart, so that only their tokens show it.
    alike = write(tmp_path / "b.jsonl", [pair("Yes.", "No."), pair("One. Two.", "One.\u2003Two.")])
    encoder = Encoder(
        tokenizers.chatml(),
        chat_template=tokenizers.template("chatml").replace("content }}", "content | replace('\u2003', ' ') }}"),
    )
    assert load(alike, want="preference", encoder=encoder)[1].dropped["chosen and rejected are equal"].first == [
        f"{alike}:2"
    ]


def test_a_rejected_answer_that_is_too_long_is_left_out_alone(tmp_path: Path, load: Load) -> None:
    """The limit holds for every answer, not only for the chosen one."""
    path = write(
        tmp_path / "a.jsonl",
        [pair("Yes.", "word " * 300, "No."), pair("Yes.", "word " * 300), pair("word " * 300, "No.")],
    )
    store, report = load(path, want="preference")
    assert len(store) == 1 and len(store[0].branches) == 2
    assert store.path_lengths.max() <= 100
    assert report.noted["a rejected answer left out, longer than max_length"].first == [f"{path}:1"]
    assert report.dropped["longer than max_length"].first == [f"{path}:2", f"{path}:3"]


def test_nothing_left_is_an_error_that_says_why(tmp_path: Path, load: Load) -> None:
    path = write(tmp_path / "a.jsonl", [chat("Hi", "word " * 300)] * 3)
    with pytest.raises(
        InputError, match=r"a\.jsonl: 0 rows left of 3: 3 longer than max_length; max_length is 100 tokens"
    ):
        load(path)
    assert list((tmp_path / "cache").glob("[!.]*")) == [], "a failed build leaves no entry"
    assert list((tmp_path / "cache").glob(".tmp*")) == []


def test_control_text_and_merges_are_told_of(tmp_path: Path, load: Load) -> None:
    """Encoded all the same, and counted with their lines."""
    path = write(tmp_path / "a.jsonl", [chat("Hi", "Yes."), chat("<|im_end|> hi", "Yes."), chat("Hi", "\n\nYes.")])
    store, report = load(path)
    assert len(store) == 3
    assert report.noted["control-token text in the data, encoded as plain text"].first == [f"{path}:2"]
    merged = "an answer's first characters would have merged with its prompt's last token; encoded apart"
    assert report.noted[merged].first == [f"{path}:3"]


def test_a_huge_row_is_dropped_and_its_content_never_shown(tmp_path: Path, load: Load) -> None:
    path = write(tmp_path / "a.jsonl", [chat("Hi", "Yes."), chat("Hi", "secret" * 100_000)])
    store, report = load(path)
    assert len(store) == 1 and report.dropped["longer than max_length"].first == [f"{path}:2"]
    assert "secret" not in json.dumps(report.as_json())


# Rows that the template refuses


def test_rows_that_the_encoder_refuses_stop_the_run_with_file_and_line(tmp_path: Path, load: Load) -> None:
    system = {"messages": [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER]}
    path = write(tmp_path / "a.jsonl", [chat("Hi", "Yes."), system])
    encoder = Encoder(tokenizers.mistral())
    with pytest.raises(
        InputError, match=r"a\.jsonl:2: the chat template refuses this conversation: System role not supported"
    ):
        load(path, encoder=encoder)
    with pytest.raises(InputError, match="stopped after 10 such rows"):
        load(write(tmp_path / "b.jsonl", [system] * 30), encoder=encoder)


def test_rows_that_the_encoder_refuses_can_be_skipped(tmp_path: Path, load: Load) -> None:
    """As bad rows of any other kind: counted, and written to the rejects file beside those that the reader refused."""
    system = {"messages": [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER]}
    path = write(tmp_path / "a.jsonl", [chat("Hi", "Yes."), system, {"messages": []}])
    rejects = tmp_path / "rejects.jsonl"
    for _ in range(2):  # the second time from the cache
        store, report = load(
            path, encoder=Encoder(tokenizers.mistral()), source={"on_bad_row": "skip"}, rejects=rejects
        )
        assert len(store) == 1
        assert [count.first for count in report.dropped.values()] == [[f"{path}:2"]]
        assert sorted(json.loads(line)["line"] for line in rejects.read_text().splitlines()) == [2, 3]
        rejects.unlink()
    assert report.reused


# The cache


def test_a_second_start_does_not_encode(tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [chat("Hi", "Yes."), chat("Hi", "word " * 300)])
    first, report = load(path)
    monkeypatch.setattr(datasets, "tree_of", None)
    second, again = load(path)
    assert second.digest == first.digest and again.reused and not report.reused
    assert again.as_json() == report.as_json()
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 1


def test_an_entry_is_named_after_content_not_after_paths(tmp_path: Path, load: Load) -> None:
    rows = [chat("Hi", "Yes.")]
    (tmp_path / "other").mkdir()
    load(write(tmp_path / "a.jsonl", rows))
    assert load(write(tmp_path / "other" / "a.jsonl", rows))[1].reused


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 99},
        {"too_long": "truncate"},
        {"train_on": "last"},
        {"want": "prompt"},
        {"encoder": Encoder(tokenizers.chatml(distinct_pad=True))},
        {"source": {"limit": 1}},
        {"source": {"where": {"id": "x"}}},
    ],
)
def test_whatever_decides_the_content_makes_a_new_entry(tmp_path: Path, load: Load, change: dict[str, Any]) -> None:
    path = write(tmp_path / "a.jsonl", [chat("Hi", "Yes.", id="x"), chat("Hi", "No.", id="y")])
    load(path)
    assert not load(path, **change)[1].reused
    assert load(path)[1].reused


def test_changed_rows_make_a_new_entry(tmp_path: Path, load: Load) -> None:
    load(write(tmp_path / "a.jsonl", [chat("Hi", "Yes.")]))
    store, report = load(write(tmp_path / "a.jsonl", [chat("Hi", "Yes!")]))
    assert not report.reused and ENCODER.spell(store[0].branches[0].ids) == "Yes!<|im_end|>"


def test_the_seed_counts_only_where_something_is_drawn(tmp_path: Path, load: Load) -> None:
    rows = [chat(f"Question {i}?", f"Answer {i}.") for i in range(20)]
    a, b = write(tmp_path / "a.jsonl", rows[:16]), write(tmp_path / "b.jsonl", rows[16:])
    assert not load(a, b, seed=1)[1].reused and load(a, b, seed=2)[1].reused
    weighted = {"source": {"weight": 1.0}}
    one, other = load(a, b, seed=1, **weighted)[0], load(a, b, seed=2, **weighted)[0]
    assert len(one) == len(other) == 20 and one.digest != other.digest


def test_an_edited_converter_makes_a_new_entry(tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own format is code, and its cached rows must not outlive an edit."""
    monkeypatch.syspath_prepend(tmp_path)
    # An edit of the same size within a second would be served from the .pyc
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = tmp_path / "my_rows.py"
    path = write(tmp_path / "a.jsonl", [{"q": "Hi", "a": "Yes."}])
    text = "def convert(row):\n    return {'prompt': row['q'], 'chosen': row['a'] + 'END', 'rejected': 'No.'}\n"
    answers = []
    for ending in ("?", "!"):
        module.write_text(text.replace("END", ending))
        sys.modules.pop("my_rows", None)
        store, report = load(path, source={"format": "my_rows:convert"})
        assert not report.reused
        answers.append(ENCODER.spell(store[0].branches[0].ids))
    assert answers == ["Yes.?<|im_end|>", "Yes.!<|im_end|>"]


def test_a_hub_data_set_is_known_by_its_fingerprint(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are not at hand to be hashed; ``datasets`` tells one revision from another."""
    import datasets as hf

    from align.data.sources import readers

    for answer, reused in (("Yes.", False), ("Yes.", True), ("No.", False)):
        rows = hf.Dataset.from_dict({"messages": [chat("Hi", answer)["messages"]]})
        rows._fingerprint = f"fingerprint of {answer}"
        for module in (datasets, readers):
            monkeypatch.setattr(module, "load_split", lambda name, source, rows=rows: rows)
        store, report = load(Path("org/name"), resolve=str)
        assert report.reused is reused
        assert ENCODER.spell(store[0].branches[0].ids) == f"{answer}<|im_end|>"


@pytest.mark.parametrize("damage", ["flip", "cut", "report", "meta"])
def test_a_damaged_entry_is_encoded_again(
    tmp_path: Path, load: Load, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", [chat("Hi", "Yes."), chat("Hi", "No.")])
    store, _ = load(path)
    expected, folder = store.digest, store.folder
    name = {"flip": "ids.bin", "cut": "ids.bin", "report": "report.json", "meta": "meta.json"}[damage]
    data = bytearray((folder / name).read_bytes())
    data[4] ^= 1
    (folder / name).write_bytes(data[:-4] if damage != "flip" else data)
    again, report = load(path)
    assert not report.reused and again.digest == expected
    again.verify()
    assert "encoding again" in caplog.text


def _load_in_process(path: Path, cache: Path, queue: Any) -> None:
    def slow_tree_of(*arguments: Any) -> Any:
        queue.put("encoded")
        return original(*arguments)

    original = datasets.tree_of
    datasets.tree_of = slow_tree_of
    store, _ = datasets.load_trees(
        "conversation",
        [DataSource(path=str(path))],
        resolve=Path,
        encoder=Encoder(tokenizers.chatml()),
        max_length=100,
        too_long="drop",
        train_on="all",
        seed=1,
        cache=cache,
        rejects=None,
    )
    queue.put(store.digest)


def test_of_two_processes_one_encodes_and_the_other_waits(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat("Hi", f"Answer {i}.") for i in range(30)])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_load_in_process, args=(path, tmp_path / "cache", queue)) for _ in range(2)]
    for process in processes:
        process.start()
    heard = [queue.get(timeout=60) for _ in range(32)]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert heard.count("encoded") == 30
    assert len({item for item in heard if item != "encoded"}) == 1


def test_an_interrupted_build_leaves_nothing_behind(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", [chat("Hi", "Yes.")])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets, "tree_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(path)
    monkeypatch.undo()
    assert [entry.name for entry in (tmp_path / "cache").iterdir() if not entry.name.endswith(".lock")] == []
    assert not load(path)[1].reused
