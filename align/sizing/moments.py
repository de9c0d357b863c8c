"""What a micro-batch takes at each moment of a training step when memory may be fullest.

Nothing here is alive all the time: a step needs what stays (:mod:`align.sizing.needs`) and the largest of these.
Counted are the tensors that this package, transformers and torch hold then, as a simulated step shows them (tests/sim).

Symbols as in :mod:`align.sizing.shapes`. Amounts are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from align.recipe.schema import Lora, Train
from align.sizing.shapes import Shape

CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}
"""Number of fp32 logits that exist at once; a copy of the numbers in `align.functional.logprobs`, which imports
torch."""
_BUCKET_BYTES = 64 * 2**20
"""Gradients that processes add up in one message; a copy of the number in `align.models.placement`."""
_WIDE = 4


@dataclass(frozen=True)
class Term:
    """One term of a sum."""

    name: str
    amount: float
    """Bytes."""
    how: str
    """How it was computed, in words."""


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


@dataclass(frozen=True)
class Layer:
    """Bytes for each token that autograd keeps of one layer until its backward pass, in the order in which they are
    made (tests/oracles/test_activation_count.py counts them)."""

    before_mlp: float
    """Attention, and the norms up to the MLP's."""
    mlp: float
    """Gate, its activation, up, and their product."""
    after_mlp: float
    """The norm behind the MLP, where there is one."""

    @property
    def kept(self) -> float:
        """All of them."""
        return self.before_mlp + self.mlp + self.after_mlp


def width_of(train: Train) -> int:
    """Bytes of a weight, and of the states that pass from layer to layer."""
    return 4 if train.dtype == "fp32" else 2


def _narrow(train: Train) -> int:
    """Bytes of what a matrix product returns."""
    return 2 if "bf16" in (train.dtype, train.autocast) else 4


def layer_of(shape: Shape, train: Train, lora: Lora | None) -> Layer:
    """What one layer keeps."""
    h = shape.hidden
    a = shape.heads * shape.head_dim
    k = shape.kv_heads * shape.head_dim
    i = shape.intermediate
    half_weights, narrow = train.dtype == "bf16", _narrow(train)
    kept = (2 * a + 2 * k) * narrow  # queries, keys, values and the output
    mlp = 4 * i * narrow
    # Inputs of the linear layers. Casting makes one copy for each layer that reads them; otherwise the layers share
    # one.
    readers = (4 if shape.fused_mlp else 5) * h + a
    # Adapters compute in fp32, so their inputs are cast
    if lora is not None and half_weights and train.autocast is None:
        kept += readers * _WIDE
        mlp += i * (_WIDE - narrow)
    else:
        kept += (readers if train.autocast == "bf16" and not (half_weights and lora is None) else 2 * h + a) * narrow
    # Norms keep their input in fp32, and the normalised values where their own weight is trained.
    norm = _norm(train, lora)
    behind = 1 if shape.norms == 4 else 0
    kept += ((shape.norms - behind) * h + (a + k) * shape.qk_norm) * norm
    if lora is not None:
        kept += len(shape.linears) * lora.rank * _WIDE
    return Layer(kept, mlp, behind * h * norm)


def _norm(train: Train, lora: Lora | None) -> int:
    """Bytes that a norm keeps of each number: its input in fp32, and the normalised value where its weight is
    trained."""
    return _WIDE + (0 if lora is not None else width_of(train))


def saved_bytes(shape: Shape, train: Train, lora: Lora | None) -> float:
    """Bytes for each token that all layers together keep from the forward pass for the backward pass: with
    checkpointing the input of each."""
    if train.gradient_checkpointing:
        return shape.layers * shape.hidden * width_of(train)
    return shape.layers * layer_of(shape, train, lora).kept


def _at_work(shape: Shape, train: Train, lora: Lora | None) -> float:
    """Bytes for each token in the backward pass of a layer when it takes most, what the layer keeps included."""
    layer, narrow, h, i = layer_of(shape, train, lora), _narrow(train), shape.hidden, shape.intermediate
    fullest = []
    if shape.norms == 4:
        # The norm behind the MLP comes first, while everything before it is still kept. In fp32: its input, that
        # input's gradient so far, the gradient of the mean, and the three steps of the square's gradient.
        fullest.append(layer.before_mlp + layer.mlp + 6 * h * _WIDE)
    if lora is None:
        # gate * up: the gradients of the product, of gate and of up, when the product itself is gone
        fullest.append(layer.before_mlp + layer.mlp + 2 * i * narrow)
    else:
        # Adapter of the down projection: its input in fp32 and in the dtype that it came in, beside what is kept; the
        # same of the gradient on the way back. While the layer is computed again, under autocast, the MLP's input is
        # there too, and the outputs of the frozen weights and of the adapter, before and after scaling.
        computed = 4 * h * narrow if train.autocast else 0
        fullest.append(layer.before_mlp + layer.mlp + i * (_WIDE + narrow) + computed)
        # Adapter of gate and up: its output, the same scaled, and the output of the frozen weights
        adapted = narrow if train.autocast else _WIDE
        outputs, there = (2 * i, 0) if shape.fused_mlp else (i, i)
        fullest.append(layer.before_mlp + there * narrow + outputs * (narrow + 2 * adapted))
    # The gradient that arrives from the layer above, and the residual, of which norms keep a copy unless it is fp32
    return max(fullest) + h * (_WIDE if train.dtype == "fp32" else 2 * width_of(train))


def moments(
    shape: Shape, train: Train, lora: Lora | None, *, device: str, largest: Pass, processes: int = 1, parts: int = 1
) -> list[list[Term]]:
    """What is alive, besides what stays, at each moment when that may be most.

    Args:
        device, largest: as of :func:`align.sizing.needs.memory`.
        processes: which add up their gradients.
        parts: the number of processes among which the model is divided.
    """
    tokens, again = largest.tokens, train.gradient_checkpointing
    layers = f"{'inputs of ' if again else ''}{shape.layers} layers"
    saved = Term("activations", tokens * saved_bytes(shape, train, lora), f"{_tokens(largest)}, {layers}")
    casts = train.autocast is not None and train.dtype == "fp32"
    copied = Term("bf16 copies of the weights", 2 * shape.matrices, "autocast keeps them for the backward pass")
    copies = [copied] if casts and not again else []
    if casts and again:
        copied = Term("bf16 copies of the weights", 2 * shape.matrices / shape.layers, "of the layer at work")
    gradients = _Gradients(shape, train, lora, parts, processes // parts)
    work = _layer_at_work(shape, train, lora, largest)
    backward = [saved, work, *([copied] if casts else []), *gradients.whole(layers=2), *gradients.waiting()]
    found = [backward]
    if shape.lm_head:
        with_head = [saved, *copies, *gradients.whole(layers=1)]
        found += [[*with_head, *alive] for alive in _lm_head(shape, train, lora, device, largest)]
    if lora is None:
        found += gradients.of_layers_and_embeddings(saved)
    if processes > 1:
        found.append([gradients.message()] if parts == 1 else gradients.gathering())
    return found


def _layer_at_work(shape: Shape, train: Train, lora: Lora | None, largest: Pass) -> Term:
    work = _at_work(shape, train, lora)
    if not train.gradient_checkpointing:
        kept = layer_of(shape, train, lora).kept  # is among the activations
        return Term("layer at work", largest.tokens * (work - kept), "gradients of the one in the backward pass")
    if train.dtype == "fp32":
        work -= shape.hidden * _WIDE  # its input is the first norm's, which needs no copy in fp32
    return Term("layer at work", largest.tokens * work, "one computed again, and its gradients")


@dataclass(frozen=True)
class _Gradients:
    """Whole gradients that are there for a while, and whole weights of a model that is divided among processes."""

    shape: Shape
    train: Train
    lora: Lora | None
    parts: int
    copies: int
    """Of the whole model."""

    @property
    def matrix(self) -> int:
        """Weights of the LM head, and of the embeddings."""
        return self.shape.vocab * self.shape.hidden

    @property
    def layer(self) -> float:
        """Weights of a layer."""
        return self.shape.matrices / self.shape.layers

    def whole(self, *, layers: int) -> list[Term]:
        """Weights that are put together. What is in no layer stays together for the step."""
        if self.parts == 1:
            return []
        weights = self.shape.parameters - self.shape.matrices + layers * self.layer
        words = "embeddings and LM head" + ("", ", and a layer", ", a layer and the next one")[layers]
        return [Term("whole layers", weights * width_of(self.train), f"{words}, put together")]

    def gathering(self) -> list[Term]:
        """When a forward pass begins: what is in no layer, as it arrives and put together, and two layers."""
        outside = width_of(self.train) * (self.shape.parameters - self.shape.matrices)
        return [*self.whole(layers=2), Term("weights on the way", outside, "embeddings and LM head, as they arrive")]

    def waiting(self) -> list[Term]:
        """Gradients that wait while layers make theirs."""
        if self.lora is not None:
            return []
        waits, width = [], width_of(self.train)
        if self.shape.lm_head and (self.shape.tied or self.parts > 1):
            words = "waits for the embedding's"
            waits.append(Term("LM head gradient", width * self.matrix, words))
        if self.parts > 1:
            waits.append(Term("gradients on the way", _WIDE * self.layer, "of the layer before, in fp32"))
        return waits

    def of_layers_and_embeddings(self, saved: Term) -> list[list[Term]]:
        """When the gradients of a layer or of the embeddings are there as a whole."""
        width, heads = width_of(self.train), [term for term in self.waiting() if term.name == "LM head gradient"]
        embedding = Term("embedding gradient", width * self.matrix, "before it is added up")
        if heads and self.shape.tied:
            embedding = Term("embedding gradient", 2 * width * self.matrix, "and its sum with the LM head's")
        if self.parts == 1:
            return [[embedding, *heads]]
        outside = self.shape.parameters - self.shape.matrices
        sent = Term("gradients on the way", _WIDE * outside, "of embeddings and LM head, in fp32")
        own = Term("gradients of a layer", (width + _WIDE) * self.layer, "whole, and in fp32 on the way")
        # The weights are divided again before the last gradients are sent
        last = [[*self.whole(layers=0), embedding, *self.waiting()], [embedding, *heads, sent]]
        if self.copies > 1:
            # torch keeps what was added up until the end of the backward pass
            added = _WIDE * self.shape.matrices / self.parts
            last = [[*alive, Term("gradients added up", added, "over the copies, in fp32")] for alive in last]
        return [*last, [saved, *self.whole(layers=2), *heads, own]]

    def message(self) -> Term:
        """Gradients that processes add up together."""
        kept = _WIDE if self.lora is not None else width_of(self.train)
        trained = trained_parameters(self.shape, self.lora) * kept
        return Term("gradient exchange", min(trained, _BUCKET_BYTES + kept * self.matrix), "one message")


def _lm_head(shape: Shape, train: Train, lora: Lora | None, device: str, largest: Pass) -> list[list[Term]]:
    """The LM head's forward and backward pass."""
    narrow, width, matrix, tokens = _narrow(train), width_of(train), shape.vocab * shape.hidden, largest.tokens
    chunk = min(CHUNK_ELEMENTS[device], tokens * shape.vocab)
    several = tokens * shape.vocab > chunk
    size = f"{chunk // shape.vocab:,} tokens at a time"
    # For each token: what the norm keeps for its backward pass, and its output. The LM head takes a copy of the output
    # at the trained tokens, and gives back a gradient of the same size.
    last = Term("last norm", tokens * shape.hidden * (_norm(train, lora) + width + 2 * narrow), _tokens(largest))
    parts = [last]
    if narrow < width:
        parts.append(Term("LM head in bf16", narrow * matrix, "autocast"))
    # The softmax's normaliser takes another fp32 copy of the logits
    forward = [*parts, Term("logits", 2 * _WIDE * chunk, f"{size}, twice in fp32")]
    # Then the logits become their own gradient, in fp32 and in the dtype of the product
    copied = narrow if narrow < _WIDE else 0
    gradients = (_WIDE + copied) * chunk
    if lora is not None:
        return [forward, [*parts, Term("logits", gradients, f"{size}, and their gradient")]]
    # The head's gradient is summed over the chunks in fp32. A chunk's product comes in its own dtype.
    summed = Term("LM head gradient", _WIDE * matrix, "summed over the chunks in fp32")
    product = Term("product of a chunk", copied * matrix, "before it is added to the LM head gradient")
    added = [*parts, summed, product, Term("logits", narrow * chunk, f"gradient of {size}")]
    next_chunk = [*parts, *([summed] if several else []), Term("logits", gradients, f"{size}, and their gradient")]
    return [forward, added, next_chunk]


def trained_parameters(shape: Shape, lora: Lora | None) -> int:
    """Number of trained parameters."""
    return shape.parameters if lora is None else shape.lora_parameters(lora.rank, lora.target_modules)


def _tokens(largest: Pass) -> str:
    return f"{largest.tokens:,} tokens ({largest.words})"
