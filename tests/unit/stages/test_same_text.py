"""A scorer reads the same text for the same sampled ids, whichever kind of stage asks it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.data.chat.encoder import Encoder
from align.data.records import Origin, Prompt
from align.data.trees.prompts import EncodedPrompt
from align.functional.selection import select_negatives
from align.models.scalar.critic import ActorCritic
from align.recipe.kinds.sampling import LabelStage, SelectPromptsStage
from align.recipe.schema import EvaluateStage, Model
from align.rollout.engine import Sample, Sampling
from align.scoring.scorer import Answer
from align.stages.context import StageContext
from align.stages.evaluate import held_out
from align.stages.ppo.rollouts import Rollouts
from align.stages.shared import policy_samples, scored_answers
from align.stages.shared.clock import Clock
from align.stages.trl import run as trl_run
from align.training.launch import Ranks
from tests.support.root import ROOT
from tests.support.tiny import tiny
from tests.support.tokenizers import chatml

ENCODER = Encoder(chatml())
STOP = ENCODER.stop_ids[0]
TEXTS = ("plain", " \n white space before", "a\0b", "half a character 🦊", "  ")
FIELDS = {"target": "the data's answer"}


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(ENCODER.tokenizer(text, add_special_tokens=False)["input_ids"])


SAMPLED = [
    *((*ids_of(text), STOP) for text in TEXTS),
    ids_of(TEXTS[3])[:-1],  # cut within a character
    (*ids_of("said"), STOP, *ids_of(" and what comes after its end"), STOP),
    (STOP,),
]
WANTED = ["plain", "white space before", "", "half a character 🦊", "", "half a character ", "said", ""]


class Recorder:
    """A scorer that only takes down what it reads."""

    name = "recorder"

    def __init__(self) -> None:
        self.seen: list[Answer] = []

    def score(self, answers: Sequence[Answer]) -> list[float]:
        self.seen += answers
        return [0.0] * len(answers)


class Says:
    """An engine that gives ``SAMPLED`` to every prompt."""

    together = 100

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Sample]]:
        made = [Sample(ids, None, "stop" if ids[-1] == STOP else "length", 0) for ids in SAMPLED]
        return [made[: sampling.n] for _ in prompts]


def prompt() -> EncodedPrompt:
    asked: Any = ({"role": "user", "content": "Say it."},)
    return EncodedPrompt(Prompt(asked, "p", Origin("x", 1), fields=FIELDS), tuple(ENCODER.encode_prompt(asked)))


@pytest.fixture
def ctx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageContext:
    @contextmanager
    def opened(*_: Any, **__: Any) -> Iterator[Says]:
        yield Says()

    monkeypatch.setattr(policy_samples, "open_engine", opened)
    monkeypatch.setattr(policy_samples, "model_digest", lambda *_: "model")
    folders = {name: tmp_path / name for name in ("out", "work", "cache")}
    return StageContext("s", 0, **folders, model=Model(path="m"), resolve=lambda text: text)


OPTIONS = {"samples_per_prompt": len(SAMPLED), "max_new_tokens": 8, "max_length": 64}


def by_sampling_stage(kind: type[LabelStage] | type[SelectPromptsStage], name: str) -> Callable[..., None]:
    """``unfinished: keep``, so that every answer with a text reaches the scorer."""

    def ask(ctx: StageContext, scorer: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = kind.model_validate(
            {"kind": name, "prompts": "x", "reward": "builtins:len", "unfinished": "keep", **OPTIONS}
        )
        answers = scored_answers._sample(spec, ctx, Model(path="m"), ENCODER, [prompt()])
        scorer.score([answer for of_prompt in answers for answer in of_prompt])

    return ask


def by_evaluate(ctx: StageContext, scorer: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = EvaluateStage.model_validate({"kind": "evaluate", "policies": ["m"], "data": "x", **OPTIONS})
    policies = [held_out.Policy("m", Model(path="m"), ENCODER)]
    (samples,) = held_out.sample_questions(spec, ctx, policies, [held_out.Question((prompt(),))], Ranks())
    scorer.score(samples[0])


def by_ppo(ctx: StageContext, scorer: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"precision": None, "canaries": [], "seed": 1, "ranks": Ranks(), "clock": Clock()}
    engine: Any = Says()
    rollouts = Rollouts(ActorCritic(tiny("llama"), None), ENCODER, engine, scorer, **settings)
    rollouts.sample([prompt()], Sampling(8, n=len(SAMPLED)), 0)


def by_trl(ctx: StageContext, scorer: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    data: Any = SimpleNamespace(asked=[prompt()])
    trl_run._reward(scorer, ENCODER, data)(row=[0] * len(SAMPLED), completion_ids=SAMPLED)


STAGES: dict[str, Callable[..., None]] = {
    "label": by_sampling_stage(LabelStage, "label"),
    "select_prompts": by_sampling_stage(SelectPromptsStage, "select_prompts"),
    "evaluate": by_evaluate,
    "ppo": by_ppo,
    "trl": by_trl,
}


@pytest.mark.parametrize("kind", STAGES)
def test_the_same_ids_are_the_same_answer(kind: str, ctx: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Recorder()
    STAGES[kind](ctx, scorer, monkeypatch)
    asked = prompt()
    assert [answer.text for answer in scorer.seen] == WANTED
    assert [answer.finished for answer in scorer.seen] == [True] * 5 + [False, True, True]
    assert [answer.ids for answer in scorer.seen] == [
        *SAMPLED[:6],
        (*ids_of("said"), STOP),
        (STOP,),
    ]
    for answer in scorer.seen:
        assert (answer.prompt, answer.prompt_ids) == (asked.record.prompt, asked.ids)
        assert (answer.target, answer.fields) == (FIELDS["target"], FIELDS)


def test_answers_are_made_of_ids_in_one_place() -> None:
    """Elsewhere ``Answer(...)`` takes texts of data files and rows: a prompt and a text, never ids."""
    wrong = []
    for path in sorted((ROOT / "align").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != "Answer":
                continue
            if len(node.args) > 2 or {"prompt_ids", "ids", "finished"} & {key.arg for key in node.keywords}:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, f"use Answer.sampled: {wrong}"


@pytest.mark.parametrize(
    ("one", "other", "copies"),
    [
        *(("Tea it is.", " tea  IT is!", True), ("\u00fcber", "u\u0308ber", True), ("「茶」", "茶。", True)),
        *(("-5", "5", False), ("tea", "teas", False), ("...", "!", False)),
    ],
)
def test_label_and_self_contrast_take_the_same_answers_for_copies(one: str, other: str, copies: bool) -> None:
    left_out = scored_answers.drop_reasons_of([Answer((), one), Answer((), other)], keep_unfinished=True, distinct=True)
    assert left_out == (None, "repeated" if copies else None)
    settings: dict[str, Any] = {"keep_least_similar": 1, "negatives": 2, "dedup": True, "seed": 0, "id": "p"}
    chosen = select_negatives("something else", [one, other], [0.1, 0.2], **settings)
    assert chosen.reasons == ("negative", "duplicate" if copies else "negative")
