"""Computing charts: the positions of lines, bars, ticks and labels. The page's template makes SVG of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from align.runs.values import short

WIDTH, HEIGHT = 440, 230
"""Size of a line chart, in its own units."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 10, 8, 34
_POINTS = 120
"""Number of points of a line; longer lines are thinned out."""
_FEW = 40
"""Lines with up to this many points have a mark at each."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A series to draw: (step, value) in order."""

    label: str
    points: Sequence[Point]
    color: int
    """Number of a colour in the page's palette."""
    marked: bool = False
    """Draw it dashed and with marks, as for held-out data, which have few points."""


@dataclass(frozen=True)
class Mark:
    """A point of a line."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Drawn:
    """A line with its positions in the chart."""

    label: str
    color: int
    dashed: bool
    path: str
    """Points of a polyline."""
    marks: tuple[Mark, ...]
    shown: bool
    """Are its points visibly marked? All points have a tooltip."""
    last: str


@dataclass(frozen=True)
class LineChart:
    """Lines over steps."""

    title: str
    unit: str
    description: str
    """The chart in words, for readers who cannot see it."""
    lines: tuple[Drawn, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    x_label: str = "step"
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def line_chart(title: str, lines: Sequence[Line], unit: str = "") -> LineChart | None:
    """The chart of those ``lines`` that have points; None when none has."""
    lines = [Line(line.label, thin(line.points), line.color, line.marked) for line in lines if line.points]
    if not lines:
        return None
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    low, high = min(ys), max(ys)
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    x0, x1, y0, y1 = min(xs), max(xs), low - room, high + room
    if x0 == x1:
        x0, x1 = x0 - 0.5, x1 + 0.5

    def place(point: Point) -> tuple[float, float]:
        x = _LEFT + (point[0] - x0) / (x1 - x0) * (WIDTH - _LEFT - _RIGHT)
        y = HEIGHT - _BOTTOM - (point[1] - y0) / (y1 - y0) * (HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    drawn = []
    for line in lines:
        places = [place(point) for point in line.points]
        marks = tuple(
            Mark(x, y, f"{line.label}, step {short(step)}: {short(value)}")
            for (x, y), (step, value) in zip(places, line.points, strict=True)
        )
        path, few = " ".join(f"{x:g},{y:g}" for x, y in places), len(places) <= _FEW
        drawn.append(
            Drawn(line.label, line.color, line.marked, path, marks, line.marked or few, short(line.points[-1][1]))
        )
    described = "; ".join(
        f"{line.label} from {short(line.points[0][1])} to {short(line.points[-1][1])}" for line in lines
    )
    return LineChart(
        title,
        unit,
        described,
        tuple(drawn),
        tuple((place((x, y0))[0], label) for x, label in ticks(x0, x1, least=1.0)),
        tuple((place((x0, y))[1], label) for y, label in ticks(y0, y1)),
    )


def thin(points: Sequence[Point], limit: int = _POINTS) -> list[Point]:
    """At most ``limit`` of ``points``: the first, the last, and the lowest and highest of each stretch between, so that
    peaks remain."""
    if len(points) <= limit:
        return list(points)
    inner = points[1:-1]
    stretches = (limit - 2) // 2
    kept = [points[0]]
    for k in range(stretches):
        stretch = inner[k * len(inner) // stretches : (k + 1) * len(inner) // stretches]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return [*kept, points[-1]]


def ticks(low: float, high: float, *, least: float = 0.0) -> list[tuple[float, str]]:
    """Round numbers between ``low`` and ``high``, about six of them, at least ``least`` apart, with labels of equal
    precision.

    >>> [label for _, label in ticks(0.46, 0.71)]
    ['0.50', '0.55', '0.60', '0.65', '0.70']
    """
    raw = max((high - low) / 6, least)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [k * step for k in range(first, last + 1)]
    plain = max(map(abs, values), default=0.0) < 1e5 and digits <= 4
    labels = [f"{value + 0.0:,.{digits}f}" for value in values] if plain else []
    precision = 3
    while len(set(labels)) < len(values):  # more digits until all labels differ
        labels = [f"{value + 0.0:.{precision}g}" for value in values]
        precision += 1
        if precision > 17:
            break
    return list(zip(values, labels, strict=True))


# Bars

_VALUE = 150
"""Width reserved for a bar's value."""


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart."""

    label: str
    parts: tuple[tuple[float, float, int], ...]
    """(where it begins, its width, its colour)."""
    value: str


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars, one below the other, each of one or more parts."""

    title: str
    series: tuple[tuple[str, int], ...]
    """Names and colours of the parts."""
    bars: tuple[Bar, ...]
    label_width: int
    width: int = WIDTH
    row: int = 20

    @property
    def height(self) -> int:
        """Height of all rows."""
        return self.row * len(self.bars) + 4

    @property
    def description(self) -> str:
        """The chart in words, for readers who cannot see it."""
        return "; ".join(f"{bar.label}: {bar.value}" for bar in self.bars)


def bar_chart(
    title: str,
    rows: Sequence[tuple[str, Sequence[float], str]],
    series: Sequence[tuple[str, int]],
    label_width: int = 120,
) -> BarChart | None:
    """Bars of (label, lengths of the parts, value as text); None when all are empty."""
    longest = max((sum(parts) for _, parts, _ in rows), default=0.0)
    if longest <= 0:
        return None
    scale = (WIDTH - label_width - _VALUE) / longest
    bars = []
    for label, parts, value in rows:
        begins, placed = float(label_width), []
        for part, (_, color) in zip(parts, series, strict=True):
            placed.append((round(begins, 1), round(part * scale, 1), color))
            begins += part * scale
        bars.append(Bar(label, tuple(placed), value))
    return BarChart(title, tuple(series), tuple(bars), label_width)
