"""The data of a TRL trainer: rows of texts, and a tokenizer that looks up the tokens of each text.

TRL's trainers tokenise their texts themselves, each in its own way. The tokenizer that they get here has a table from
texts to the ids of this package's encoder, so that these ids are trained on and sampled from. It refuses every other
text.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from align.data.chat.encoder import Encoder
from align.data.report import Counted, DataReport
from align.data.tree import Branch, Tree
from align.data.trees.build import Unusable
from align.data.trees.load import load_trees
from align.data.trees.prompts import EncodedPrompt, load_prompts
from align.errors import InputError, Problem
from align.recipe.schema import Data, TrlStage
from align.stages.context import StageContext

OPEN_END = "an answer that was cut, or has messages in between: TRL would train on an end, or on more than the answer"
SPELT_ALIKE = "spelt like another text that has other tokens"


@dataclass
class TextIds:
    """A table from texts to the token ids that the tokenizer will return for them."""

    encoder: Encoder
    ids: dict[str, list[int]] = field(default_factory=dict)

    def add(self, text: str, ids: Sequence[int]) -> bool:
        """Enter the ids of ``text``. Returns False when the table has other ids for it already."""
        return self.ids.setdefault(text, list(ids)) == list(ids)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The encoder's tokenizer, changed to look texts up in this table. Its end token is the one that ends a turn in
        the chat template."""
        own = self.encoder.tokenizer
        twin = copy.deepcopy(own)
        twin.__class__ = type(type(own).__name__, (_LookupTokenizer, type(own)), {})
        vars(twin)["text_ids"] = self.ids
        twin.eos_token = own.convert_ids_to_tokens(self.encoder.stop_ids[0])
        twin.pad_token = own.convert_ids_to_tokens(self.encoder.pad_id)
        twin.bos_token = None  # the encoder's ids contain it where the template has it; TRL must not add another
        return twin


class _LookupTokenizer:
    """Replaces the part of a tokenizer that turns texts into ids."""

    def __call__(
        self,
        text: str | list[str],
        *,
        padding: bool = False,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        **_: Any,
    ) -> BatchEncoding:
        """The ids of each text. Raises KeyError for a text that is not in the table."""
        known: dict[str, list[int]] = vars(self)["text_ids"]
        texts = [text] if isinstance(text, str) else text
        ids = [list(known[one]) for one in texts]
        if padding:
            pad: Any = getattr(self, "pad")  # noqa: B009 - of the tokenizer that this is mixed into
            padded: BatchEncoding = pad(
                {"input_ids": ids}, padding=True, padding_side=padding_side, return_tensors=return_tensors
            )
            return padded
        masks = [[1] * len(one) for one in ids]
        if isinstance(text, str):
            return BatchEncoding({"input_ids": ids[0], "attention_mask": masks[0]})
        return BatchEncoding({"input_ids": ids, "attention_mask": masks})


ShownPrompt = tuple[str, list[int]]
"""Id and tokens."""


@dataclass
class TrlData:
    """Data sets that a trainer learns from and is evaluated on."""

    train: Dataset
    held_out: Dataset | None
    text_ids: TextIds
    shown: list[ShownPrompt]
    """Prompts to answer for the report: held-out ones if there are any."""
    asked: list[EncodedPrompt]
    """For a trainer that samples: the prompts, to which the data sets' column ``row`` is an index."""
    report: DataReport
    held_out_report: DataReport | None

    def lines(self) -> list[str]:
        """Lines for the user: what was read, what was left out and why, and how many rows TRL gets."""
        held_out = self.held_out_report.lines() if self.held_out_report else []
        return [*self.report.lines(), *(f"held out: {line}" for line in held_out), f"{len(self.train):,} rows for TRL"]


def read(spec: TrlStage, ctx: StageContext, encoder: Encoder) -> TrlData:
    """The stage's data. Raises InputError for bad rows, and when nothing is left."""
    rows = _Rows(spec, ctx, TextIds(encoder))
    train, report, prompts = rows.of(spec.data, ctx.out / "rejects.jsonl")
    held_out: Dataset | None = None
    held_out_report: DataReport | None = None
    if spec.eval_data is not None:
        held_out, held_out_report, prompts = rows.of(spec.eval_data, None)
    return TrlData(train, held_out, rows.text_ids, prompts[: spec.samples], rows.asked, report, held_out_report)


Made = tuple[Dataset, DataReport, list[ShownPrompt]]


@dataclass
class _Rows:
    """Makes the data sets of one stage, which share the table from texts to ids."""

    spec: TrlStage
    ctx: StageContext
    text_ids: TextIds
    asked: list[EncodedPrompt] = field(default_factory=list)

    def of(self, sources: Data, rejects: Path | None) -> Made:
        """The rows that the trainer wants, of these sources; what is left out is written to ``rejects``."""
        made = self._prompts if self.spec.method.rows == "prompts" else self._preferences
        return made(sources, rejects)

    def _prompts(self, sources: Data, rejects: Path | None) -> Made:
        """Rows ``prompt`` and ``row``, its place in ``asked``."""
        prompts, report = load_prompts(
            sources,
            resolve=self.ctx.resolve,
            encoder=self.text_ids.encoder,
            max_length=self.spec.max_length - (self.spec.longest_answer or 0),
            limit="max_length, less the longest answer",
            seed=self.ctx.seed,
            rejects=rejects,
        )
        rows = []
        for prompt in prompts:
            text = self.text_ids.encoder.spell(prompt.ids)
            if self.text_ids.add(text, prompt.ids):
                rows.append({"prompt": text, "row": len(self.asked)})
                self.asked.append(prompt)
            else:
                report.drop(SPELT_ALIKE, prompt.record.origin)
        return Dataset.from_list(rows), report, [(prompt.record.id, list(prompt.ids)) for prompt in prompts]

    def _preferences(self, sources: Data, rejects: Path | None) -> Made:
        """Rows ``prompt``, ``completion`` and ``label``, or ``prompt``, ``chosen`` and ``rejected``, in an order that
        follows from the seed."""
        judged = self.spec.method.rows == "answers"
        trees, report = load_trees(
            "unpaired" if judged else "preference",
            sources,
            resolve=self.ctx.resolve,
            encoder=self.text_ids.encoder,
            max_length=self.spec.max_length,
            too_long=self.spec.too_long,
            train_on="last",
            seed=self.ctx.seed,
            cache=self.ctx.cache,
            rejects=rejects,
        )
        make: Callable[[Tree, TextIds], list[dict[str, Any]]] = _judged if judged else _pairs
        rows: list[dict[str, Any]] = []
        for place in range(len(trees)):
            try:
                rows += make(trees[place], self.text_ids)
            except Unusable as reason:
                report.dropped.setdefault(str(reason), Counted()).total += 1
        if not rows:
            reasons = ", ".join(f"{count.total:,} {reason}" for reason, count in report.dropped.items())
            file = ", ".join(source.path for source in sources)
            raise InputError(Problem(f"0 preferences left: {reasons}", file=file))
        # KTO reads its rows in order and estimates its reference point from neighbouring rows, so there must be no long
        # run of one label, and no pair next to each other.
        random.Random(self.ctx.seed).shuffle(rows)
        shown = map(trees.__getitem__, range(min(self.spec.samples, len(trees))))
        return Dataset.from_list(rows), report, [(tree.id, tree.trunk.tolist()) for tree in shown]


def _judged(tree: Tree, text_ids: TextIds) -> list[dict[str, Any]]:
    """A row for each answer. The answer of a tree with a single one has its own label; of a preference the first answer
    is the good one."""
    prompt, answers = _texts(tree, text_ids)
    good = tree.branches[0].margin > 0 if len(answers) == 1 else True
    return [
        {"prompt": prompt, "completion": answer, "label": good and place == 0} for place, answer in enumerate(answers)
    ]


def _pairs(tree: Tree, text_ids: TextIds) -> list[dict[str, Any]]:
    prompt, (chosen, *rejected) = _texts(tree, text_ids)
    return [{"prompt": prompt, "chosen": chosen, "rejected": one} for one in rejected]


def _texts(tree: Tree, text_ids: TextIds) -> tuple[str, list[str]]:
    """A prompt and its answers as texts, entered into the table. Raises Unusable when TRL cannot train on exactly these
    tokens."""
    if not all(_closed(branch, text_ids.encoder) for branch in tree.branches):
        raise Unusable(OPEN_END)
    spell = text_ids.encoder.spell
    prompt, answers = spell(tree.trunk), [spell(branch.ids) for branch in tree.branches]
    added = [text_ids.add(prompt, tree.trunk.tolist())]
    for branch, answer in zip(tree.branches, answers, strict=True):
        added.append(text_ids.add(prompt + answer, np.concatenate([tree.trunk, branch.ids]).tolist()))
    if not all(added):
        raise Unusable(SPELT_ALIKE)
    return prompt, answers


def _closed(branch: Branch, encoder: Encoder) -> bool:
    """Are all tokens of the answer trained, up to the end token? TRL would train on all of them and add a missing end
    token."""
    return bool(branch.mask.all()) and int(branch.ids[-1]) == encoder.stop_ids[0]
