"""Scalar models: a transformer without LM head and one linear output. Reward models read the output at the end of an
answer, value models before every token.

The head is fp32 whatever the backbone's type: bf16 has 8 significant bits, and the scores of a pair often differ by
less than that resolves. It has no bias: the ranking loss does not depend on one, and transformers' classifiers of this
family have none, so an exported model gives exactly the same scores.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from align import files
from align.batching.batch import Batch
from align.batching.tree import Layout, pack
from align.data.chat.encoder import Encoder
from align.data.tree import Tree
from align.errors import InputError, Problem
from align.models.adapters import is_lora
from align.models.compute.forward import causal_lm, hidden_states
from align.models.files.folder import HEAD, MERGED, ModelFolder, read_folder
from align.models.files.identity import is_gguf
from align.models.files.quiet import no_progress_bars
from align.models.generate import embedding_rows
from align.models.load import load_backbone, locate, readable, require_rows
from align.models.merging import merged_copy
from align.models.placement import WHOLE, in_forward, size_of
from align.models.save import SUBJECTS, origin_of, save_adapter, save_backbone, save_notes, save_tokenizer, take_part
from align.recipe.schema import Model

if TYPE_CHECKING:
    from peft import PeftModel

Number = TypeVar("Number", float, Tensor, npt.NDArray[np.float64])


class ScalarModel(nn.Module):
    """``backbone`` (a transformers model without LM head, or a PeftModel around one) and ``head``, an fp32 linear layer
    to one number, or to one for each of ``grades``: attribute to its weight in the one score, the weighted sum.

    A new head is drawn from a normal distribution of standard deviation 1 / sqrt(d + 1), d the hidden size, as in
    OpenAI's lm-human-preferences; OpenRLHF draws it sqrt(d) times smaller. Hidden states after a final norm have a
    length of about sqrt(d), so the first scores have a standard deviation of about 1 for unrelated states, and a
    smaller one when answers end alike.
    """

    def __init__(self, backbone: PreTrainedModel | PeftModel, grades: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.grades = dict(grades or {})
        inner = causal_lm(backbone)
        width = int(inner.config.get_text_config().hidden_size)
        self.backbone: nn.Module = backbone
        self.head = nn.Linear(width, len(self.grades) or 1, bias=False, dtype=torch.float32)
        # Drawn on the CPU, so that the numbers are the same for every device
        nn.init.normal_(self.head.weight, std=(width + 1) ** -0.5)
        self.head.to(inner.device)

    def at(self, batch: Batch, positions: Tensor, *, own_attention: bool = False) -> Tensor:
        """The score at ``positions`` of the flattened tokens, fp32 [len(positions)]."""
        return self.score(self.outputs(batch, positions, own_attention=own_attention))

    def outputs(self, batch: Batch, positions: Tensor, *, own_attention: bool = False) -> Tensor:
        """The head's values at ``positions`` of the flattened tokens, fp32 [len(positions), outputs]."""

        def values() -> Tensor:
            states = hidden_states(self.backbone, batch, own_attention=own_attention)[positions]
            with torch.autocast(states.device.type, enabled=False):
                found: Tensor = self.head(states.float())
            return found

        return in_forward(self, values)

    def score(self, outputs: Tensor) -> Tensor:
        """The score [n] from the head's outputs [n, outputs]: the only one, or the weighted sum of the grades."""
        return outputs @ outputs.new_tensor(list(self.grades.values())) if self.grades else outputs.squeeze(-1)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Switch gradient checkpointing on, as the method of transformers' models does."""
        causal_lm(self.backbone).gradient_checkpointing_enable(**options)


def branch_scores(model: ScalarModel, batch: Batch, *, own_attention: bool = False) -> Tensor:
    """The score of each branch: the head at its last target, which is the token that ends the answer. fp32 [B].

    The token is found by its position, never by its id, since padding may have the id of an end token. Every branch
    must have a target.
    """
    return model.at(batch, _ends(batch), own_attention=own_attention)


def branch_grades(model: ScalarModel, batch: Batch, *, own_attention: bool = False) -> Tensor:
    """Every output of the head for each branch, fp32 [B, outputs], read at the same token as :func:`branch_scores`
    does."""
    return model.outputs(batch, _ends(batch), own_attention=own_attention)


def _ends(batch: Batch) -> Tensor:
    """The index of each branch's last target, int64 [B]."""
    last = torch.full((batch.num_branches,), -1, device=batch.targets.device)
    return last.scatter_reduce(0, batch.branch, batch.targets, "amax")


def token_values(model: ScalarModel, batch: Batch, *, own_attention: bool = False) -> Tensor:
    """The value of the state before each target: the head's output at the token from which the target is predicted.
    fp32 [N], in the order of the targets."""
    return model.at(batch, batch.sources, own_attention=own_attention)


@torch.no_grad()
def score_trees(
    model: ScalarModel, trees: list[Tree], *, microbatch_tokens: int, layout: Layout, pad_id: int
) -> list[list[float]]:
    """Scores of all branches of each tree. Up to rounding they do not depend on which trees are scored together."""
    scores = [[0.0] * len(tree.branches) for tree in trees]
    device = model.head.weight.device
    # All rows have the same length, so that the kernel is compiled once
    multiple = microbatch_tokens if device.type == "cuda" and layout != "padded" else 1
    for cpu_batch in pack(
        trees, microbatch_tokens=microbatch_tokens, layout=layout, pad_id=pad_id, multiple_of=multiple
    ):
        batch = cpu_batch.to(device)
        values = branch_scores(model, batch, own_attention=layout == "padded").tolist()
        places = zip(cpu_batch.branch_tree.tolist(), cpu_batch.branch_slot.tolist(), strict=True)
        for value, (tree, slot) in zip(values, places, strict=True):
            scores[cpu_batch.tree_index[tree]][slot] = value
    return scores


@dataclass(frozen=True)
class ScoreStats:
    """Mean and standard deviation of a reward model's scores on the answers that it was trained on, and the number of
    these answers."""

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, scores: npt.ArrayLike) -> ScoreStats:
        """Those of ``scores``."""
        values = np.asarray(scores, dtype=np.float64)
        return cls(float(values.mean()), float(values.std()), values.size)

    def normalise(self, scores: Number) -> Number:
        """The distance of ``scores`` from the mean in standard deviations. Scores must not be normalised twice: code
        that passes them on says whether they are normalised."""
        return (scores - self.mean) / (self.std or 1.0)


# Folders


def load_scalar(
    model: Model,
    *,
    dtype: Literal["fp32", "bf16"] = "fp32",
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    quantize: Literal["nf4"] | None = None,
    grades: bool = False,
) -> ScalarModel:
    """The reward model at ``model.path`` that a reward stage saved: whole, or an adapter with its base. In eval mode,
    dropout off.

    If it learned grades, its head gives their weighted sum as the score, or with ``grades`` each of them.

    Raises:
        InputError: it is not a reward model of this package (a plain language model has no head, and no random one is
            made for it), or it is damaged.
        EnvironmentFault: as for :func:`~align.models.load.load_policy`.
    """
    folder = _reward_folder(model)
    weights = grade_weights(folder)
    with readable(folder.path / HEAD):
        weight = load_file(folder.path / HEAD)["weight"]
    if weights and not grades and len(weight) == len(weights):
        weight = weight.new_tensor([list(weights.values())]) @ weight
    backbone = load_backbone(model, dtype=dtype, device=device, cache=cache, quantize=quantize)
    scalar = ScalarModel(backbone, weights if grades else None)
    if weight.shape != scalar.head.weight.shape:
        shapes = f"{tuple(weight.shape)}, the backbone needs {tuple(scalar.head.weight.shape)}"
        raise InputError(Problem(f"the head is {shapes}", file=str(folder.path / HEAD)))
    return with_head(scalar, weight).eval()


def grade_weights(folder: ModelFolder) -> dict[str, float]:
    """The grades that a reward model of this package learned, and their weights in its score; empty when it learned to
    rank.

    Raises :class:`InputError` when the entry in align.json is of another kind.
    """
    weights = folder.notes.get("grades") or {}
    if not isinstance(weights, dict) or not all(isinstance(weight, (int, float)) for weight in weights.values()):
        raise InputError(Problem("align.json has no weights of its grades", file=str(folder.path)))
    return {str(name): float(weight) for name, weight in weights.items()}


def with_head(scalar: ScalarModel, weight: Tensor) -> ScalarModel:
    """The same model with the head's ``weight`` [outputs, d] replaced."""
    with torch.no_grad():
        scalar.head.weight.copy_(weight)
    return scalar


@dataclass(frozen=True)
class ScoreNotes:
    """What a reward model's folder says about its scores."""

    encoder: str
    """Digest of the tokenizer and template that the model was trained with."""
    layout: Layout
    """How rows are laid out: a model that cannot attend by trees needs ``padded``."""
    stats: ScoreStats


def score_notes(model: Model) -> ScoreNotes:
    """Read the notes of the reward model at ``model.path``. Raises :class:`InputError` when there are none."""
    folder = _reward_folder(model)
    try:
        notes = folder.notes
        return ScoreNotes(notes["encoder"], notes["layout"], ScoreStats(**notes["scores"]))
    except (KeyError, TypeError) as error:
        raise InputError(Problem("align.json has no statistics of its scores", file=str(folder.path))) from error


def _reward_folder(model: Model) -> ModelFolder:
    location = locate(model)
    if is_gguf(location):
        raise InputError(Problem("a .gguf file is a language model, not a reward model", file=str(location)))
    return read_folder(location, "reward_model")


def save_scalar(
    model: ScalarModel,
    encoder: Encoder,
    out: Path,
    *,
    base: Model,
    scores: ScoreStats,
    layout: Layout = "tree",
    save_merged: bool = False,
    writes: bool = True,
) -> dict[str, Any]:
    """Write a reward model into the folder ``out``: head, tokenizer, notes, and the backbone or its adapter when that
    is what was trained.

    ``base`` is the model that the stage started from (resolved). ``save_merged`` adds the folder ``merged`` with the
    adapter merged in. Making the finished folder visible at once is up to the caller. The model is left as it was.
    Where each process has a part of the model, all must call this, and one ``writes``.

    Returns:
        For the stage's report (empty for a process that does not write): format, dtype, parameters, stop ids, base, and
        for a merged copy the largest difference of a score from the adapter's.

    Raises:
        InputError: the tokenizer has ids beyond the model's embeddings.
        EnvironmentFault: the disk is full or cannot be written.
    """
    if not writes:
        take_part(model.backbone)
        WHOLE.whole(model.head.weight)
        return {}
    inner, adapter = causal_lm(model.backbone), is_lora(model.backbone)
    require_rows(encoder.tokenizer, embedding_rows(inner), out)
    origin = origin_of(base, adapter=adapter)
    report: dict[str, Any] = {
        "format": "lora" if adapter else "full",
        "dtype": str(inner.dtype).removeprefix("torch."),
        "parameters": size_of(inner) + model.head.weight.numel(),
        "stop_ids": list(encoder.stop_ids),
        "base": origin,
    }
    notes = _notes(model, scores, layout)
    with files.machine_faults(out), no_progress_bars():
        out.mkdir(parents=True, exist_ok=True)
        if adapter:
            report["adapter_parameters"] = save_adapter(model.backbone, out, origin)
            if save_merged:
                report["merged"] = {
                    "max_abs_score_diff": write_merged_scalar(
                        model, encoder, out / MERGED, origin, scores=scores, layout=layout
                    )
                }
        else:
            save_backbone(inner, encoder, out)
        _save_rest(model, encoder, out, origin, notes)
    return report


def write_merged_scalar(
    model: ScalarModel, encoder: Encoder, out: Path, origin: dict[str, Any], *, scores: ScoreStats, layout: Layout
) -> float:
    """Write a reward model into the folder ``out`` with its adapter merged in; returns the largest difference of a
    score between the two.

    Raises:
        InputError: the merged model does not compute the same as the one with the adapter.
        EnvironmentFault: the disk is full or cannot be written.
    """
    plain = with_head(ScalarModel(merged_copy(model.backbone), model.grades), model.head.weight)
    difference = _drift(model, plain, encoder, layout)
    with files.machine_faults(out), no_progress_bars():
        save_backbone(causal_lm(plain.backbone), encoder, out)
        _save_rest(plain, encoder, out, origin, _notes(plain, scores, layout))
    return difference


def _notes(model: ScalarModel, scores: ScoreStats, layout: Layout) -> dict[str, Any]:
    return {"scores": vars(scores), "layout": layout, **({"grades": model.grades} if model.grades else {})}


def _save_rest(model: ScalarModel, encoder: Encoder, out: Path, origin: dict[str, Any], notes: dict[str, Any]) -> None:
    save_file({"weight": WHOLE.whole(model.head.weight).cpu().contiguous()}, out / HEAD, metadata={"format": "pt"})
    save_tokenizer(encoder, out)
    (out / HEAD).chmod((out / "tokenizer_config.json").stat().st_mode)  # safetensors ignores the umask
    save_notes(encoder, out, origin, **copy.deepcopy(notes))


def _drift(model: ScalarModel, merged: ScalarModel, encoder: Encoder, layout: Layout) -> float:
    """The largest difference of a score between an adapter and its merged copy, on 20 fixed answers."""
    trees = []
    for it in SUBJECTS:
        trunk, answers = encoder.encode_answers(
            [{"role": "user", "content": f"Do you like {it}?"}],
            [[{"role": "assistant", "content": f"Yes, {it} is fine."}]],
        )
        trees.append(Tree(it, trunk, answers))
    settings: dict[str, Any] = {"microbatch_tokens": 512, "layout": layout, "pad_id": encoder.pad_id}
    training = model.training
    one, other = score_trees(model.eval(), trees, **settings), score_trees(merged.eval(), trees, **settings)
    model.train(training)
    return max(abs(a - b) for (a,), (b,) in zip(one, other, strict=True))
