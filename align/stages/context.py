"""What the runner passes to a stage: where to read and write, and how to print."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from align.recipe.schema import DataSource, Model

if TYPE_CHECKING:
    from align.data.formats.formats import Want


@dataclass
class StageContext:
    """One run of one stage.

    ``out`` is an empty folder: what the stage writes into it becomes the artefact, which appears by a single rename
    after the stage returned. ``work`` is kept after an interruption: checkpoints and caches of this identity (same
    config, same inputs) go there.
    """

    name: str
    seed: int
    out: Path
    work: Path
    cache: Path
    """Folder shared by all stages and runs, for encoded data and the like, keyed by content."""
    model: Model
    """The recipe's model, for stages that name no policy."""
    resolve: Callable[[str], Path | str]
    """A reference as written in the recipe -> a local path, or a hub id (str)."""
    trained_on: Callable[[str], Sequence[tuple[DataSource, Want]]] = lambda reference: ()
    """A reference to a model -> the data sources that the stages of this recipe which made it were trained on, each
    with its use; empty for any other model."""
    console: Console = field(default_factory=Console)
    summary: dict[str, Any] = field(default_factory=dict)
    """Headline numbers for the manifest and the report. JSON values only."""
    encoder_digest: str | None = None
    """Digest of tokenizer and template (``Encoder.digest``), set by stages that use an encoder; written into the
    manifest."""

    def policy(self, reference: str | None) -> Model:
        """The model that a stage's ``policy`` key names; the recipe's model when it names none.

        The model settings of the recipe are not applied to a trained policy, whose folder has its own template.
        """
        if reference is None:
            template = self.model.chat_template
            found = {
                "path": str(self.resolve(self.model.path)),
                "chat_template": None if template is None else str(self.resolve(template)),
            }
            return self.model.model_copy(update=found)
        return Model(path=str(self.resolve(reference)))

    def note(self, values: Mapping[str, Any]) -> None:
        """Add headline numbers to the summary."""
        self.summary.update(values)

    def warn(self, text: str) -> None:
        """Warn the user about the result, now and in the report."""
        self.summary["warnings"] = [*self.summary.get("warnings", ()), text]
        self.console.print(f"{self.name}  note: {text}", highlight=False, markup=False, soft_wrap=True)
