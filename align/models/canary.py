"""A check before training: does this package's forward pass give the model's own log-probs?

Models differ in what they do around attention and to their logits, and new ones keep coming. A few short forward passes
at the start of a stage find any difference, whatever its cause; a list of known models would miss new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from align.batching.tree import Layout, build
from align.data.tree import Branch, Tree
from align.errors import InputError
from align.models.compute.forward import batch_logprobs, causal_lm, hidden_states, own_attention_name

_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.5}
"""Largest difference in nats that is put down to rounding, with some room. A wrong mask or scale makes a larger one."""


@torch.no_grad()
def require_own_logprobs(model: nn.Module, ids: Sequence[int], layout: Layout) -> None:
    """Compare the log-probs of a small tree of ``ids`` (at least six) with those of the model's plain forward passes,
    path by path.

    Raises:
        InputError: they differ by more than rounding, so training would use other probabilities than the model's.
    """
    lm: Any = causal_lm(model)
    training = model.training
    model.eval()
    trunk, first, second = (np.array(part, dtype=np.int32) for part in (ids[:2], ids[2:], ids[:1:-1]))
    tree = Tree("canary", trunk, tuple(Branch(part, np.ones(len(part), dtype=np.bool_)) for part in (first, second)))
    # The second copy of the tree shows whether tokens of the first are visible to it
    batch = build([tree, tree], [0, 1], layout=layout).to(lm.device)
    ours = batch_logprobs(model, batch, own_attention=layout == "padded")
    lm.set_attn_implementation(own_attention_name(lm))
    expected = torch.cat([_path_logprobs(lm, trunk, branch) for branch in (first, second)] * 2)
    model.train(training)
    difference = float((ours - expected).abs().max())
    if not difference <= _TOLERANCE.get(lm.dtype, 0.5):
        raise InputError(
            f"{type(lm).__name__}: log-probs in layout {layout} differ from the model's own by {difference:.2g} nats",
            hint="set train.layout: padded" if layout != "padded" else "this kind of model is not supported",
        )


@torch.no_grad()
def require_own_states(backbone: nn.Module, ids: Sequence[int], layout: Layout) -> None:
    """Like :func:`require_own_logprobs` for a transformer without LM head: compares last hidden states instead of
    log-probs.

    Raises:
        InputError: they differ by more than rounding, so scores would differ from the model's.
    """
    inner: Any = causal_lm(backbone)
    trunk, first, second = (np.array(part, dtype=np.int32) for part in (ids[:2], ids[2:], ids[:1:-1]))
    tree = Tree("canary", trunk, tuple(Branch(part, np.ones(len(part), dtype=np.bool_)) for part in (first, second)))
    batch = build([tree, tree], [0, 1], layout=layout).to(inner.device)
    training = backbone.training
    backbone.eval()
    ours = hidden_states(backbone, batch, own_attention=layout == "padded")[batch.targets].float()
    inner.set_attn_implementation(own_attention_name(inner))
    paths = [torch.tensor(np.concatenate([trunk, branch]), device=inner.device).long() for branch in (first, second)]
    expected = torch.cat(
        [inner(path[None], use_cache=False).last_hidden_state[0, len(trunk) :].float() for path in paths] * 2
    )
    backbone.train(training)
    difference = float((ours - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    if not difference <= _TOLERANCE.get(inner.dtype, 0.5):
        raise InputError(
            f"{type(inner).__name__}: states in layout {layout} differ from the model's own by {difference:.2g}",
            hint="set train.layout: padded" if layout != "padded" else "this kind of model is not supported",
        )


def _path_logprobs(lm: Any, trunk: np.ndarray, branch: np.ndarray) -> Tensor:
    """Log-probs of a completion by the model's own forward pass, in a batch of one."""
    path = torch.tensor(np.concatenate([trunk, branch]), device=lm.device).long()
    logits = lm(path[None], use_cache=False).logits[0, len(trunk) - 1 : -1].float()
    logprobs: Tensor = logits.log_softmax(-1).gather(1, path[len(trunk) :, None]).squeeze(1)
    return logprobs
