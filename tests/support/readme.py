"""Whether a run's README names what lies in the run's folder."""

from __future__ import annotations

from pathlib import Path

from align.pipeline.artifacts import read_manifest
from align.pipeline.readme import unexplained
from align.recipe.schema import stage_class


def every_file_is_explained(run: Path) -> None:
    """In the folder itself and in the results of its stages."""
    readme = (run / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in run.iterdir() if not path.name.startswith(".") and path.name not in readme]
    for result in (run / "stages").iterdir():
        kind = stage_class(read_manifest(result).identity.kind)
        missing += [f"{result.name}/{name}" for name in unexplained(result, kind)]
        missing += [f"{result.name}/{name}" for name in kind.files if name not in readme]
    assert not missing
