"""Writes the table of presets into ``docs/your-data.md``: ``python -m align.recipe.manuals.preset_table
docs/your-data.md``."""

from __future__ import annotations

import sys
from pathlib import Path

from align.recipe.rows.presets import PRESETS

BEGIN, END = "<!-- presets: begin -->", "<!-- presets: end -->"


def table() -> str:
    """One row for each preset."""
    lines = ["| preset | for | where such rows come from | what it reads |", "|---|---|---|---|"]
    for name, preset in PRESETS.items():
        mark = " *" if (preset.marks or preset.holds) and not preset.asks else ""
        told = f". Has to be told more: `{preset.asks.split('}}')[0]}}}}}`" if preset.asks else ""
        says = preset.says.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{name}`{mark} | {preset.kind} | {preset.hub} | {says}{told} |")
    return "\n".join(lines)


def filled(page: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
