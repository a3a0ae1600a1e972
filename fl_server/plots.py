"""Plots of the dashboard as coordinates, which a template draws: lines over rounds, and who took part in which round.

Each has its summary in words, for whoever cannot see it, and lines differ by more than their colour.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 340  # about the width of a telephone, so that text is never smaller than intended
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 10, 152
TICKS_MOST = 5
STRIP_HEIGHT = 14
_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Curve:
    """One quantity by round; None where it is not known."""

    name: str
    points: Sequence[tuple[int, float | None]]


@dataclass(frozen=True)
class Drawn:
    """A curve in coordinates. `paths`: one SVG path for each unbroken part; `dots`: every known point."""

    name: str
    paths: list[str]
    dots: list[tuple[float, float]]
    last: str


@dataclass(frozen=True)
class Chart:
    """Curves with axes. `x`, `y`: (place, text) of each tick."""

    title: str
    summary: str
    curves: list[Drawn]
    x: list[tuple[float, str]]
    y: list[tuple[float, str]]


def chart(title: str, curves: Sequence[Curve], rounds: int, most: float = math.inf) -> Chart:
    """`curves` over rounds 0 to `rounds`; no tick is above `most`, such as 1 for a share."""
    known = [value for curve in curves for _, value in curve.points if value is not None and math.isfinite(value)]
    ticks = _ticks(min(known, default=0.0), max(known, default=1.0), most)
    low, high, last = ticks[0], ticks[-1], max(1, rounds)

    def place(number: int, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * number / last
        return round(x, 1), round(BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low), 1)

    drawn, told = [], []
    for curve in curves:
        parts: list[list[tuple[float, float]]] = [[]]
        for number, value in curve.points:
            if value is None or not math.isfinite(value):
                parts.append([])
            else:
                parts[-1].append(place(number, value))
        values = [value for _, value in curve.points if value is not None]
        final = f"{values[-1]:.3f}" if values else "not known"
        paths = ["M" + " L".join(f"{x} {y}" for x, y in part) for part in parts if len(part) > 1]
        drawn.append(Drawn(curve.name, paths, [dot for part in parts for dot in part], final))
        told.append(f"{curve.name} {f'from {values[0]:.3f} to {final}' if len(values) > 1 else final}")
    step = max(1, math.ceil(last / TICKS_MOST))
    xs = [(place(number, low)[0], str(number)) for number in range(0, last + 1, step)]
    ys = [(place(0, tick)[1], f"{tick:g}") for tick in ticks]
    return Chart(title, f"{title} by round: {'; '.join(told)}.", drawn, xs, ys)


def _ticks(low: float, high: float, most: float) -> list[float]:
    """Round numbers that enclose low and high."""
    if high - low < 1e-9:
        low, high = low - 0.05, min(high + 0.05, most)
    raw = (high - low) / (TICKS_MOST - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * each for each in _STEPS if power * each >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class Cell:
    """One round of one site: a high bar if it contributed, a low one if not."""

    x: float
    y: float
    width: float
    height: float
    inside: bool


def strip(took_part: Sequence[bool]) -> list[Cell]:
    """A bar for each round, over 100 units of width."""
    wide = 100 / max(1, len(took_part))
    cells = []
    for number, inside in enumerate(took_part):
        high = STRIP_HEIGHT if inside else 3
        cells.append(
            Cell(
                round(number * wide, 3),
                STRIP_HEIGHT - high,
                round(max(wide * 0.84, wide - 1.0), 3),
                float(high),
                inside,
            )
        )
    return cells


def ranges(numbers: Sequence[int]) -> str:
    """ "1–3, 7" for [1, 2, 3, 7]."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in spans)
