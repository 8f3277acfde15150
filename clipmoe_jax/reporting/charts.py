"""Charts as inline SVG, whose colours are CSS variables of the page: light or dark as it is.

Letters: T points in a curve, R rows, C columns, E experts.
"""

import io
import re
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape

from clipmoe_jax.reporting.pictures import EXPERT_COLOURS

# Stand for CSS variables while matplotlib draws: colours that no chart has otherwise.
INK, MUTED, RULE, PAGE, ACCENT = "#010101", "#010102", "#010103", "#010104", "#010105"
_VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAGE: "--page", ACCENT: "--accent"}
MAX_POINTS = 240  # of a curve; more are averaged
MAX_IN_PANEL = 5  # curves
MAX_LABELS, MAX_CELLS = 300, 2000  # of a chart; each takes some milliseconds
WIDTH = 4.5  # of a panel in inches, 72 units of the SVG each
SCALE = 1.15  # pixels a unit where there is room
FONT = 10
NUMBER_AWAY, NUMBER_SIZE = 10.0, (11.0, 9.0)  # of a scatter's numbers: from their points, and of two digits


class Curve(NamedTuple):
    """A line of points x, y (T,). noisy: drawn faintly, with its running mean over it. dash: matplotlib's."""

    x: np.ndarray
    y: np.ndarray
    colour: str
    noisy: bool = False
    dash: Any = "-"


def expert_colour(expert: int) -> str:
    """Returns the colour of an expert, or of the stage that it came from; beyond ten they come again."""
    return EXPERT_COLOURS[expert % len(EXPERT_COLOURS)]


def draw_curves(
    name: str,
    alt: str,
    curves: dict[str, Curve],
    *,
    x: str,
    y: str,
    reference: tuple[str, float] | None = None,
    dots: bool = False,
    from_zero: bool = False,
    log_x: bool = False,
) -> Markup:
    """Draws lines by label. reference: the label and height of a level to compare with.

    More than MAX_IN_PANEL make a wide chart, whose legend stands beside it.
    """
    labels = [*curves, *([reference[0]] if reference else [])]
    is_wide = len(curves) > MAX_IN_PANEL
    columns = _legend_columns(labels, WIDTH)
    if is_wide:
        figure, axis = _panel(10, max(3.2, 0.6 + 0.2 * len(labels)))
    else:
        figure, axis = _panel(WIDTH, 2.7 + 0.2 * -(-len(labels) // columns))
    for label, curve in curves.items():
        xs, ys = _thin(np.asarray(curve.x)), _thin(np.asarray(curve.y))
        if curve.noisy and len(ys) > 12:
            if not is_wide:  # noise of many would hide their means
                axis.plot(xs, ys, color=curve.colour, linewidth=0.8, alpha=0.35)
            ys = _running_mean(ys, max(3, len(ys) // 12))
        look: dict[str, Any] = {"color": curve.colour, "linestyle": curve.dash, "label": label}
        axis.plot(xs, ys, linewidth=1.8, marker="o" if dots else None, **look)
    if reference:
        axis.axhline(reference[1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label=reference[0])
    if dots:
        axis.xaxis.set_major_locator(_whole_numbers())
    if log_x:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.margins(x=0.02, y=0.1)
    if from_zero:
        axis.set_ylim(bottom=0)
    if is_wide:
        _legend(axis, 1, loc="center left", bbox_to_anchor=(1, 0.5))
    elif len(labels) > 1:
        _legend_above(axis, columns)
    return _svg(figure, name, alt)


def draw_paired_bars(
    name: str,
    alt: str,
    labels: Sequence[str],
    pairs: dict[str, tuple[np.ndarray, np.ndarray | None]],
    *,
    x: str,
    strong: str,
) -> Markup:
    """Draws two horizontal bars for each label.

    pairs: {legend: (values (R,), what they may be off (R,) or None)}. strong: the label in bold.
    """
    _check_count(len(labels), MAX_LABELS)
    names = [textwrap.fill(label, 34) for label in labels]
    figure, axis = _panel(6.4, 0.9 + 0.4 * len(labels))
    rows = np.arange(len(labels))
    for (label, (values, spread)), shift, alpha in zip(pairs.items(), (-0.19, 0.19), (1, 0.5), strict=True):
        axis.barh(rows + shift, values, 0.34, color=ACCENT, alpha=alpha, linewidth=0, label=label)
        ends = values
        if spread is not None:
            axis.errorbar(values, rows + shift, xerr=spread, fmt="none", ecolor=INK, elinewidth=1)
            ends = values + spread
        for row, (value, end) in enumerate(zip(values, ends, strict=True)):
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            axis.annotate(f"{value:.1f}", (end, row + shift), fontsize=FONT - 1, color=INK, **place)
    axis.set_yticks(rows, names, color=INK)
    for tick in axis.get_yticklabels():
        tick.set(fontweight="bold" if tick.get_text() == strong else "normal", linespacing=1)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(False)
    axis.set_xlabel(x)
    _legend_above(axis, 2)
    return _svg(figure, name, alt)


def draw_scatter(
    name: str,
    alt: str,
    points: dict[str, tuple[float, float]],
    curves: dict[str, np.ndarray],
    *,
    x: str,
    y: str,
    strong: str,
) -> Markup:
    """Draws a point for each label, and its number beside it, from 1; the page lists the labels.

    points: {label: (x, y)}. curves: {label: (T, 2)}, faint lines through a point of that label. strong: the
    label whose point stands out.
    """
    _check_count(len(points), MAX_LABELS)
    figure, axis = _panel(6.0, 4.0)
    for curve in curves.values():
        axis.plot(*curve.T, color=MUTED, linewidth=1, marker=".", markersize=3, alpha=0.6)
    for label, (left, up) in points.items():
        fill, size = (ACCENT, 9) if label == strong else (PAGE, 6)
        axis.plot(left, up, "o", color=fill, markersize=size, markeredgecolor=INK, markeredgewidth=0.9)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.margins(0.08)
    axis.grid(axis="x", color=RULE, linewidth=0.6)
    figure.draw_without_rendering()  # places the axes
    places = axis.transData.transform(list(points.values())) * 72 / figure.dpi
    for number, (label, place, number_at) in enumerate(zip(points, places, _apart(places), strict=True), 1):
        weight = "bold" if label == strong else "normal"
        look: dict[str, Any] = {"fontsize": FONT - 1, "fontweight": weight, "ha": "center", "va": "center"}
        if np.hypot(*(number_at - place)) > 1.5 * NUMBER_AWAY:
            look["arrowprops"] = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0}
        offset = {"xytext": tuple(number_at - place), "textcoords": "offset points"}
        axis.annotate(str(number), points[label], color=INK, **offset, **look)
    return _svg(figure, name, alt)


def _apart(places: np.ndarray) -> np.ndarray:
    """Places of numbers (R, 2), each beside its place (R, 2), away from other numbers and places; points.

    Each goes to the nearest free spot on circles around its place.
    """
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    taken = places
    for place in places:
        spots = np.concatenate([place + away * circle for away in NUMBER_AWAY * np.arange(1, 8)])
        gaps = np.abs(spots[:, None] - taken) / NUMBER_SIZE  # (spots, taken, 2)
        free = (gaps.max(axis=2) >= 1).all(axis=1)
        taken = np.concatenate([taken, spots[[int(np.argmax(free))]]])
    return taken[len(places) :]


def draw_matrix(
    name: str,
    alt: str,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    low: float,
    high: float,
    form: str = "{:.2f}",
    width: float = 3.6,
    strong: str = "",
) -> Markup:
    """Draws a heat map (R, C) with its numbers: the higher in low … high, the stronger. NaN is left empty."""
    from matplotlib.patches import Rectangle

    _check_count(values.size, MAX_CELLS)
    figure, axis = _panel(width, 0.75 + 0.36 * len(rows))
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            strength = float(np.clip((value - low) / (high - low), 0, 1))
            cell = (column - 0.485, row - 0.47)
            look = {"color": ACCENT, "alpha": 0.05 + 0.6 * strength, "linewidth": 0}
            axis.add_patch(Rectangle(cell, 0.97, 0.94, **look))
            axis.text(column, row, form.format(value), ha="center", va="center", fontsize=FONT, color=INK)
    axis.set_xlim(-0.5, len(columns) - 0.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xticks(range(len(columns)), columns, color=INK)
    axis.set_yticks(range(len(rows)), rows, color=INK)
    for tick in axis.get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text() == strong else "normal")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.grid(False)
    return _svg(figure, name, alt)


def draw_sizes(name: str, alt: str, sizes: np.ndarray, batch_size: int | None) -> Markup:
    """Draws sizes of clusters from the largest, (R,) int, on a logarithmic scale, and the size of a batch."""
    figure, axis = _panel(WIDTH, 2.5)
    edges = np.arange(len(sizes) + 1) + 0.5
    axis.stairs(sizes, edges, baseline=0.7, fill=True, color=ACCENT, alpha=0.55, linewidth=0)
    if len(sizes) <= 40:
        axis.vlines(edges[1:-1], 0.7, sizes[1:], color=PAGE, linewidth=1)
    axis.set_yscale("log")
    axis.set_ylim(bottom=0.7)
    if batch_size:
        axis.axhline(batch_size, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        place = {"xytext": (0, 3), "textcoords": "offset points", "ha": "right"}
        end = (edges[-1], batch_size)
        axis.annotate(f"one batch: {batch_size:,}", end, color=MUTED, fontsize=FONT, **place)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.xaxis.set_major_locator(_whole_numbers())
    axis.set_xlabel("cluster, by size")
    axis.set_ylabel("pairs")
    axis.margins(x=0.01)
    return _svg(figure, name, alt)


def draw_shares(name: str, alt: str, rows: Sequence[str], shares: np.ndarray) -> Markup:
    """Draws stacked bars in the experts' colours: shares (R, E) whose rows sum to 1."""
    _check_count(shares.size, MAX_CELLS)
    figure, axis = _panel(WIDTH, 0.6 + 0.3 * len(rows))
    left = np.zeros(len(rows))
    for expert, share in enumerate(np.transpose(shares)):
        axis.barh(range(len(rows)), 100 * share, 0.72, left=left, color=expert_colour(expert), edgecolor=PAGE)
        left += 100 * share
    axis.set_yticks(range(len(rows)), rows, color=INK)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    axis.grid(False)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("share of routed slots (%)")
    return _svg(figure, name, alt)


def _check_count(count: int, most: int) -> None:
    if count > most:
        raise ValueError(f"a chart has room for {most:,} parts, not for {count:,}")


def _panel(width: float, height: float):
    """Returns (figure, axis) without pyplot's global state."""
    from matplotlib.figure import Figure  # here because it is slow to import

    figure = Figure((width, height), layout="constrained")
    axis = figure.add_subplot()
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(RULE)
    axis.grid(axis="y", color=RULE, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(colors=MUTED, which="both", labelsize=FONT)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set(color=MUTED, fontsize=FONT)
    return figure, axis


def _whole_numbers():
    """Returns the locator of an axis of counts."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True)


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """Returns in how many columns labels have room in a panel of so many inches, 3 at most."""
    characters = 12.5 * (width - 0.4)  # of the font
    return max(1, min(3, int(characters / (max(map(len, labels)) + 8))))


def _legend_above(axis, columns: int) -> None:
    _legend(axis, columns, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.3)


def _legend(axis, columns: int, **place: Any) -> None:
    look = {"handlelength": 2.2, "columnspacing": 1.4, "ncols": columns}
    axis.legend(frameon=False, labelcolor=INK, fontsize=FONT, **look, **place)


def _svg(figure, name: str, alt: str) -> Markup:
    """Returns the figure as an <svg> with text as text and ids of its own; the same bytes each time."""
    import matplotlib

    out = io.StringIO()
    style = matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name})
    with style, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+")  # missing from its font: the reader's draws the text
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    body = out.getvalue().partition("</metadata>")[2]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", body)  # only these are referred to
    body = re.sub(r' id="', f' id="{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r'xlink:href="#', f'href="#{name}-', body)
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", body)
    body = re.sub("|".join(_VARIABLES), lambda match: f"var({_VARIABLES[match[0]]})", body)
    return Markup(
        f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {width} {height}" '
        f'style="max-width: {round(SCALE * width)}px">{body}'
    )


def _thin(values: np.ndarray) -> np.ndarray:
    """Returns at most MAX_POINTS means of neighbours."""
    if len(values) <= MAX_POINTS:
        return values
    return np.array([part.mean() for part in np.array_split(values, MAX_POINTS)])


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the mean (T,) of each value and its neighbours, `window` in all, fewer at the ends."""
    half = window // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])
