"""Checkpoints from which a training run resumes: written atomically, checked by digest, never pickled.

``ROOT/step-00000100/`` holds safetensors files, ``state.json`` and a manifest of sha256 sums. A folder gets its name
only once it is complete, and is used only when every file in its manifest is there and has the digest written there.

Where the processes of a run each hold a part of every tensor (some of its rows), each writes its part, to
``weights-00000-of-00002.safetensors`` and so on, and any number of processes can resume from them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from align import files, sealed
from align.errors import EnvironmentFault, InputError, Problem
from align.training.launch import ALONE, Ranks

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

    def saved(self, name: str) -> TensorFiles:
        """The tensors ``name``, of which one reads what one needs."""
        return TensorFiles([self.folder / file for file in _files_of(self.folder, name)])

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


class TensorFiles:
    """Tensors in one safetensors file, or in several with a part of every tensor each: its rows, in the order of the
    files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._parts: list[Any] = [safe_open(path, "pt") for path in paths]

    def keys(self) -> list[str]:
        """Their names."""
        return list(self._parts[0].keys())

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        shapes = [part.get_slice(key).get_shape() for part in self._parts]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()

    def rows(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Some rows of a tensor; all of them by default, and of what has no dimension."""
        if not self.shape(key):
            scalar: Tensor = self._parts[0].get_tensor(key)
            return scalar
        found, begin = [], 0
        for part in self._parts:
            rows = part.get_slice(key)
            count = rows.get_shape()[0]
            low, high = max(0, start - begin), count if stop is None else min(count, stop - begin)
            if low < high:
                found.append(rows[low:high])
            begin += count
        return torch.cat(found) if found else self._parts[0].get_tensor(key)[:0]


def part_name(name: str, part: int, parts: int) -> str:
    """What the tensors ``name`` are called where each of several processes saves a part of them."""
    return name if parts == 1 else f"{name}-{part:05d}-of-{parts:05d}"


def _files_of(folder: Path, name: str) -> list[str]:
    """The files of a checkpoint that hold the tensors ``name``: one file, or one for each part. All must be there."""
    part = next(folder.glob(f"{name}-*-of-*.safetensors"), None)
    parts = 1 if part is None else int(part.stem.rpartition("-")[2])
    return [f"{part_name(name, number, parts)}.safetensors" for number in range(parts)]


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Write one checkpoint, make it visible, and only then remove the oldest beyond ``keep``.

    Args:
        tensors: those that this process writes.
        ranks: the processes that write it, all of which must call this.

    Raises:
        EnvironmentFault: disk full, read-only and the like, for any of the processes; older checkpoints are untouched.
    """
    final = root / f"step-{step:08d}"
    save_tensors(final, tensors, {"step": step, **state}, ranks=ranks)
    for old in sorted(root.glob("step-*"))[:-keep] if ranks.first else ():
        files.remove_folder(old)
    return final


def save_tensors(
    final: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any] | None = None,
    *,
    ranks: Ranks = ALONE,
) -> None:
    """Write the folder ``final``, whole or not at all: ``NAME.safetensors`` for each group of each of the processes
    ``ranks``, ``state.json`` of the first, and the manifest."""
    root = final.parent
    needed = sum(ranks.gather(sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())))
    tmp = root / ranks.broadcast_object(files.temporary(root).name if ranks.first else None)
    try:
        with _by_all(ranks):
            if ranks.first:
                files.make_folder(root)
                files.free_space_or_raise(root, needed)
                with files.machine_faults(final, lambda: needed):
                    tmp.mkdir()
        with _by_all(ranks):
            digests = _write(tmp, final, tensors, needed)
        known = {name: digest for part in ranks.gather(digests) for name, digest in part.items()}
        with _by_all(ranks):
            if ranks.first:
                files.write_json(tmp / "state.json", state or {})
                sealed.seal(tmp, known)
                files.publish_folder(tmp, final)
    finally:
        if ranks.first:
            files.discard(tmp)


def _write(tmp: Path, final: Path, tensors: Mapping[str, Mapping[str, Tensor]], needed: int) -> dict[str, str]:
    """Write this process's files; returns their digests."""
    digests = {}
    try:
        with files.machine_faults(final, lambda: needed):
            for name, group in tensors.items():
                path = tmp / f"{name}.safetensors"
                save_file({key: value.detach().contiguous() for key, value in group.items()}, path)
                digests[path.name] = files.sha256_file(path)
    except SafetensorError as error:  # safetensors hides the operating system's error in a text of its own
        raise EnvironmentFault(f"{final}: cannot be written: {error}") from error
    return digests


@contextmanager
def _by_all(ranks: Ranks) -> Iterator[None]:
    """What is inside succeeds in all processes, or raises the fault of the first that had one in all of them."""
    own: EnvironmentFault | None = None
    try:
        yield
    except EnvironmentFault as fault:
        own = fault
    problems = next((found for found in ranks.gather(own and own.problems) if found), None)
    if own is not None:
        raise own
    if problems:
        raise EnvironmentFault(problems)


def checkpoints(root: Path) -> list[Checkpoint]:
    """All checkpoint folders of a run, the newest first. They are not verified."""
    return [
        Checkpoint(folder, int(folder.name.removeprefix("step-")))
        for folder in sorted(root.glob("step-*"), reverse=True)
    ]


def newest_checkpoint(
    root: Path,
    required: Sequence[str],
    needs: Callable[[Mapping[str, Any]], list[Problem]] = lambda state: [],
    ranks: Ranks = ALONE,
) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None when the run has none. A warning names each one that was skipped, and
    why.

    Args:
        needs: gets a checkpoint's state and returns what is wrong with other files that resuming from it would read.
        ranks: the processes that resume from it, which share the checking; all of them must call this.

    Raises:
        InputError: the run has checkpoints and all are damaged.
    """
    problems: list[Problem] = []
    for checkpoint in checkpoints(root):
        own = _problems(checkpoint.folder, required, ranks) or needs(checkpoint.state())
        wrong = list(dict.fromkeys(problem for part in ranks.gather(own) for problem in part))
        if not wrong:
            for problem in problems if ranks.first else ():
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


def _problems(folder: Path, required: Sequence[str], ranks: Ranks = ALONE) -> list[Problem]:
    """What is wrong with a checkpoint folder; empty when it can be trusted. Each of several processes reads its share
    of the files."""
    present = sorted(path.name for path in folder.glob("*"))
    others = {name for number, name in enumerate(present) if number % ranks.world != ranks.rank}
    names = [file for name in required for file in _files_of(folder, name)]
    return sealed.damage(folder, [*names, "state.json"], only=lambda name: name not in others)


class BestWeights:
    """Weights of the best evaluation so far. A run that resumes from a checkpoint needs the weights that were the best
    when that checkpoint was saved: the newest ones up to its step.

    All processes of the run save and load them together, each its part of them if it holds a part.
    """

    def __init__(self, work: Path, ranks: Ranks = ALONE) -> None:
        self._work, self._root, self._ranks = work, work / "best", ranks

    def _folder(self, step: int) -> Path:
        return self._root / f"step-{step:08d}"

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keep the weights as they are after ``step`` (``tensors`` as in :func:`save_tensors`), and forget those that
        nothing needs any more."""
        save_tensors(self._folder(step), tensors, ranks=self._ranks)
        self.forget(step)

    def load(self, step: int) -> TensorFiles:
        """The weights after ``step``, which were the best. Raises InputError when they are damaged."""
        problems = [problem for part in self._ranks.gather(self.damage(step)) for problem in part]
        if problems:
            raise InputError(list(dict.fromkeys(problems)))
        return Checkpoint(self._folder(step), step).saved("weights")

    def damage(self, step: int) -> list[Problem]:
        """What is wrong with this process's share of the weights saved after ``step``."""
        return _problems(self._folder(step), ["weights"], self._ranks)

    def forget(self, now: int) -> None:
        """Remove weights that neither the run, now at step ``now``, nor any of its checkpoints needs."""
        if not self._ranks.first:
            return
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
