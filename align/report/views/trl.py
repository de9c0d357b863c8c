"""What the report shows of a stage that one of TRL's trainers runs: every number that it logs, as it is."""

from __future__ import annotations

from align.pipeline.artifacts import Identity
from align.report.views.view import View
from align.runs.values import text


class TrlView(View):
    """The trainer is what made the model."""

    def made_by(self, identity: Identity) -> str:
        """See :meth:`View.made_by`."""
        return f"{text(identity.config, 'trainer')} of TRL"
