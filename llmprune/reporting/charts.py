"""Charts as SVG text, in colours that are variables of the page (`STYLE`), so that they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from llmprune.reporting.words import escape

WIDTH, LEFT, RIGHT = 760, 60, 12
CELL, HEIGHT = 22, 170
CHARACTER = 6.6
"""Approximate width of a character of a label."""
COLOURS = 4

STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --ink: #0b0b0b; --soft: #52514e; --line: #dedcd6; --panel: #f3f2ee;
  --low: #e9f1fb; --high: #0d366b; --s0: #2a78d6; --s1: #eb6834; --s2: #1b9e77; --s3: #6a4fc4; --warn: #a15c00; }
@media (prefers-color-scheme: dark) {
  :root { --page: #1a1a19; --ink: #f5f4f0; --soft: #c3c2b7; --line: #3a3936; --panel: #242422;
    --low: #202c3a; --high: #a9ccf5; --s0: #3987e5; --s1: #e08054; --s2: #35b58b; --s3: #9a86e8; --warn: #eda100; } }
svg { display: block; width: 100%; height: auto; max-width: 900px; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.cell { fill: color-mix(in oklab, var(--high) var(--v), var(--low)); }
.none { fill: none; stroke: var(--line); stroke-dasharray: 3 2; }
.grid { stroke: var(--line); }
.series { fill: none; stroke-width: 2; stroke-linejoin: round; }
.scale { display: inline-block; width: 120px; height: 10px; margin: 0 .5em;
  background: linear-gradient(in oklab to right, var(--low), var(--high)); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin: 0 .4em 0 1em; }
"""


def heat_map(rows: Mapping[str, Sequence[float]], top: float) -> str:
    """A heat map with a row of cells per label; missing values (NaN) are outlines.

    Args:
        rows: label -> values, one a block.
        top: the value of the strongest colour.
    """
    left = CHARACTER * max(map(len, rows)) + 12
    width = (WIDTH - left - RIGHT) / max(map(len, rows.values()))
    parts = []
    for number, (label, values) in enumerate(rows.items()):
        y = number * CELL
        parts.append(_text(left - 8, y + 15, label, "end"))
        for block, value in enumerate(values):
            missing = math.isnan(value)
            look = 'class="none"' if missing else f'class="cell" style="--v:{_percent(value, top)}"'
            title = f"{label}, block {block}: {'left dense' if missing else f'{value:.4f}'}"
            parts.append(
                f'<rect x="{left + block * width + 0.5:.1f}" y="{y + 1}" width="{width - 1:.1f}" '
                f'height="{CELL - 2}" {look}><title>{escape(title)}</title></rect>'
            )
    bottom = len(rows) * CELL
    blocks = max(map(len, rows.values()))
    return _svg(bottom + 36, [*parts, *_block_numbers(blocks, left + width / 2, width, bottom + 14)])


def scale(top: float) -> str:
    """The colour scale of a heat map."""
    return f'<p class="note">0<span class="scale"></span>{top:.3g}</p>'


def lines(series: Mapping[str, Sequence[float]], show: Callable[[float], str] = "{:.3g}".format) -> str:
    """A line chart of series over the blocks, from zero; with a legend where there are several.

    Args:
        series: name -> values, one a block.
        show: formats a value.
    """
    blocks = max(map(len, series.values()))
    steps = _steps(max((value for values in series.values() for value in values), default=0.0))
    width = (WIDTH - LEFT - RIGHT) / max(blocks - 1, 1)
    floor = HEIGHT + 8

    def at(block: int, value: float) -> tuple[float, float]:
        return LEFT + block * width, floor - HEIGHT * value / steps[-1]

    parts = []
    for value in steps:
        y = at(0, value)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, show(value), "end"))
    for number, (name, values) in enumerate(series.items()):
        colour = f"var(--s{number % COLOURS})"
        points = [at(block, value) for block, value in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="series" style="stroke:{colour}" points="{path}"/>')
        for block, (x, y) in enumerate(points):
            title = escape(f"{name}, block {block}: {show(values[block])}")
            parts.append(
                f'<circle style="fill:{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{title}</title></circle>'
            )
    return _key(series) + _svg(floor + 36, [*parts, *_block_numbers(blocks, LEFT, width, floor + 14)])


def _key(names: Iterable[str]) -> str:
    """The legend; empty for a single series."""
    entries = [
        f'<span class="key" style="background:var(--s{number % COLOURS})"></span>{escape(name)}'
        for number, name in enumerate(names)
    ]
    return f'<p class="note">{"".join(entries)}</p>' if len(entries) > 1 else ""


def _block_numbers(blocks: int, first: float, width: float, y: float) -> list[str]:
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if width * step >= 20)
    numbers = [_text(first + block * width, y, str(block), "middle") for block in range(0, blocks, every)]
    return [*numbers, _text(first + (blocks - 1) * width / 2, y + 16, "block", "middle")]


def _steps(top: float) -> list[float]:
    """Round tick values from zero to `top` or a little more."""
    unit = 10.0 ** math.floor(math.log10(top)) if top > 1e-300 else 1.0
    step = next(unit * part for part in (0.2, 0.5, 1, 2, 5) if unit * part * 5 >= top)
    return [step * number for number in range(max(math.ceil(top / step - 1e-9), 1) + 1)]


def _percent(value: float, top: float) -> str:
    return f"{100 * min(max(value / top, 0.0), 1.0) if top > 0 else 0:.1f}%"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, parts: list[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'
