"""Checkpoints from which a training run resumes: written atomically, checked by digest, never pickled.

``ROOT/step-00000100/`` holds safetensors files, ``state.json`` and a manifest of sha256 sums. A folder gets its name
only once it is complete, and is used only when every file in its manifest is there and has the digest written there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from align import files, sealed
from align.errors import EnvironmentFault, InputError, Problem

SAVE_SECONDS = 15 * 60.0
"""After this time without a checkpoint one is saved, even if the recipe asks for none."""
SAVE_SHARE = 0.03
"""Such checkpoints may take up to this share of a run's time."""
log = logging.getLogger("align")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path
    step: int

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``NAME.safetensors``.

        Raises:
            InputError: the checkpoint has no such file; resuming without it would silently be another run.
        """
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            raise InputError(
                Problem("checkpoint has no such state", file=str(path), hint="remove the checkpoint to start over")
            )
        return load_file(path)

    def state(self) -> dict[str, Any]:
        """What ``state.json`` holds."""
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return state


def save_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write one checkpoint, make it visible, and only then remove the oldest beyond ``keep``.

    Raises:
        EnvironmentFault: disk full, read-only and the like; older checkpoints are untouched.
    """
    final = root / f"step-{step:08d}"
    save_tensors(final, tensors, {"step": step, **state})
    for old in sorted(root.glob("step-*"))[:-keep]:
        files.remove_folder(old)
    return final


def save_tensors(
    final: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any] | None = None
) -> None:
    """Write the folder ``final``, whole or not at all: ``NAME.safetensors`` for each group, ``state.json``, and the
    manifest."""
    root = files.make_folder(final.parent)
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    files.free_space_or_raise(root, needed)
    tmp = files.temporary(root)
    try:
        with files.machine_faults(final, lambda: needed):
            tmp.mkdir()
            for name, group in tensors.items():
                save_file(
                    {key: value.detach().contiguous() for key, value in group.items()}, tmp / f"{name}.safetensors"
                )
        files.write_json(tmp / "state.json", state or {})
        sealed.seal(tmp)
        files.publish_folder(tmp, final)
    except SafetensorError as error:  # safetensors hides the operating system's error in a text of its own
        raise EnvironmentFault(f"{final}: cannot be written: {error}") from error
    finally:
        files.discard(tmp)


def checkpoints(root: Path) -> list[Checkpoint]:
    """All checkpoint folders of a run, the newest first. They are not verified."""
    return [
        Checkpoint(folder, int(folder.name.removeprefix("step-")))
        for folder in sorted(root.glob("step-*"), reverse=True)
    ]


def newest_checkpoint(
    root: Path, required: Sequence[str], needs: Callable[[Mapping[str, Any]], list[Problem]] = lambda state: []
) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None when the run has none. A warning names each one that was skipped, and
    why.

    ``needs`` gets a checkpoint's state and returns what is wrong with other files that resuming from it would read.

    Raises:
        InputError: the run has checkpoints and all are damaged.
    """
    problems: list[Problem] = []
    for checkpoint in checkpoints(root):
        wrong = _problems(checkpoint.folder, required) or needs(checkpoint.state())
        if not wrong:
            for problem in problems:
                log.warning("skipped a damaged checkpoint: %s", problem)
            return checkpoint
        problems += wrong
    if problems:
        raise InputError(
            [*problems, Problem("no checkpoint verifies", file=str(root), hint="remove the folder to start over")]
        )
    return None


def verified(folder: Path, required: Sequence[str]) -> Checkpoint:
    """Compare a folder that :func:`save_tensors` wrote, named ``WORD-NUMBER``, with its manifest.

    Raises:
        InputError: a file is missing or damaged.
    """
    problems = _problems(folder, required)
    if problems:
        raise InputError(problems)
    return Checkpoint(folder, int(folder.name.rpartition("-")[2]))


def _problems(folder: Path, required: Sequence[str]) -> list[Problem]:
    """What is wrong with a checkpoint folder; empty when it can be trusted."""
    return sealed.damage(folder, [*(f"{name}.safetensors" for name in required), "state.json"])


class BestWeights:
    """Weights of the best evaluation so far. A run that resumes from a checkpoint needs the weights that were the best
    when that checkpoint was saved: the newest ones up to its step."""

    def __init__(self, work: Path) -> None:
        self._work, self._root = work, work / "best"

    def _folder(self, step: int) -> Path:
        return self._root / f"step-{step:08d}"

    def save(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights as they are after ``step``, and forget those that nothing needs any more."""
        save_tensors(self._folder(step), {"weights": weights})
        self.forget(step)

    def load(self, step: int) -> dict[str, Tensor]:
        """The weights after ``step``, which were the best. Raises InputError when they are damaged."""
        return verified(self._folder(step), ["weights"]).tensors("weights")

    def damage(self, step: int) -> list[Problem]:
        """What is wrong with the weights saved after ``step``; empty when they are undamaged."""
        return _problems(self._folder(step), ["weights"])

    def forget(self, now: int) -> None:
        """Remove weights that neither the run, now at step ``now``, nor any of its checkpoints needs."""
        kept = {int(folder.name.removeprefix("step-")): folder for folder in self._root.glob("step-*")}
        users = [now, *(checkpoint.step for checkpoint in checkpoints(self._work / "checkpoints"))]
        needed = {max((step for step in kept if step <= user), default=None) for user in users}
        for step in kept.keys() - needed:
            files.remove_folder(kept[step])


def rng_state() -> dict[str, Tensor]:
    """The state of torch's random generators: the only ones that training draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Put back what :func:`rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
