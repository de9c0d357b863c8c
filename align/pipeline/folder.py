"""The run folder: where its parts are, and the files that record how it was made."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from align import files
from align.errors import InputError, Problem
from align.pipeline.artifacts import MANIFEST, Identity, package_versions
from align.pipeline.identity import redact
from align.pipeline.locks import LOCK
from align.pipeline.readme import readme
from align.recipe.load import LoadedRecipe


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or YAML 1.2 would not read as text."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = None if re.match(r"[A-Za-z_/]", value) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


@dataclass(frozen=True)
class RunFolder:
    """``runs/NAME``."""

    path: Path
    cache: Path
    """Folder shared by all runs."""

    @classmethod
    def of(cls, loaded: LoadedRecipe, runs_dir: Path) -> RunFolder:
        """The run folder of a recipe. Creates nothing. Raises :class:`InputError` when it would lie outside
        ``runs_dir``."""
        path = files.inside(runs_dir, runs_dir / files.safe_name(loaded.recipe.name))
        return cls(path, files.inside(runs_dir, runs_dir / ".cache"))

    @property
    def stages(self) -> Path:
        """Parent folder of the results."""
        return self.path / "stages"

    def stage(self, name: str) -> Path:
        """Folder of a stage's result, which may not exist yet."""
        return files.inside(self.path, self.stages / files.safe_name(name))

    def scratch(self, name: str) -> Path:
        """Parent folder of a stage's work folders, one for each identity that was tried."""
        return files.inside(self.path, self.path / "work" / files.safe_name(name))

    def work(self, name: str, identity: Identity) -> Path:
        """Folder for files that a stage keeps after an interruption. It depends on the identity: another config or
        input has another folder."""
        return self.scratch(name) / identity.digest[:16]

    def left(self, name: str, identity: Identity, *, checkpoints: bool) -> str:
        """A few words about what an earlier attempt at a stage left; empty when it left nothing.

        ``checkpoints`` says that the stage can only resume from checkpoints.
        """
        work = self.work(name, identity)
        step = newest_step(work)
        if step is not None:
            return f"going on from step {step}"
        if not has_content(work):
            return ""
        return "starting again (no checkpoint was left)" if checkpoints else "going on from an earlier attempt"

    def others(self, name: str, identity: Identity) -> list[str]:
        """For each unfinished attempt at a stage with other settings or inputs, a few words about how far it got."""
        own = self.work(name, identity)
        folders = sorted(self.scratch(name).glob("[!.]*"))
        steps = [newest_step(folder) for folder in folders if folder != own and has_content(folder)]
        return ["no checkpoint" if step is None else f"step {step}" for step in steps]

    def foreign(self, loaded: LoadedRecipe) -> list[str]:
        """The stages with finished results here, if none of them is in this recipe, so that the folder belongs to
        another recipe; else empty."""
        finished = sorted(place.name for place in self.stages.glob("[!.]*") if (place / MANIFEST).is_file())
        return [] if set(finished) & loaded.recipe.stages.keys() else finished

    def is_bare(self) -> bool:
        """Whether the folder has nothing that a run made or could resume from."""
        work = [entry for _, _, names in os.walk(self.path / "work") for entry in names]
        return not work and not has_content(self.stages)

    def forget(self, name: str, identity: Identity) -> None:
        """Remove the work folder of a finished identity. Those of other identities stay, since the user may return to
        them."""
        files.remove_folder(self.work(name, identity))
        if self.scratch(name).is_dir() and not any(self.scratch(name).iterdir()):
            files.remove_folder(self.scratch(name))

    def create(self) -> None:
        """Make the folder.

        Raises :class:`InputError` when the folder exists and is not a run folder (a run may delete files in it), and
        when links in it or in the cache lead out of the folder of all runs.
        """
        if self.path.is_dir() and has_content(self.path) and not (self.path / LOCK).is_file():
            raise InputError(
                f"{self.path} exists and is not a run folder", hint="move it away, or give the recipe another name"
            )
        for folder in (self.path, self.cache):
            for parent, folders, names in os.walk(folder):
                for name in (*folders, *names):
                    if (place := Path(parent, name)).is_symlink():
                        files.inside(self.path.parent, place)
        wanted = (self.path.parent, self.path, self.stages, self.path / "work", self.cache)
        for folder in wanted:
            files.make_folder(folder)

    def obstacle(self) -> Problem | None:
        """Why a run could not write here, as far as that can be known before it starts; None if it can."""
        for folder in (self.path.absolute(), self.cache.absolute()):
            nearest = next(place for place in (folder, *folder.parents) if place.exists())
            if not nearest.is_dir():
                return Problem(
                    "is a file, and a run needs a folder here",
                    file=str(nearest),
                    hint="move it away, or name another --runs-dir",
                )
            if not os.access(nearest, os.W_OK | os.X_OK):
                return Problem("cannot be written", file=str(nearest), hint="name another --runs-dir")
        return None

    def recover(self) -> None:
        """Repair what a killed run left. Only the holder of the lock may call it."""
        files.recover(self.path)
        files.recover(self.stages)
        for parent, _, _ in os.walk(self.path / "work"):  # unfinished checkpoints may be inside it at any depth
            files.recover(Path(parent))

    def record(self, loaded: LoadedRecipe) -> None:
        """Write recipe, command and versions of the run that is about to start."""
        recipe = yaml.dump(redact(loaded.tree.plain()), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)
        _write_changed(self.path / "README.md", readme(loaded.recipe.name, loaded.recipe.stages.values()))
        _write_changed(self.path / "recipe.yaml", recipe)
        run = {
            "command": redact(sys.argv),
            "recipe": str(loaded.path),
            "root": str(loaded.root),
            "folder": str(Path.cwd()),
        }
        run |= {"started": _now(), "packages": package_versions()}
        files.write_json(self.path / "run.json", run)

    def log(self, stage: str, event: str, **details: Any) -> None:
        """Add a line to ``history.jsonl``."""
        files.append_line(self.path / "history.jsonl", {"time": _now(), "stage": stage, "event": event, **details})


def newest_step(work: Path) -> int | None:
    """The step of the newest checkpoint in a work folder, unverified; None without one."""
    checkpoints = [
        *work.glob("checkpoints/step-*"),
        *(path.parent for path in work.glob(f"trl/checkpoint-*/{MANIFEST}")),
    ]
    return max((int(path.name.rpartition("-")[2]) for path in checkpoints), default=None)


def has_content(folder: Path) -> bool:
    """Whether a folder has entries that are not hidden; False when it does not exist."""
    return folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())


def _write_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        files.atomic_write(path, text)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
