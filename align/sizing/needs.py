"""Estimates of the memory, disk and time of a training stage, each as a sum of terms that can be checked one by one.

They describe this package's code: the trainer's copies, what autograd keeps of a Llama-like layer, and the chunked
log-probs. A GB is 10^9 bytes. Symbols as in :mod:`align.sizing.shapes`.
"""

from __future__ import annotations

from dataclasses import dataclass

from align.recipe.schema import Lora, Train
from align.sizing.shapes import Shape

CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}
"""Number of fp32 logits that exist at once; a copy of the numbers in `align.functional.logprobs`, which imports
torch."""

_RUNTIME = {"cpu": 0.55e9, "cuda": 0.8e9}
"""Bytes of the loaded Python, torch and transformers; on a GPU, of the CUDA context and its kernels."""
_SLACK = {"cpu": 0.15, "cuda": 0.10}
"""Memory that allocators hold without using it, as a share of the rest. Measured on a CPU (glibc): 0 to 29 %."""
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits: an 8-bit scale for each 64 of them, an fp32 one for each 256 scales (arXiv
2305.14314)."""
_FLOPS = {"cpu": 50e9, "cuda": 100e12}
"""Floating point operations per second that training achieves on one core or GPU. Assumed."""


@dataclass(frozen=True)
class Term:
    """One term of a sum."""

    name: str
    amount: float
    """Bytes."""
    how: str
    """How it was computed, in words."""


def trained_parameters(shape: Shape, lora: Lora | None) -> int:
    """Number of trained parameters."""
    return shape.parameters if lora is None else shape.lora_parameters(lora.rank, lora.target_modules)


@dataclass(frozen=True)
class Pass:
    """The largest forward pass of a stage."""

    tokens: int
    """Number of tokens, padding included."""
    words: str
    """The reason for that number."""

    @classmethod
    def full(cls, train: Train) -> Pass:
        """A full micro-batch."""
        return cls(train.microbatch_tokens, "train.microbatch_tokens")


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
    width = 4 if train.dtype == "fp32" else 2
    trained, kept = trained_parameters(shape, lora), 4 if lora is not None else width  # adapters are fp32 always
    parts = parts_of(train, processes, of_machine)
    share = f", divided among {parts} processes" if parts > 1 else ""
    terms = [
        *_weights(shape, lora, width, train.dtype, parts),
        Term("gradients", trained * kept / parts, f"{count(trained)} trained, {kept} bytes each{share}"),
        Term("Adam moments", 2 * trained * kept / parts, f"two for each trained parameter{share}"),
        Term(
            "activations",
            largest.tokens * activation_bytes(shape, train, lora),
            _activation_words(shape, train, largest),
        ),
    ]
    if shape.lm_head:
        words = f"chunks of up to {CHUNK_ELEMENTS[device] // shape.vocab:,} tokens, twice"
        terms.append(Term("logits", _logit_bytes(shape, largest, device), words))
        if lora is None:
            terms.append(Term("LM head gradient", 4 * shape.vocab * shape.hidden, "summed over the chunks in fp32"))
    if lora is not None:
        terms.append(Term("adapters", trained * kept, "fp32"))
    if train.autocast and train.dtype == "fp32":
        # Layers that are computed again in the backward pass make their copies again as well
        layers = 1 if parts > 1 and train.gradient_checkpointing else shape.layers
        words = "autocast keeps them for the backward pass"
        terms.append(Term("bf16 copies of the weights", 2 * shape.matrices * layers / shape.layers, words))
    if parts > 1:
        terms += _put_together(shape, lora, width, sum(term.amount for term in terms))
    elif processes > 1:
        terms.append(
            Term("gradient exchange", min(trained * kept, 64 * 2**20 + 4 * shape.vocab * shape.hidden), "one bucket")
        )
    terms.append(Term("runtime", _RUNTIME[device], "CUDA context" if device == "cuda" else "Python and libraries"))
    used = sum(term.amount for term in terms)
    return [*terms, Term("slack", used * _SLACK[device], f"{_SLACK[device]:.0%}, held by the allocator")]


def _put_together(shape: Shape, lora: Lora | None, width: int, divided: float) -> list[Term]:
    """What is whole for a while although the model is divided: the layer at work and the next one, all that is in no
    layer (embeddings, LM head), and their gradients with a copy that is sent; and before anything is divided, the model
    as it was loaded.

    Args:
        divided: bytes of everything else.
    """
    layer = shape.matrices // shape.layers
    outside = shape.parameters - shape.matrices
    terms = [Term("whole layers", (outside + 2 * layer) * width, "two layers, embeddings and LM head, put together")]
    if lora is None:
        sent = outside + layer + max(outside, layer)
        terms.append(Term("their gradients", sent * 4, "until each process has its part; one copy is being sent"))
    beyond = shape.parameters * width - divided - sum(term.amount for term in terms)
    if beyond > 0:
        terms.append(Term("loading", beyond, "what the whole model takes more, before it is divided"))
    return terms


def _weights(shape: Shape, lora: Lora | None, width: int, dtype: str, parts: int) -> list[Term]:
    if lora is None or lora.quantize is None:
        share = f", divided among {parts} processes" if parts > 1 else ""
        return [Term("weights", shape.parameters * width / parts, f"{count(shape.parameters)} in {dtype}{share}")]
    rest = shape.parameters - shape.matrices
    amount = _NF4 * shape.matrices + rest * width
    largest = max(inputs * outputs for inputs, outputs in shape.linears.values())
    return [
        Term("weights", amount, f"{count(shape.matrices)} in 4 bits, embeddings and norms in {dtype}"),
        Term("layer at work", largest * width, f"its 4 bits unpacked to {dtype}"),
    ]


def activation_bytes(shape: Shape, train: Train, lora: Lora | None) -> float:
    """Bytes that autograd keeps for each token of a micro-batch, in all layers; one layer more is at work in the
    backward pass.

    With checkpointing that layer counts with its recomputed values and their gradients.
    """
    layer = layer_bytes(shape, train, lora)
    if train.gradient_checkpointing:
        return shape.layers * shape.hidden * (4 if train.dtype == "fp32" else 2) + 2 * layer
    return (shape.layers + 1) * layer


def layer_bytes(shape: Shape, train: Train, lora: Lora | None) -> float:
    """Bytes kept for each token in one layer, counted from the tensors that autograd saves
    (tests/oracles/test_activation_count.py)."""
    h = shape.hidden
    a = shape.heads * shape.head_dim
    k = shape.kv_heads * shape.head_dim
    i = shape.intermediate
    half_weights, half_compute = train.dtype == "bf16", train.dtype == "bf16" or train.autocast == "bf16"
    wide, narrow = 4, 2 if half_compute else 4
    # Attention: queries, keys, values and the output. MLP: gate, its activation, up, and their product.
    kept = (2 * a + 2 * k + 4 * i) * narrow
    # Inputs of the linear layers. Casting makes one copy for each layer that reads them; otherwise the layers share
    # one.
    readers = (4 if shape.fused_mlp else 5) * h + a
    # Adapters compute in fp32, so their inputs are cast
    casts_up = lora is not None and half_weights and train.autocast is None
    if casts_up:
        kept += readers * wide + i * (wide - narrow)
    else:
        kept += (readers if train.autocast == "bf16" and not (half_weights and lora is None) else 2 * h + a) * narrow
    # Norms keep their input in fp32, and the normalised values where their own weight is trained.
    normed = shape.norms * h + (a + k) * shape.qk_norm
    if lora is not None:
        values = 0
    else:
        values = 2 if half_weights else 4
    kept += normed * (wide + values)
    if lora is not None:
        kept += len(shape.linears) * lora.rank * wide
    return kept


def _activation_words(shape: Shape, train: Train, largest: Pass) -> str:
    layers = (
        f"inputs of {shape.layers} layers, one recomputed and at work"
        if train.gradient_checkpointing
        else f"{shape.layers} layers"
    )
    return f"{largest.tokens:,} tokens ({largest.words}), {layers}"


def _logit_bytes(shape: Shape, largest: Pass, device: str) -> float:
    return 2 * 4 * min(CHUNK_ELEMENTS[device], largest.tokens * shape.vocab)


def disk(shape: Shape, train: Train, lora: Lora | None, *, tokens: int | None, dequantises: bool) -> list[Term]:
    """Disk space of the run folder at its fullest.

    Args:
        tokens: number of tokens of the encoded data, if known.
        dequantises: the model is a `.gguf` file, whose plain copy is kept in the cache.
    """
    width = 4 if train.dtype == "fp32" else 2
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
