"""An engine whose completions come from a file, for tests, documentation, and trying a recipe without a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.data.chat.encoder import Encoder
from align.data.sources.readers import BadRow, read_rows
from align.errors import InputError, Problem
from align.recipe.blocks.rollout import ScriptedRollout
from align.recipe.schema import DataSource
from align.rollout.engine import Sample, SampledPolicy, Sampling, WeightSource, sample_seed
from align.rollout.limits import require_room

_PROBE = "probequestion"


def opened(rollout: ScriptedRollout, policy: SampledPolicy) -> ScriptedEngine:
    """The engine that ``rollout`` asks for."""
    assert rollout.script is not None
    return ScriptedEngine(Path(policy.resolve(rollout.script)), policy.encoder, max_length=policy.max_length)


class ScriptedEngine:
    """Samples from a script, a JSONL file of rows ``{"completion": text}``, instead of from a model. A row that has a
    ``prompt`` too is used only for prompts whose last user message is that text, and such prompts get no other rows.
    All other prompts share the rows without a ``prompt``.

    The row of a sample depends only on the sampling's seed and the numbers of prompt and sample. Temperature and top-p
    have no effect, and there are no log-probs.

    Args:
        encoder: encodes the scripted texts, as the policy in whose place they stand would; each completion ends with
            its first stop id.
        max_length: longest prompt with its completion, in tokens; any when None.

    Raises:
        InputError: a bad row, with file and line; or no row at all.
    """

    together = sys.maxsize
    """No limit, since each sample has its own seed."""

    def __init__(self, script: Path, encoder: Encoder, *, max_length: int | None = None) -> None:
        self._encoder, self._max_length = encoder, max_length
        self._version = 0
        self._answers: dict[str | None, list[tuple[int, ...]]] = {}
        for prompt, completion in _rows(script):
            self._answers.setdefault(prompt, []).append(_ids(encoder, completion))
        self._script = script
        self._user, self._tail = _around_user(encoder) if self._answers.keys() - {None} else ("", "")

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Sample]]:
        """Raises InputError for a prompt that leaves no room, or that the script does not answer."""
        if self._max_length is not None:
            require_room(prompts, sampling.max_new_tokens, self._max_length)
        made = []
        for p, prompt in enumerate(prompts):
            answers = self._answers_to(prompt)
            chosen = (answers[sample_seed(sampling.seed, p, s) % len(answers)] for s in range(sampling.n))
            made.append([self._completion(ids, sampling.max_new_tokens) for ids in chosen])
        return made

    def load_weights(self, weights: WeightSource) -> None:
        """A script has no weights: only the version changes."""
        self._version = weights.version

    def close(self) -> None:
        """Nothing to free."""

    def _answers_to(self, prompt: Sequence[int]) -> list[tuple[int, ...]]:
        found = self._answers.get(self._last_user_text(prompt)) if self._tail else None
        found = found or self._answers.get(None)
        if not found:
            raise InputError(
                Problem("no row answers a prompt", file=str(self._script), hint="add rows without `prompt`")
            )
        return found

    def _last_user_text(self, prompt: Sequence[int]) -> str:
        """The text between the last user header and the generation prompt."""
        text = self._encoder.spell(prompt)
        return text.removesuffix(self._tail).rpartition(self._user)[2].strip()

    def _completion(self, ids: tuple[int, ...], room: int) -> Sample:
        if len(ids) + 1 <= room:
            return Sample((*ids, self._encoder.stop_ids[0]), None, "stop", self._version)
        return Sample(ids[:room], None, "length", self._version)


def _rows(script: Path) -> list[tuple[str | None, str]]:
    """``(prompt, completion)`` of every row. A completion may be empty, as that of a model may be."""
    problems: list[Problem] = []
    found: list[tuple[str | None, str]] = []

    def bad(row: BadRow) -> None:
        problems.append(row)

    for row in read_rows(DataSource(path=str(script)), script, bad):
        completion, prompt = row.value.get("completion"), row.value.get("prompt")
        fault = None
        if unknown := row.value.keys() - {"completion", "prompt"}:
            fault = (min(unknown)[:40], "unknown key; known: completion, prompt")
        elif not isinstance(completion, str):
            fault = ("completion", "must be a text")
        elif prompt is not None and not isinstance(prompt, str):
            fault = ("prompt", "must be the text of a last user message")
        else:
            found.append((None if prompt is None else prompt.strip(), completion))
        if fault:
            problems.append(Problem(fault[1], row.origin.source, row.origin.line, key=fault[0]))
    if problems:
        raise InputError(problems[:10])
    return found


def _ids(encoder: Encoder, text: str) -> tuple[int, ...]:
    """The tokens of the text; texts of control tokens in it remain text."""
    tokenizer: Any = encoder.tokenizer
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return tuple(ids)


def _around_user(encoder: Encoder) -> tuple[str, str]:
    """The texts that the template writes before a user's last message and after it."""
    ask: Any = {"role": "user", "content": _PROBE}
    first = encoder.spell(encoder.encode_prompt([ask]))
    later = encoder.spell(encoder.encode_prompt([ask, {"role": "assistant", "content": "probeanswer"}, ask]))
    (one, _, tail), (other, _, _) = first.rpartition(_PROBE), later.rpartition(_PROBE)
    same = 0
    while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
        same += 1
    return one[len(one) - same :], tail
