"""What the report shows of supervised fine-tuning."""

from __future__ import annotations

from align.report.views.view import HELD_OUT_LOSS, LOSS, View


class SftView(View):
    """The loss on held-out conversations."""

    measures = (HELD_OUT_LOSS,)
    panels = (LOSS,)
    held_out_key = "eval_data"
    all_numbers = False
