"""What the runs of a block amount to: means over seeds, who collapsed, which learning rate, who is among the best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.staleness.grid import Block, Cell, Grid, Results, expand, identity

Result = dict[str, Any]
Column = Any

TIE = 0.01
"""Learning rates whose final success differs by no more are told apart by how fast they learn."""


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
        are any; of those within `TIE` of it the one that learns fastest, by its mean success over the run.
        None where nothing has run there yet."""
        runs = self.tuning or {
            rate: columns[first] for rate, columns in self.runs.items() if first in columns
        }
        best = max((mean_final(results) for results in runs.values()), default=0.0)
        able = {rate: results for rate, results in runs.items() if mean_final(results) >= best - TIE}
        return max(able, key=lambda rate: statistics.fmean(map(_mean_success, able[rate])), default=None)

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
        rate = None if block.columns == "learning_rate" else cell.get("learning_rate")
        column = cell[block.columns]
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

    @property
    def rates(self) -> set[Any]:
        return {rate for row in self.entries.values() for rate, _ in row.values()}

    def collapsed(self, label: str, column: Column) -> int:
        """How many seeds."""
        return sum(map(has_collapsed, self.entries[label][column][1]))


def tables(block: Block, rows: Sequence[Row]) -> list[Table]:
    """The table of one rate per method; and, where several were run, that of the best rate of every column.
    One without any entry is left out."""
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
    return [table for table in found if table.entries]


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
