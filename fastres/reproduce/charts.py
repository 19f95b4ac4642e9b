"""Charts as HTML: lines in inline SVG that stretches with the page, and text around it that does not.

Colours are CSS variables, so that one chart reads well in light and in dark.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from fastres.plots.series import FEW_POINTS, Curve, Float64Array, Line
from fastres.reproduce.markup import text

SIDE = 1_000  # units of a chart's width and height
COLOURS, DASHES = 7, 4  # s0 to s6 and d0 to d3 of report.css
SHADES = 8  # of wrong answers: h1 to h8 of report.css, h0 for none
SETTLED = 0.1  # of the x axis; the y axis shows all that comes after it


def line_chart(
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    describe: str,
    key: Sequence[tuple[str, str]] = (),
    points: int = 300,
    small: bool = False,
) -> str:
    """Curves over one x axis, y from 0 to what the settled part needs; what lies above is cut, and the chart says so.

    Args:
        curves: Each in its colour, training thin and test bold.
        x_label, y_label: What the axes hold.
        describe: For those who cannot see it.
        key: (CSS class, text) of what thin, bold and pale mean.
        points: Of each line at most.
        small: Of half the height.
    """
    lines = [line for curve in curves for line in curve.lines]
    if not lines:
        return ""
    left = 0.0 if min(line.x[0] for line in lines) >= 0 else min(float(line.x[0]) for line in lines)
    right = max([left + 1e-9, *(float(line.x[-1]) for line in lines)])
    settled = left + SETTLED * (right - left)
    highest = max(float(line.y.max()) for line in lines)
    shown = max(
        (float(line.y[line.x >= settled].max()) for line in lines if (line.x >= settled).any()), default=highest
    )
    y_ticks = ticks(0.0, 1.05 * shown if 1.3 * shown < highest else highest)
    top = y_ticks[-1] or 1.0  # of a network that makes no errors
    x_ticks = [tick for tick in ticks(left, right) if tick <= right * (1 + 1e-9)]

    def across(x: float) -> int:
        return round(SIDE * (x - left) / (right - left))

    def down(y: float) -> int:
        return round(SIDE * (1 - y / top))

    grid = "".join(f"M0 {down(y)}h{SIDE}" for y in y_ticks)
    parts = [f'<path class="grid" d="{grid}"/>']
    for n, curve in enumerate(curves):
        parts += [_line(line, kind, n, across, down, points) for line, kind in _kinds(curve)]
        if len(curves) == 1:
            for place in (*([] if curve.warmup_end is None else [curve.warmup_end]), *curve.lr_falls):
                parts.append(f'<path class="aside" d="M{across(place)} 0v{SIDE}"/>')
    y_step, x_step = (spacing[1] - spacing[0] if len(spacing) > 1 else 1 for spacing in (y_ticks, x_ticks))
    labels = [f'<span class="y" style="bottom:{_percent(y / top)}">{_tick(y, y_step)}</span>' for y in y_ticks]
    labels += [
        f'<span class="x" style="left:{_percent((x - left) / (right - left))}">{_tick(x, x_step)}</span>'
        for x in x_ticks
    ]
    labels += [f'<span class="xt">{text(x_label)}</span>', f'<span class="yt">{text(y_label)}</span>']
    cut = f"<figcaption>The axis ends at {top:g}; the first values lie above it.</figcaption>" if highest > top else ""
    svg = (
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" aria-label="{text(describe)}">'
        f"{''.join(parts)}</svg>"
    )
    tag = '<figure class="small">' if small else "<figure>"
    return f'{tag}<div class="frame">{svg}{"".join(labels)}</div>\n{_legend(curves, key)}{cut}</figure>\n'


def _kinds(curve: Curve) -> list[tuple[Line, str]]:
    return [(line, kind) for line, kind in ((curve.train, "thin"), (curve.test, "bold")) if line is not None]


def _line(
    line: Line, kind: str, n: int, across: Callable[[float], int], down: Callable[[float], int], points: int
) -> str:
    """A line; behind it what was logged, or the band."""
    shade, dash = f"s{n % COLOURS}", n // COLOURS % DASHES
    step = max(1, math.ceil(len(line.x) / points))
    kept = np.r_[0 : len(line.x) - 1 : step, len(line.x) - 1]
    found = []
    if line.low is not None and line.high is not None:
        there = _path(line.x[kept], line.high[kept], across, down)
        back = _path(line.x[kept[::-1]], line.low[kept[::-1]], across, down)
        found.append(f'<path class="{shade} band" d="{there}L{back[1:]}z"/>')
    elif line.smoothed:
        found.append(f'<path class="{shade} pale" d="{_path(line.x[kept], line.y[kept], across, down)}"/>')
    dashed = f" d{dash}" if dash else ""
    found.append(f'<path class="{shade} {kind}{dashed}" d="{_path(line.x[kept], line.smooth[kept], across, down)}"/>')
    if len(line.x) < FEW_POINTS:
        dots = "".join(f"M{across(x)} {down(y)}h0" for x, y in zip(line.x, line.smooth, strict=True))
        found.append(f'<path class="{shade} {kind} dots" d="{dots}"/>')
    return "".join(found)


def _path(x: Float64Array, y: Float64Array, across: Callable[[float], int], down: Callable[[float], int]) -> str:
    return "M" + "L".join(f"{across(a)} {down(b)}" for a, b in zip(x, y, strict=True))


def _legend(curves: Sequence[Curve], key: Sequence[tuple[str, str]]) -> str:
    entries = []
    if len(curves) > 1:
        for n, curve in enumerate(curves):
            dash = f"d{n // COLOURS % DASHES}"
            entries.append(f'<li class="s{n % COLOURS}"><i class="{dash}"></i><span>{text(curve.label)}</span></li>')
    shade = "s0" if len(curves) == 1 else ""
    entries += [f'<li class="{shade}"><i class="{kind}"></i><span>{text(words)}</span></li>' for kind, words in key]
    return f'<ul class="legend">{"".join(entries)}</ul>\n' if entries else ""


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to at or above `high`, at most `most` and one."""
    span = max(high - low, 1e-9)
    raw = span / (most - 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(k * step, 10) for k in range(first, last + 1)]


def _tick(value: float, step: float) -> str:
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    decimals += step * 10**decimals % 1 > 1e-6  # 2.5 and the like
    return f"{value:,.{decimals}f}"


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """A bar a row, the longest full: (name, length, what it says)."""
    longest = max((length for _, length, _ in rows), default=0) or 1
    body = "".join(
        f"<tr><th scope=row>{text(name)}</th><td class=n>{text(words)}</td>"
        f'<td class="bar"><i style="width:{_percent(length / longest)}"></i></td></tr>\n'
        for name, length, words in rows
    )
    return f'<table class="bars wide"><tbody>{body}</tbody></table>\n'


def stacked(rows: Sequence[tuple[str, float, str]]) -> str:
    """One bar of parts, and a table that names them: (name, length, what it says)."""
    total = sum(length for _, length, _ in rows)
    if total <= 0:
        return ""
    pieces, names = [], []
    for n, (name, length, words) in enumerate(rows):
        shade, share = f"s{n % COLOURS}", length / total
        said = f"{text(name)} {text(words)}, {100 * share:.1f} %"
        pieces.append(f'<i class="{shade}" style="width:{_percent(share)}" title="{said}"></i>')
        names.append(f'<li class="{shade}"><i class="box"></i><span>{said}</span></li>')
    return f'<div class="stack" aria-hidden="true">{"".join(pieces)}</div><ul class="legend">{"".join(names)}</ul>\n'


def matrix(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Answers by true class: rows are true, columns predicted; wrong answers are the darker the more there are."""
    most = max((n for i, row in enumerate(counts) for j, n in enumerate(row) if i != j), default=0) or 1
    head = "".join(f"<th scope=col><span>{text(name)}</span></th>" for name in names)
    lines = []
    for i, (name, row) in enumerate(zip(names, counts, strict=True)):
        cells = "".join(_cell(n, most, hit=i == j) for j, n in enumerate(row))
        lines.append(f"<tr><th scope=row>{text(name)}</th>{cells}</tr>\n")
    return (
        f'<div class="scroll"><table class="matrix"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>\n"
    )


def _cell(count: int, most: int, *, hit: bool) -> str:
    shade = "hit" if hit else f"h{math.ceil(SHADES * count / most)}"
    return f"<td class={shade}>{count:,}</td>"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}".rstrip("0").rstrip(".") + "%"
