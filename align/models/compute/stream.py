"""Training on a tree that is larger than a micro-batch: every token is computed once, but the tree's activations are
never all in memory.

The trunk and its first branch are computed and kept. The other branches follow in groups: each attends to the trunk's
keys and values, its backward pass runs at once, and its activations are freed. The gradients of the groups with respect
to the trunk are added up; the backward passes of the first branch and of the trunk come last. Gradients are those of
the whole tree, and memory depends on the size of a group, not on the number of branches. This works for losses that are
a sum over branches, each compared with at most the first one: preference and reward model losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from align.batching.batch import ROOT, Batch, Span, TreeNode
from align.models.compute.attention import KeyValues, Trees
from align.models.compute.forward import batch_logprobs, causal_lm, hidden_states, project
from align.models.placement import device_of, in_forward

WHOLE = 2
"""A tree up to this many times the size of a micro-batch is computed as a whole."""
GROUP = 4
"""A group has at most the tokens of a micro-batch divided by this. It is smaller than a micro-batch because the
parameters' gradients are in memory as well."""


@dataclass(frozen=True)
class TreeParts:
    """A batch of one tree, split into its trunk, its first branch, and groups of the other branches."""

    trunk: Batch
    first: Batch
    groups: Sequence[Batch]

    def to(self, device: torch.device | str) -> TreeParts:
        """The same parts with their tensors on ``device``."""
        return TreeParts(self.trunk.to(device), self.first.to(device), [group.to(device) for group in self.groups])


def split(batch: Batch, tokens: int) -> TreeParts | None:
    """Split a batch of one tree. ``tokens`` is the limit of a micro-batch; a group has at most ``tokens / GROUP``
    tokens, or is a single branch.

    None when the batch is small enough, or is not one trunk with several branches. Where ``batch.groups`` asks for more
    groups than its size needs, the others have a single token and no target.
    """
    if not batch.groups and not group_count(batch, tokens):
        return None
    span = batch.rows[0][0]
    cut, start = [], span.trunk
    for group in [[0], *_groups(span.branches, tokens)]:
        lengths = tuple(span.branches[b] for b in group)
        cut.append(
            _part(
                batch, group, start, start + sum(lengths), Span(0, tuple(TreeNode(length, ROOT) for length in lengths))
            )
        )
        start += sum(lengths)
    nothing = _part(batch, [], 0, 1, Span(0, (TreeNode(1, ROOT),)))
    cut += [nothing] * (1 + batch.groups - len(cut))
    return TreeParts(_part(batch, [], 0, span.trunk, Span.of_branches(0, span.trunk, ())), cut[0], cut[1:])


def group_count(batch: Batch, tokens: int) -> int:
    """Into how many groups :func:`split` cuts a batch by its size; 0 when it is computed whole."""
    if (
        batch.num_tokens <= WHOLE * tokens
        or len(batch.rows) != 1
        or len(batch.rows[0]) != 1
        or not batch.rows[0][0].is_flat
        or len(batch.rows[0][0].branches) < 2
    ):
        return 0
    return len(_groups(batch.rows[0][0].branches, tokens))


def _groups(branches: Sequence[int], tokens: int) -> list[list[int]]:
    """Groups of the branches after the first one, by number; ``branches`` are the lengths of all."""
    groups: list[list[int]] = []
    room = 0
    for branch, length in enumerate(branches[1:], start=1):
        if not groups or length > room:
            groups.append([])
            room = tokens // GROUP
        groups[-1].append(branch)
        room -= length
    return groups


def held_at_once(trunk: int, branches: Sequence[int], tokens: int) -> int:
    """How many tokens of a tree have their activations in memory at the same time: all of them when the tree is
    computed as a whole; those of its trunk, first branch and largest group when it is computed in groups.

    Args:
        trunk, branches: lengths in tokens.
        tokens: ``microbatch_tokens``, which decides whether the tree is computed in groups.
    """
    whole = trunk + sum(branches)
    if whole <= WHOLE * tokens or len(branches) < 2:
        return whole
    return trunk + branches[0] + max(sum(branches[b] for b in group) for group in _groups(branches, tokens))


def _part(batch: Batch, branches: Sequence[int], start: int, end: int, span: Span) -> Batch:
    """A batch of some branches of a tree. A branch's first token is predicted from the trunk's last state, which is not
    in this batch: its source is then the index after the last token."""
    first, last = (branches[0], branches[-1] + 1) if branches else (0, 0)
    inside = (batch.branch >= first) & (batch.branch < last)
    sources = batch.sources[inside] - start
    return replace(
        batch,
        input_ids=batch.input_ids[:, start:end],
        position_ids=batch.position_ids[:, start:end],
        rows=((span,),),
        targets=batch.targets[inside] - start,
        sources=torch.where(sources < 0, end - start, sources),
        branch=batch.branch[inside] - first,
        branch_tree=batch.branch_tree[first:last],
        branch_slot=batch.branch_slot[first:last],
        margins=batch.margins[first:last],
        shares=None if batch.shares is None else batch.shares[first:last],
    )


class Stream:
    """The forward and backward pass of one split tree. First read ``logprobs`` of its first branch, then call
    :meth:`branches` for each group, and :meth:`backward` last."""

    def __init__(self, model: nn.Module, parts: TreeParts) -> None:
        self._model, self._parts = model, parts
        self.logprobs, self._embedded, *self._computed = in_forward(model, self._begin)
        """Log-probs of the first branch's targets, fp32 [N]; their backward pass is :meth:`backward`'s."""

    def _begin(self) -> tuple[Tensor, ...]:
        """What backward passes begin at: log-probs of the first branch, embeddings, and what was computed of the
        trunk."""
        model, parts = self._model, self._parts
        in_order = (parts.trunk, parts.first, *parts.groups)
        # Embeddings are looked up for the whole tree at once: every separate lookup would allocate a gradient as large
        # as the embedding matrix.
        embedded: Tensor = causal_lm(model).get_input_embeddings()(
            torch.cat([part.input_ids for part in in_order], dim=1)
        )
        inputs = embedded.detach().split_with_sizes([part.input_ids.shape[1] for part in in_order], dim=1)
        self._inputs = [part.requires_grad_(embedded.requires_grad) for part in inputs]
        kept: KeyValues = {}
        trees = Trees(parts.trunk.rows, parts.trunk.input_ids.device, keep=kept)
        hidden = hidden_states(model, parts.trunk, trees=trees, embedded=self._inputs[0])
        computed = [hidden[-1], *(part for pair in kept.values() for part in pair)]
        self._leaves = [part.detach().requires_grad_() for part in computed]
        keys_values = iter(self._leaves[1:])
        self._trunk = {layer: (next(keys_values), next(keys_values)) for layer in kept}
        return (self._logprobs(parts.first, self._inputs[1]), embedded, *computed)

    def branches(self, group: int) -> Tensor:
        """Log-probs of a group's targets, fp32 [N]. Their backward pass ends at the trunk's keys and values, where the
        gradient is kept for :meth:`backward`."""
        return in_forward(self._model, lambda: self._logprobs(self._parts.groups[group], self._inputs[2 + group]))

    def _logprobs(self, part: Batch, embedded: Tensor) -> Tensor:
        trees = Trees(part.rows, part.input_ids.device, trunk=self._trunk)
        hidden = hidden_states(self._model, part, trees=trees, embedded=embedded)
        return project(self._model, torch.cat([hidden, self._leaves[0][None]]), part)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of ``loss``, a function of :attr:`logprobs`, then that of the trunk with the gradients
        of all branches."""
        loss.backward()  # type: ignore[no-untyped-call]
        _backward(self._computed, [leaf.grad for leaf in self._leaves])
        if self._embedded.requires_grad:
            gradients = [torch.zeros_like(part) if part.grad is None else part.grad for part in self._inputs]
            self._embedded.backward(torch.cat(gradients, dim=1))  # type: ignore[no-untyped-call]


def _backward(tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    known = [(tensor, gradient) for tensor, gradient in zip(tensors, gradients, strict=True) if gradient is not None]
    torch.autograd.backward([tensor for tensor, _ in known], [gradient for _, gradient in known])


def logprobs_in_groups(model: nn.Module, batch: Batch, tokens: int, *, own_attention: bool) -> Tensor:
    """Log-probs of a batch's targets, fp32 [N], without gradient: computed exactly as in training, large trees in
    groups.

    ``batch`` lies on the CPU: it is cut there, and then moved to the model. Cutting it on a GPU would make the CPU
    wait.
    """
    device = device_of(model)
    with torch.no_grad():
        parts = None if own_attention else split(batch, tokens)
        if parts is None:
            return batch_logprobs(model, batch.to(device), own_attention=own_attention)
        stream = Stream(model, parts.to(device))
        return torch.cat([stream.logprobs, *(stream.branches(number) for number in range(len(parts.groups)))])
