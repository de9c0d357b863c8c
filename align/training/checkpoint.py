"""Checkpoints to resume from: atomic, checked by digest, never pickled.

``ROOT/step-00000100/`` holds safetensors files, ``state.json`` and a manifest of sha256 sums. A folder is visible only when complete, and
is used only when every file of its manifest is there with its digest.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from align import files
from align.errors import EnvironmentFault, InputError, Problem

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
            raise InputError(Problem("checkpoint has no such state", file=str(path), hint="remove the checkpoint to start over"))
        return load_file(path)

    def state(self) -> dict[str, Any]:
        """What ``state.json`` holds."""
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return state


def save_checkpoint(root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int) -> Path:
    """Write one checkpoint, make it visible, and only then remove the oldest beyond ``keep``.

    Raises:
        EnvironmentFault: disk full, read-only and the like; older checkpoints are untouched.
    """
    final = root / f"step-{step:08d}"
    save_tensors(final, tensors, {"step": step, **state})
    for old in sorted(root.glob("step-*"))[:-keep]:
        files.remove_folder(old)
    return final


def save_tensors(final: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any] | None = None) -> None:
    """Write the folder ``final``, whole or not at all: ``NAME.safetensors`` for each group, ``state.json``, and the manifest."""
    root = files.make_folder(final.parent)
    files.free_space_or_raise(root, sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()))
    tmp = files.temporary(root)
    try:
        with files.machine_faults(final):
            tmp.mkdir()
            for name, group in tensors.items():
                save_file({key: value.detach().contiguous() for key, value in group.items()}, tmp / f"{name}.safetensors")
        files.write_json(tmp / "state.json", state or {})
        files.write_json(tmp / "manifest.json", {path.name: files.sha256_file(path) for path in sorted(tmp.iterdir())})
        files.publish_folder(tmp, final)
    except SafetensorError as error:  # safetensors hides the operating system's error in a text of its own
        raise EnvironmentFault(f"{final}: cannot be written: {error}") from error
    finally:
        files.discard(tmp)


def newest_checkpoint(root: Path, required: Sequence[str]) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None when there is none at all. Says which it skipped, and why.

    Raises:
        InputError: there are checkpoints and none of them verifies.
    """
    folders = sorted(root.glob("step-*"), reverse=True) if root.exists() else []
    problems: list[Problem] = []
    for folder in folders:
        found = _problems(folder, required)
        if not found:
            for problem in problems:
                log.warning("skipped a damaged checkpoint: %s", problem)
            return Checkpoint(folder, int(folder.name.removeprefix("step-")))
        problems += found
    if problems:
        raise InputError([*problems, Problem("no checkpoint verifies", file=str(root), hint="remove the folder to start over")])
    return None


def verified(folder: Path, required: Sequence[str]) -> Checkpoint:
    """One folder that :func:`save_tensors` wrote, named ``WORD-NUMBER``, after comparing it with its manifest.

    Raises:
        InputError: a file is missing or damaged.
    """
    problems = _problems(folder, required)
    if problems:
        raise InputError(problems)
    return Checkpoint(folder, int(folder.name.rpartition("-")[2]))


def _problems(folder: Path, required: Sequence[str]) -> list[Problem]:
    """What is wrong with a checkpoint folder; empty when it can be trusted."""
    try:
        manifest: dict[str, str] = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return [Problem("not readable", file=str(folder / "manifest.json"))]
    missing = [name for name in [*(f"{r}.safetensors" for r in required), "state.json"] if name not in manifest]
    problems = [Problem("not in the manifest", file=str(folder / name)) for name in missing]
    for name, digest in manifest.items():
        path = folder / name
        if not path.is_file():
            problems.append(Problem("missing", file=str(path)))
        elif (actual := files.sha256_file(path)) != digest:
            problems.append(Problem(f"sha256 is {actual[:12]}, manifest says {digest[:12]}", file=str(path)))
    return problems
