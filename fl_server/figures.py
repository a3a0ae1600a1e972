"""The figures of a report: learning curves, ROC, precision-recall, reliability, decision curves, forest plots, who contributed.

Each is a matplotlib figure; `png` and `svg` make bytes of it, the same ones for the same figure.

What several sites have together is black: a thick line, or a diamond in a forest plot. Anything beside it is blue, and
told apart by line style or marker as well, so that a grey print and any common colour blindness leave the difference.
"""

import io
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

DPI = 160  # two device pixels for each CSS pixel of the page, and sharp in print
NAMED_MAX = 42  # more sites than this are drawn without their names, which would run into each other
MARKED_MAX = 40  # with more rounds than this, markers run into each other and are left out
ROUNDS_MAX = 400  # columns of the participation figure; more rounds are drawn in bands, the worst of each band
STATES = ("contributed", "missing", "not asked")

_STATE_COLOURS = ("#2a6f97", "#E69F00", "#eef1f5")
MAE, BIAS, CONCORDANCE = "mean absolute error", "bias", "Lin's concordance"
_BLUE, _GREY, _INK, _FAINT = "#0072B2", "#8a8f98", "#1d2530", "#d5dae1"
_ORANGE = "#E69F00"


@dataclass(frozen=True)
class Curve:
    """One line of a figure; NaN in `points` (x, y) is a gap."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Estimate:
    """One row of a forest plot: an AUROC with the ends of its interval; None where there is none."""

    name: str
    auroc: float | None
    low: float | None
    high: float | None


def png(figure: Figure) -> bytes:
    # Without the metadata two reports of one run are equal byte for byte.
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def svg(figure: Figure) -> bytes:
    """Letters as outlines, so that it looks the same everywhere; ids by hash, so that it is the same every time."""
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "isocenter"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


@dataclass(frozen=True)
class Group:
    """One mark of a reliability figure: mean score, share of positives with the ends of its interval, and images."""

    score: float
    observed: float
    low: float
    high: float
    images: int


def per_round(curves: Sequence[Curve], label: str, selected: int) -> Figure:
    """A quantity over the rounds; the first curve is the black one. A dotted vertical line marks the selected round."""
    figure, (axes,) = _canvas(1, 7.4, 3.5)
    rounds = [x for curve in curves for x, _ in curve.points] or [selected]
    marked = max(rounds) - min(rounds) < MARKED_MAX
    for place, curve in enumerate(curves):
        xs, ys = [x for x, _ in curve.points], [y for _, y in curve.points]
        shade, style, width, marker = (_BLUE, "--", 1.6, "s") if place else (_INK, "-", 2.4, "o")
        (line,) = axes.plot(xs, ys, color=shade, linestyle=style, linewidth=width, label=curve.name)
        line.set(marker=marker if marked else "", markersize=4)
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
    if len(curves) > 1:  # outside, so that it never covers a line
        figure.legend(loc="outside right upper", frameon=False, fontsize=8.5, handlelength=2.6)
    return figure


def roc(panels: Mapping[str, Curve | None]) -> Figure:
    """ROC curves, one square panel for each target; None is a target without one."""
    figure, grid = _grid(len(panels), 4.4 if len(panels) == 1 else 3.2)
    for axes, (target, curve) in zip(grid, panels.items(), strict=False):
        axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=1)
        if curve is not None:  # its name goes to the lower right, which is empty for any model worth a look
            xs, ys = [x for x, _ in curve.points], [y for _, y in curve.points]
            axes.plot(xs, ys, color=_INK, linewidth=2.4, label=curve.name, zorder=5)
            axes.legend(frameon=False, fontsize=8 if len(panels) == 1 else 7, loc="lower right", handlelength=2.6)
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel="1 - specificity", ylabel="sensitivity", aspect="equal")
        if len(panels) > 1:
            axes.set_title(target, fontsize=10, color=_INK)
    return figure


def precision_recall(panels: Mapping[str, tuple[Curve, float] | None]) -> Figure:
    """Precision over recall, one square panel for each target, with the share of positives as the line of no skill."""
    figure, grid = _grid(len(panels), 4.4 if len(panels) == 1 else 3.2)
    for axes, (target, found) in zip(grid, panels.items(), strict=False):
        if found is not None:
            curve, prevalence = found
            axes.axhline(
                prevalence, color=_GREY, linestyle=":", linewidth=1, label=f"share of positives {prevalence:.3f}"
            )
            xs, ys = [x for x, _ in curve.points], [y for _, y in curve.points]
            axes.step(xs, ys, where="pre", color=_INK, linewidth=2.4, label=curve.name, zorder=5)
            axes.legend(frameon=False, fontsize=8 if len(panels) == 1 else 7, loc="best", handlelength=2.6)
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.03), aspect="equal")
        axes.set(xlabel="recall (sensitivity)", ylabel="precision (PPV)")
        if len(panels) > 1:
            axes.set_title(target, fontsize=10, color=_INK)
    return figure


def reliability(panels: Mapping[str, Sequence[Group]]) -> Figure:
    """Share of positives over mean score, one square panel for each target; a larger mark is of more images."""
    figure, grid = _grid(len(panels), 4.4 if len(panels) == 1 else 3.2)
    for axes, (target, groups) in zip(grid, panels.items(), strict=False):
        axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=1)
        most = max((group.images for group in groups), default=1)
        for group in groups:
            axes.plot([group.score] * 2, [group.low, group.high], color=_INK, linewidth=1.4)
            axes.scatter([group.score], [group.observed], s=14 + 90 * group.images / most, color=_INK, zorder=5)
        axes.plot([g.score for g in groups], [g.observed for g in groups], color=_INK, linewidth=1, alpha=0.5)
        axes.set(
            xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="mean score", ylabel="share of positives", aspect="equal"
        )
        if len(panels) > 1:
            axes.set_title(target, fontsize=10, color=_INK)
    return figure


def decision(panels: Mapping[str, tuple[Curve, Curve] | None]) -> Figure:
    """Net benefit over threshold probability: the model (black), calling everybody positive (blue, dashed), and nobody (0)."""
    figure, grid = _grid(len(panels), 3.2, 3.0) if len(panels) > 1 else _canvas(1, 7.4, 3.5)
    for axes, (target, curves) in zip(grid, panels.items(), strict=False):
        axes.axhline(0, color=_GREY, linewidth=1, label="nobody")
        if curves is not None:
            for curve, style, shade, width in zip(curves, ("-", "--"), (_INK, _BLUE), (2.4, 1.6), strict=True):
                xs, ys = [x for x, _ in curve.points], [y for _, y in curve.points]
                axes.plot(xs, ys, color=shade, linestyle=style, linewidth=width, label=curve.name)
            highest = max(0.02, *(y for curve in curves for _, y in curve.points))
            axes.set_ylim(-highest / 3, highest * 1.08)  # what calls everybody positive falls without end
            axes.legend(frameon=False, fontsize=8 if len(panels) == 1 else 7, loc="upper right", handlelength=2.6)
        axes.set(xlim=(0, 1), xlabel="threshold probability", ylabel="net benefit")
        if len(panels) > 1:
            axes.set_title(target, fontsize=10, color=_INK)
    return figure


def forest(panels: Mapping[str, Sequence[Estimate]], label: str = "AUROC") -> Figure:
    """What `label` says with its interval, one panel for each target and a row for each estimate; the first is the pooled one."""
    rows = max(len(estimates) for estimates in panels.values())
    height = min(12.0 if len(panels) == 1 else 6.0, 0.9 + 0.3 * rows)
    figure, grid = _grid(len(panels), 3.2, height) if len(panels) > 1 else _canvas(1, 7.4, height)
    for axes, (target, estimates) in zip(grid, panels.items(), strict=False):
        _forest_panel(axes, estimates, label)
        if len(panels) > 1:
            axes.set_title(target, fontsize=10, color=_INK)
    return figure


def errors(unit: str, panels: Mapping[str, Sequence[Estimate]]) -> Figure:
    """Figures of a number with their intervals, one panel for each figure and a row for each estimate, the pooled one first."""
    rows = max(len(estimates) for estimates in panels.values())
    figure, grid = _grid(len(panels), 3.2, min(6.0, 0.9 + 0.3 * rows))
    for axes, (name, estimates) in zip(grid, panels.items(), strict=False):
        _rows_of(axes, estimates)
        axes.set(xlabel=name if name == CONCORDANCE else f"{name}, {unit}")
        if name == BIAS:
            axes.axvline(0, color=_GREY, linewidth=1, zorder=0)
    return figure


def _forest_panel(axes: Axes, estimates: Sequence[Estimate], label: str) -> None:
    least = _rows_of(axes, estimates) - 0.03
    if label == "AUROC":
        axes.axvline(0.5, color=_GREY, linewidth=1, zorder=0)
        axes.set_xlim(min(0.48, least), 1.02)
    else:  # of an overlap no value is chance
        axes.set_xlim(max(0.0, least), 1.02)
    axes.set(xlabel=label)


def _rows_of(axes: Axes, estimates: Sequence[Estimate]) -> float:
    """A row for each estimate; where the lowest interval begins, or 1."""
    pooled = estimates[0].auroc
    if pooled is not None:
        axes.axvline(pooled, color=_GREY, linestyle=":", linewidth=1.2, zorder=0)
    lowest = 1.0
    for row, estimate in enumerate(estimates):
        if estimate.auroc is None:
            continue
        low, high = (estimate.auroc if end is None else end for end in (estimate.low, estimate.high))
        lowest = min(lowest, low)
        shade, marker, size = (_BLUE, "s", 5) if row else (_INK, "D", 7)
        axes.plot([low, high], [row, row], color=shade, linewidth=1.5 if row else 2.4, solid_capstyle="butt")
        axes.plot([estimate.auroc], [row], color=shade, marker=marker, markersize=size)
    named = len(estimates) <= NAMED_MAX
    names = [estimate.name if estimate.auroc is not None else f"{estimate.name} (–)" for estimate in estimates]
    axes.set_yticks(range(len(names)) if named else [], names if named else [])
    axes.set_ylim(len(estimates) - 0.4, -0.6)
    axes.set(ylabel="" if named else f"{len(estimates) - 1} sites")
    axes.grid(False, axis="y")
    return lowest


def participation(states: Mapping[str, Sequence[int]], rounds: Sequence[int]) -> Figure:
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
    named = len(states) <= NAMED_MAX
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
    return figure


def _chance(axes: Axes, values: Sequence[float]) -> None:
    """The line at 0.5, named below its left end, where no curve begins, and limits that show it whenever it is near."""
    axes.axhline(0.5, color=_GREY, linewidth=1, zorder=0)
    axes.annotate(
        "chance", (0, 0.5), xycoords=("axes fraction", "data"), xytext=(4, -10), textcoords="offset points",
        fontsize=8, color=_GREY,
    )  # fmt: skip
    axes.set_ylim(min(0.45, *(value - 0.03 for value in values)) if values else 0.45, 1.01)


@dataclass(frozen=True)
class Cell:
    """One place of a matrix: an AUROC with the ends of its interval, None where there is none; `home`: it gets a frame."""

    auroc: float | None
    low: float | None = None
    high: float | None = None
    home: bool = False


def matrix(panels: Mapping[str, Mapping[str, Sequence[Cell]]], columns: Sequence[str]) -> Figure:
    """Models (rows) by where they are tested (columns), a panel for each target; darker is higher, every cell has its numbers.

    One hue from light to dark, so that a grey print keeps the order. The last column, all sites together, stands apart.
    """
    rows = max(len(models) for models in panels.values())
    longest = max(len(name) for models in panels.values() for name in models)
    width, height = 1.3 + 0.075 * longest + 0.95 * len(columns), (0.95 + 0.46 * rows) * len(panels)
    figure, grid = _canvas(1, max(4.2, width), height, len(panels))
    hues = ["#f4f8fb", "#9fc3da", "#1f5f8b", "#0b2f4a"]
    shades = LinearSegmentedColormap.from_list("light to dark", hues)
    for axes, (target, models) in zip(grid, panels.items(), strict=True):
        values = [[math.nan if cell.auroc is None else cell.auroc for cell in cells] for cells in models.values()]
        axes.imshow(np.ma.masked_invalid(values), cmap=shades, vmin=0.5, vmax=1.0, aspect="auto", interpolation="none")
        for row, cells in enumerate(models.values()):
            for column, cell in enumerate(cells):
                _matrix_cell(axes, (column, row), cell)
        for edge in range(1, len(columns)):
            last = edge == len(columns) - 1
            axes.axvline(edge - 0.5, color="white", linewidth=5 if last else 1.5)
        for edge in range(1, len(models)):
            axes.axhline(edge - 0.5, color="white", linewidth=1.5)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(models)), list(models))
        axes.xaxis.tick_top()
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        if len(panels) > 1:
            axes.set_title(target, fontsize=10, color=_INK)
    return figure


def _matrix_cell(axes: Axes, place: tuple[int, int], cell: Cell) -> None:
    column, row = place
    if cell.auroc is None:
        axes.text(column, row, "–", ha="center", va="center", fontsize=9, color=_GREY)
        return
    ink = "white" if cell.auroc > 0.78 else _INK  # where the shade is dark
    told = cell.low is not None and cell.high is not None
    axes.text(column, row - (0.14 if told else 0), f"{cell.auroc:.3f}", ha="center", va="center", fontsize=9, color=ink)
    if told:
        span = f"{cell.low:.2f} to {cell.high:.2f}"
        axes.text(column, row + 0.24, span, ha="center", va="center", fontsize=6.5, color=ink)
    if cell.home:
        frame = Rectangle((column - 0.46, row - 0.45), 0.92, 0.9, fill=False, edgecolor=_ORANGE, linewidth=2)
        axes.add_patch(frame)


def _grid(panels: int, width: float, height: float | None = None) -> tuple[Figure, list[Axes]]:
    """Up to three panels in a row, each `width` x `height` inches, square without a height; spare ones hidden."""
    columns = min(3, panels)
    rows = math.ceil(panels / columns)
    figure, grid = _canvas(columns, width * columns, (height or width) * rows, rows)
    for axes in grid[panels:]:
        axes.set_visible(False)
    return figure, grid


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


def canaries(inside: Sequence[float], outside: Sequence[float], caption: str) -> Figure:
    """Scores of the canaries that were in a run and of those that were not; where they lie apart, presence can be told."""
    figure, (axes,) = _canvas(1, 7.4, 3.2)
    edges = np.histogram_bin_edges(np.concatenate([inside, outside]), 40).tolist()
    axes.hist(outside, edges, color=_GREY, alpha=0.55, label=f"out ({len(outside)})")
    axes.hist(inside, edges, histtype="step", color=_INK, linewidth=2, label=f"in ({len(inside)})")
    axes.set(xlabel="score: log likelihood ratio over all steps", ylabel="canaries")
    axes.set_title(caption, fontsize=9, color=_INK, loc="left")
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def membership(rates: Sequence[tuple[float, float]], caption: str) -> Figure:
    """(false, true positive rate) of telling members by their loss, on logarithmic axes, beside chance."""
    figure, (axes,) = _canvas(1, 4.6, 4.2)
    least = min(0.5, *(rate for point in rates for rate in point if rate > 0)) / 1.5
    axes.plot([least, 1], [least, 1], color=_GREY, linestyle=":", linewidth=1.2, label="chance")
    shown = [(x, y) for x, y in rates if x > 0 and y > 0]
    axes.plot([x for x, _ in shown], [y for _, y in shown], color=_INK, linewidth=2.2, label="by loss")
    axes.set(xscale="log", yscale="log", xlim=(least, 1.1), ylim=(least, 1.1))
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.set_title(caption, fontsize=9, color=_INK, loc="left")
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")
    return figure


def pictures(rows: Sequence[tuple[str, Sequence[tuple[str, NDArray[np.float32]]]]]) -> Figure:
    """Rows of pictures (S, S) in [0, 1], each picture under its caption and each row with its name at the left."""
    columns = max(len(row) for _, row in rows)
    figure, grid = _canvas(columns, 1.75 * columns, 2.15 * len(rows), len(rows))
    for place, axes in enumerate(grid):
        name, row = rows[place // columns]
        number = place % columns
        if number >= len(row):
            axes.set_visible(False)
            continue
        caption, picture = row[number]
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(caption, fontsize=7.5, color=_INK)
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        if number == 0:
            axes.set_ylabel(textwrap.fill(name, 24), fontsize=8, color=_INK)
    return figure
