"""Tiny tokenizers for tests, built in code: byte-level BPE over a few sentences, one for each family of chat
templates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.root import ROOT

TEMPLATES = ROOT / "tests" / "fixtures" / "templates"

SENTENCES = (
    "The quick brown fox jumps over the lazy dog. The dog sleeps, and the fox runs away.",
    "What is the capital of France? The capital of France is Paris.",
    "You are a helpful assistant. Answer in one short sentence, please.",
    "The price is $46. In total that makes 12 + 34 = 46, as the user asked.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
    "今天天气怎么样？今天天气很好，适合出门散步。",
    "user assistant system tool observation\n\n",
)


def template(name: str) -> str:
    """Text of a fixture template; the file's own last newline is not part of it."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


# How Llama-3, Qwen and GLM-4 split text before BPE: runs of newlines stay together. GPT-2's rule (SmolLM2 has it) tears
# the last one off.
_SPLIT = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


@cache
def _bpe(gpt2: bool) -> str:
    """A byte-level BPE without added tokens, serialised. 400 pieces: some words are one token, most are several."""
    tokenizer = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = bytes_ if gpt2 else pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return str(tokenizer.to_str())


def build(
    chat_template: str | None,
    special: Sequence[str],
    *,
    plain: Sequence[str] = (),
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
    adds_bos: bool = False,
    gpt2: bool = False,
) -> PreTrainedTokenizerFast:
    """A tokenizer with ``special`` tokens and added tokens that are not flagged special (``plain``)."""
    backend = Tokenizer.from_str(_bpe(gpt2))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = chat_template
    return tokenizer


@cache
def chatml(*, distinct_pad: bool = False) -> PreTrainedTokenizerFast:
    """SmolLM2's way: bos opens every turn, pad is eos. ``<|note|>`` is an added token that is not flagged special."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    pad = "<|pad|>" if distinct_pad else "<|im_end|>"
    return build(
        template("chatml"), special, plain=["<|note|>"], bos="<|im_start|>", eos="<|im_end|>", pad=pad, gpt2=True
    )


@cache
def llama3() -> PreTrainedTokenizerFast:
    """The template writes bos as text and the tokenizer would add another; contents are trimmed; eos is not what ends a
    turn."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return build(template("llama3"), special, bos="<|begin_of_text|>", eos="<|end_of_text|>", adds_bos=True)


@cache
def mistral() -> PreTrainedTokenizerFast:
    """No generation prompt, turns told apart by ordinary characters, eos ends a turn, no system message."""
    return build(template("mistral"), ["<s>", "</s>"], bos="<s>", eos="</s>", adds_bos=True)


@cache
def glm4(style: str = "glm4") -> PreTrainedTokenizerFast:
    """No end token: the next role token ends a turn. ``style``: ``glm4`` or ``glm4_arguments``."""
    special = [
        "<|endoftext|>",
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "<sop>",
        "<eop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    ]
    return build(template(style), special, eos="<|endoftext|>", pad="<|endoftext|>")


@cache
def qwen3() -> PreTrainedTokenizerFast:
    """Reasoning is dropped from earlier turns; its markers, and those of tools, are added tokens not flagged
    special."""
    inner = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    return build(
        template("qwen3"),
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        plain=inner,
        eos="<|im_end|>",
        pad="<|endoftext|>",
    )
