"""Plots of a block: one small panel a row, so that a reader sees every method at once and no line hides another."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from tools.staleness.grid import Block
from tools.staleness.outcomes import Result, Table, has_collapsed, mean_final

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLUE, RED, GREY = "#0072B2", "#D55E00", "#BBBBBB"
"""Of Okabe and Ito: told apart with any colour vision."""
MOST_ACROSS = 5
"""Panels beside each other."""
CURVES = {
    "success": ("curves", "success"),
    "log_w_std": ("log_w_std", "spread of log W (sd, nats)"),
    "phi_mean": ("phi_mean", "living weight (mean coefficient)"),
}
"""Of a run: the end of the file's name, and the words for it, by key of a history."""


def draw(table: Table, block: Block, stem: Path) -> list[str]:
    """Draw final success against the columns, and the course of the runs in the last column.

    Returns:
        Names of the files, all `<stem>_<block>*.png`.
    """
    path, columns, last = f"{stem}_{block.name}", block.columns.replace("_", " "), table.columns[-1]
    names: list[str] = []
    if len(table.columns) > 1:
        words = (f"{block.title}: final success against {columns}", columns, "success")
        names.append(_panels(table, partial(_draw_columns, table), words, f"{path}.png"))
    for key in CURVES if block.weights else ("success",):
        ending, name = CURVES[key]
        words = (f"{block.title}: {name} at {columns} = {last}", "update", name)
        names.append(_panels(table, partial(_draw_curve, table, key), words, f"{path}_{ending}.png"))
    return names


def _panels(
    table: Table, draw: Callable[[Axes, str, bool], None], words: tuple[str, str, str], path: str
) -> str:
    """One small panel a row of the table: the row in colour, all others in grey behind it."""
    labels = list(table.entries)
    down = math.ceil(len(labels) / MOST_ACROSS)
    across = math.ceil(len(labels) / down)
    figure, grid = plt.subplots(
        down,
        across,
        figsize=(2.7 * across, 1.9 * down + 1.0),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, label in zip(grid.flat, labels, strict=False):
        for other in labels:
            if other != label:
                draw(axes, other, True)
        draw(axes, label, False)
        axes.set_title(label, fontsize=9, color=BLUE, loc="left", wrap=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    title, x, y = words
    for axes in grid.flat[len(labels) :]:
        axes.set_visible(False)
    for axes in grid.flat[max(0, len(labels) - across) : len(labels)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(x, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.supylabel(y, fontsize=9)
    handles = [
        Line2D([], [], color=BLUE, marker="o", markersize=4, label="this row (every seed, and their mean)"),
        Line2D([], [], color=GREY, label="the other rows"),
        Line2D([], [], color=RED, marker="X", linestyle="", label="seed that collapsed"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return Path(path).name


def _draw_columns(table: Table, axes: Axes, label: str, is_other: bool) -> None:
    row = table.entries[label]
    places = {column: place for place, column in enumerate(table.columns) if column in row}
    means = [mean_final(row[column][1]) for column in places]
    axes.plot(list(places.values()), means, color=GREY if is_other else BLUE, lw=0.8 if is_other else 1.8)
    axes.set_xticks(range(len(table.columns)), [f"{column:g}" for column in table.columns])
    axes.set_ylim(-0.04, 1.04)
    if is_other:
        return
    for column, place in places.items():
        for result in row[column][1]:
            fell = has_collapsed(result)
            axes.plot(
                place, result["final"], "X" if fell else "o", color=RED if fell else BLUE, ms=6 if fell else 4
            )


def _draw_curve(table: Table, key: str, axes: Axes, label: str, is_other: bool) -> None:
    row, last = table.entries[label], table.columns[-1]
    if last not in row:
        return
    curves = [_curve(result, key) for result in row[last][1]]
    at = max((x for x, _ in curves), key=len)
    axes.plot(
        at,
        np.mean([np.interp(at, x, y) for x, y in curves], 0),
        color=GREY if is_other else BLUE,
        lw=0.8 if is_other else 1.8,
    )
    if key == "log_w_std":
        axes.set_yscale("log")
    elif key == "success":
        axes.set_ylim(-0.04, 1.04)
    if is_other:
        return
    for (x, y), result in zip(curves, row[last][1], strict=True):
        axes.plot(x, y, color=BLUE, lw=0.7, alpha=0.6)
        if has_collapsed(result):
            axes.plot(x[-1], y[-1], "X", color=RED, ms=6, clip_on=False)


def _curve(result: Result, key: str) -> tuple[list[float], list[float]]:
    entries = [entry for entry in result["history"] if key in entry]
    return [entry["update"] for entry in entries], [entry[key] for entry in entries]
