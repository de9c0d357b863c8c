"""Rollouts with ``generate`` of transformers: slow, but log-probs are computed by the trainer's code and equal the
trainer's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from align.data.chat.encoder import Encoder
from align.models.adapters import unwrap
from align.models.generate import BATCH, answer
from align.models.load import load_policy
from align.models.placement import WHOLE, parameters_of
from align.recipe.blocks.rollout import TransformersRollout
from align.rollout.engine import Sample, SampledPolicy, Sampling, WeightSource, device_here
from align.rollout.limits import require_room
from align.rollout.sync import policy_logprobs


def opened(rollout: TransformersRollout, policy: SampledPolicy) -> TransformersEngine:
    """An engine on the model in training, or on one that is loaded for it."""
    model = policy.live
    if model is None:
        model = load_policy(policy.model, cache=policy.cache, device=torch.device(device_here()))
    return TransformersEngine(model, policy.encoder, max_length=policy.max_length, shared=policy.live is not None)


class TransformersEngine:
    """Samples from ``model`` itself: the model in training, or one that was loaded for sampling (``shared=False``).

    ``max_length`` bounds a prompt with its answer, in tokens.
    """

    together = BATCH
    """The batch size of generation."""

    def __init__(self, model: nn.Module, encoder: Encoder, *, max_length: int, shared: bool) -> None:
        self._model, self._encoder, self._max_length, self._shared, self._version = (
            model,
            encoder,
            max_length,
            shared,
            0,
        )

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Sample]]:
        """See :class:`align.rollout.engine.RolloutEngine`."""
        require_room(prompts, sampling.max_new_tokens, self._max_length)
        sampled = answer(
            self._model,
            self._encoder,
            [prompt for prompt in prompts for _ in range(sampling.n)],
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
        )
        grouped = [
            [self._completion(ids) for ids in sampled[p * sampling.n : (p + 1) * sampling.n]]
            for p in range(len(prompts))
        ]
        return self._with_logprobs(prompts, grouped, sampling) if prompts else []

    def _completion(self, ids: list[int]) -> Sample:
        return Sample(
            tuple(ids), None, "stop" if ids and ids[-1] in self._encoder.stop_ids else "length", self._version
        )

    def _with_logprobs(
        self, prompts: Sequence[Sequence[int]], answers: list[list[Sample]], sampling: Sampling
    ) -> list[list[Sample]]:
        # For greedy choices the log-probs are those at temperature 1; with top-p or top-k they are the policy's, not
        # those of the truncated distribution.
        temperature = sampling.temperature if sampling.temperature > 0 else 1.0
        logprobs = iter(policy_logprobs(self._model, prompts, answers, temperature=temperature))
        return [
            [Sample(c.ids, tuple(next(logprobs).tolist()), c.finish_reason, c.version) for c in completions]
            for completions in answers
        ]

    def load_weights(self, weights: WeightSource) -> None:
        """Copy the weights into the model, unless it is the model in training itself."""
        if not self._shared:
            own = parameters_of(unwrap(self._model))
            for name, tensor in weights:
                if name in own:  # a tied LM head is sent under two names
                    WHOLE.load({name: own[name]}, {name: tensor})
        self._version = weights.version

    def close(self) -> None:
        """Nothing to free: the model is the caller's."""
