"""Small line charts as inline SVG. Colours are CSS variables, so they follow the page's theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 58, 16, 12, 46  # room for labels that a phone can show


@dataclass(frozen=True)
class Series:
    """Attributes:
    name: for the tooltip of its points.
    points: (x, y), drawn in order.
    style: CSS class, "a" or "b".
    marks: whether to draw the points.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "a"
    marks: bool = True


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between low and high, about `count` of them."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(x: float) -> str:
    """A short label: 1.5M, 200k, 0.35."""
    x += 0.0  # no minus before a zero
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:g}{suffix}"
    return f"{x:.3g}"


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    title: str,
    width: int = 430,
    height: int = 230,
    percent: bool = False,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    focus: tuple[float, float] | None = None,
    baseline: float | None = None,
    baseline_label: str = "",
    x_mark: float | None = None,
) -> str:
    """An SVG element. Values that are not finite are left out.

    Args:
        percent: label y as percentages.
        bounds: values that y can take: the axis does not go beyond them.
        focus: y shows these values and those between them, and lines are cut off where they
            leave it; None: all values.
        baseline: a dashed horizontal line at this y.
        x_mark: a vertical line at this x.
    """
    kept = [
        [(x, y) for x, y in one.points if math.isfinite(x) and math.isfinite(y)] for one in series
    ]
    xs = [x for points in kept for x, _ in points]
    ys = [y for points in kept for _, y in points] if focus is None else [*focus]
    if not xs:
        return ""
    if baseline is not None and not math.isfinite(baseline):
        baseline = None
    if baseline is not None:
        ys.append(baseline)
    low_x, high_x = min(xs), max(xs)
    margin = 0.06 * (max(ys) - min(ys)) or 0.5
    low_y, high_y = max(min(ys) - margin, bounds[0]), min(max(ys) + margin, bounds[1])
    span_x = high_x - low_x or 1.0

    def px(x: float) -> float:
        return LEFT + (x - low_x) / span_x * (width - LEFT - RIGHT)

    def py(y: float) -> float:
        return TOP + (high_y - y) / (high_y - low_y) * (height - TOP - BOTTOM)

    def y_text(y: float) -> str:
        return f"{100 * y + 0.0:.3g}%" if percent else number(y)

    out = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title, quote=True)}">'
    ]
    for y in ticks(low_y, high_y):
        out.append(
            f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{py(y):.1f}" '
            f'y2="{py(y):.1f}"/><text class="tick" x="{LEFT - 7}" y="{py(y) + 4:.1f}" '
            f'text-anchor="end">{y_text(y)}</text>'
        )
    for x in ticks(low_x, high_x, 5):
        out.append(
            f'<text class="tick" x="{px(x):.1f}" y="{height - BOTTOM + 19}" '
            f'text-anchor="middle">{number(x)}</text>'
        )
    out.append(
        f'<text class="label" x="{(LEFT + width - RIGHT) / 2:.1f}" y="{height - 4}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )
    if x_mark is not None:
        out.append(
            f'<line class="mark" x1="{px(x_mark):.1f}" x2="{px(x_mark):.1f}" y1="{TOP}" '
            f'y2="{height - BOTTOM}"/>'
        )
    if baseline is not None:
        out.append(
            f'<line class="base" x1="{LEFT}" x2="{width - RIGHT}" y1="{py(baseline):.1f}" '
            f'y2="{py(baseline):.1f}"/><text class="tick" x="{width - RIGHT - 2}" '
            f'y="{py(baseline) - 4:.1f}" text-anchor="end">{escape(baseline_label)}</text>'
        )
    x, y, w, h = LEFT - 5, TOP - 5, width - LEFT - RIGHT + 10, height - TOP - BOTTOM + 10
    # a viewport of its own cuts off what lies outside
    out.append(f'<svg x="{x}" y="{y}" width="{w}" height="{h}" viewBox="{x} {y} {w} {h}">')
    for one, points in zip(series, kept, strict=True):
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
        out.append(f'<polyline class="line {one.style}" points="{path}"/>')
        if one.marks:
            for x, y in points:
                value = f"{100 * y:.1f}%" if percent else f"{y:.4g}"
                out.append(
                    f'<circle class="dot {one.style}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.6">'
                    f"<title>{escape(one.name)} at {number(x)}: {value}</title></circle>"
                )
    out.append("</svg></svg>")
    return "".join(out)
