"""Curves as an SVG, without a plotting library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, MARGIN = 640, 360, 48
TICKS = 5
STYLES = ('stroke="#c0392b" stroke-width="3" stroke-opacity="0.55"', 'stroke="#1f4e9c" stroke-width="1.2"')
"""Of the first curve, the second, and so on in turns: a thin one over a broad one shows where they are equal."""


def svg(curves: Mapping[str, Sequence[float]], title: str, x_label: str, y_label: str) -> str:
    """A picture of `curves`, by name, each of values at 0, 1, 2, ...; the vertical axis starts at 0.

    Raises:
        ValueError: there is no curve, or one without values.
    """
    if not curves or not all(curves.values()):
        raise ValueError("nothing to draw: no curve, or one without values")
    last = max(1, max(len(values) for values in curves.values()) - 1)
    top = max(max(values) for values in curves.values()) or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 20, title, "middle"),
        _text(WIDTH / 2, HEIGHT - 8, x_label, "middle"),
        _text(8, MARGIN - 14, y_label, "start"),
        *_ticks(last, top),
    ]
    for index, (name, values) in enumerate(curves.items()):
        style = STYLES[index % len(STYLES)]
        points = " ".join(f"{_x(i, last):.1f},{_y(value, top):.1f}" for i, value in enumerate(values))
        parts.append(f'<polyline points="{points}" fill="none" {style}/>')
        y = MARGIN + 16 * (index + 1)
        parts.append(f'<line x1="{WIDTH - 250}" y1="{y - 4}" x2="{WIDTH - 226}" y2="{y - 4}" {style}/>')
        parts.append(_text(WIDTH - 220, y, name, "start"))
    return "\n".join([*parts, "</svg>", ""])


def _ticks(last: int, top: float) -> list[str]:
    parts = []
    for i in range(TICKS):
        share = i / (TICKS - 1)
        x, y = _x(share * last, last), _y(share * top, top)
        parts.append(f'<line x1="{MARGIN}" y1="{y:.1f}" x2="{WIDTH - MARGIN / 2}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(MARGIN - 6, y + 4, f"{share * top:.2f}", "end"))
        parts.append(_text(x, HEIGHT - MARGIN + 18, f"{share * last:.0f}", "middle"))
    return parts


def _x(value: float, last: int) -> float:
    return MARGIN + (WIDTH - 1.5 * MARGIN) * value / last


def _y(value: float, top: float) -> float:
    return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * value / top


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
