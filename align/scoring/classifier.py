"""Reward models made by other tools: any sequence-classification model of transformers, with its own tokenizer and
template. If it has several labels, weights make one score of them.

The text of a policy's sample is encoded with the reward model's own template. The answer always ends with the end token
that this template writes, because another model's template cannot express that an answer was cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from align.data.chat.encoder import Encoder
from align.data.records import Message
from align.data.tree import Ids
from align.errors import InputError, Problem
from align.models.files.starts import output_weights
from align.models.load import load_classifier, load_tokenizer
from align.recipe.schema import Model
from align.scoring.encoded import limit_of, require_room
from align.scoring.scorer import Answer, require_scores

_PROBE = (
    Answer(({"role": "user", "content": "Is the sun a star?"},), "Yes."),
    Answer(
        ({"role": "user", "content": "Is the sun a star?"},),
        "No, it is a planet, as everybody knows, and so is the moon.",
    ),
)


class ClassifierScorer:
    """Scores conversations with the classifier at ``model.path`` (resolved: a folder or a hub id), on ``device``.

    A decoder's score is the head's value at the last token of the conversation. The token is found by position:
    transformers looks for the last token that is not padding, which is the wrong one if padding and end token have the
    same id. An encoder model computes its score itself.

    Args:
        grades: name of a label -> its weight in the score. When empty the only label is the score, or the weights are
            those that :func:`~align.models.scalar.classifier.export_classifier` wrote into the configuration.
        dtype: of the weights; the head computes in fp32 always.
        max_length: longest conversation, in tokens; the model's maximum length when None.
        batch_tokens: tokens of one forward pass, padding included; a longer conversation gets a pass of its own.

    Raises:
        InputError: the model cannot be used: see :func:`~align.models.load.load_classifier`; it has several labels and
            none is chosen; it has no chat template; or its scores change with padding.
        EnvironmentFault: a hub model is not on this machine and cannot be fetched.
    """

    def __init__(
        self,
        model: Model,
        *,
        grades: Mapping[str, float] | None = None,
        device: torch.device | str = "cpu",
        dtype: Literal["fp32", "bf16"] = "fp32",
        max_length: int | None = None,
        batch_tokens: int = 2048,
    ) -> None:
        self.name = model.path
        self._model: Any = load_classifier(model, dtype=dtype, device=device)
        config: dict[str, Any] = self._model.config.to_dict()
        names = [str(config["id2label"][number]) for number in sorted(config["id2label"], key=int)]
        weights = output_weights(names, grades or config.get("grade_weights") or {}, model.path)
        self._weights = torch.tensor(weights, device=device)
        self._encoder = _encoder(model)
        head = getattr(self._model, "score", None)
        self._head = head if isinstance(head, nn.Linear) else None
        limits = [length for length in (max_length, limit_of(self._model.config)) if length is not None]
        self._max_length = min(limits, default=None)
        self._batch_tokens = batch_tokens
        self._require_padding_to_be_ignored(tolerance=1e-3 if dtype == "fp32" else 0.1)

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """The model's score of each conversation, in order; of the prompt alone if there is no answer. Raises
        InputError for one that is too long, or that the template refuses."""
        encoded = [self._encode(answer) for answer in answers]
        require_room(self.name, max(map(len, encoded), default=0), self._max_length)
        scores = [0.0] * len(encoded)
        for places in self._batches([len(ids) for ids in encoded]):
            for place, score in zip(places, self._forward([encoded[i] for i in places]).tolist(), strict=True):
                scores[place] = score
        return require_scores(self.name, scores, len(answers))

    def _encode(self, answer: Answer) -> Ids:
        """Token ids of the conversation as the template writes it."""
        messages: list[Message] = list(answer.prompt)
        if not answer.prompt_only:
            messages.append({"role": "assistant", "content": answer.text})
        read: list[Message] = [{**m, "train": False} if m["role"] == "assistant" else m for m in messages]
        return self._encoder.encode(read, train_on="last").ids

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Batches of indices with similar lengths, so that little is padded."""
        batch: list[int] = []
        for place in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
            if batch and (len(batch) + 1) * lengths[place] > self._batch_tokens:
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    @torch.no_grad()
    def _forward(self, rows: Sequence[Ids]) -> Tensor:
        """Scores of conversations, fp32 [R]. Rows are padded on the right, which earlier tokens of a decoder cannot
        see."""
        device = self._model.device
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), self._encoder.pad_id)
        for r, row in enumerate(rows):
            ids[r, : len(row)] = torch.from_numpy(row)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if self._head is None:
            scores: Tensor = self._model(**inputs).logits.float() @ self._weights
            return scores
        hidden = self._model.base_model(**inputs, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(rows), device=device), (lengths - 1).to(device)]
        bias = None if self._head.bias is None else self._head.bias.float()
        return nn.functional.linear(last.float(), self._head.weight.float(), bias) @ self._weights

    def _require_padding_to_be_ignored(self, tolerance: float) -> None:
        """Score two conversations of different lengths in one batch, so that one is padded, and separately. Raises
        InputError when the scores differ."""
        rows = [self._encode(answer) for answer in _PROBE]
        apart = torch.cat([self._forward([row]) for row in rows])
        together = self._forward(rows)
        if not torch.allclose(together, apart, atol=tolerance, rtol=tolerance):
            problem = f"{type(self._model).__name__} gives other scores to padded conversations"
            raise InputError(Problem(problem, file=self.name, hint="use another reward model"))


def _encoder(model: Model) -> Encoder:
    """The reward model's encoder. When it has no chat template, the InputError names the scorer's key to set, not the
    policy's."""
    tokenizer = load_tokenizer(model)
    if tokenizer.chat_template is None:
        problem = "the reward model's tokenizer has no chat template"
        hint = (
            "set `chat_template` beside `model` in `reward` to a Jinja file with the template that it was trained with"
        )
        raise InputError(Problem(problem, file=model.path, hint=hint))
    return Encoder(tokenizer, template_kwargs=model.chat_template_kwargs)
