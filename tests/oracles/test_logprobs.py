"""The log-prob function and the road to it through a model, against float64 formulas, transformers' own logits and
TRL's SFTTrainer."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from align.batching.tree import pack
from align.data.tree import Tree
from align.functional.logprobs import token_logprobs
from align.functional.losses import token_nll
from align.models.compute.forward import batch_logprobs
from tests.support.tiny import (
    CONFIGS,
    UNSERVED,
    VOCAB,
    branch_logprobs,
    gradients,
    ids_to,
    nested_tree,
    random_trees,
    tiny,
)

N, H, V = 7, 5, 11


def reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    logit_softcap: float | None,
) -> Tensor:
    """Full logits in float64, in the order in which Cohere scales and Gemma caps them, then log_softmax and gather."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return torch.log_softmax(logits / temperature, dim=-1)[torch.arange(len(targets)), targets]


def problem(
    dtype: torch.dtype = torch.float32, n: int = N, h: int = H, v: int = V
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias (leaves that want gradients), targets, and a weight per target to add the log-probs up
    with."""
    rng = torch.Generator().manual_seed(3)
    leaves = [torch.randn(*shape, generator=rng).to(dtype).requires_grad_() for shape in [(n, h), (v, h), (v,)]]
    return *leaves, torch.randint(v, (n,), generator=rng), torch.randn(n, generator=rng)  # type: ignore[return-value]


PLAIN: dict[str, Any] = {"temperature": 1.0, "logit_scale": 1.0, "logit_softcap": None}
SETTINGS = [
    PLAIN,
    PLAIN | {"temperature": 0.7},
    PLAIN | {"temperature": 1.3},
    PLAIN | {"logit_scale": 0.25},
    PLAIN | {"logit_softcap": 2.0},
    {"temperature": 0.7, "logit_scale": 1.5, "logit_softcap": 2.0},
    {"temperature": 1.3, "logit_scale": 1.3, "logit_softcap": None},
]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, N])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_forward_and_gradient_equal_full_log_softmax(settings: dict[str, Any], chunk: int, with_bias: bool) -> None:
    """Temperature included. Every target has a weight of its own, so that a gradient of the wrong row cannot
    cancel."""
    hidden, weight, bias, targets, weights = problem()
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    ours = token_logprobs(hidden, weight, targets, bias=bias if with_bias else None, chunk_tokens=chunk, **settings)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = reference(exact_leaves[0], exact_leaves[1], targets, exact_leaves[2] if with_bias else None, **settings)

    assert ours.dtype == torch.float32
    assert_close(ours.double(), exact, atol=1e-5, rtol=0)
    got = torch.autograd.grad(ours @ weights, leaves)
    wanted = torch.autograd.grad(exact @ weights.double(), exact_leaves)
    for name, g, w in zip(("hidden", "weight", "bias"), got, wanted, strict=False):
        assert w.abs().max() > 0.01, name
        assert_close(g.double(), w, atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_temperature_divides_the_logits() -> None:
    """By hand: logits (2, 0) at temperature 0.5 are (4, 0), so the first token has log-prob -log(1 + e^-4) =
    -0.0181499."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[2.0], [0.0]])
    assert_close(
        token_logprobs(hidden, weight, torch.tensor([0]), temperature=0.5),
        torch.tensor([-0.0181499]),
        atol=1e-6,
        rtol=0,
    )


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature: float) -> None:
    hidden, weight, _, targets, _ = problem()
    with pytest.raises(ValueError, match="temperature must be positive"):
        token_logprobs(hidden, weight, targets, temperature=temperature)


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[5]], ids=["plain", "all"])
def test_bf16(settings: dict[str, Any]) -> None:
    """Bf16 inputs; everything after the matrix product is fp32.

    A logit rounded to bf16 (8 significant bits) is off by at most 2^-9 of itself, and a log-prob by twice the largest
    such error; that is also the relative error of a probability, and so of the gradient, whose factors are rounded once
    more (2^-8).
    """
    hidden, weight, bias, targets, weights = problem(torch.bfloat16, n=40, h=16, v=50)
    weight = (weight.detach() / 4).requires_grad_()
    ours = token_logprobs(hidden, weight, targets, bias=bias, chunk_tokens=16, **settings)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight, bias)]
    exact = reference(exact_leaves[0], exact_leaves[1], targets, exact_leaves[2], **settings)
    largest = (
        (exact_leaves[0] @ exact_leaves[1].T).abs().max().item() * settings["logit_scale"] / settings["temperature"]
    )

    assert ours.dtype == torch.float32
    tolerance = 2 * largest * 2**-9
    assert tolerance < 0.05
    assert_close(ours.double(), exact, atol=tolerance, rtol=0)
    got = torch.autograd.grad(ours @ weights, (hidden, weight, bias))
    wanted = torch.autograd.grad(exact @ weights.double(), exact_leaves)
    for g, w in zip(got, wanted, strict=True):
        assert g.dtype == torch.bfloat16
        assert_close(g.double(), w, atol=w.abs().max().item() * (tolerance + 2**-8), rtol=0)


def test_autocast_does_not_reach_inside() -> None:
    """fp32 hidden states under bf16 autocast: still the fp32 result, and fp32 gradients."""
    hidden, weight, _, targets, weights = problem()
    plain = token_logprobs(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = token_logprobs(hidden, weight, targets)
    assert torch.equal(plain, cast)
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(torch.autograd.grad(x @ weights, (hidden, weight)) for x in (plain, cast)), strict=True)
    )


def test_bf16_hidden_states_with_an_fp32_head() -> None:
    """Under autocast the hidden states are bf16 and the head is fp32: its gradient comes back in fp32."""
    hidden, weight, _, targets, weights = problem()
    lowered = hidden.detach().bfloat16().requires_grad_()
    ours = token_logprobs(lowered, weight, targets, chunk_tokens=2)
    exact = reference(lowered.detach().double(), weight.detach().bfloat16().double(), targets, None, **PLAIN)
    assert_close(ours.double(), exact, atol=0.05, rtol=0)
    assert [g.dtype for g in torch.autograd.grad(ours @ weights, (lowered, weight))] == [torch.bfloat16, torch.float32]


def test_frozen_head_gets_no_gradient() -> None:
    """LoRA: the head is frozen; the gradient of the hidden states is the same, and the head's is not computed."""
    hidden, weight, bias, targets, weights = problem()
    (wanted,) = torch.autograd.grad(token_logprobs(hidden, weight, targets, bias=bias) @ weights, hidden)
    frozen_weight, frozen_bias = weight.detach(), bias.detach()
    with LargestTensors() as made:
        (token_logprobs(hidden, frozen_weight, targets, bias=frozen_bias) @ weights).backward()
    assert torch.equal(hidden.grad, wanted)
    assert (V, H) not in made.shapes
    assert frozen_weight.grad is None and frozen_bias.grad is None


def test_no_targets() -> None:
    """A micro-batch of a rank that is short of examples: nothing to predict, gradients of zero and not None."""
    hidden, weight, _, _, _ = problem()
    ours = token_logprobs(hidden[:0], weight, torch.empty(0, dtype=torch.int64))
    assert ours.shape == (0,)
    assert all((g == 0).all() for g in torch.autograd.grad(ours.sum(), (hidden, weight)))


class LargestTensors(TorchDispatchMode):
    """Records the shape of every tensor that any operation makes while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.shapes.add(tuple(tensor.shape))
        return result

    @property
    def largest(self) -> int:
        return max(int(np.prod(shape)) for shape in self.shapes)


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[5]], ids=["plain", "all"])
def test_full_logits_never_exist(settings: dict[str, Any]) -> None:
    """Nothing that is made, forward or backward, is larger than one chunk of logits (or than the head itself)."""
    n, h, v, chunk = 200, 4, 300, 8
    hidden, weight, bias, targets, weights = problem(n=n, h=h, v=v)
    with LargestTensors() as made:
        logprobs = token_logprobs(hidden, weight, targets, bias=bias, chunk_tokens=chunk, **settings)
        assert (chunk, v) in made.shapes  # the recorder does see the logits
        made.shapes.clear()
        (logprobs @ weights).backward()
        assert (chunk, v) in made.shapes
    assert made.largest <= max(chunk * v, v * h) < n * v


def test_chunk_is_chosen_from_the_vocabulary() -> None:
    """By default at most 2^25 logits exist at once on CPU: 128 targets of a vocabulary of 2^18, not all 200."""
    hidden, weight = torch.randn(200, 1), torch.randn(2**18, 1)
    with LargestTensors() as made:
        token_logprobs(hidden, weight, torch.arange(200))
    assert made.largest == 2**25
    assert (128, 2**18) in made.shapes


def test_a_second_backward_pass_is_the_same() -> None:
    """The kept logits are used up by the first one."""
    hidden, weight, bias, targets, weights = problem()
    total = token_logprobs(hidden, weight, targets, bias=bias, chunk_tokens=3) @ weights
    first = torch.autograd.grad(total, (hidden, weight, bias), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(total, (hidden, weight, bias)), strict=True):
        assert_close(a, b, atol=0, rtol=0)


# Through a model


def by_transformers(model: Any, trees: list[Tree], *, temperature: float = 1.0) -> dict[tuple[int, int], Tensor]:
    """Log-probs of all targets from transformers' own logits: every path alone in a batch of one, no mask, no
    positions, plain causal."""
    found = {}
    for t, tree in enumerate(trees):
        for b, branch in enumerate(tree.branches):
            path = torch.tensor(ids_to(tree, b))
            logits = model(input_ids=path[None], use_cache=False).logits[0].double() / temperature
            places = len(path) - len(branch.ids) + np.flatnonzero(branch.mask)
            found[t, b] = torch.stack([torch.log_softmax(logits[place - 1], dim=-1)[path[place]] for place in places])
    return found


def weighted_sum(logprobs: dict[tuple[int, int], Tensor], seed: int = 0) -> Tensor:
    """Every target with a weight of its own, over the number of targets."""
    rng = torch.Generator().manual_seed(seed)
    flat = torch.cat([logprobs[key] for key in sorted(logprobs)])
    return flat @ torch.randn(len(flat), generator=rng).to(flat.dtype) / len(flat)


@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in UNSERVED])
def test_model_logprobs_equal_transformers(family: str) -> None:
    """Packed trees of every kind of model against its own logits, forward and the gradient of every
    parameter.

    Cohere, Granite and Gemma 2 change their logits after the head; Phi has a bias on it.
    """
    trees = random_trees(np.random.default_rng(5), [2, 1, 3])
    model = tiny(family)
    own = copy.deepcopy(model)
    own.set_attn_implementation("eager")
    (batch,) = pack(trees, microbatch_tokens=1000)
    ours, theirs = branch_logprobs(model, [batch], temperature=0.8), by_transformers(own, trees, temperature=0.8)

    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert_close(value.double(), theirs[key], atol=1e-5, rtol=0)
    got, wanted = gradients(model, weighted_sum(ours)), gradients(own, weighted_sum(theirs))
    assert max(g.abs().max().item() for g in wanted.values()) > 0.01
    for name, gradient in got.items():
        assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", ["llama", "glm4", "mistral_short_window", "gpt2"])
def test_branches_of_branches_equal_transformers(family: str) -> None:
    """In every layout and however they are packed: the log-probs are those of each path alone, a token that paths share
    counts once, in the loss and in the gradient of every parameter."""
    rng = np.random.default_rng(21)
    trees = [
        nested_tree(rng, [-1, 0, 0, 2, -1, 4, 5], name="deep"),
        nested_tree(rng, [-1, -1], name="flat"),
        nested_tree(rng, [-1, 0, 1], name="chain"),
    ]
    model = tiny(family)
    own = copy.deepcopy(model)
    own.set_attn_implementation("eager")
    theirs = by_transformers(own, trees)
    wanted = gradients(own, weighted_sum(theirs))
    for layout, padded in (("tree", False), ("packed", False), ("padded", False), ("padded", True)):
        for tokens in (1000, 16):
            batches = pack(trees, microbatch_tokens=tokens, layout=layout)
            ours = branch_logprobs(model, batches, own_attention=padded)
            assert ours.keys() == theirs.keys()
            assert sum(batch.num_targets for batch in batches) == sum(len(value) for value in theirs.values())
            for key, value in ours.items():
                assert_close(value.double(), theirs[key], atol=1e-5, rtol=0)
            for name, gradient in gradients(model, weighted_sum(ours)).items():
                assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def sft_rows() -> list[Tree]:
    """Supervised rows of unequal length; the masks have holes, as those of several turns have."""
    return random_trees(np.random.default_rng(9), [1] * 5, longest=12)


def test_sft_loss_is_an_explicit_gather() -> None:
    """The label of position t is token t + 1, shifted once. Written out as loops over the full logits."""
    model = tiny("llama")
    rows = sft_rows()
    (batch,) = pack(rows, microbatch_tokens=1000)
    loss = token_nll(batch_logprobs(model, batch)).sum() / batch.num_targets

    total, count = 0.0, 0
    own = copy.deepcopy(model)
    own.set_attn_implementation("eager")
    for row in rows:
        ids = [*row.trunk.tolist(), *row.branches[0].ids.tolist()]
        trained = [False] * len(row.trunk) + row.branches[0].mask.tolist()
        logits = own(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
        for t in range(len(ids) - 1):
            if trained[t + 1]:
                total += torch.logsumexp(logits[t], dim=0).item() - logits[t, ids[t + 1]].item()
                count += 1
    assert count == batch.num_targets
    assert loss.item() == pytest.approx(total / count, abs=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "padding-free"])
def test_sft_loss_and_gradient_equal_trl(packed: bool, tmp_path: Any) -> None:
    """The same rows through the collator and the loss of TRL 1.16's SFTTrainer."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="w2", pad_token="w0"
    )
    rows = sft_rows()
    data = [
        {
            "input_ids": [*row.trunk.tolist(), *row.branches[0].ids.tolist()],
            "completion_mask": [0] * len(row.trunk) + row.branches[0].mask.astype(int).tolist(),
        }
        for row in rows
    ]
    model = tiny("llama")
    theirs = copy.deepcopy(model)
    theirs.set_attn_implementation("sdpa")
    config = SFTConfig(
        output_dir=str(tmp_path),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        max_length=None,
        padding_free=packed,
        completion_only_loss=True,
    )
    trainer = SFTTrainer(model=theirs, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
    collated = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    theirs.train()
    their_loss = trainer.compute_loss(theirs, collated)

    (batch,) = pack(rows, microbatch_tokens=1000)
    assert batch.num_targets == (collated["labels"] != -100).sum()
    loss = token_nll(batch_logprobs(model, batch)).sum() / batch.num_targets
    assert loss.item() == pytest.approx(their_loss.item(), abs=1e-5)
    got, wanted = gradients(model, loss), gradients(theirs, their_loss)
    for name, gradient in got.items():
        assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-5)
