"""A chat with a model in the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from align.data.chat.encoder import Encoder
from align.data.records import Message
from align.data.tree import Ids
from align.errors import InputError
from align.models.generate import answer, generating, generation_settings
from align.models.load import load_encoder, load_policy
from align.recipe.schema import Model

__all__ = ["answer", "chat", "printable"]

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` without control characters, so that a model's output cannot move the cursor, change colours or reorder
    what is shown."""
    return _UNPRINTABLE.sub("", text)


def chat(
    model: str,
    *,
    max_new_tokens: int,
    temperature: float,
    system: str | None,
    console: Console,
    cache: Path | None = None,
) -> None:
    """Talk to the model at ``model`` (a folder, a .gguf file or a hub id). Ctrl-C stops an answer, Ctrl-D ends the
    chat.

    Raises:
        InputError: the model cannot be loaded, or its template refuses a system message.
        EnvironmentFault: a hub model is not on this machine and cannot be fetched.
    """
    chosen = Model(path=model)
    encoder = load_encoder(chosen, cache=cache)
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    # Raises for a template without a system role
    encoder.encode_prompt([*opening, {"role": "user", "content": "?"}])
    policy = load_policy(chosen, cache=cache)
    console.print("Ctrl-C stops an answer, Ctrl-D ends the chat.", style="dim")
    history: list[Message] = []
    with generating(policy) as lm:
        while (text := _ask(console)) is not None:
            if text.strip():
                history.append({"role": "user", "content": text})
                _turn(lm, encoder, opening, history, max_new_tokens, temperature, console)


def _ask(console: Console) -> str | None:
    """The next line that the user types; None at the end of the input."""
    while True:
        try:
            return console.input("[bold]> [/bold]")
        except EOFError:
            console.print()
            return None
        except KeyboardInterrupt:
            console.print("\nCtrl-D ends the chat.", style="dim")


def _turn(
    lm: PreTrainedModel,
    encoder: Encoder,
    opening: list[Message],
    history: list[Message],
    max_new_tokens: int,
    temperature: float,
    console: Console,
) -> None:
    """Answer the last message of ``history`` and append the answer. If the answer is empty, the question is removed."""
    try:
        prompt = _fit(lm, encoder, opening, history, max_new_tokens, console)
    except InputError as error:
        console.print(str(error), style="red", markup=False)
        history.pop()
        return
    stream = _Stream(encoder, lambda piece: console.out(printable(piece), end="", highlight=False))
    settings = generation_settings(lm, encoder, max_new_tokens=max_new_tokens, temperature=temperature)
    ids = torch.tensor([prompt.tolist()], device=lm.device)
    generate: Any = lm.generate
    try:
        generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=stream)
    except KeyboardInterrupt:
        stream.end()
        console.print(" [stopped]", style="dim", markup=False, end="")
    console.print()
    if said := stream.shown.strip():
        history.append({"role": "assistant", "content": said})
    else:
        console.print("(no answer)", style="dim")
        history.pop()


def _fit(
    lm: PreTrainedModel, encoder: Encoder, opening: list[Message], history: list[Message], room: int, console: Console
) -> Ids:
    """The prompt's ids. The oldest turns are removed if the prompt and ``room`` new tokens exceed the model's maximum
    length."""
    limit = getattr(lm.config, "max_position_embeddings", None)
    prompt = encoder.encode_prompt([*opening, *history])
    forgotten = 0
    while limit is not None and len(prompt) + room > limit and len(history) > 1:
        del history[:2]
        forgotten += 1
        prompt = encoder.encode_prompt([*opening, *history])
    if forgotten:
        console.print(f"(forgot the first {forgotten} turns: the model holds {limit} tokens)", style="dim")
    if limit is not None and len(prompt) + room > limit:
        raise InputError(f"too long: {len(prompt)} tokens and {room} for the answer, the model holds {limit}")
    return prompt


class _Stream(BaseStreamer):
    """Prints an answer while it is generated, character by character."""

    def __init__(self, encoder: Encoder, show: Callable[[str], None]) -> None:
        self._encoder = encoder
        self._show = show
        self._ids: list[int] | None = None
        self.shown = ""

    def put(self, value: torch.Tensor) -> None:
        """transformers calls this with the prompt first, then with each new token."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = self._text()
        if not text.endswith("\ufffd"):  # an incomplete character, whose bytes are in several tokens
            self._emit(text)

    def end(self) -> None:
        """Called when the answer is complete or was stopped."""
        self._emit(self._text())

    def _text(self) -> str:
        # GLM's models begin an answer with a line break, which the template writes for earlier turns
        return self._encoder.decode(self._ids or []).lstrip()

    def _emit(self, text: str) -> None:
        self._show(text[len(self.shown) :])
        self.shown = text
