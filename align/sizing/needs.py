"""Estimates of the memory, disk and time of a training stage, each as a sum of terms that can be checked one by one.

They describe this package's code: the trainer's copies, and what a step takes beside them when it takes most. A GB is
10^9 bytes. Symbols as in :mod:`align.sizing.shapes`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from align.recipe.schema import Lora, Train
from align.sizing.moments import Pass, Term, moments, trained_parameters, width_of
from align.sizing.shapes import Shape

_RUNTIME = {"cpu": 0.55e9, "cuda": 0.8e9}
"""Bytes of the loaded Python, torch and transformers; on a GPU, of the CUDA context and its kernels."""
_SLACK = {"cpu": 0.15, "cuda": 0.10}
"""Memory that allocators hold without using it, as a share of the rest. Measured on a CPU (glibc): 7 to 21 %; none with
gradient checkpointing and of divided models, where freed blocks are returned
(:func:`align.training.memory.return_freed_memory`)."""
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits: an 8-bit scale for each 64 of them, an fp32 one for each 256 scales (arXiv
2305.14314)."""
_FLOPS = {"cpu": 50e9, "cuda": 100e12}
"""Floating point operations per second that training achieves on one core or GPU. Assumed."""


def parts_of(train: Train, processes: int, of_machine: int | None) -> int:
    """Among how many processes the model is divided (``train.sharding``)."""
    return {"none": 1, "full": processes, "hybrid": of_machine or processes}[train.sharding]


def memory(
    shape: Shape,
    train: Train,
    lora: Lora | None,
    *,
    device: str,
    processes: int = 1,
    of_machine: int | None = None,
    largest: Pass | None = None,
) -> list[Term]:
    """Peak memory of one process while it trains, as a sum of terms; the last one is the allocator's slack.

    Args:
        device: "cpu" or "cuda".
        processes: number of processes of the run; with more than one, a buffer for gradients is needed.
        of_machine: how many of them each machine has; all when None.
        largest: the largest forward pass; a full micro-batch when None.
    """
    largest = largest or Pass.full(train)
    width = width_of(train)
    trained, kept = trained_parameters(shape, lora), 4 if lora is not None else width  # adapters are fp32 always
    parts = parts_of(train, processes, of_machine)
    divided = f", divided among {parts} processes" if parts > 1 else ""
    terms = [
        *_weights(shape, lora, width, train.dtype, parts),
        Term("gradients", trained * kept / parts, f"{count(trained)} trained, {kept} bytes each{divided}"),
        Term("Adam moments", 2 * trained * kept / parts, f"two for each trained parameter{divided}"),
    ]
    if lora is not None:
        terms.append(Term("adapters", trained * kept / parts, f"fp32{divided}"))
    found = moments(shape, train, lora, device=device, largest=largest, processes=processes, parts=parts)
    terms += max(found, key=lambda alive: sum(term.amount for term in alive))
    beyond = shape.parameters * width - sum(term.amount for term in terms)
    if parts > 1 and beyond > 0:
        terms.append(Term("loading", beyond, "what the whole model takes more, before it is divided"))
    terms.append(Term("runtime", _RUNTIME[device], "CUDA context" if device == "cuda" else "Python and libraries"))
    used = sum(term.amount for term in terms)
    returned = device == "cpu" and (train.gradient_checkpointing or parts > 1)  # as the trainer tells the allocator
    share = 0.0 if returned else _SLACK[device]
    return [*terms, Term("slack", used * share, f"{share:.0%}, held by the allocator")]


def most_tokens(needed: Callable[[int], float], budget: float, *, most: int = 2**20) -> int:
    """The most tokens in a forward pass, a multiple of 128, whose memory is within ``budget``; 0 when not even 128 are.

    Args:
        needed: bytes for a number of tokens; more tokens never need less.
        most: not more than this.
    """
    return 128 * bisect_right(range(most // 128), budget, key=lambda step: needed(128 * (step + 1)))


def _weights(shape: Shape, lora: Lora | None, width: int, dtype: str, parts: int) -> list[Term]:
    if lora is None or lora.quantize is None:
        share = f", divided among {parts} processes" if parts > 1 else ""
        return [Term("weights", shape.parameters * width / parts, f"{count(shape.parameters)} in {dtype}{share}")]
    rest = shape.parameters - shape.matrices
    amount = _NF4 * shape.matrices + rest * width
    largest = max(inputs * outputs for inputs, outputs in shape.linears.values())
    return [
        Term("weights", amount, f"{count(shape.matrices)} in 4 bits, embeddings and norms in {dtype}"),
        Term("weights at work", largest * width, f"the largest layer's 4 bits unpacked to {dtype}"),
    ]


def disk(shape: Shape, train: Train, lora: Lora | None, *, tokens: int | None, dequantises: bool) -> list[Term]:
    """Disk space of the run folder at its fullest.

    Args:
        tokens: number of tokens of the encoded data, if known.
        dequantises: the model is a `.gguf` file, whose plain copy is kept in the cache.
    """
    width = width_of(train)
    trained, kept = trained_parameters(shape, lora), 4 if lora is not None else width
    copies = train.save_total_limit + 1 if train.save_steps else 1
    terms = [Term("checkpoints", 3 * trained * kept * copies, _copies_words(train, copies))]
    if train.load_best_model:
        terms.append(Term("best weights", trained * kept, "train.load_best_model"))
    if lora is None:
        terms.append(Term("saved model", shape.parameters * width, train.dtype))
    else:
        merged = shape.parameters * width if lora.save_merged else 0
        terms.append(Term("saved model", trained * kept + merged, "adapter and merged model" if merged else "adapter"))
    if dequantises:
        terms.append(Term("dequantised model", 4 * shape.parameters, "kept in the cache"))
    if tokens is not None:
        terms.append(Term("encoded data", 5 * tokens, "kept in the cache"))
    return terms


def _copies_words(train: Train, copies: int) -> str:
    return (
        f"{train.save_total_limit} kept and one being written" if train.save_steps else "one, if the run is interrupted"
    )


def flops_per_token(shape: Shape, train: Train, lora: Lora | None) -> float:
    """Floating point operations to train on one token: 2 for each weight in the forward pass and 2 for the gradient of
    what enters it, 2 more for its own gradient where it is trained, and another forward pass where activations are
    recomputed."""
    passes = 2 + (1 if lora is None else 0) + (1 if train.gradient_checkpointing else 0)
    return 2.0 * _multiplied(shape) * passes


def _multiplied(shape: Shape) -> int:
    """Number of weights that a token is multiplied with. Looking up an embedding is no multiplication."""
    return shape.parameters - (shape.vocab * shape.hidden if not (shape.tied and shape.lm_head) else 0)


def sampled_tokens_per_second(shape: Shape, *, device: str, units: int) -> float:
    """An assumed speed of sampling: one forward pass for each token, at the speed of training. It is about right when
    many samples are drawn at a time."""
    return _FLOPS[device] * units / (2.0 * _multiplied(shape))


def tokens_per_second(shape: Shape, train: Train, lora: Lora | None, *, device: str, units: int) -> float:
    """An assumed training speed.

    Args:
        units: cores of the machine (device "cpu") or GPUs of the whole run.
    """
    return _FLOPS[device] * units / flops_per_token(shape, train, lora)


def assumed_speed(device: str) -> str:
    """The assumption behind :func:`tokens_per_second`, in words."""
    return (
        f"{_FLOPS[device] / 1e9:,.0f} GFLOP/s a core"
        if device == "cpu"
        else f"{_FLOPS[device] / 1e12:,.0f} TFLOP/s a GPU"
    )


def count(number: float) -> str:
    """A number of parameters as text: ``134.5M``."""
    for scale, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= scale:
            return f"{number / scale:.1f}{letter}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds as text: ``3 min``."""
    for size, word in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {word}"
    return f"{seconds:.0f} s"
