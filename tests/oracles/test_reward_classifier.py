"""An exported reward model gives our scores in transformers alone; where padding is the end token, transformers reads
another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from align.batching.batch import Batch
from align.batching.tree import build
from align.data.chat.encoder import Encoder
from align.data.tree import Branch, Tree
from align.errors import InputError
from align.models.adapters import add_lora, trainable_parameters
from align.models.compute.forward import causal_lm
from align.models.load import load_backbone, load_encoder
from align.models.scalar.classifier import export_classifier
from align.models.scalar.heads import ScalarModel, ScoreStats, branch_scores, load_scalar, save_scalar
from align.recipe.schema import Model
from tests.support import tokenizers
from tests.support.saved import LORA, save_tiny
from tests.support.tokenizers import chatml, glm4

PROMPT = [{"role": "user", "content": "What is the capital of France?"}]
ANSWERS = ("Paris.", "The capital of France is Paris.", "今天天气很好")


def reward(
    tmp_path: Path,
    family: str = "llama",
    tokenizer: PreTrainedTokenizerFast | None = None,
    lora: bool = False,
    **config: Any,
) -> Model:
    base = save_tiny(tmp_path / "base", family, tokenizer or chatml(), **config)
    backbone = load_backbone(base)
    model = ScalarModel(add_lora(backbone, LORA) if lora else backbone).eval()
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter += 0.05 * torch.randn_like(parameter)
    save_scalar(model, load_encoder(base), tmp_path / "rm", base=base, scores=ScoreStats(0.0, 1.0, 2))
    return Model(path=str(tmp_path / "rm"))


def batch_of(encoder: Encoder) -> Batch:
    tree = Tree("t", *encoder.encode_answers(PROMPT, [[{"role": "assistant", "content": text}] for text in ANSWERS]))  # type: ignore[typeddict-item]
    return build([_up_to_the_end(tree, encoder)], [0], layout="tree")


def _up_to_the_end(tree: Tree, encoder: Encoder) -> Tree:
    ends = [int(np.flatnonzero(branch.mask)[-1]) + 1 for branch in tree.branches]
    return Tree(
        tree.id,
        tree.trunk,
        tuple(Branch(b.ids[:end], b.mask[:end]) for b, end in zip(tree.branches, ends, strict=True)),
    )


@torch.no_grad()
def in_transformers(folder: Path, stops: tuple[int, ...], side: str) -> list[float]:
    """Scores with nothing of ours: text by the template, cut behind the token that ends the answer, padded, one
    forward."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    rows = []
    for text in ANSWERS:
        ids = tokenizer.apply_chat_template([*PROMPT, {"role": "assistant", "content": text}])["input_ids"]
        last = max((i for i, token in enumerate(ids) if token in stops), default=-1)
        # GLM-4 ends with the next role's token
        rows.append({"input_ids": ids[: last + 1] if last >= len(ids) - 2 else [*ids, stops[0]]})
    tokenizer.padding_side = side
    batch = tokenizer.pad(rows, return_tensors="pt")
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    scores: list[float] = model(**batch, position_ids=positions).logits.squeeze(-1).tolist()
    return scores


@pytest.mark.filterwarnings("ignore:You're using a PreTrainedTokenizerFast")
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("family", "tokenizer", "lora"),
    [
        ("llama", chatml(), False),
        ("llama", chatml(distinct_pad=True), True),
        ("glm4", glm4(), False),
        ("qwen3", chatml(), False),
        ("gpt2", chatml(), True),
    ],
)
@torch.no_grad()
def test_transformers_alone_gives_our_scores(
    tmp_path: Path, family: str, tokenizer: Any, lora: bool, side: str
) -> None:
    """Pad == eos in the reward model, a distinct padding token in the export, whichever side is padded; an
    adapter is merged."""
    rm = reward(tmp_path, family, tokenizer, lora)
    encoder = load_encoder(rm)
    ours = branch_scores(load_scalar(rm), batch_of(encoder)).tolist()
    report = export_classifier(rm, tmp_path / "plain")
    assert report["architecture"].endswith("ForSequenceClassification")
    exported = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert exported.pad_token_id not in encoder.stop_ids
    assert in_transformers(tmp_path / "plain", encoder.stop_ids, side) == pytest.approx(ours, abs=1e-5)


@torch.no_grad()
def test_a_model_without_room_for_padding_gets_a_row(tmp_path: Path) -> None:
    """The vocabulary is full, so the padding token is one more embedding; scores stay."""
    full = PreTrainedTokenizerFast.from_pretrained(_without_pad_token(tmp_path / "tokenizer"))
    rm = reward(tmp_path, "llama", full, vocab_size=len(full))
    ours = branch_scores(load_scalar(rm), batch_of(load_encoder(rm))).tolist()
    report = export_classifier(rm, tmp_path / "plain")
    assert report["pad_token"] == "<|pad|>"
    assert in_transformers(tmp_path / "plain", load_encoder(rm).stop_ids, "right") == pytest.approx(ours, abs=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert plain.get_input_embeddings().weight.shape[0] == len(full) + 1
    assert plain.config.pad_token_id == len(full)


def _without_pad_token(folder: Path) -> Path:
    """SmolLM2's way, in a vocabulary without a token that is called like a padding token."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = tokenizers.build(
        tokenizers.template("chatml"), special, bos="<|im_start|>", eos="<|im_end|>", pad="<|im_end|>", gpt2=True
    )
    made.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:You're using a PreTrainedTokenizerFast")
@torch.no_grad()
def test_where_padding_is_the_end_token_transformers_reads_another_one(tmp_path: Path) -> None:
    """The same weights with pad == eos score the token before the end, even unpadded; ours score the
    end."""
    rm = reward(tmp_path)
    scalar, encoder = load_scalar(rm), load_encoder(rm)
    batch = batch_of(encoder)
    ours = branch_scores(scalar, batch)
    export_classifier(rm, tmp_path / "plain")
    wrong = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    wrong.config.pad_token_id = encoder.pad_id
    assert encoder.pad_id == encoder.stop_ids[0]
    backbone: Any = causal_lm(scalar.backbone)
    backbone.set_attn_implementation("sdpa")
    trunk = batch.input_ids[0, : batch.rows[0][0].trunk].tolist()
    cursor = len(trunk)
    for b, length in enumerate(batch.rows[0][0].branches):
        path = torch.tensor([[*trunk, *batch.input_ids[0, cursor : cursor + length].tolist()]])
        cursor += length
        theirs = float(wrong(path).logits)
        states = backbone(path, use_cache=False).last_hidden_state[0] @ scalar.head.weight[0]
        assert theirs == pytest.approx(float(states[-2]), abs=1e-5)
        assert float(ours[b]) == pytest.approx(float(states[-1]), abs=1e-5)
        assert abs(theirs - float(ours[b])) > 1e-3


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    """A folder that exists, a language model, and an architecture without a classifier of this kind."""
    rm = reward(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists already"):
        export_classifier(rm, tmp_path / "there")
    with pytest.raises(InputError, match="not a reward model"):
        export_classifier(Model(path=str(tmp_path / "base")), tmp_path / "new")
    with pytest.raises(InputError, match="no sequence classifier for granite models"):
        export_classifier(reward(tmp_path / "other", "granite"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
