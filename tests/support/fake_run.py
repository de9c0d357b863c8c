"""Run folders as a run leaves them, made from plain values: for tests of what is read from them. Nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from align.files import write_json
from align.pipeline import artifacts
from align.pipeline.artifacts import Identity, artefact_digest
from align.pipeline.locks import LOCK

TIME = "2026-01-02T03:04:05+00:00"


def event(stage: str, what: str, **more: Any) -> dict[str, Any]:
    """A line of the history."""
    return {"time": TIME, "stage": stage, "event": what, **more}


def ran(stage: str, reason: str = "first run", seconds: float = 12.0) -> list[dict[str, Any]]:
    """The history of a stage that went well."""
    return [event(stage, "started", reason=reason, identity="0"), event(stage, "finished", seconds=seconds)]


class FakeRun:
    """``runs/NAME`` with a recipe; results and events are added."""

    def __init__(
        self, folder: Path, stages: Mapping[str, Mapping[str, Any]], model: str = "base", **recipe: Any
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / LOCK).touch()
        tree = {
            "name": folder.name,
            "model": model,
            **recipe,
            "stages": {name: dict(spec) for name, spec in stages.items()},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        about = {
            "recipe": "recipe.yaml",
            "started": TIME,
            "root": ".",
            "folder": str(Path.cwd()),
            "packages": {"python": "3.11"},
        }
        write_json(folder / "run.json", about)
        self._kinds = {name: str(spec["kind"]) for name, spec in stages.items()}

    def history(self, events: Sequence[Mapping[str, Any]]) -> FakeRun:
        """Add lines to the history."""
        with (self.folder / "history.jsonl").open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(line) + "\n" for line in events)
        return self

    def result(
        self,
        stage: str,
        files: Mapping[str, str | bytes],
        *,
        type: str = "policy",
        summary: Mapping[str, Any] | None = None,
        inputs: Mapping[str, str] | None = None,
        needs: Sequence[str] = (),
        seconds: float = 12.0,
    ) -> Path:
        """A stage's result, with its events; ``needs`` are stages that it was made from."""
        folder = self.folder / "stages" / stage
        folder.mkdir(parents=True)
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        given = {f"stage:{need}": artefact_digest(self.folder / "stages" / need) for need in needs} | dict(inputs or {})
        identity = Identity(kind=self._kinds[stage], config={}, seed=17, model=None, inputs=given)
        artifacts.write_manifest(folder, type=type, stage=stage, identity=identity, encoder=None, summary=summary or {})
        self.history(ran(stage, seconds=seconds))
        return folder
