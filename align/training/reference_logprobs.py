"""Log-probs of the reference, the policy with which the stage started. Computed once, before the first step.

The key of a cached result contains everything that the result depends on: the digest of the weights in memory (with
adapters, so that a policy changed after loading has another key), the encoded data (whose digest covers tokenizer,
template and lengths), and the precision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from align import sealed
from align.batching.batch import Batch
from align.functional.segments import segment_sum
from align.models.compute.stream import logprobs_in_groups
from align.models.placement import WHOLE
from align.training.launch import Ranks


class ReferenceLogprobs:
    """Log-probs of every branch of every tree under the reference, summed over its tokens: fp32, looked up by (tree,
    branch)."""

    def __init__(self, sums: Tensor, first_branch: Tensor) -> None:
        self._sums, self._first_branch = sums, first_branch  # [branches of all trees], [trees]

    def __call__(self, batch: Batch) -> Tensor:
        """Summed reference log-probs of a batch's branches, fp32 [B]."""
        device = batch.branch.device
        # Once for all batches: 4 bytes for each branch of the data.
        self._sums, self._first_branch = self._sums.to(device), self._first_branch.to(device)
        trees = torch.tensor(batch.tree_index, dtype=torch.int64, device=device)[batch.branch_tree]
        return self._sums[self._first_branch[trees] + batch.branch_slot]


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, types and bytes of all parameters and persistent buffers, as they are in memory."""
    digest = hashlib.sha256()
    for name, value in sorted(WHOLE.full_state(model).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        content: Any = value.contiguous().view(torch.uint8).cpu().numpy()
        digest.update(content)
    return digest.hexdigest()


def reference_for(
    model: nn.Module,
    batches: Iterable[Batch],
    branches: list[int],
    *,
    key: str,
    cache: Path,
    ranks: Ranks,
    autocast: AbstractContextManager[None],
    own_attention: bool,
    microbatch_tokens: int,
) -> ReferenceLogprobs:
    """Compute the reference log-probs of this process's ``batches``, share them with all, and keep them under ``key``.

    Args:
        model: the starting policy; must not have been trained yet.
        batches: this process's share of all trees; ``tree_index`` are tree numbers.
        branches: number of branches of every tree.
        key: identifies everything that the result depends on.
        cache: folder for cached results.
        microbatch_tokens: limit of a micro-batch in training. Larger trees are computed in groups there, and therefore
            here too; with the same arithmetic the first DPO loss is exactly ln 2.
    """
    first = torch.tensor([0, *branches]).cumsum(0)
    path = cache / f"{key}.safetensors"
    if ranks.broadcast_object(ranks.first and sealed.find(path, key) is not None):
        return ReferenceLogprobs(load_file(path)["sums"], first[:-1])
    sums = torch.full((int(first[-1]),), torch.nan)
    training = model.training
    model.eval()
    with torch.no_grad(), autocast:
        for batch in batches:
            logprobs = logprobs_in_groups(model, batch, microbatch_tokens, own_attention=own_attention)
            of_branches = segment_sum(logprobs, batch.branch.to(logprobs.device), batch.num_branches)
            trees = torch.tensor(batch.tree_index, dtype=torch.int64)[batch.branch_tree]
            sums[first[trees] + batch.branch_slot] = of_branches.cpu()
    model.train(training)
    for part in ranks.gather(sums):
        sums = torch.where(sums.isnan(), part, sums)
    if sums.isnan().any():
        raise RuntimeError("a tree was in no batch, so it has no reference log-probs")
    if ranks.first:
        sealed.keep(path, save({"sums": sums}), key)
    ranks.barrier()
    return ReferenceLogprobs(sums, first[:-1])
