"""What the report shows of a stage that runs one of TRL's trainers: every number that the trainer logs."""

from __future__ import annotations

from align.pipeline.artifacts import Identity
from align.report.views.view import View
from align.runs.values import text


class TrlView(View):
    """Names the TRL trainer as the maker of the model."""

    def made_by(self, identity: Identity) -> str:
        """See :meth:`View.made_by`."""
        return f"{text(identity.config, 'trainer')} of TRL"
