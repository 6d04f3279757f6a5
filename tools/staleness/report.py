"""The report of a grid in Markdown: its tables, and in words who collapsed and where VESPO does not win."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.staleness import plots
from tools.staleness.grid import Block, Grid, Results, expand, identity
from tools.staleness.outcomes import Column, Result, Table, collect, mean_final, spread_final, tables


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
        for name in plots.draw(found[0], block, stem) if found else ():
            text += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})", ""]
        text += [_cost(results, grid, block), ""]
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
        *(f"{_words(block)} = {column}" for column in table.columns),
        *(["last / first"] if several else []),
    ]
    (*_, rate) = table.rates
    same = f" (learning rate {rate:g})" if len(table.rates) == 1 and rate is not None else ""
    lines = [f"{table.caption}{same}.", "", f"| | {' | '.join(heads)} |", f"|---{'|---:' * len(heads)}|"]
    for label, row in table.entries.items():
        texts = [_entry(table, block, label, column, label in best[column]) for column in table.columns]
        if several:
            kept = _kept(row, ends)
            texts.append("" if kept is None else f"{kept:.0%}")
        lines.append(f"| {label} | {' | '.join(texts)} |")
    return [*lines, "", *_remarks(table, block, best)]


def _entry(table: Table, block: Block, label: str, column: Column, is_best: bool) -> str:
    if column not in table.entries[label]:
        return ""
    rate, results = table.entries[label][column]
    text = f"{mean_final(results):.3f}"
    if len(results) > 1:  # one run has no spread
        text += f" +- {spread_final(results):.3f}"
    text = f"**{text}**" if is_best else text
    if (num := len(block.axes["seed"])) > len(results):
        text += f" [{len(results)} of {num} seeds]"
    if collapsed := table.collapsed(label, column):
        text += f" `x {collapsed}`"
    return f"{text} ({rate:g})" if len(table.rates) > 1 else text


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
    where = f"{_words(block)} = {last}"
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
        ahead[column] = f"at {_words(block)} = {column} (a higher mean: {', '.join(better)})"
    return f"not among the best {'; '.join(ahead.values())}"


def _words(block: Block) -> str:
    return block.columns.replace("_", " ")


def _cost(results: Results, grid: Grid, block: Block) -> str:
    keys = set(map(identity, expand(grid, block)))
    runs = [results.done[key] for key in keys if key in results.done]
    missing = len(keys) - len(runs)
    wall_s, cpu_s = (sum(run.get(clock, 0) for run in runs) for clock in ("wall_s", "cpu_s"))
    text = f"{len(runs)} runs, together {wall_s / 60:.1f} minutes"
    text += f", of which {cpu_s / 60:.1f} of computing." if cpu_s else "."
    return text + (f" {missing} cells have no result." if missing else "")
