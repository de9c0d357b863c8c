"""`select_prompts` and `label` end to end: prompts from a file, answers from a script, scores from rules and from a
user's function.

The scores are worked out by hand: an answer of w words scores w / 8 with `{rule: length, min: 8}`.
"""

from __future__ import annotations

import importlib
import io
import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from align.data.answer_file import read_answers
from align.data.chat.encoder import Encoder
from align.data.records import Origin, Preference, Prompt
from align.data.sources.mixture import read_records
from align.errors import InputError, Interrupted
from align.pipeline.runner import RunResult, run_recipe
from align.pipeline.selection import Selection
from align.recipe.load import load_recipe
from align.recipe.schema import DataSource, Model, SelectPromptsStage
from align.rollout.engine import Sample, Sampling
from align.scoring.reward_model import RewardModelScorer
from align.scoring.scorer import Answer
from align.scoring.stored import score_answers
from align.stages.label import ScoredPair, make_pairs
from align.stages.select_prompts import rule_against, too_alike
from align.stages.shared import policy_samples
from align.stages.shared import scored_answers as answering
from tests.support.readme import every_file_is_explained
from tests.support.report_run import reported
from tests.support.root import ROOT
from tests.support.saved import save_tiny

WORDS = {"rule": "length", "min": 8}
SPREAD = {  # question: its four answers, as numbers of words; the standard deviation of the scores behind it
    "Name a fruit.": (1, 3, 5, 7),  # 5 ** 0.5 / 8, about 0.280
    "Name a bird.": (2, 2, 2, 2),  # 0
    "Name a city.": (2, 2, 4, 4),  # 1 / 8
    "Name a tree.": (0, 8, 0, 8),  # 1 / 2
}


def said(count: int, number: int) -> str:
    """An answer of ``count`` words; ``number`` makes it another text."""
    return " ".join(["word", "and", "so", "on", "to", "the", "end", "now"][:count]) + "-" * number


class Canned:
    """Answers each prompt from a script, by the question in it. A text that ends in ``~`` is cut off there."""

    def __init__(self, encoder: Encoder, script: Mapping[str, Sequence[str]]) -> None:
        self.encoder, self.script = encoder, script
        self.generated = 0

    def generate(self, prompts: Sequence[Sequence[int]], settings: Sampling) -> list[list[Sample]]:
        self.generated += len(prompts)
        return [[self._completion(text) for text in self._answers(prompt, settings.n)] for prompt in prompts]

    def _answers(self, prompt: Sequence[int], n: int) -> Sequence[str]:
        asked = self.encoder.spell(prompt)
        found = next(answers for question, answers in self.script.items() if question in asked)
        assert len(found) == n
        return found

    def _completion(self, text: str) -> Sample:
        ids = self.encoder.tokenizer(text.removesuffix("~"), add_special_tokens=False)["input_ids"]
        if text.endswith("~"):
            return Sample(tuple(ids), None, "length", 0)
        return Sample((*ids, self.encoder.stop_ids[0]), None, "stop", 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a tiny model, prompts, and scorers of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    save_tiny(tmp_path / "model", max_position_embeddings=512, head_dim=32)  # heads that vLLM serves
    (tmp_path / "my_rewards.py").write_text(
        "import os\n"
        "from pathlib import Path\n"
        "def words(answers):\n"
        "    '''Words / 8; notes what it was asked, and does what the file `event` says, once.'''\n"
        "    with open('asked.txt', 'a') as file:\n"
        "        file.writelines(f'{len(answers)}\\n' for _ in [0])\n"
        "    event = Path('event')\n"
        "    if event.exists():\n"
        "        what = event.read_text()\n"
        "        event.unlink()\n"
        "        if what == 'fail':\n"
        "            raise RuntimeError('no memory')\n"
        "        os.kill(os.getpid(), int(what))\n"
        "    return [len(a.text.split()) / 8 for a in answers]\n"
        "def question(answers):\n"
        "    '''A quality scorer: it gets prompts without an answer.'''\n"
        "    assert all(a.prompt_only for a in answers)\n"
        "    return [a.fields.get('quality', 1.0) for a in answers]\n"
    )
    prompts(*({"id": f"p{i}", "prompt": question, "lang": "en"} for i, question in enumerate(SPREAD)))
    return tmp_path


def prompts(*rows: Mapping[str, Any]) -> None:
    Path("prompts.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Canned]:
    """The engines that were opened; ``SPREAD`` is their script unless a test says otherwise."""
    opened: list[Canned] = []

    @contextmanager
    def open_engine(rollout: Any, model: Any, encoder: Encoder, **options: Any) -> Iterator[Canned]:
        opened.append(Canned(encoder, SCRIPT))
        yield opened[-1]

    monkeypatch.setattr(policy_samples, "open_engine", open_engine)
    SCRIPT.clear()
    SCRIPT.update(
        {
            question: [said(count, i) if count else f"{'.' * (i + 1)}" for i, count in enumerate(counts)]
            for question, counts in SPREAD.items()
        }
    )
    return opened


SCRIPT: dict[str, list[str]] = {}


def run(stages: dict[str, Any], text: io.StringIO | None = None, runs: str = "runs") -> RunResult:
    Path("recipe.yaml").write_text(
        yaml.safe_dump({"name": "r", "model": "./model", "stages": stages}, sort_keys=False, allow_unicode=True)
    )
    result = run_recipe(
        load_recipe("recipe.yaml"),
        console=Console(file=text or io.StringIO(), width=160),
        runs_dir=Path(runs),
        selection=Selection(replace=True),
    )
    every_file_is_explained(result.folder)
    return result


def select(**options: Any) -> dict[str, Any]:
    return {
        "kind": "select_prompts",
        "prompts": "prompts.jsonl",
        "reward": WORDS,
        "max_new_tokens": 32,
        "max_length": 128,
        **options,
    }


def label(**options: Any) -> dict[str, Any]:
    return {
        "kind": "label",
        "prompts": "prompts.jsonl",
        "reward": WORDS,
        "max_new_tokens": 32,
        "max_length": 128,
        **options,
    }


def lines(result: RunResult, stage: str, name: str = "data") -> list[dict[str, Any]]:
    text = (result.folder / "stages" / stage / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def reasons(result: RunResult, stage: str) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in lines(result, stage, "left_out")}


# Selecting prompts


def test_prompts_whose_answers_score_alike_are_dropped(folder: Path, engines: list[Canned]) -> None:
    """Half of four prompts: the two with the smallest spread. Rows keep their columns, and every id is in one of the
    two files."""
    text = io.StringIO()
    result = run({"select": select(drop_lowest_variance=0.5)}, text)
    rows = lines(result, "select")
    assert [row["id"] for row in rows] == ["p0", "p3"]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Name a fruit."}] and rows[0]["lang"] == "en"
    assert [row["reward_std"] for row in rows] == [pytest.approx(5**0.5 / 8), 0.5]
    assert [row["reward_mean"] for row in rows] == [0.5, 0.5]
    assert lines(result, "select", "left_out") == [
        {"id": "p1", "row": "prompts.jsonl:2", "reason": "its answers score alike", "reward_std": 0.0},
        {"id": "p2", "row": "prompts.jsonl:3", "reason": "its answers score alike", "reward_std": 0.125},
    ]
    summary = result.summaries["select"]
    assert (summary["prompts"], summary["kept"], summary["left_out"]) == (4, 2, {"its answers score alike": 2})
    assert reported(result.folder)["select"]["prompts, given and kept"].cells == ("4", "2", "")
    assert summary["answers"]["answers"] == 16 and summary["length_correlation"] > 0.5
    assert "kept 2 of 4 prompts" in text.getvalue() and "p1, p2" in text.getvalue()
    assert run({"select": select(drop_lowest_variance=0.5)}).up_to_date == ("select",)
    assert engines[0].generated == 4 and len(engines) == 1


def test_a_threshold_instead_of_a_share(folder: Path, engines: list[Canned]) -> None:
    """What scores exactly the threshold stays."""
    assert [row["id"] for row in lines(run({"select": select(min_std=0.125)}), "select")] == ["p0", "p2", "p3"]
    everything = run({"select": select(min_std=0)})
    assert len(lines(everything, "select")) == 4
    assert everything.summaries["select"]["kept_without_spread"] == 1


def test_too_alike_by_hand() -> None:
    assert too_alike([0.5, 0.0, 0.2, 0.3], share=0.5) == {1, 2}
    assert too_alike([0.5, 0.0, 0.2, 0.3]) == {1}, "a quarter, unless something else is said"
    assert too_alike([0.5, 0.0, 0.2], share=0.3) == set(), "rounded down"
    assert len(too_alike([0.0] * 100, share=0.29)) == 29, "0.29 * 100 is 28.999999999999996"
    assert too_alike([0.1, 0.1, 0.1, 0.1], share=0.5) == {2, 3}, "of equal ones the later go"
    assert too_alike([0.1, 0.2, 0.3], least=0.2) == {0}


def test_rules_come_before_anything_is_sampled(folder: Path, engines: list[Canned]) -> None:
    prompts(
        {"id": "good", "prompt": "Name a fruit."},
        {"id": "short", "prompt": "hm"},
        {"id": "picture", "prompt": "Describe this picture, please."},
        {"id": "again", "prompt": "Name  a fruit. "},
        {"id": "zh", "prompt": "今天的天气怎么样？"},
        {"id": "digits", "prompt": "12345 ???"},
        {"id": "long", "prompt": "Name a fruit. " * 12},
        {"id": "room", "prompt": "Name a tree that is " + "not an oak and " * 8},
        {"id": "also good", "prompt": "Name a tree."},
    )
    result = run({"select": select(min_std=0, max_characters=160, max_length=80)})
    assert [row["id"] for row in lines(result, "select")] == ["good", "also good"]
    assert reasons(result, "select") == {
        "short": "too short (min_characters)",
        "picture": "cannot be answered (unanswerable)",
        "again": "asked before",
        "zh": "cannot be answered (unanswerable)",
        "digits": "cannot be answered (unanswerable)",
        "long": "too long (max_characters)",
        "room": "leaves no room for an answer (max_length)",
    }
    assert engines[0].generated == 2


def test_the_default_patterns_spare_the_quickstart_prompts() -> None:
    """Questions about this very day apart, they are meant to be answered."""
    source = DataSource(path="data/quickstart/prompts.jsonl")
    spec = SelectPromptsStage(kind="select_prompts", prompts=(source,), reward=WORDS)  # type: ignore[arg-type]
    root = ROOT
    records = list(read_records([source], [root / source.path], "prompt", seed=0, rejects=None))
    dropped = [record.id for record in records if isinstance(record, Prompt) and rule_against(record, spec)]
    assert len(records) == 170 and len(dropped) <= 3, dropped


def test_patterns_of_ones_own_replace_the_default(folder: Path, engines: list[Canned]) -> None:
    result = run({"select": select(min_std=0, unanswerable=["(?i)bird|FRUIT"])})
    assert [row["id"] for row in lines(result, "select")] == ["p2", "p3"]


def test_a_quality_scorer_judges_the_prompts_themselves(folder: Path, engines: list[Canned]) -> None:
    """A function from outside the package, given prompts without answers; what it drops is never sampled."""
    prompts(*({"id": f"p{i}", "prompt": question, "quality": i / 4} for i, question in enumerate(SPREAD)))
    result = run({"select": select(min_std=0, quality="my_rewards:question", min_quality=0.5)})
    assert [row["id"] for row in lines(result, "select")] == ["p2", "p3"]
    assert lines(result, "select", "left_out")[0] == {
        "id": "p0",
        "row": "prompts.jsonl:1",
        "reason": "low quality (min_quality)",
        "quality": 0.0,
    }
    assert engines[0].generated == 2


def test_unfinished_answers_by_choice(folder: Path, engines: list[Canned]) -> None:
    """Dropped, they leave `fruit` with one answer, which says nothing about a spread; empty ones never count."""
    SCRIPT["Name a fruit."] = ["a~", "b c~", "d e f~", "g h"]
    SCRIPT["Name a bird."] = ["", "", " ", "a b c"]
    kept = run({"select": select(min_std=0)})
    assert reasons(kept, "select") == {"p1": "fewer than two answers that can be used"}
    assert lines(kept, "select")[0]["reward_std"] == pytest.approx(0.5**0.5 / 8), "1, 2, 3 and 2 words"
    dropped = run({"select": select(min_std=0, unfinished="drop")})
    assert set(reasons(dropped, "select")) == {"p0", "p1"}
    assert dropped.summaries["select"]["answers_left_out"] == {"unfinished": 3, "empty": 3}
    first = [answer for answer in read_answers(dropped.folder / "stages" / "select") if answer.prompt_id == "p0"]
    assert [answer.left_out for answer in first] == [*["unfinished"] * 3, "fewer than two answers that can be used"]
    assert not any(answer.scores for answer in first)


def test_nothing_left_is_an_error(folder: Path, engines: list[Canned]) -> None:
    """At every step."""
    with pytest.raises(InputError, match=r"0 prompts left: 4 too short \(min_characters\)"):
        run({"select": select(min_characters=100)})
    with pytest.raises(InputError, match="0 prompts left: 4 its answers score alike"):
        run({"select": select(min_std=10)})
    with pytest.raises(InputError, match=r"0 prompts left: 4 low quality \(min_quality\)"):
        run({"select": select(quality="my_rewards:question", min_quality=2)})


def test_a_prompt_that_the_template_refuses_is_named(folder: Path, engines: list[Canned]) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    path = folder / "model" / "chat_template.jinja"
    path.write_text(template + path.read_text())
    prompts(
        {"prompt": "Name a fruit."},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a tree."}]},
    )
    with pytest.raises(
        InputError, match=r"prompts.jsonl:2: the chat template refuses this conversation: no system message"
    ):
        run({"select": select()})
    prompts(
        {"prompt": "Name a fruit."},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a tree."}]},
        {"prompt": "Name a bird."},
    )
    result = run({"select": select(prompts={"path": "prompts.jsonl", "on_bad_row": "skip"})})
    assert any("no system message" in reason for reason in reasons(result, "select").values()), (
        "left out, with the reason"
    )


# Labelling


def test_the_best_answer_against_the_worst(folder: Path, engines: list[Canned]) -> None:
    """One preference a prompt, with its margin and its scores; a prompt whose answers all score the same makes none."""
    result = run({"label": label()})
    rows = lines(result, "label")
    assert reported(result.folder)["label"]["prompts in, preferences out"].cells == ("4", str(len(rows)), "")
    assert [row["id"] for row in rows] == ["p0", "p2", "p3"]
    assert rows[0] == {
        "id": "p0",
        "prompt": [{"role": "user", "content": "Name a fruit."}],
        "lang": "en",
        "chosen": [{"role": "assistant", "content": said(7, 3)}],
        "rejected": [[{"role": "assistant", "content": "word"}]],
        "margin": 0.75,
        "scores": {"chosen": 0.875, "rejected": [0.125]},
    }
    assert rows[2]["scores"] == {"chosen": 1.0, "rejected": [0.0]}
    assert lines(result, "label", "left_out") == [
        {"id": "p1", "row": "prompts.jsonl:2", "reason": "all its answers score the same", "margin": 0.0}
    ]
    summary = result.summaries["label"]
    assert (summary["preferences"], summary["longer_chosen"], summary["shorter_chosen"]) == (3, 3, 0)


def test_the_best_against_all_others_is_one_preference(folder: Path, engines: list[Canned]) -> None:
    """Equally good answers are not rejected. Each has its own margin."""
    rows = lines(run({"label": label(pairs="best_vs_rest")}), "label")
    assert [len(row["rejected"]) for row in rows] == [3, 2, 2]
    assert rows[0]["margin"] == [0.25, 0.5, 0.75] and rows[0]["scores"] == {
        "chosen": 0.875,
        "rejected": [0.625, 0.375, 0.125],
    }
    closer = lines(run({"label": label(pairs="best_vs_rest", min_margin=0.5)}), "label")
    assert [row["scores"]["rejected"] for row in closer] == [[0.375, 0.125], [0.0, 0.0]]


def test_all_pairs_that_are_a_margin_apart(folder: Path, engines: list[Canned]) -> None:
    result = run({"label": label(pairs="margin", min_margin=0.5)})
    rows = [row for row in lines(result, "label") if row["id"].startswith("p0")]
    assert [(row["id"], row["scores"]["chosen"], row["scores"]["rejected"], row["margin"]) for row in rows] == [
        ("p0#1", 0.875, [0.375], 0.5),
        ("p0#2", 0.875, [0.125], 0.75),
        ("p0#3", 0.625, [0.125], 0.5),
    ]
    assert reasons(result, "label") == {
        "p1": "all its answers score the same",
        "p2": "no two answers are min_margin apart",
    }


@pytest.mark.parametrize(
    ("scores", "pairs", "margin", "expected"),
    [
        ([1.0, 3.0, 2.0], "best_worst", 0.0, [ScoredPair(1, (0,))]),
        ([3.0, 1.0, 3.0, 1.0], "best_worst", 0.0, [ScoredPair(0, (1,))]),
        ([2.0, 2.0], "best_worst", 0.0, []),
        ([1.0, 2.0], "best_worst", 1.5, []),
        ([], "best_worst", 0.0, []),
        ([1.0, 3.0, 2.0, 3.0], "best_vs_rest", 0.0, [ScoredPair(1, (2, 0))]),
        ([2.0, 2.0], "margin", 0.0, []),
        ([1.0, 3.0, 2.0], "margin", 0.0, [ScoredPair(1, (2,)), ScoredPair(1, (0,)), ScoredPair(2, (0,))]),
        ([1.0, 3.0, 2.0], "margin", 2.0, [ScoredPair(1, (0,))]),
    ],
)
def test_pairs_by_hand(scores: list[float], pairs: Any, margin: float, expected: list[ScoredPair]) -> None:
    assert make_pairs(scores, pairs, margin) == expected


def test_equal_answers_count_once_and_cut_ones_by_choice(folder: Path, engines: list[Canned]) -> None:
    """A pair of equal texts teaches nothing, whatever a scorer says. An answer that was cut is marked: no end is to be
    trained onto it."""
    SCRIPT["Name a fruit."] = ["a b", "a  b ", "a b", "a b c d~"]
    dropped = run({"label": label()})
    assert reasons(dropped, "label")["p0"] == "fewer than two answers that can be used"
    assert dropped.summaries["label"]["answers_left_out"] == {"unfinished": 1, "repeated": 2}
    row = lines(run({"label": label(unfinished="keep")}), "label")[0]
    assert row["chosen"] == [{"role": "assistant", "content": "a b c d", "finished": False}]
    assert row["rejected"] == [[{"role": "assistant", "content": "a b"}]]


def test_the_rows_are_preferences_that_dpo_trains_on(folder: Path, engines: list[Canned]) -> None:
    """The whole chain, selection included: what one stage leaves the next one reads."""
    train = {"learning_rate": 1e-3, "batch_size": 2, "microbatch_tokens": 128}
    dpo = {"kind": "dpo", "data": "stage:label", "train": train, "samples": 0}
    chain = {
        "select": select(drop_lowest_variance=0.25),
        "label": label(prompts="stage:select", pairs="best_vs_rest"),
        "dpo": dpo,
    }
    result = run(chain)
    assert result.ran == ("select", "label", "dpo")
    source = DataSource(path="x")
    found = list(read_records([source], [result.folder / "stages" / "label"], "preference", seed=0, rejects=None))
    assert [(r.id, len(r.rejected), r.margins) for r in found if isinstance(r, Preference)] == [
        ("p0", 3, (0.25, 0.5, 0.75)),
        ("p2", 2, (0.25, 0.25)),
        ("p3", 2, (1.0, 1.0)),
    ]
    assert found[0].fields["reward_mean"] == 0.5
    assert result.summaries["dpo"]["steps"] == 2


def test_the_whole_chain_with_a_reward_model(folder: Path, engines: list[Canned]) -> None:
    """As in recipes/rlhf_dpo.yaml: a reward model is trained, scores the policy's own ids, chooses prompts and labels
    answers for DPO.

    What it scores are the ids as sampled, so that its scores are those of `align score` on the same conversations.
    """
    pairs = [{"prompt": q, "chosen": said(7, 1), "rejected": said(1, 1)} for q in SPREAD]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    train = {"learning_rate": 1e-3, "batch_size": 2, "microbatch_tokens": 128, "epochs": 4}
    result = run(
        {
            "reward": {"kind": "reward", "data": "pairs.jsonl", "filters": False, "train": train},
            "select": select(reward="stage:reward", drop_lowest_variance=0.25),
            "label": label(reward={"ensemble": ["stage:reward", WORDS]}, prompts="stage:select"),
            "dpo": {"kind": "dpo", "data": "stage:label", "train": train, "samples": 0},
        }
    )
    assert result.ran == ("reward", "select", "label", "dpo")
    assert [row["id"] for row in lines(result, "select")] == ["p0", "p2", "p3"], "equal answers have equal scores"
    scorer = RewardModelScorer(Model(path=str(result.folder / "stages" / "reward")))
    answers = [answer for answer in read_answers(result.folder / "stages" / "select") if answer.prompt_id == "p0"]
    prompt: Any = ({"role": "user", "content": "Name a fruit."},)
    assert scorer.score([Answer(prompt, one.text) for one in answers]) == pytest.approx(
        [one.scores["reward"] for one in answers], abs=1e-5
    )


def test_a_row_keeps_tools_and_columns_but_none_that_would_change_what_it_is() -> None:
    """A column `instruction` or `completion` beside a prompt would make another format of the row, `margin` another
    margin."""
    tool = {
        "type": "function",
        "function": {"name": "look", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
    fields = {
        "lang": "en",
        "instruction": "x",
        "completion": "y",
        "chosen": "z",
        "rejected": "z",
        "margin": 9,
        "conversations": [],
    }
    record = Prompt(({"role": "user", "content": "Look!"},), "a", Origin("x", 1), (tool,), fields)
    assert answering.prompt_row(record) == {
        "id": "a",
        "prompt": [{"role": "user", "content": "Look!"}],
        "tools": [tool],
        "lang": "en",
    }


def test_a_biased_scorer_is_told_of(folder: Path, engines: list[Canned]) -> None:
    """A scorer of length alone. The report, and the console, say that the longer answer always wins."""
    questions = {f"Name {i:02d} things.": [said(1, 0), said(5, 1)] for i in range(20)}
    prompts(*({"prompt": question} for question in questions))
    SCRIPT.update(questions)
    text = io.StringIO()
    result = run({"label": label(samples_per_prompt=2)}, text)
    (warning,) = result.summaries["label"]["warnings"]
    assert "the longer answer is chosen in 20 of 20 pairs of unequal length" in warning
    assert warning in text.getvalue().replace("\n", " ")
    assert result.summaries["label"]["length_correlation"] == pytest.approx(1.0)


def test_nothing_to_prefer_is_an_error(folder: Path, engines: list[Canned]) -> None:
    with pytest.raises(
        InputError, match="0 preferences left: 3 no two answers are min_margin apart, 1 all its answers score the same"
    ):
        run({"label": label(min_margin=2)})


# Going on


def content(result: RunResult, stage: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (result.folder / "stages" / stage).iterdir() if p.name != "manifest.json"}


@pytest.mark.parametrize(
    ("event", "error"), [(str(int(signal.SIGTERM)), Interrupted), ("fail", InputError)], ids=["signal", "failure"]
)
@pytest.mark.parametrize("kind", ["select_prompts", "label"])
def test_an_interrupted_run_goes_on_where_it_was(
    folder: Path, engines: list[Canned], monkeypatch: pytest.MonkeyPatch, kind: str, event: str, error: type[Exception]
) -> None:
    """Stopped, or failed, while scoring: nothing is sampled again, no shard is scored twice, and the result is
    bit-equal."""
    monkeypatch.setattr(answering, "score_answers", partial(score_answers, shard_answers=6))
    stage = {"s": (select if kind == "select_prompts" else label)(reward="my_rewards:words")}
    plain = content(run(stage, runs="plain"), "s")
    whole = Path("asked.txt").read_text().split()
    assert len(whole) > 2
    Path("asked.txt").unlink()
    Path("event").write_text(event)
    with pytest.raises(error):
        run(stage)
    assert not list(Path("runs/r").glob("stages/*")), "nothing half-done is visible"
    sampled = sum(engine.generated for engine in engines)
    assert content(run(stage), "s") == plain
    assert sum(engine.generated for engine in engines) == sampled, "nothing was sampled twice"
    asked = Path("asked.txt").read_text().split()
    assert asked == (whole if error is Interrupted else [whole[0], *whole]), (
        "only the shard that failed was scored again"
    )
    answers = list(read_answers(Path("runs/r/stages/s")))
    assert answers and {(answer.part, answer.policy) for answer in answers} == {("prompts", "./model")}
    assert all(("reward" in answer.scores) == (answer.left_out is None) for answer in answers)
