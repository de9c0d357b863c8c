"""Rollouts on vLLM inside this process. The trainer's random state, threads, process groups and compiler settings are
restored after every call.

vLLM packs the weights of linear layers when it loads them, and packs them again at every
:meth:`VllmEngine.load_weights`. Afterwards each of its tensors is compared with the one that was sent, by its product
with a fixed vector, so that a tensor which was not updated is found at once (vLLM 0.32 keeps the old LM head of a tied
model unless the head is sent under its own name).
"""

from __future__ import annotations

import gc
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch.distributed.distributed_c10d import GroupMember

from align.errors import EnvironmentFault, InputError
from align.rollout.engine import Sample, Sampling, WeightSource
from align.rollout.limits import require_room
from align.rollout.weight_check import Arrived

_QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's core in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "GLOO_SOCKET_IFNAME": "lo",
}
"""Environment variables that are set before vLLM is imported, unless the user has set them."""


@dataclass(frozen=True)
class VllmSettings:
    """How vLLM serves a model."""

    stop_ids: Sequence[int]
    """The ids that end an answer."""
    vocabulary: int
    """Ids from here on have no token, and are never sampled."""
    dtype: Literal["fp32", "bf16"]
    max_length: int
    """Longest prompt with its answer, in tokens."""
    cache_bytes: int
    """Size of the key-value cache."""
    max_sequences: int
    """Number of answers that are sampled at the same time."""


class VllmEngine:
    """Samples with vLLM from the model in ``folder`` until :meth:`load_weights` brings others.

    Args:
        folder: configuration and weights of a whole model (no adapter).
        alive: called after every step of sampling.

    Raises:
        InputError: this process is one of several of a run.
        EnvironmentFault: vLLM does not start with this model on this machine, or this process already has a vLLM
            engine, with which it would share process groups.
    """

    in_use: ClassVar[bool] = False
    """Does this process have one?"""

    def __init__(self, folder: Path, settings: VllmSettings, *, alive: Callable[[], None] = lambda: None) -> None:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        self.together = settings.max_sequences
        self._stop_ids, self._max_length, self._version, self._alive = (
            list(settings.stop_ids),
            settings.max_length,
            0,
            alive,
        )
        self._group: Any = None  # vLLM's default process group, while vLLM is not running
        self._llm: Any = None
        if torch.distributed.is_initialized():
            # Leaving vLLM's process group, at the end, shuts down all that this process is in.
            raise InputError(
                "rollout.own_process: false, and the run has several processes", hint="leave own_process out"
            )
        if VllmEngine.in_use:
            raise EnvironmentFault(
                "there is a vLLM engine in this process already", hint="set rollout.own_process: true"
            )
        self._closed, VllmEngine.in_use = False, True
        arguments: dict[str, Any] = {
            "model": str(folder),
            "skip_tokenizer_init": True,
            "trust_remote_code": False,
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[settings.dtype],
            "max_model_len": settings.max_length,
            "max_num_seqs": settings.max_sequences,
            "kv_cache_memory_bytes": settings.cache_bytes,
            "enforce_eager": not torch.cuda.is_available(),
            # Log-probs of the distribution that is sampled from, with the temperature
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # without the model's sampling defaults
            "seed": 0,
            "use_tqdm_on_load": False,
        }
        if torch.cuda.is_available():
            arguments["gpu_memory_utilization"] = _free_share()
        try:
            with self._at_work(), _quietly():
                from vllm import LLM

                self._llm = LLM(**arguments)
                config = self._llm.llm_engine.model_config.hf_config.get_text_config()
        except (ValueError, RuntimeError, AssertionError, ImportError, OSError) as error:
            self.close()
            hint = "lower rollout.cache_gb or rollout.max_sequences, or set rollout.engine: transformers"
            raise EnvironmentFault(f"vLLM does not start with {folder}: {_reason(error)}", hint=hint) from error
        self._allowed = list(range(settings.vocabulary)) if settings.vocabulary < config.vocab_size else None

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Sample]]:
        """See :class:`align.rollout.engine.RolloutEngine`.

        There is one stream of random numbers for the whole call, so the samples of a prompt depend on all prompts of
        the call. (vLLM 0.32 cannot give each request its own seed on a CPU: chunked prefill fails there.)
        """
        require_room(prompts, sampling.max_new_tokens, self._max_length)
        if not prompts:
            return []
        with self._at_work():
            engine = self._llm.llm_engine
            # Cached prefixes of an earlier call would change which tokens are computed together, and with that the
            # order of the draws.
            self._llm.reset_prefix_cache()
            torch.manual_seed(sampling.seed)
            parameters = self._parameters(sampling)
            places = {}
            for p, prompt in enumerate(prompts):
                for s in range(sampling.n):
                    request = f"{p}.{s}"
                    places[request] = (p, s)
                    engine.add_request(request, {"prompt_token_ids": list(prompt)}, parameters)
            found: dict[tuple[int, int], Sample] = {}
            try:
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        if output.finished:
                            found[places[output.request_id]] = self._completion(output.outputs[0])
                    self._alive()
            except BaseException:
                engine.abort_request([request for request, place in places.items() if place not in found])
                raise
        return [[found[p, s] for s in range(sampling.n)] for p in range(len(prompts))]

    def _parameters(self, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=self._stop_ids,
            ignore_eos=True,  # only the template's stop ids end an answer
            allowed_token_ids=self._allowed,
            logprobs=0,  # of the sampled token only
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, output: Any) -> Sample:
        ids = tuple(output.token_ids)
        logprobs = tuple(float(entry[token].logprob) for token, entry in zip(ids, output.logprobs, strict=True))
        return Sample(ids, logprobs, "stop" if output.finish_reason == "stop" else "length", self._version)

    def load_weights(self, weights: WeightSource) -> None:
        """See :class:`align.rollout.engine.RolloutEngine`.

        Raises:
            TrainingFault: tensors of the engine differ from those that were sent; the message names them.
        """
        with self._at_work(), torch.no_grad():
            arrived = Arrived(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": arrived.seen(weights)})
            self._llm.reset_prefix_cache()  # it has keys and values of the old weights
            self._llm.apply_model(arrived.require)
        self._version = weights.version

    def close(self) -> None:
        """Shut the engine down and give its memory back; the default process group goes with it."""
        if self._closed:
            return
        self._closed, VllmEngine.in_use = True, False
        llm, self._llm = self._llm, None
        with self._at_work():
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
                del llm
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
        gc.collect()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """vLLM reseeds the global generators, replaces torch.set_num_threads and joins its own process group. Outside
        of this context all of these are as they were before."""
        generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        set_threads, threads, outer = torch.set_num_threads, torch.get_num_threads(), GroupMember.WORLD
        GroupMember.WORLD = self._group
        try:
            # On a CPU vLLM would compile small functions at their first use, which needs a C++ compiler and takes half
            # a minute.
            with torch._dynamo.config.patch(disable=not torch.cuda.is_available()):
                yield
        finally:
            self._group, GroupMember.WORLD = GroupMember.WORLD, outer
            torch.set_num_threads = set_threads
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            random.setstate(generators[0])
            np.random.set_state(generators[1])
            torch.set_rng_state(generators[2])
            if cuda is not None:
                torch.cuda.set_rng_state(cuda)


def _free_share() -> float:
    """The share of the GPU's memory that vLLM may count on: nearly all that is free.

    It refuses to start unless so much is free, before it looks at the size of the cache that it is given. Its default
    of 0.92 is never free beside a model in training.
    """
    free, total = torch.cuda.mem_get_info()
    return max(0.01, 0.95 * free / total)


@contextmanager
def _quietly() -> Iterator[None]:
    """Inside, stderr is discarded: vLLM's libraries write notes about this machine to it while they start, also from
    C++. Errors are raised as exceptions anyway."""
    with warnings.catch_warnings(), tempfile.TemporaryFile() as notes:
        warnings.simplefilter("ignore")
        stderr = os.dup(2)
        os.dup2(notes.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _reason(error: Exception) -> str:
    """The line of a library's message that gives the reason."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "rror, " in line), lines[0])[:300]
