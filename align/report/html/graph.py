"""A drawing of a recipe's stages. A stage's column is the length of the longest chain of stages before it; arrows lead
from a result to the stages that read it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align.runs.record import RunRecord, StageRecord
from align.runs.values import duration
from align.terminal import byte_size

_WIDTH, _HEIGHT = 156, 88
"""Size of a stage's box."""
_ACROSS, _DOWN = 40, 18
"""Gaps between boxes."""
_PASSING = 14
"""Height reserved for an arrow that passes through a column."""
_MARGIN = 6
_READABLE = 1400

Place = str | tuple[str]
"""A stage, or a tuple with the stage whose result an arrow carries through a column to a later one."""


@dataclass(frozen=True)
class StageBox:
    """The box of a stage."""

    name: str
    kind: str
    state: str
    time: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Graph:
    """The whole drawing, in its own units."""

    nodes: tuple[StageBox, ...]
    arrows: tuple[tuple[str, str], ...]
    """(SVG path, tooltip)."""
    width: float
    height: float
    description: str
    node_width: int = _WIDTH
    node_height: int = _HEIGHT

    @property
    def fits(self) -> bool:
        """Whether it is still readable when scaled to the width of a window."""
        return self.width <= _READABLE


def graph(run: RunRecord) -> Graph:
    """Lay out the stages."""
    columns = _columns(run.stages)
    heights = [sum(_height(place) for place in column) + _DOWN * (len(column) - 1) for column in columns]
    tallest = max(heights, default=0)
    at: dict[tuple[Place, int], tuple[float, float]] = {}
    for number, (column, height) in enumerate(zip(columns, heights, strict=True)):
        y = _MARGIN + (tallest - height) / 2
        for place in column:
            at[place, number] = _MARGIN + number * (_WIDTH + _ACROSS), y
            y += _height(place) + _DOWN
    depth = _depths(run.stages)
    nodes, arrows, words = [], [], []
    for stage in run.stages:
        x, y = at[stage.name, depth[stage.name]]
        time = "" if stage.seconds is None else duration(stage.seconds)
        nodes.append(
            StageBox(
                stage.name,
                stage.kind,
                stage.state,
                time,
                byte_size(stage.manifest.bytes) if stage.manifest else "",
                x,
                y,
            )
        )
        for need in stage.needs:
            arrows.append((_path(need, stage.name, depth, at), f"{stage.name} reads the result of {need}"))
        words.append(
            f"{stage.name} ({stage.kind}, {stage.state})" + (f" reads {', '.join(stage.needs)}" if stage.needs else "")
        )
    width = 2 * _MARGIN + len(columns) * _WIDTH + (len(columns) - 1) * _ACROSS
    return Graph(tuple(nodes), tuple(arrows), max(width, 0), tallest + 2 * _MARGIN, "; ".join(words))


def _height(place: Place) -> int:
    return _HEIGHT if isinstance(place, str) else _PASSING


def _depths(stages: Sequence[StageRecord]) -> dict[str, int]:
    depth: dict[str, int] = {}
    for stage in stages:  # needs come first; one that does not belongs to a circle in an edited recipe
        depth[stage.name] = max((depth[need] + 1 for need in stage.needs if need in depth), default=0)
    return depth


def _columns(stages: Sequence[StageRecord]) -> list[list[Place]]:
    """The boxes and passing arrows in each column, from top to bottom, ordered to be near the boxes that they read
    from."""
    depth = _depths(stages)
    columns: list[list[Place]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    before: dict[tuple[Place, int], list[Place]] = {}
    for stage in stages:
        end = depth[stage.name]
        columns[end].append(stage.name)
        for need in stage.needs:
            begin = depth[need]
            for number in range(begin + 1, end):
                if (need,) not in columns[number]:
                    columns[number].append((need,))
                before[(need,), number] = [need if number == begin + 1 else (need,)]
            before.setdefault((stage.name, end), []).append(need if end == begin + 1 else (need,))
    for number, column in enumerate(columns[1:], 1):
        above = {place: k for k, place in enumerate(columns[number - 1])}

        def middle(place: Place, number: int = number, above: Mapping[Place, int] = above) -> float:
            read = [above[one] for one in before.get((place, number), ()) if one in above]
            return sum(read) / len(read) if read else float(len(above))

        column.sort(key=middle)
    return columns


def _path(need: str, name: str, depth: Mapping[str, int], at: Mapping[tuple[Place, int], tuple[float, float]]) -> str:
    """SVG path from the right side of one box to the left side of another, through gaps that all arrows of that stage
    share."""
    x, y = at[need, depth[need]]
    points = [(x + _WIDTH, y + _HEIGHT / 2)]
    for number in range(depth[need] + 1, depth[name]):
        x, y = at[(need,), number]
        points += [(x, y + _PASSING / 2), (x + _WIDTH, y + _PASSING / 2)]
    x, y = at[name, depth[name]]
    points.append((x, y + _HEIGHT / 2))
    path = f"M{points[0][0]:g} {points[0][1]:g}"
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        half = (x0 + x1) / 2
        path += f" C{half:g} {y0:g} {half:g} {y1:g} {x1:g} {y1:g}"
    return path
