"""The floor: forward, backward, clip and AdamW, with nothing around them.

The unique tokens of the trees are laid end to end in rows, packed like ours, and the model's plain causal attention runs over a whole row:
rows see each other, so this is no training step that anybody wants, only what its arithmetic costs. Two heads: ``all`` is the model's own
loss, which projects every position to the vocabulary; ``targets`` projects only the positions that predict a target.
"""

from __future__ import annotations

from typing import Any

from benchmarks.harness import Contender, Setting, Work
from benchmarks.measure import Recorder
from benchmarks.model import BETAS, EPSILON, LEARNING_RATE, MAX_GRAD_NORM, policy

ROWS = (1024, 512, 2048)


def _run(work: Work, setting: Setting, recorder: Recorder) -> None:
    import torch
    from torch.nn.utils import clip_grad_norm_

    from align.batching.tree import pack

    model = policy()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, BETAS, EPSILON, weight_decay=0.0, fused=True)
    loss = {"all": _own_loss, "targets": _target_loss}[setting["head"]]
    for step in work.steps:
        batches = [b.to(model.device) for b in pack([work.trees[i] for i in step], microbatch_tokens=setting["microbatch_tokens"])]
        count = sum(batch.num_targets for batch in batches)
        recorder.begin()
        for batch in batches:
            part = loss(model, batch, count)
            part.backward()
            recorder.add(part.detach())
        clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recorder.end()


def _own_loss(model: Any, batch: Any, count: int) -> Any:
    labels = batch.input_ids.new_full(batch.input_ids.shape, -100)
    labels.view(-1)[batch.targets] = batch.target_ids
    return model(input_ids=batch.input_ids, labels=labels, num_items_in_batch=count, use_cache=False).loss


def _target_loss(model: Any, batch: Any, count: int) -> Any:
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=batch.input_ids, logits_to_keep=batch.sources, use_cache=False).logits
    return cross_entropy(logits[0].float(), batch.target_ids, reduction="sum") / count


BARE = Contender(
    "bare",
    "forward and backward over the same unique tokens, plain causal attention, the model's own loss, the same AdamW step",
    tuple({"microbatch_tokens": tokens, "head": "all"} for tokens in ROWS),
    _run,
    same_loss=False,
)
BARE_TARGETS = Contender(
    "bare, targets",
    "the same, but only positions that predict a target are projected to the vocabulary",
    tuple({"microbatch_tokens": tokens, "head": "targets"} for tokens in ROWS),
    _run,
    same_loss=False,
)
