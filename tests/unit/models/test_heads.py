"""Scalar models: where a score is read, what a new head looks like, and what comes back from disk."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from align.batching.batch import Batch
from align.batching.tree import build, pack
from align.data.tree import Branch, Tree
from align.errors import InputError
from align.functional.losses import bradley_terry
from align.models.adapters import START, add_lora, trainable_parameters
from align.models.compute.forward import causal_lm
from align.models.files.identity import model_digest
from align.models.load import load_backbone, load_encoder, load_policy, without_lm_head
from align.models.save import save_policy
from align.models.scalar.heads import (
    ScalarModel,
    ScoreStats,
    branch_scores,
    load_scalar,
    save_scalar,
    score_notes,
    score_trees,
    token_values,
)
from align.recipe.schema import Lora, Model
from tests.support.root import ROOT
from tests.support.saved import LORA, save_tiny
from tests.support.tiny import random_trees, tiny
from tests.support.tokenizers import chatml, glm4

PAD = END = 2
STATS = ScoreStats(0.25, 2.0, 20)


def scalar(family: str = "llama", **changes: Any) -> ScalarModel:
    torch.manual_seed(5)
    return ScalarModel(without_lm_head(tiny(family, **changes))).eval()


def tree(trunk: list[int], *branches: list[int]) -> Tree:
    parts = tuple(Branch(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool)) for ids in branches)
    return Tree("t", np.array(trunk, dtype=np.int32), parts)


def path_states(model: ScalarModel, ids: list[int]) -> torch.Tensor:
    """Hidden states of one sequence by the backbone's own forward: no packing, no padding."""
    backbone: Any = model.backbone
    backbone.set_attn_implementation("sdpa")
    states: torch.Tensor = backbone(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    return states


def by_hand(model: ScalarModel, ids: list[int]) -> float:
    """The head at the last token of a path."""
    return float(path_states(model, ids)[-1] @ model.head.weight[0])


def flat(scores: list[list[float]]) -> list[float]:
    return [score for tree in scores for score in tree]


# Where the score is read


@pytest.mark.parametrize("pad", [END, 90])
@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
@torch.no_grad()
def test_the_score_is_read_at_the_end_token(layout: Any, pad: int) -> None:
    """Head(state of the end token), alone or beside longer answers (padded on the right), whether padding has the
    end's id or not."""
    model = scalar()
    trees = [tree([5, END, 6], [7, 8, END], [9, END]), tree([4], [10, 11, 12, 13, END], [END])]
    scores = score_trees(model, trees, microbatch_tokens=1000, layout=layout, pad_id=pad)
    for t, found in zip(trees, scores, strict=True):
        for branch, score in zip(t.branches, found, strict=True):
            path = [*t.trunk.tolist(), *branch.ids.tolist()]
            assert score == pytest.approx(by_hand(model, path), abs=1e-5)
            assert score != pytest.approx(by_hand(model, path[:-1]), abs=1e-3), "one token too early would show"
            (alone,) = score_trees(
                model, [Tree("a", t.trunk, (branch,))], microbatch_tokens=1, layout=layout, pad_id=pad
            )
            assert score == pytest.approx(alone[0], abs=1e-5)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing() -> None:
    """What stands before a row's first token is a matter of positions and masks; ours never puts anything there,
    and a batch that does is scored the same."""
    model = scalar()
    (batch,) = pack([tree([5, 6], [7, END])], microbatch_tokens=100, layout="padded", pad_id=END)
    expected = branch_scores(model, batch, own_attention=True)
    width, shift = 9, 5
    ids, positions = torch.full((1, width), END), torch.zeros(1, width, dtype=torch.long)
    ids[0, shift:], positions[0, shift:] = batch.input_ids[0], batch.position_ids[0]
    mask = (torch.arange(width) >= shift).long()[None]

    class LeftPadded(Batch):
        attention_mask = mask  # type: ignore[assignment]

    fields = {
        **vars(batch),
        "input_ids": ids,
        "position_ids": positions,
        "targets": batch.targets + shift,
        "sources": batch.sources + shift,
    }
    assert_close(branch_scores(model, LeftPadded(**fields), own_attention=True), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
@torch.no_grad()
def test_real_tokens_change_the_score_and_padding_does_not(layout: Any) -> None:
    """Any token of the path, the last one included; not a token of padding, nor of another branch or tree."""
    model = scalar()
    trees = [tree([5, 6], [7, 8, END], [9, END]), tree([4], [10, 11, 12, END], [13, END])]
    (batch,) = pack(trees, microbatch_tokens=1000, layout=layout, pad_id=0, multiple_of=8)
    own = layout == "padded"
    before = branch_scores(model, batch, own_attention=own)
    flat, real = batch.input_ids.flatten(), torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
    for r, row in enumerate(batch.rows):
        if row:
            real[r * batch.input_ids.shape[1] : r * batch.input_ids.shape[1] + row[-1].end] = True
    assert not real.all()
    poisoned = _with_ids(batch, torch.where(real, flat, 77).view_as(batch.input_ids))
    assert_close(branch_scores(model, poisoned, own_attention=own), before, atol=1e-6, rtol=0)
    for b in range(batch.num_branches):
        last = int(batch.targets[batch.branch == b].max())
        changed = flat.clone()
        changed[last] = 50
        after = branch_scores(model, _with_ids(batch, changed.view_as(batch.input_ids)), own_attention=own)
        moved = (after - before).abs() > 1e-4
        assert moved.tolist() == [k == b for k in range(batch.num_branches)]


def _with_ids(batch: Batch, ids: torch.Tensor) -> Batch:
    return replace(batch, input_ids=ids)


@torch.no_grad()
def test_text_behind_the_last_target_is_not_scored() -> None:
    """A branch may go on after its last target (a template's line break): the score is the target's."""
    model = scalar()
    mask = np.array([True, True, False, False])
    tail = Tree("t", np.array([5, 6], dtype=np.int32), (Branch(np.array([7, END, 8, 9], dtype=np.int32), mask),))
    (batch,) = pack([tail], microbatch_tokens=100)
    assert float(branch_scores(model, batch)[0]) == pytest.approx(by_hand(model, [5, 6, 7, END]), abs=1e-5)


@torch.no_grad()
def test_values_are_of_the_state_before_each_target() -> None:
    """Of a branch's first target: the trunk's last state. A masked token gets none."""
    model = scalar()
    mask = np.array([True, False, True])
    one = Tree("t", np.array([5, 6], dtype=np.int32), (Branch(np.array([7, 8, END], dtype=np.int32), mask),))
    batch = build([one, tree([4], [9, END], [3, END])], [0, 1], layout="tree")
    values = token_values(model, batch)
    states = path_states(model, [5, 6, 7, 8, END]) @ model.head.weight[0]
    other = path_states(model, [4, 3, END]) @ model.head.weight[0]
    assert_close(values[:2], states[[1, 3]], atol=1e-5, rtol=0)
    assert_close(values[-2:], other[:2], atol=1e-5, rtol=0)
    assert len(values) == batch.num_targets


@pytest.mark.parametrize("family", ["llama", "glm4", "qwen3", "gemma3", "gpt2", "mistral_short_window"])
@torch.no_grad()
def test_layouts_agree(family: str) -> None:
    """Trees, packed rows and padded rows give the same scores and values, in any micro-batch."""
    model = scalar(family)
    trees = random_trees(np.random.default_rng(3), [2, 3, 1, 4, 2])
    expected = score_trees(model, trees, microbatch_tokens=10_000, layout="padded", pad_id=0)
    for layout in ("tree", "packed", "padded"):
        for tokens in (1, 40, 10_000):
            found = score_trees(model, trees, microbatch_tokens=tokens, layout=layout, pad_id=1)  # type: ignore[arg-type]
            assert flat(found) == pytest.approx(flat(expected), abs=1e-5)


@torch.no_grad()
def test_scoring_twice_is_bit_equal_where_the_model_has_dropout(tmp_path: Path) -> None:
    """Dropout is off, in training mode too."""
    base = save_tiny(tmp_path / "base", "gpt2", resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3)
    model = ScalarModel(load_backbone(base)).train()
    (batch,) = pack(random_trees(np.random.default_rng(0), [2, 2]), microbatch_tokens=1000)
    assert torch.equal(branch_scores(model, batch), branch_scores(model, batch))


# A new head


@pytest.mark.parametrize("family", ["llama", "glm4", "gpt2"])
@torch.no_grad()
def test_a_new_head_is_small_and_fp32(family: str) -> None:
    """Weights of standard deviation 1 / sqrt(d + 1), no bias, fp32 on a bf16 backbone and under autocast. On a
    model drawn as real ones are, first scores of answers that end alike spread by less than 1, and the first loss is ln
    2 +- 0.1."""
    assert ScalarModel(without_lm_head(tiny("llama")).to("meta")).head.weight.device.type == "meta", (
        "the head is where the transformer is"
    )
    wide = ScalarModel(without_lm_head(tiny("llama", hidden_size=512, num_attention_heads=8)))
    assert float(wide.head.weight.std()) == pytest.approx(513**-0.5, rel=0.15)
    model = ScalarModel(without_lm_head(tiny(family).to(torch.bfloat16)))
    assert model.head.weight.dtype == torch.float32 and model.head.bias is None
    rng = np.random.default_rng(2)
    trees = [
        tree(rng.integers(3, 90, 6).tolist(), *([*rng.integers(3, 90, 8).tolist(), END] for _ in range(2)))
        for _ in range(40)
    ]
    (batch,) = pack(trees, microbatch_tokens=10_000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = branch_scores(model, batch)
    assert scores.dtype == torch.float32
    assert len(scores.unique()) > 0.9 * len(scores), "a bf16 head would round scores together"
    usual = branch_scores(ScalarModel(without_lm_head(tiny(family, initializer_range=0.02))), batch)
    assert float(usual.std()) < 1
    assert float(bradley_terry(usual[::2], usual[1::2]).mean()) == pytest.approx(math.log(2), abs=0.1)


def test_the_lm_head_is_let_go_of() -> None:
    """A reward model of an untied model neither keeps in memory nor trains the LM head; the same with adapters."""
    plain = tiny("glm4")
    assert not plain.config.tie_word_embeddings
    lms = [weakref.ref(plain)]
    whole = ScalarModel(without_lm_head(plain))
    assert not any("lm_head" in name for name, _ in whole.named_parameters())
    peft = add_lora(tiny("glm4"), Lora(rank=2))
    lms.append(weakref.ref(causal_lm(peft)))
    model = ScalarModel(without_lm_head(peft))
    assert not any("lm_head" in name for name in model.state_dict())
    del plain
    gc.collect()
    assert [lm() for lm in lms] == [None, None]
    assert all("lora_" in name or name == "head.weight" for name in trainable_parameters(model))


# Folders


def trained(tmp_path: Path, kind: str) -> tuple[ScalarModel, Model, Path]:
    """A reward model with weights moved as training moves them, saved: (the model in memory, its base, its folder)."""
    base = save_tiny(
        tmp_path / "base", kind if kind in ("glm4", "gpt2") else "llama", glm4() if kind == "glm4" else chatml()
    )
    encoder = load_encoder(base)
    if kind == "lora on lora":
        policy = add_lora(load_policy(base), Lora(rank=3, target_modules=["q_proj", "down_proj"]))
        _move(policy)
        save_policy(policy, encoder, tmp_path / "policy", base=base)
        base = Model(path=str(tmp_path / "policy"))
    backbone = without_lm_head(load_policy(base))
    model = ScalarModel(add_lora(backbone, LORA) if kind in ("lora", "lora on lora") else backbone)
    _move(model)
    save_scalar(model.eval(), encoder, tmp_path / "out", base=base, scores=STATS, save_merged=kind == "lora")
    return model, base, tmp_path / "out"


def _move(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter += 0.05 * torch.randn_like(parameter)


FRESH = """
import json, sys
import numpy as np
from align.data.tree import Branch, Tree
from align.models.scalar.heads import load_scalar, score_trees
from align.recipe.schema import Model
def branch(ids):
    return Branch(np.array(ids, np.int32), np.ones(len(ids), bool))
trees = [Tree("", np.array(trunk, np.int32), tuple(map(branch, branches))) for trunk, branches in json.load(sys.stdin)]
for folder in sys.argv[1:]:
    model = load_scalar(Model(path=folder))
    assert not model.training
    print(json.dumps(score_trees(model, trees, microbatch_tokens=64, layout="tree", pad_id=0)))
"""


def test_a_fresh_process_gives_the_same_scores(tmp_path: Path) -> None:
    """Full, LoRA, and to rounding the merged copy and an adapter joined with its policy's."""
    drawn = random_trees(np.random.default_rng(1), [2, 1, 3])
    trees = [
        replace(t, branches=tuple(Branch(b.ids, np.ones(len(b.ids), dtype=bool)) for b in t.branches)) for t in drawn
    ]
    folders, expected = [], []
    for kind in ("full", "glm4", "gpt2", "lora", "lora on lora"):
        model, _, out = trained(tmp_path / kind, kind)
        for folder in [out, out / "merged"] if kind == "lora" else [out]:
            folders.append(str(folder))
            expected.append(flat(score_trees(model, trees, microbatch_tokens=64, layout="tree", pad_id=0)))
    text = json.dumps([[t.trunk.tolist(), [b.ids.tolist() for b in t.branches]] for t in trees])
    done = subprocess.run([sys.executable, "-c", FRESH, *folders], input=text, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for folder, line, scores in zip(folders, done.stdout.splitlines(), expected, strict=True):
        assert flat(json.loads(line)) == pytest.approx(scores, abs=1e-6 if folder in folders[:4] else 1e-5), folder


def test_the_adapter_is_of_the_first_policys_base(tmp_path: Path) -> None:
    """Joined with the policy's own adapter, as one adapter of the original base, which is all that has to be kept."""
    _, _, out = trained(tmp_path, "lora on lora")
    assert json.loads((out / "align.json").read_text())["base"]["path"] == str(tmp_path / "base")
    again = load_scalar(Model(path=str(out)))
    assert START in again.backbone.peft_config and len(again.backbone.peft_config) == 1  # type: ignore[union-attr, arg-type]


def test_a_plain_language_model_is_no_reward_model(tmp_path: Path) -> None:
    """A folder or an adapter without a head is refused, never given a random one; and the other way round."""
    base = save_tiny(tmp_path / "base")
    with pytest.raises(InputError, match=r"base: no reward_head.safetensors, so this is not a reward model"):
        load_scalar(base)
    save_policy(add_lora(load_policy(base), LORA), load_encoder(base), tmp_path / "adapter", base=base)
    with pytest.raises(InputError, match="not a reward model"):
        load_scalar(Model(path=str(tmp_path / "adapter")))
    with pytest.raises(InputError, match="not a reward model"):
        load_scalar(Model(path=str(tmp_path / "model.gguf")))
    for kind in ("full", "lora"):
        _, _, out = trained(tmp_path / kind, kind)
        for folder in [out, out / "merged"] if kind == "lora" else [out]:
            with pytest.raises(InputError, match="a reward model; a language model is wanted here"):
                load_policy(Model(path=str(folder)))


def test_a_lost_or_damaged_head_is_an_error(tmp_path: Path) -> None:
    _, _, out = trained(tmp_path, "full")
    head = out / "reward_head.safetensors"
    before = model_digest(out)
    content = head.read_bytes()
    head.write_bytes(content[:-4] + bytes(4))
    assert model_digest(out) != before, "the head is part of the model's identity"
    head.write_bytes(content[:-4])
    with pytest.raises(InputError, match=r"reward_head.safetensors: cannot be loaded"):
        load_scalar(Model(path=str(out)))
    head.unlink()
    with pytest.raises(InputError, match="not a reward model"):
        load_scalar(Model(path=str(out)))


def test_the_folder_carries_template_and_statistics(tmp_path: Path) -> None:
    """Digest of tokenizer and template, stop ids, mean and spread."""
    _, base, out = trained(tmp_path, "full")
    notes = score_notes(Model(path=str(out)))
    assert notes.stats == STATS and notes.layout == "tree"
    assert notes.encoder == load_encoder(base).digest == load_encoder(Model(path=str(out))).digest
    assert json.loads((out / "align.json").read_text())["stop_ids"] == list(load_encoder(base).stop_ids)
    assert not list(out.glob("*.bin")) and not list(out.glob("*.pt"))


def test_statistics_normalise_once() -> None:
    """Mean 0 and standard deviation 1 on the scores they are of; normalised twice is another thing."""
    scores = np.random.default_rng(0).normal(3, 2, 500)
    stats = ScoreStats.of(scores)
    once = stats.normalise(scores)
    assert float(once.mean()) == pytest.approx(0, abs=1e-12) and float(once.std()) == pytest.approx(1, abs=1e-12)
    assert abs(float(stats.normalise(once).mean())) > 0.5
    assert stats.count == 500
    assert ScoreStats.of([1.0, 1.0]).normalise(2.0) == 1.0


def test_an_adapter_may_be_trained_on_a_reward_model(tmp_path: Path) -> None:
    """As PPO's value model: it starts at the reward model's scores, and its adapter is of the reward model."""
    _, _, out = trained(tmp_path, "full")
    start = load_scalar(Model(path=str(out)))
    value = ScalarModel(add_lora(load_backbone(Model(path=str(out))), LORA)).eval()
    value.head.load_state_dict(start.head.state_dict())
    trees = random_trees(np.random.default_rng(1), [2, 1])
    settings: dict[str, Any] = {"microbatch_tokens": 64, "layout": "tree", "pad_id": 0}
    assert score_trees(value, trees, **settings) == score_trees(start, trees, **settings)
    _move(value)
    save_scalar(value, load_encoder(Model(path=str(out))), tmp_path / "value", base=Model(path=str(out)), scores=STATS)
    again = load_scalar(Model(path=str(tmp_path / "value")))
    assert flat(score_trees(again, trees, **settings)) == pytest.approx(
        flat(score_trees(value, trees, **settings)), abs=1e-6
    )


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    model = scalar()
    (batch,) = pack(random_trees(np.random.default_rng(0), [2, 2]), microbatch_tokens=1000)
    branch_scores(model.train(), batch).sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    branch_scores(model, batch).sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, plain[name], atol=1e-6, rtol=0)
