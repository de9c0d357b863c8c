"""From a policy to scored answers: where they end, what they cost, what is kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from align.batching.tree import build
from align.data.answer_file import said
from align.data.chat.encoder import Encoder
from align.data.trees.prompts import EncodedPrompt, digest, load_prompts
from align.errors import InputError, TrainingFault
from align.models.scalar.critic import ActorCritic
from align.recipe.blocks.scoring import EnsembleScorer, FunctionScorer, JsonRule, ModelScorer
from align.recipe.schema import DataSource
from align.rollout.engine import Sample, Sampling, WeightSource
from align.rollout.trajectory import Trajectory
from align.scoring.scorer import Answer
from align.stages.ppo import rollouts as sampling
from align.stages.ppo.collect import TokenOutputs, build_experience
from align.stages.ppo.experience import Answers, minibatch_plan
from align.stages.ppo.report import answers_before_and_after, change_of
from align.stages.ppo.rollouts import Rollouts, ScoredAnswer, parquet, read_parquet, reference_baselines
from align.stages.ppo.run import _content
from align.stages.shared.clock import Clock
from align.training.launch import Ranks
from tests.support.rollouts import ENCODER, STOP, ByRule, ends_early, policy, prompts, stage, trainer
from tests.support.tiny import tiny
from tests.support.tokenizers import glm4, llama3


class Says:
    """An engine that gives the same completions to every prompt."""

    def __init__(self, *answers: Sequence[int], logprobs: bool = False) -> None:
        self.answers, self.logprobs, self.asked = answers, logprobs, 0

    together = 1000

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Sample]]:
        self.asked += len(prompts)
        chosen = [self.answers[s % len(self.answers)] for s in range(sampling.n)]
        made = [Sample(tuple(ids), tuple(-1.0 for _ in ids) if self.logprobs else None, "length", 0) for ids in chosen]
        return [made for _ in prompts]

    def load_weights(self, weights: WeightSource) -> None:
        raise AssertionError("a scripted engine has no weights")

    def close(self) -> None:
        pass


def rollouts(
    engine: Any, rule: Any = ends_early, encoder: Encoder = ENCODER, precision: Literal["fp32"] | None = None
) -> Rollouts:
    models = ActorCritic(tiny("llama"), None)
    settings: dict[str, Any] = {"precision": precision, "canaries": [], "seed": 1, "ranks": Ranks(), "clock": Clock()}
    return Rollouts(models, encoder, engine, ByRule(rule), **settings)


def sampled(
    *answers: Sequence[int], encoder: Encoder = ENCODER, data: Sequence[EncodedPrompt] | None = None
) -> list[ScoredAnswer]:
    (found,) = rollouts(Says(*answers, logprobs=True), encoder=encoder).sample(
        prompts(1) if data is None else data, Sampling(4, n=len(answers)), 0
    )
    return found


# Where an answer ends


def test_finished_is_what_the_answer_says() -> None:
    """An end as the very last token allowed is an end; an answer without one is not, whatever the prompt holds."""
    asked = EncodedPrompt(prompts(1)[0].record, (10, STOP, 11, STOP))
    last, none = sampled([7, 8, 9, STOP], [7, 8, 9, 10], data=[asked])
    assert last.answer.finished and not none.answer.finished


@pytest.mark.parametrize("encoder", [Encoder(llama3()), Encoder(glm4())], ids=["llama3", "glm4"])
def test_every_stop_id_ends_an_answer(encoder: Encoder) -> None:
    """The template's own end tokens, not only the tokenizer's eos."""
    assert len(encoder.stop_ids) > 1
    for stop in encoder.stop_ids:
        (found,) = sampled([7, stop], encoder=encoder)
        assert found.answer.finished and found.answer.ids == (7, stop)


def test_nothing_after_the_end_counts() -> None:
    """Ids, log-probs, text and score are those of the answer alone."""
    clean, dirty = sampled([7, 8, STOP], [7, 8, STOP, 99, STOP, 5])
    assert clean == dirty and dirty.answer.ids == (7, 8, STOP) and dirty.trajectory.logprobs == (-1.0,) * 3
    assert dirty.score == pytest.approx(0.7)


def test_the_scorer_sees_the_ids_and_the_text() -> None:
    """Ids as they were sampled, also where decoding and encoding again gives others; the text without the end
    token."""
    odd = [ids for ids in ([260, 261], [65, 66, 67], [300, 80]) if ENCODER.tokenizer.encode(ENCODER.decode(ids)) != ids]
    assert odd, "some ids must not survive decoding"
    made = rollouts(Says([*odd[0], STOP]))
    data = prompts(2)
    made.sample(data, Sampling(4), 0)
    for answer, prompt in zip(made.scorer.seen, data, strict=True):  # type: ignore[attr-defined]
        assert (
            answer.ids == (*odd[0], STOP) and answer.prompt_ids == prompt.ids and answer.prompt == prompt.record.prompt
        )
        assert (
            answer.text == ENCODER.answer_text([*odd[0], STOP], finished=True) == ENCODER.decode(odd[0]).lstrip()
            and answer.finished
        )


def test_an_empty_answer_and_a_score_that_is_none_stop_the_run() -> None:
    with pytest.raises(TrainingFault, match="empty answer"):
        sampled([])
    with pytest.raises(InputError, match="the scorer rule gave nan"):
        rollouts(Says([7]), lambda answer: float("nan")).sample(prompts(1), Sampling(4), 0)


def test_one_number_that_is_none_stops_the_run(tmp_path: Path) -> None:
    """A log-prob of one token is enough: the others, of the same answer and of others, are numbers."""
    spec = stage(samples_per_prompt=2)
    net: Any = policy(spec, tie_word_embeddings=False)
    with torch.no_grad():
        net.get_input_embeddings().weight[200] = float("nan")
    with pytest.raises(TrainingFault, match="log-probs or values of the sampled answers are not finite"):
        trainer(
            tmp_path, spec, net=net, engine=Says([7, 200, STOP], [7, STOP]), proved=False, data=prompts(4, length=3)
        ).fit()


# What an unfinished answer costs


def worth_of(answers: list[list[int]], *, baselines: float = 0.0, **options: Any) -> Any:
    spec = stage(estimator="reinforce", kl_coefficient=0.0, **options)
    samples = sampled(*answers)
    made = Answers.of(["p"], [[sample.trajectory for sample in samples]])
    zeros = torch.zeros(len(made.ids))
    return build_experience(
        spec, 0, made, samples, TokenOutputs(zeros, zeros, None), torch.full((len(samples),), baselines), 0.0
    )


def test_the_penalty_is_for_answers_that_do_not_end() -> None:
    """The score is .7 for three tokens, with the end; .7 - .5 without."""
    found = worth_of([[7, 8, STOP], [7, 8, 9]], unfinished_penalty=0.5)
    assert found.advantages.tolist() == pytest.approx([0.7] * 3 + [0.2] * 3)
    assert found.summary["finished"] == 0.5 and found.summary["length"] == 3.0
    assert found.summary["score"] == pytest.approx(0.45)


def test_the_next_coefficient_follows_the_kl_only_where_it_has_a_target() -> None:
    """Two tokens a nat above the reference: 2 nats an answer, twice the target, so 2 % more."""
    said = Trajectory.single_turn([1, 2], Sample((7, STOP), None, "stop", 0))
    made, sample = Answers.of(["p"], [[said]]), ScoredAnswer(Answer((), "x", ids=(7, STOP)), said, 1.0)
    for target, wanted in ((None, 0.25), (1.0, 0.25 * 1.02), (2.0, 0.25)):
        spec = stage(estimator="reinforce", kl_target=target)
        found = build_experience(
            spec, 0, made, [sample], TokenOutputs(torch.zeros(2), -torch.ones(2), None), torch.zeros(1), 0.25
        )
        assert found.summary["kl_of_answer"] == 2.0 and found.next_coefficient == pytest.approx(wanted)


def test_the_references_own_answer_is_worth_nothing() -> None:
    """With y = y_ref the reward is exactly 0."""
    found = worth_of([[7, 8, STOP]], baselines=float(torch.tensor(1.0 - 0.1 * 3)))
    assert found.advantages.tolist() == pytest.approx([0.0] * 3, abs=1e-7)


def test_importance_needs_the_engines_log_probs() -> None:
    """Nothing is silently left out."""
    spec = stage(estimator="reinforce", importance_cap=2.0)
    said = Trajectory.single_turn([1, 2], Sample((7, STOP), None, "stop", 0))
    made, sample = Answers.of(["p"], [[said]]), ScoredAnswer(Answer((), "x", ids=(7, STOP)), said, 1.0)
    zeros = torch.zeros(2)
    with pytest.raises(InputError, match="this engine gives none"):
        build_experience(spec, 0, made, [sample], TokenOutputs(zeros, zeros, None), torch.zeros(1), 0.0)


def test_the_change_of_held_out_scores() -> None:
    """Differences 1, 2, 3: mean 2, deviation 1; Student's interval with two degrees of freedom."""
    before = [{"score": s, "prompt": "p", "answer": "a"} for s in (0.0, 0.0, 0.0)]
    after = [{"score": s, "prompt": "p", "answer": "b"} for s in (1.0, 2.0, 3.0)]
    found = change_of(before, after)
    assert found is not None and found["prompts"] == 3 and found["mean"] == 2.0
    assert found["interval"] == pytest.approx([2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5])
    assert change_of([], after) is None
    rows = answers_before_and_after("ppo", before[:1], after[:1])
    assert [(row.prompt, said(row)) for row in rows] == [("p", "a\n[score 0.000]"), ("p", "b\n[score 1.000]")]


# The reference's answers


def test_baselines_are_sampled_once(tmp_path: Path) -> None:
    """The mean of m reference answers to each prompt, penalties included; found again under its key, made anew under
    another."""
    engine = Says([7, STOP], [7, 8, 9, 10])
    made = rollouts(engine, lambda answer: len(answer.ids) + len(answer.prompt_ids))
    data = prompts(3)
    settings: dict[str, Any] = {"penalty": 1.0, "cache": tmp_path, "ranks": Ranks()}
    found, rows = reference_baselines(made, data, Sampling(4, n=2), key="a", **settings)
    assert found.tolist() == [len(prompt.ids) + (2 + 4 - 1) / 2 for prompt in data]
    assert [row["prompt_id"] for row in rows] == ["p0", "p0", "p1", "p1", "p2", "p2"]
    again, _ = reference_baselines(made, data, Sampling(4, n=2), key="a", **settings)
    assert torch.equal(again, found) and engine.asked == 3
    reference_baselines(made, data, Sampling(4, n=2), key="b", **settings)
    assert engine.asked == 6
    free, _ = reference_baselines(made, data, Sampling(4, n=2), key="a", **{**settings, "penalty": 0.0})
    assert torch.equal(free, found + 0.5), "the penalty is no part of what is kept"


def test_the_references_answers_are_those_of_step_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine gets the weights once for them and for the first iteration, and again as soon as a step was taken."""
    made, pushed = rollouts(Says([7, STOP]), precision="fp32"), []
    monkeypatch.setattr(sampling, "push", lambda engine, model, *, version, **how: pushed.append(version))
    reference_baselines(made, prompts(2), Sampling(4), penalty=0.0, key="a", cache=tmp_path, ranks=Ranks())
    assert pushed == [1]
    made.sync(0)
    assert pushed == [1], "nothing has moved"
    made.sync(1)
    assert pushed == [1, 2]


def test_baselines_follow_from_what_scores_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model in a folder, another one on the hub, another text of a function, or another member of several:
    another key."""
    module = tmp_path / "my_scores.py"
    monkeypatch.syspath_prepend(tmp_path)

    def key(part: Any) -> str:
        return json.dumps(_content(part, lambda text: Path(text) if text.startswith("/") else text), default=str)

    keys = []
    for text in ("def length(answers): return [0.0]\n", "def length(answers): return [1.0]\n"):
        module.write_text(text)
        function = FunctionScorer(function="my_scores:length")
        keys += [key(function), key(EnsembleScorer(ensemble=[function, JsonRule(rule="json")]))]
    assert len(set(keys)) == 4
    for content in ("one", "other"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "weights").write_text(content)
        keys.append(key(ModelScorer(model=str(tmp_path / "model"))))
    keys += [key(ModelScorer(model="org/model", revision=revision)) for revision in ("a", "b")]
    assert len(set(keys)) == 8 and "org/model" in keys[-1]


# Flat tokens


SAID = {
    (1, 2, 3): [(10, 11), (12,)],
    (4,): [(13, 14, 15), (16, 17)],
    (5, 6): [(18,), (19, 20, 21, 22)],
}
MADE = Answers.of(
    ["a", "b", "c"],
    [
        [Trajectory.single_turn(prompt, Sample(ids, None, "stop", 0)) for ids in answers]
        for prompt, answers in SAID.items()
    ],
)


@pytest.mark.parametrize(
    ("layout", "tokens", "count"),
    [("tree", 100, 3), ("tree", 6, 4), ("tree", 1, 6), ("packed", 100, 6), ("padded", 100, 6)],
)
def test_tokens_find_their_places_whatever_the_packing(layout: Any, tokens: int, count: int) -> None:
    """Every target of every batch lies at the place of its own token, whether a prompt's answers share it or do not fit
    a micro-batch."""
    pieces = MADE.pieces(tokens, layout)
    trees = [pieces.tree(i) for i in range(len(pieces.ranges))]
    assert len(trees) == count
    assert all(tree.size <= max(tokens, 6) for tree in trees)
    found = []
    for members in ([count - 1, 0], list(range(1, count - 1))):
        batch = build(trees, members, layout=layout)
        at = pieces.places(batch)
        assert torch.equal(MADE.ids[at].long(), batch.target_ids)
        found += at.tolist()
    assert sorted(found) == list(range(13)), "every token once"
    assert MADE.branch.tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 4, 5, 5, 5, 5]


def test_a_step_takes_all_answers_of_its_prompts() -> None:
    """Steps are cut by prompts; a prompt in two trees brings both."""
    plan = minibatch_plan(3, stage(minibatches=3), seed=0, iteration=0)
    for tokens in (100, 6, 1):
        pieces = MADE.pieces(tokens, "tree")
        steps = pieces.plan(plan)
        for number in range(3):
            answers = [answer for tree in steps.examples(number).tolist() for answer in pieces.ranges[tree]]
            assert answers == [a for a in range(6) if MADE.prompt_of[a] == plan.order[number]]


def test_rollouts_can_be_read(tmp_path: Path) -> None:
    """What a person needs: prompt, answer, score, baseline, KL, length, end, iteration."""
    run = trainer(tmp_path, stage(samples_per_prompt=2, iterations=1))
    run.fit()
    rows = read_parquet(tmp_path / "rollouts" / "iteration-000000.parquet")
    assert len(rows) == 8
    wanted = {
        "iteration",
        "step",
        "prompt_id",
        "sample",
        "prompt",
        "answer",
        "finished",
        "length",
        "score",
        "baseline",
        "kl",
    }
    assert rows[0].keys() == wanted
    seen = run.parts.rollouts.scorer.seen  # type: ignore[attr-defined]
    assert [row["length"] for row in rows] == [len(answer.ids) for answer in seen]
    assert [row["score"] for row in rows] == [ends_early(answer) for answer in seen]
    (tmp_path / "x.parquet").write_bytes(parquet(rows))
    assert read_parquet(tmp_path / "x.parquet") == rows


# Prompts


def test_long_prompts_are_left_out_before_anything_is_sampled(tmp_path: Path) -> None:
    """Counted, with their line; the others end with the generation prompt; none is cut."""
    path = tmp_path / "prompts.jsonl"
    texts = ["Say tea.", "very " * 200 + "long", "Say rain."]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    source = DataSource(path=str(path))
    found, report = load_prompts([source], resolve=Path, encoder=ENCODER, max_length=60, seed=0, rejects=None)
    assert [prompt.record.prompt[-1]["content"] for prompt in found] == ["Say tea.", "Say rain."]
    assert any("dropped" in line and "prompts.jsonl:2" in line for line in report.lines())
    opening = tuple(ENCODER.encode_prompt([{"role": "user", "content": "x"}]).tolist()[-3:])
    assert all(prompt.ids[-3:] == opening for prompt in found)
    assert digest(found) != digest(found[::-1])
    with pytest.raises(InputError, match="0 prompts left of 3"):
        load_prompts([source], resolve=Path, encoder=ENCODER, max_length=2, seed=0, rejects=None)
    for limit in ("max_prompt_length", "max_length - max_new_tokens"):
        with pytest.raises(InputError, match=rf"3 longer than {limit}; {limit} is 2") as caught:
            load_prompts([source], resolve=Path, encoder=ENCODER, max_length=2, seed=0, rejects=None, limit=limit)
        assert "max_length is" not in str(caught.value)


def test_answers_to_the_same_prompts_are_others_each_time() -> None:
    """Every occasion has random numbers of its own, and the same ones when it is repeated."""

    class Seeds(Says):
        def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Sample]]:
            seeds.append(sampling.seed)
            return super().generate(prompts, sampling)

    seeds: list[int] = []
    made = rollouts(Seeds([7]))
    for place in (0, 1, -1, 0):
        made.sample(prompts(1), Sampling(4, seed=123), place)
    assert len(set(seeds)) == 3 and seeds[0] == seeds[3]


def test_target_reaches_the_scorer() -> None:
    """A data row's `target` is there for rules that compare with it."""
    prompt = prompts(1)[0]
    prompt.record.fields["target"] = "42"
    made = rollouts(Says([7]))
    made.sample([prompt], Sampling(4), 0)
    (answer,) = made.scorer.seen  # type: ignore[attr-defined]
    assert isinstance(answer, Answer) and answer.target == "42"
