"""Bars in SVG: groups of them, one colour for each series, a whisker from the worst to the best run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 340
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 64, 36
COLOURS = ("#1f6fb4", "#d9822b", "#8a8a8a", "#4f9d5d", "#9b59b6")
STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Bar:
    median: float
    least: float
    most: float


def bars(title: str, unit: str, groups: Sequence[str], series: Mapping[str, Sequence[Bar | None]]) -> str:
    top = max(bar.most for row in series.values() for bar in row if bar) or 1.0
    step = tick(top / 5)
    top = (int(top / step) + 1) * step
    plot_width, plot_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def y(value: float) -> float:
        return TOP + plot_height * (1 - value / top)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="15">{escape(title)}, {escape(unit)}</text>',
    ]
    at = LEFT
    for name, colour in zip(series, COLOURS, strict=False):
        out.append(f'<rect x="{at}" y="32" width="12" height="12" fill="{colour}"/>')
        out.append(f'<text x="{at + 17}" y="43">{escape(name)}</text>')
        at += 36 + 7 * len(name)
    for number in range(round(top / step) + 1):
        value = number * step
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    slot = plot_width / len(groups)
    width = min(46.0, slot * 0.8 / len(series))
    for index, group in enumerate(groups):
        middle = LEFT + slot * (index + 0.5)
        out.append(f'<text x="{middle:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{escape(group)}</text>')
        for place, (row, colour) in enumerate(zip(series.values(), COLOURS, strict=False)):
            if (bar := row[index]) is None:
                continue
            x = middle + (place - len(series) / 2) * width
            centre = x + width / 2
            out.append(
                f'<rect x="{x + 1:.1f}" y="{y(bar.median):.1f}" width="{width - 2:.1f}"'
                f' height="{y(0) - y(bar.median):.1f}" fill="{colour}"/>'
            )
            whisker = f'y1="{y(bar.least):.1f}" y2="{y(bar.most):.1f}"'
            out.append(f'<line x1="{centre:.1f}" x2="{centre:.1f}" {whisker} stroke="black"/>')
            label = f'x="{centre:.1f}" y="{y(bar.most) - 4:.1f}" text-anchor="middle" font-size="10"'
            out.append(f"<text {label}>{digits(bar.median)}</text>")
    return "\n".join([*out, "</svg>"]) + "\n"


def tick(rough: float) -> float:
    """The smallest round step that is not less."""
    magnitude = 10.0 ** math.floor(math.log10(rough))
    return next(step * magnitude for step in STEPS if step * magnitude >= rough * 0.999)


def digits(value: float) -> str:
    """Three of them, and never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
