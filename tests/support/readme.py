"""Whether a run's README names what lies in the run's folder."""

from __future__ import annotations

from pathlib import Path

from align.pipeline.readme import unexplained


def every_file_is_explained(run: Path) -> None:
    """In the folder itself and in the results of its stages."""
    readme = (run / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in run.iterdir() if not path.name.startswith(".") and path.name not in readme]
    missing += [f"{result.name}/{name}" for result in (run / "stages").iterdir() for name in unexplained(result)]
    assert not missing
