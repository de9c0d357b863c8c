"""A tree that is larger than a micro-batch: computed in one pass, but never held as a whole.

The trunk and its first branch are computed and kept. The other branches follow in groups: each attends to the trunk's keys and values,
takes its own backward pass at once, and is forgotten. What the groups' gradients say about the trunk adds up, and the trunk's own backward
pass comes last. Nothing is computed twice, gradients are those of the whole tree, and memory follows the size of a group, however many
branches there are. A loss fits when it is a sum over branches, each compared at most with the first one: preferences, rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from align.batching.batch import Batch, Span
from align.models.attention import KeyValues, Trees
from align.models.forward import batch_logprobs, hidden_states, project


def split(batch: Batch, tokens: int) -> tuple[Batch, list[Batch]] | None:
    """A batch of one tree as (trunk and first branch, groups of the other branches), each group of at most ``tokens``.

    What is held at a time is the first part and one group. A group has one branch at least. None when the batch is small enough, or is
    not one tree with several branches.
    """
    if batch.num_tokens <= tokens or len(batch.rows) != 1 or len(batch.rows[0]) != 1 or len(batch.rows[0][0].branches) < 2:
        return None
    span = batch.rows[0][0]
    first = span.trunk + span.branches[0]
    groups: list[list[int]] = []
    room = 0
    for branch, length in enumerate(span.branches[1:], start=1):
        if not groups or length > room:
            groups.append([])
            room = tokens
        groups[-1].append(branch)
        room -= length
    head = _part(batch, [0], 0, first, Span(0, span.trunk, span.branches[:1]))
    rest, start = [], first
    for group in groups:
        lengths = tuple(span.branches[b] for b in group)
        rest.append(_part(batch, group, start, start + sum(lengths), Span(0, 0, lengths)))
        start += sum(lengths)
    return head, rest


def _part(batch: Batch, branches: Sequence[int], start: int, end: int, span: Span) -> Batch:
    """Some branches of a batch of one tree. Where a first token is predicted from the trunk, its source is the place after the last."""
    inside = (batch.branch >= branches[0]) & (batch.branch <= branches[-1])
    sources = batch.sources[inside] - start
    return replace(
        batch,
        input_ids=batch.input_ids[:, start:end],
        position_ids=batch.position_ids[:, start:end],
        rows=((span,),),
        targets=batch.targets[inside] - start,
        sources=torch.where(sources < 0, end - start, sources),
        branch=batch.branch[inside] - branches[0],
        branch_tree=batch.branch_tree[branches[0] : branches[-1] + 1],
        branch_slot=batch.branch_slot[branches[0] : branches[-1] + 1],
    )


class Stream:
    """One tree on its way through the model: ``logprobs`` of its first branch, then :meth:`branches`, at last :meth:`backward`."""

    def __init__(self, model: nn.Module, head: Batch) -> None:
        self._model = model
        kept: KeyValues = {}
        hidden = hidden_states(model, head, trees=Trees(head.rows, head.input_ids.device, keep=kept))
        self.logprobs = project(model, hidden, head)
        """Log-probs of the first branch's targets, fp32 [N]; their backward pass is :meth:`backward`'s."""
        last = hidden[head.rows[0][0].trunk - 1]
        self._computed = [last, *(part for pair in kept.values() for part in pair)]
        self._leaves = [part.detach().requires_grad_() for part in self._computed]
        keys_values = iter(self._leaves[1:])
        self._trunk = {layer: (next(keys_values), next(keys_values)) for layer in kept}

    def branches(self, group: Batch) -> Tensor:
        """Log-probs of a group's targets, fp32 [N]. Their backward pass ends at the trunk, where it is remembered."""
        hidden = hidden_states(self._model, group, trees=Trees(group.rows, group.input_ids.device, trunk=self._trunk))
        return project(self._model, torch.cat([hidden, self._leaves[0][None]]), group)

    def backward(self, loss: Tensor) -> None:
        """The backward pass of ``loss``, a function of :attr:`logprobs`, together with what the groups left at the trunk."""
        roots = [(part, leaf.grad) for part, leaf in zip(self._computed, self._leaves, strict=True) if leaf.grad is not None]
        torch.autograd.backward([loss, *(part for part, _ in roots)], [None, *(gradient for _, gradient in roots)])


def logprobs_in_groups(model: nn.Module, batch: Batch, tokens: int, *, own_attention: bool = False) -> Tensor:
    """Log-probs of a batch's targets, fp32 [N], without gradient: exactly those that training sees, large trees in groups."""
    with torch.no_grad():
        parts = None if own_attention else split(batch, tokens)
        if parts is None:
            return batch_logprobs(model, batch, own_attention=own_attention)
        stream = Stream(model, parts[0])
        return torch.cat([stream.logprobs, *(stream.branches(group) for group in parts[1])])
