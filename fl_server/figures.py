"""The figures of a report as PNG bytes: loss and AUROC per round, ROC curves, and who contributed in which round.

Each site keeps its colour, line style and marker in every figure (they follow the order of sites in the study). The
palette is that of Okabe and Ito with two of Paul Tol's, chosen so that people with any common colour blindness tell the
lines apart; style and marker repeat the distinction for grey prints. Pooled values are thick and black.
"""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

POOLED = "all sites"
DPI = 160  # two device pixels for each CSS pixel of the page, and sharp in print
NAMED_MAX = 14  # more sites than this are drawn in grey without a legend: nobody reads a legend of fifty names
MARKED_MAX = 40  # with more rounds than this, markers run into each other and are left out
ROUNDS_MAX = 400  # columns of the participation figure; more rounds are drawn in bands, the worst of each band
STATES = ("contributed", "missing", "not asked")

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#882255", "#999933")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STATE_COLOURS = ("#2a6f97", "#E69F00", "#eef1f5")
_GREY, _INK, _FAINT = "#8a8f98", "#1d2530", "#d5dae1"


@dataclass(frozen=True)
class Curve:
    """One line of a figure. `name` is a site or POOLED; NaN in `points` (x, y) is a gap; `note` goes to the legend."""

    name: str
    points: Sequence[tuple[float, float]]
    note: str = ""


def colour(site: str, sites: Sequence[str]) -> str:
    """The colour of `site` on the page and in every figure: its place in `sites` decides."""
    return _COLOURS[sites.index(site) % len(_COLOURS)]


def per_round(curves: Sequence[Curve], sites: Sequence[str], label: str, selected: int) -> bytes:
    """A quantity over the rounds, one line for each curve; a dotted vertical line marks the selected round."""
    figure, (axes,) = _canvas(1, 7.4, 3.5)
    rounds = [x for curve in curves for x, _ in curve.points] or [selected]
    for curve in curves:
        _line(axes, curve, sites, marked=max(rounds) - min(rounds) < MARKED_MAX)
    axes.axvline(selected, color=_GREY, linestyle=":", linewidth=1.2, zorder=0)
    axes.annotate(
        "selected", (selected, 1), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points",
        ha="center", fontsize=8, color=_GREY,
    )  # fmt: skip
    margin = max(0.4, 0.02 * (max(rounds) - min(rounds)))
    axes.set_xlim(min(rounds) - margin, max(rounds) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="round", ylabel=label)
    if label.startswith("AUROC"):
        _chance(axes, [y for curve in curves for _, y in curve.points if not math.isnan(y)])
    _legend(figure, axes, sites)
    return _png(figure)


def roc(panels: Mapping[str, Sequence[Curve]], sites: Sequence[str]) -> bytes:
    """ROC curves, one square panel for each target."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    side = 4.4 if len(panels) == 1 else 3.2
    figure, grid = _canvas(columns, side * columns, side * rows, rows)
    for axes, (target, curves) in zip(grid, panels.items(), strict=False):
        axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=1)
        for curve in curves:
            _line(axes, curve, sites, marked=False)
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel="1 - specificity", ylabel="sensitivity", aspect="equal")
        if len(panels) > 1:
            axes.set_title(target, fontsize=10, color=_INK)
        if curves and len(sites) <= NAMED_MAX:  # the lower right is empty for any model worth a look
            axes.legend(frameon=False, fontsize=8 if len(panels) == 1 else 7, loc="lower right", handlelength=2.6)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return _png(figure)


def participation(states: Mapping[str, Sequence[int]], rounds: Sequence[int]) -> bytes:
    """A grid of sites by rounds; `states[site]` holds an index into STATES for each round."""
    cells = np.array([states[site] for site in states], dtype=np.int64)
    width = cells.shape[1]
    if width > ROUNDS_MAX:
        edges = np.linspace(0, width, ROUNDS_MAX + 1).astype(int)
        shown = np.where(cells == 1, 3, cells)  # within a band "missing" wins, so no gap can disappear from the picture
        cells = np.stack([shown[:, a:b].max(axis=1) for a, b in itertools.pairwise(edges)], axis=1)
        cells = np.where(cells == 3, 1, cells)
    figure, (axes,) = _canvas(1, 7.4, min(12.0, 1.15 + 0.27 * len(cells)))
    extent = (rounds[0] - 0.5, rounds[-1] + 0.5, len(cells) - 0.5, -0.5)
    axes.imshow(
        cells, cmap=ListedColormap(_STATE_COLOURS), vmin=0, vmax=2, aspect="auto", extent=extent, interpolation="none"
    )
    if len(rounds) <= MARKED_MAX:
        for edge in rounds[1:]:
            axes.axvline(edge - 0.5, color="white", linewidth=1.5)
    named = len(states) <= 3 * NAMED_MAX
    if named:
        for edge in range(1, len(cells)):
            axes.axhline(edge - 0.5, color="white", linewidth=1.5)
    axes.set_yticks(range(len(states)) if named else [], list(states) if named else [])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("round")
    axes.set_ylabel("" if named else f"{len(states)} sites")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    handles = [Patch(color=shade, label=state) for shade, state in zip(_STATE_COLOURS, STATES, strict=True)]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    return _png(figure)


def _line(axes: Axes, curve: Curve, sites: Sequence[str], *, marked: bool) -> None:
    xs, ys = [x for x, _ in curve.points], [y for _, y in curve.points]
    name = f"{curve.name} {curve.note}".strip()
    if curve.name == POOLED:
        axes.plot(xs, ys, color=_INK, linewidth=2.4, marker="o" if marked else None, markersize=4, label=name, zorder=5)
    elif len(sites) > NAMED_MAX:
        axes.plot(xs, ys, color=_GREY, linewidth=0.7, alpha=0.6)
    else:
        place = sites.index(curve.name)
        style = _STYLES[place % len(_STYLES)]
        marker = _MARKERS[place % len(_MARKERS)] if marked else None
        shade = colour(curve.name, sites)
        axes.plot(xs, ys, color=shade, linestyle=style, linewidth=1.5, marker=marker, markersize=4, label=name)


def _chance(axes: Axes, values: Sequence[float]) -> None:
    """The line at 0.5, named at its right end, and limits that show it whenever it is near."""
    axes.axhline(0.5, color=_GREY, linewidth=1, zorder=0)
    axes.annotate(
        "chance", (0, 0.5), xycoords=("axes fraction", "data"), xytext=(4, 3), textcoords="offset points",
        fontsize=8, color=_GREY,
    )  # fmt: skip
    axes.set_ylim(min(0.45, *(value - 0.03 for value in values)) if values else 0.45, 1.01)


def _legend(figure: Figure, axes: Axes, sites: Sequence[str]) -> None:
    """Outside on the right, so that it never covers a line; with many sites only the pooled line is named."""
    handles, labels = axes.get_legend_handles_labels()
    if len(sites) > NAMED_MAX:
        axes.plot([], [], color=_GREY, linewidth=0.7, label=f"each of {len(sites)} sites")
        handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8.5, handlelength=2.6)


def _canvas(columns: int, width: float, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure of `width` x `height` inches; without pyplot, so no global state is touched."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.grid(True, color=_FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GREY)
        axes.tick_params(colors=_INK, labelsize=8.5)
        axes.xaxis.label.set(color=_INK, fontsize=9)
        axes.yaxis.label.set(color=_INK, fontsize=9)
    return figure, grid


def _png(figure: Figure) -> bytes:
    # Without the metadata two reports of one run are equal byte for byte.
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
