"""Tables and plots of a grid: means over seeds, who collapsed, which learning rate, and where VESPO does not win."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from tools.staleness.grid import Block, Cell, Grid, Results, expand, identity

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Result = dict[str, Any]
Column = Any

TIE = 0.01
"""Learning rates whose final success differs by no more are told apart by how fast they learn."""
BLUE, RED, GREY = "#0072B2", "#D55E00", "#BBBBBB"
"""Of Okabe and Ito: told apart with any colour vision."""
NAMES = {
    "success": "success",
    "log_w_std": "spread of log W (sd, nats)",
    "phi_mean": "living weight (mean coefficient)",
}


def has_collapsed(result: Result) -> bool:
    """The criterion, fixed in advance: final < 0.75 best, or final < start."""
    return result["final"] < 0.75 * result["best"] or result["final"] < result["start"]


@dataclass
class Row:
    """One row of a block's tables: a method, with what is varied beside columns, seeds and rates."""

    label: str
    runs: dict[Any, dict[Column, list[Result]]] = field(default_factory=dict)
    """Of the seeds of the table, by learning rate and column."""
    tuning: dict[Any, list[Result]] = field(default_factory=dict)
    """Of the tuning seeds, by learning rate, all in the first column."""

    def chosen_rate(self, first: Column) -> Any:
        """The rate for all columns: that of the highest final success in the first one, on the tuning seeds if there
        are any; of those within `TIE` of it the one that learns fastest, by its mean success over the run."""
        runs = self.tuning or {
            rate: columns[first] for rate, columns in self.runs.items() if first in columns
        }
        best = max(mean_final(results) for results in runs.values())
        able = {rate: results for rate, results in runs.items() if mean_final(results) >= best - TIE}
        return max(able, key=lambda rate: statistics.fmean(map(_mean_success, able[rate])))

    def best_rate(self, column: Column) -> Any:
        """The rate of the highest final success in this column, on the seeds of the table themselves."""
        runs = {rate: columns[column] for rate, columns in self.runs.items() if column in columns}
        return max(runs, key=lambda rate: mean_final(runs[rate]))


def mean_final(results: Sequence[Result]) -> float:
    return statistics.fmean(result["final"] for result in results)


def spread_final(results: Sequence[Result]) -> float:
    """Standard deviation over seeds (n - 1), 0 for a single one."""
    return statistics.stdev(result["final"] for result in results) if len(results) > 1 else 0.0


def _mean_success(result: Result) -> float:
    return statistics.fmean(entry["success"] for entry in result["history"])


def collect(grid: Grid, block: Block, results: Results) -> list[Row]:
    """The finished cells of a block as rows, in the order of the grid file."""
    rows: dict[str, Row] = {}
    for cell in expand(grid, block):
        result = results.done.get(identity(cell))
        if result is None:
            continue
        label = row_label(block, cell)
        row = rows.setdefault(label, Row(label))
        rate, column = cell.get("learning_rate"), cell[block.columns]
        if cell["seed"] in block.tuning_seeds:
            row.tuning.setdefault(rate, []).append(result)
        else:
            row.runs.setdefault(rate, {}).setdefault(column, []).append(result)
    return [row for row in rows.values() if row.runs]


def row_label(block: Block, cell: Cell) -> str:
    """The method, and the values of the axes that are neither columns, seeds nor learning rates."""
    varied = [
        axis
        for axis, values in block.axes.items()
        if axis not in (block.columns, "seed", "learning_rate") and len(values) > 1
    ]
    return ", ".join([cell["algorithm"], *(f"{axis} {cell[axis]}" for axis in varied)])


@dataclass
class Table:
    """Results of one rate for each row and column."""

    caption: str
    columns: list[Column]
    entries: dict[str, dict[Column, tuple[Any, list[Result]]]]
    """(rate, results of the seeds), by row and column."""

    def among_best(self, column: Column) -> set[str]:
        """The best row, and all within one pooled standard deviation of it."""
        results = {label: row[column][1] for label, row in self.entries.items() if column in row}
        if not results:
            return set()
        best = max(results.values(), key=mean_final)

        def is_close(other: list[Result]) -> bool:
            pooled = math.sqrt((spread_final(best) ** 2 + spread_final(other) ** 2) / 2)
            return mean_final(best) - mean_final(other) <= pooled

        return {label for label, other in results.items() if is_close(other)}

    def collapsed(self, label: str, column: Column) -> int:
        """How many seeds."""
        return sum(map(has_collapsed, self.entries[label][column][1]))


def tables(block: Block, rows: Sequence[Row]) -> list[Table]:
    """The table of one rate per method; and, where several were run, that of the best rate of every column."""
    columns = sorted(block.axes[block.columns])
    several = len({rate for row in rows for rate in row.runs}) > 1
    how = "the tuning seeds" if block.tuning_seeds else "the seeds of the table themselves"
    one = f"One learning rate per row, chosen at {block.columns} = {columns[0]} on {how}"
    found = [
        _table(one if several else "Final success", columns, rows, lambda row, _: row.chosen_rate(columns[0]))
    ]
    if several:
        best = "The best learning rate of each row and column, chosen on the seeds of the table (optimistic, for all rows alike)"
        found.append(_table(best, columns, rows, Row.best_rate))
    return found


def _table(
    caption: str, columns: list[Column], rows: Sequence[Row], rate_of: Callable[[Row, Column], Any]
) -> Table:
    entries: dict[str, dict[Column, tuple[Any, list[Result]]]] = {}
    for row in rows:
        for column in columns:
            if any(column in runs for runs in row.runs.values()):
                rate = rate_of(row, column)
                if column in row.runs.get(rate, {}):
                    entries.setdefault(row.label, {})[column] = (rate, row.runs[rate][column])
    return Table(caption, columns, entries)


def write(grid: Grid, results: Results, stem: Path) -> None:
    """Write `<stem>.md` and a few `<stem>_<block>_*.png`."""
    text = [f"# {grid.title}", ""]
    for block in grid.block:
        rows = collect(grid, block, results)
        if not rows:
            continue
        text += [f"## {block.title}", ""]
        found = tables(block, rows)
        for table in found:
            text += [*markdown(table, block), ""]
        for kind in ("success", "curves", *(("weights",) if block.weights else ())):
            for name in _plot(kind, found[0], block, stem):
                text += [f"![{kind} of {block.name}]({name})", ""]
        text += [_cost(rows, results, grid, block), ""]
    text += [
        "Mean +- standard deviation over seeds of the final success rate. **Bold**: the best of the column, and all within one "
        "pooled standard deviation of it. `x n`: so many seeds collapsed (final < 0.75 best, or final < start).",
        "",
    ]
    stem.with_suffix(".md").write_text("\n".join(text))


def markdown(table: Table, block: Block) -> list[str]:
    """The table and what it says in words."""
    ends = [table.columns[0], table.columns[-1]]
    several = len(table.columns) > 1
    best = {column: table.among_best(column) for column in table.columns}
    heads = [
        *(f"{block.columns} = {column}" for column in table.columns),
        *(["last / first"] if several else []),
    ]
    lines = [f"{table.caption}.", "", f"| | {' | '.join(heads)} |", f"|---{'|---:' * len(heads)}|"]
    for label, row in table.entries.items():
        texts = [_entry(table, label, column, label in best[column]) for column in table.columns]
        if several:
            kept = _kept(row, ends)
            texts.append("" if kept is None else f"{kept:.0%}")
        lines.append(f"| {label} | {' | '.join(texts)} |")
    return [*lines, "", *_remarks(table, block, best)]


def _entry(table: Table, label: str, column: Column, is_best: bool) -> str:
    if column not in table.entries[label]:
        return ""
    rate, results = table.entries[label][column]
    text = f"{mean_final(results):.3f} +- {spread_final(results):.3f}"
    text = f"**{text}**" if is_best else text
    if collapsed := table.collapsed(label, column):
        text += f" `x {collapsed}`"
    rates = {rate for row in table.entries.values() for rate, _ in row.values()}
    return f"{text} ({rate:g})" if len(rates) > 1 else text


def _kept(row: dict[Column, tuple[Any, list[Result]]], ends: Sequence[Column]) -> float | None:
    """Success in the last column as a share of that in the first."""
    if not all(column in row for column in ends):
        return None
    first, last = (mean_final(row[column][1]) for column in ends)
    return last / first if first else None


def _remarks(table: Table, block: Block, best: dict[Column, set[str]]) -> list[str]:
    last = table.columns[-1]
    fallen = [
        f"{label} ({collapsed} of {len(row[last][1])})"
        for label, row in table.entries.items()
        if last in row and (collapsed := table.collapsed(label, last))
    ]
    where = f"{block.columns} = {last}"
    lines = [f"Collapsed at {where}: {', '.join(fallen) or 'nobody'}."]
    if "VESPO" in table.entries:
        behind = [column for column in table.entries["VESPO"] if "VESPO" not in best[column]]
        lines += ["", f"VESPO is {_behind(table, block, behind)}."]
    return lines


def _behind(table: Table, block: Block, behind: list[Column]) -> str:
    if not behind:
        return "among the best in every column"
    ahead = {}
    for column in behind:
        ours = mean_final(table.entries["VESPO"][column][1])
        better = [
            k for k, row in table.entries.items() if column in row and mean_final(row[column][1]) > ours
        ]
        ahead[column] = f"at {block.columns} = {column} ({', '.join(better)} have a higher mean)"
    return f"not among the best {'; '.join(ahead.values())}"


def _cost(rows: Sequence[Row], results: Results, grid: Grid, block: Block) -> str:
    runs = [results.done[key] for key in map(identity, expand(grid, block)) if key in results.done]
    missing = len(expand(grid, block)) - len(runs)
    minutes = sum(run["wall_s"] for run in runs) / 60
    text = f"{len(runs)} runs, {minutes:.1f} minutes of one process together."
    return text + (f" {missing} cells have no result." if missing else "")


def _plot(
    kind: Literal["success", "curves", "weights"] | str, table: Table, block: Block, stem: Path
) -> list[str]:
    """Draw one kind of plot.

    Returns:
        Names of its files.
    """
    last = table.columns[-1]
    if kind == "success":
        if len(table.columns) == 1:
            return []
        title = f"{block.title}: final success against {block.columns}"
        return [
            _panels(
                table,
                lambda *a: _draw_columns(table, *a),
                (title, block.columns, "success"),
                f"{stem}_{block.name}.png",
            )
        ]
    keys = ("success",) if kind == "curves" else ("log_w_std", "phi_mean")
    return [
        _panels(
            table,
            lambda axes, label, is_other, key=key: _draw_curve(table, key, axes, label, is_other),
            (f"{block.title}: {NAMES[key]} at {block.columns} = {last}", "update", NAMES[key]),
            f"{stem}_{block.name}_{key if kind == 'weights' else kind}.png",
        )
        for key in keys
    ]


def _panels(
    table: Table, draw: Callable[[Axes, str, bool], None], words: tuple[str, str, str], path: str
) -> str:
    """One small panel a row of the table: the row in colour, all others in grey behind it."""
    labels = list(table.entries)
    down = math.ceil(len(labels) / 4)
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
    else:
        axes.set_ylim(-0.04, 1.04 if key == "success" else None)
    if is_other:
        return
    for (x, y), result in zip(curves, row[last][1], strict=True):
        axes.plot(x, y, color=BLUE, lw=0.7, alpha=0.6)
        if has_collapsed(result):
            axes.plot(x[-1], y[-1], "X", color=RED, ms=6, clip_on=False)


def _curve(result: Result, key: str) -> tuple[list[float], list[float]]:
    entries = [entry for entry in result["history"] if key in entry]
    return [entry["update"] for entry in entries], [entry[key] for entry in entries]
