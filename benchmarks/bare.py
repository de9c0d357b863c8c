"""The floor: forward, backward, clip and AdamW, with nothing around them.

The unique tokens of the trees are laid end to end in rows, packed like ours, and the model's plain causal attention
runs over a whole row: rows see each other, so this is no training step that anybody wants, only what its arithmetic
costs. The loss is the model's own, which projects every position to the vocabulary. Rows of 512 tokens: the fastest
here (1024: 3 % more, 2048: 10 % more, in the same trial).
"""

from __future__ import annotations

from typing import Any

from benchmarks.harness import Contender, Setting, Work
from benchmarks.measure import Recorder
from benchmarks.model import BETAS, EPSILON, LEARNING_RATE, MAX_GRAD_NORM, policy

ROWS = (512,)


def _run(work: Work, setting: Setting, recorder: Recorder) -> None:
    import torch
    from torch.nn.utils import clip_grad_norm_

    from align.batching.tree import pack

    model = policy()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, BETAS, EPSILON, weight_decay=0.0, fused=True)
    for step in work.steps:
        batches = [
            b.to(model.device)
            for b in pack([work.trees[i] for i in step], microbatch_tokens=setting["microbatch_tokens"])
        ]
        count = sum(batch.num_targets for batch in batches)
        recorder.begin()
        for batch in batches:
            part = _own_loss(model, batch, count)
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


BARE = Contender(
    "bare",
    "forward and backward over the same unique tokens, plain causal attention, the model's own loss, the same AdamW"
    " step",
    tuple({"microbatch_tokens": tokens} for tokens in ROWS),
    _run,
    same_loss=False,
)
