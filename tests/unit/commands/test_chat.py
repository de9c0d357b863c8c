"""The terminal chat: what is asked of the model, what is shown, and how it ends."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console

from align.commands import chat as module
from align.commands.chat import chat, printable
from align.data.chat.encoder import Encoder
from align.errors import InputError
from align.recipe.schema import Model
from tests.support.saved import save_tiny
from tests.support.tokenizers import chatml, glm4, mistral

Say = Callable[[list[int]], Sequence[int | list[int]]]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return save_tiny(tmp_path).path


CTRL_C = -1


class Fake:
    """Stands for a model's ``generate``: says what ``say`` makes of the prompt, token by token, and remembers the
    prompts."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.prompts: list[list[int]] = []

    def __call__(self, ids: torch.Tensor, *, streamer: module._Stream, **settings: object) -> None:
        self.prompts.append(ids[0].tolist())
        streamer.put(ids)
        for token in self.say(self.prompts[-1]):
            if token == CTRL_C:
                raise KeyboardInterrupt
            streamer.put(torch.tensor(token).reshape(-1))
        streamer.end()


def talk(
    folder: str,
    lines: Sequence[str | type[BaseException]],
    monkeypatch: pytest.MonkeyPatch,
    say: Say | None,
    **options: object,
) -> tuple[str, Fake]:
    """Run a chat in which the user types ``lines``; returns the screen and the fake model (with ``say`` None: the real
    one)."""
    screen, todo = io.StringIO(), iter([*lines, EOFError])
    console = Console(file=screen, width=500)

    def type_in(prompt: str = "") -> str:
        line = next(todo)
        if isinstance(line, str):
            return line
        raise line

    fake = Fake(say or (lambda prompt: []))
    if say is not None:
        load = module.load_policy

        def rigged(model: Model, **kwargs: object) -> object:
            policy = load(model, **kwargs)  # type: ignore[arg-type]
            policy.generate = fake  # type: ignore[assignment]
            return policy

        monkeypatch.setattr(module, "load_policy", rigged)
    monkeypatch.setattr("builtins.input", type_in)
    settings = {"max_new_tokens": 8, "temperature": 0.0, "system": None} | options
    chat(folder, console=console, **settings)  # type: ignore[arg-type]
    return screen.getvalue(), fake


def words(text: str) -> list[int]:
    return list(chatml()(text).input_ids)


STOP = chatml().eos_token_id


def test_a_conversation(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole conversation is asked each time, encoded by the one encoder; the stop id is not shown and not repeated
    in the history."""
    screen, fake = talk(
        folder, ["Hello", "  ", "Again"], monkeypatch, lambda prompt: [*words("The dog."), STOP], system="Be short."
    )
    assert screen.count("The dog.\n") == 2 and "<|im_end|>" not in screen
    encode = Encoder(chatml()).encode_prompt
    opening = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    assert fake.prompts[0] == encode(opening).tolist()
    more = [{"role": "assistant", "content": "The dog."}, {"role": "user", "content": "Again"}]
    assert fake.prompts[1:] == [encode([*opening, *more]).tolist()]


def test_the_real_model_answers(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from align.models.generate import answer
    from align.models.load import load_encoder, load_policy

    screen, _ = talk(folder, ["Hello"], monkeypatch, None)
    encoder = load_encoder(Model(path=folder))
    prompt = encoder.encode_prompt([{"role": "user", "content": "Hello"}])
    (ids,) = answer(load_policy(Model(path=folder)), encoder, [prompt], max_new_tokens=8)
    assert printable(encoder.decode(ids)) in screen


def test_ctrl_c_stops_the_answer_and_keeps_it(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen, fake = talk(folder, ["Hello", "Again"], monkeypatch, lambda prompt: [*words("The fox"), CTRL_C])
    assert "The fox [stopped]" in screen
    more = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "The fox"},
        {"role": "user", "content": "Again"},
    ]
    assert fake.prompts[1] == Encoder(chatml()).encode_prompt(more).tolist()


def test_ctrl_c_at_the_prompt_does_not_end_the_chat(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen, fake = talk(folder, [KeyboardInterrupt, "Hello"], monkeypatch, lambda prompt: [STOP])
    assert "Ctrl-D ends the chat." in screen and len(fake.prompts) == 1


def test_an_empty_answer_is_not_remembered(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen, fake = talk(folder, ["Hello", "Again"], monkeypatch, lambda prompt: [STOP])
    assert "(no answer)" in screen
    assert fake.prompts[1] == Encoder(chatml()).encode_prompt([{"role": "user", "content": "Again"}]).tolist()


def test_glms_line_break_is_not_doubled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GLM-4's models begin an answer with the line break that its template writes before the content."""
    save_tiny(tmp_path, tokenizer=glm4())
    ids = list(glm4()("\nThe dog.").input_ids)
    screen, fake = talk(
        str(tmp_path), ["Hello", "Again"], monkeypatch, lambda prompt: [*ids, Encoder(glm4()).stop_ids[0]]
    )
    more = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "The dog."},
        {"role": "user", "content": "Again"},
    ]
    assert fake.prompts[1] == Encoder(glm4()).encode_prompt(more).tolist()
    assert screen.count("> The dog.\n") == 2


def test_a_character_of_several_tokens_is_shown_whole(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte-level token may be a third of a Chinese character; halves would be shown as replacement marks."""
    ids = words("猫")
    assert len(ids) > 1
    screen, _ = talk(folder, ["Hello"], monkeypatch, lambda prompt: [*words("a "), *ids, *words("b"), STOP])
    assert "a 猫b" in screen and "\ufffd" not in screen


def test_output_cannot_control_the_terminal(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither escape sequences nor rich's markup of a model's answer take effect, and both are shown as text."""
    screen, _ = talk(
        folder, ["Hello"], monkeypatch, lambda prompt: [words("\x1b[2J\x1b]0;t\x07 [red]x[/red] \x9b1m"), STOP]
    )
    assert "\x1b" not in screen and "\x07" not in screen and "\x9b" not in screen
    assert "[2J]0;t [red]x[/red] 1m" in screen


def test_printable() -> None:
    text = "a\tb\n中文 🙂 é\u200d"
    assert printable(text) == text
    assert printable("\x00\x1b\r\x7f\x85\x9b\u202e\u2066x") == "x"


def test_old_turns_are_forgotten_when_the_model_is_full(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model holds 128 tokens; the newest question always fits, and forgetting is said."""
    long = "the quick brown fox jumps over the lazy dog and runs away"
    screen, fake = talk(folder, [long, long, long, long], monkeypatch, lambda prompt: [*words("The dog."), STOP])
    assert all(len(prompt) + 8 <= 128 for prompt in fake.prompts) and len(fake.prompts) == 4
    assert "(forgot the first 1 turns: the model holds 128 tokens)" in screen


def test_a_question_that_is_too_long_is_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen, fake = talk(folder, ["fox " * 200, "Hello"], monkeypatch, lambda prompt: [STOP])
    assert "too long: " in screen and len(fake.prompts) == 1


def test_a_system_message_that_the_template_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the model is loaded, not after the first question."""
    save_tiny(tmp_path, tokenizer=mistral())
    with pytest.raises(InputError):
        talk(str(tmp_path), ["Hello"], monkeypatch, lambda prompt: [STOP], system="Be short.")


def test_control_tokens_typed_by_the_user_are_text(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user cannot end a turn by typing its marker."""
    _, fake = talk(folder, ["x<|im_end|>y"], monkeypatch, lambda prompt: [STOP])
    assert fake.prompts[0].count(STOP) == Encoder(chatml()).encode_prompt(
        [{"role": "user", "content": "xy"}]
    ).tolist().count(STOP)
