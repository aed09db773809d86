"""Figures of the stored results: a colour for each package, lines named beside their ends."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import OURS
from benchmarks.curves import Curve, Row
from benchmarks.scaling import COMPILED, EAGER, FIELD, KEPT, PEER

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    OURS: "#0072b2", "torchdiffeq": "#d55e00", "torchode": "#009e73", "torchdyn": "#cc79a7", "diffrax": "#222222",
}  # fmt: skip
STYLES = ("-", "--", ":", "-.")
ORDERS = ((0, 2), (3, 4), (5, 6), (7, 99))


def precision(path: Path, found: Sequence[Curve], work: str, title: str) -> None:
    """One panel for methods of like order."""
    panels = [
        (_orders([c.order for c in group]), group)
        for low, high in ORDERS
        if (group := [curve for curve in found if low <= curve.order <= high])
    ]
    _diagrams(path, panels, work, title)


def by_class(path: Path, found: Mapping[str, Sequence[Curve]], work: str, title: str) -> None:
    """One panel for each class of problems."""
    _diagrams(path, list(found.items()), work, title)


def _orders(orders: Sequence[int]) -> str:
    low, high = min(orders), max(orders)
    return f"order {low}" if low == high else f"order {low} to {high}"


def _diagrams(path: Path, panels: Sequence[tuple[str, Sequence[Curve]]], work: str, title: str) -> None:
    figure, axes = _grid(len(panels), title)
    for axis, (name, group) in zip(axes, panels, strict=True):
        used: dict[str, int] = {}
        ends = []
        for curve in group:
            style = STYLES[used.setdefault(curve.package, 0) % len(STYLES)]
            used[curve.package] += 1
            colour = COLOURS.get(curve.package, "#777777")
            xs, ys = zip(*curve.points, strict=True)
            own = curve.package == OURS
            axis.plot(xs, ys, style, color=colour, marker=".", markersize=4, linewidth=1.8 if own else 1.0)
            ends.append((xs[-1], ys[-1], curve.name.replace("nesterov_triton", "here:"), colour))
        axis.set_yscale("log")
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_xlabel(work, fontsize=9)
        axis.set_ylabel("global error", fontsize=9)
        axis.set_ylim(top=min(10.0, axis.get_ylim()[1]))  # a solution that is lost is lost
        _finish(axis, ends)
    _save(figure, path)


def scaling(path: Path, rows: Sequence[Row], way: str, title: str) -> None:
    """One panel for each axis: milliseconds, solid on one thread, dashed on two."""
    own = [row for row in rows if row["way"] == way]
    axes_named = list(dict.fromkeys(row["axis"] for row in own))
    colours = {
        EAGER: COLOURS[OURS],
        KEPT: "#009e73",
        COMPILED: "#56b4e9",
        PEER: COLOURS["torchdiffeq"],
        FIELD: "#777777",
    }
    short = {EAGER: "here", KEPT: "here, kept", COMPILED: "here, compiled", PEER: "torchdiffeq", FIELD: "field alone"}
    figure, axes = _grid(len(axes_named), title)
    for axis, name in zip(axes, axes_named, strict=True):
        ends = []
        lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for row in own:
            if row["axis"] == name:
                point = (float(row["value"]), float(row["milliseconds"]))
                lines.setdefault((row["contender"], row["threads"]), []).append(point)
        for (contender, threads), points in lines.items():
            xs, ys = zip(*points, strict=True)
            style, colour = ("-" if threads == "1" else "--"), colours.get(contender, "#777777")
            axis.plot(xs, ys, style, color=colour, marker=".", markersize=4, linewidth=1.3)
            label = short.get(contender, contender) + ("" if threads == "1" else f", {threads} threads")
            ends.append((xs[-1], ys[-1], label, colour))
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_xlabel(name, fontsize=9)
        axis.set_ylabel("milliseconds", fontsize=9)
        _finish(axis, ends)
    _save(figure, path)


def _grid(panels: int, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # half a second, which only drawing needs

    columns = 2 if panels < 5 else 3
    rows = -(-panels // columns)
    figure = Figure(figsize=(4.9 * columns, 3.1 * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[panels:]:
        axis.set_visible(False)
    return figure, axes[:panels]


def _finish(axis: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Logarithmic axes, and the lines' names in a column beside them, in the order of their ends."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.set_yscale("log")
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 30 * low else (1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, color="#e5e5e5", linewidth=0.6)
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    low, high = np.log(axis.get_ylim())
    ordered = sorted(ends, key=lambda end: end[1])
    heights = _apart([(float(np.log(y)) - low) / (high - low) for _, y, _, _ in ordered], 0.075)
    for (x, y, name, colour), height in zip(ordered, heights, strict=True):
        axis.annotate(
            name, (x, y), (1.03, height), textcoords="axes fraction", color=colour, fontsize=8, va="center",
            annotation_clip=False, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "alpha": 0.5},
        )  # fmt: skip


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """The given heights, in rising order, moved as little as keeps them `least` apart: neighbours that touch are moved
    together, around their mean."""
    groups: list[list[float]] = []  # [sum of wished positions of the first one, count]
    for height in heights:
        groups.append([height, 1])
        while len(groups) > 1:
            (a, n), (b, m) = groups[-2:]
            if a / n + n * least <= b / m:
                break
            # Each of the second group's wishes, as wishes for the first one's place.
            groups[-2:] = [[a + b - m * n * least, n + m]]
    return [total / count + i * least for total, count in groups for i in range(int(count))]


def _save(figure: Any, path: Path) -> None:
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A few colours with their shades: a third of the bytes. And no date, so that the same numbers make the same file.
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
