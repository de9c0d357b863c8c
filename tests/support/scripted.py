"""A stand-in for opening an engine: whatever a recipe asks for, the answers come from a script."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.data.chat.encoder import Encoder
from align.recipe.schema import Model, Rollout
from align.rollout.engine import Sample, Sampling
from align.rollout.scripted import ScriptedEngine

SCRIPT = "script.jsonl"


def write_script(folder: Path, completions: Sequence[str]) -> Path:
    """A script of completions that answer any prompt."""
    path = folder / SCRIPT
    path.write_text(
        "".join(json.dumps({"completion": text}, ensure_ascii=False) + "\n" for text in completions), encoding="utf-8"
    )
    return path


class Dying(ScriptedEngine):
    """Is killed at call number ``dies_at``, counted over all engines."""

    calls = 0
    dies_at = -1

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Sample]]:
        """Or dies."""
        Dying.calls += 1
        if Dying.calls - 1 == Dying.dies_at:
            raise KeyboardInterrupt
        return super().generate(prompts, sampling)


@contextmanager
def open_scripted(
    rollout: Rollout,
    model: Model,
    encoder: Encoder,
    *,
    max_length: int,
    cache: Path,
    resolve: Callable[[str], Path | str],
    live: Any = None,
) -> Iterator[ScriptedEngine]:
    """An engine of the script in the model's folder if there is one, else of the recipe's, else of the one in the
    current folder."""
    own = Path(model.path) / SCRIPT
    script = own if own.is_file() else Path(resolve(getattr(rollout, "script", None) or SCRIPT))
    yield Dying(script, encoder, max_length=max_length)
