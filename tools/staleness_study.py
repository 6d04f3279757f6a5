"""Run what is missing of a grid of the staleness study, then write its tables and plots.

    python tools/staleness_study.py tools/staleness/grids/toy_reduced.toml

Results, tables and plots go to docs/staleness (--output elsewhere).  A call that was interrupted goes on where it
stopped; a cell that failed is tried again.  Exit status 1 if a cell has failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own path is tools/

from megatron_vespo.config import ConfigError  # noqa: E402
from megatron_vespo.types import RunError  # noqa: E402
from tools.staleness import grid as grids  # noqa: E402
from tools.staleness import report  # noqa: E402


def study(path: Path, output: Path, *, workers: int, only_report: bool) -> int:
    """Run and report one grid.

    Returns:
        The number of cells that have failed.
    """
    grid = grids.load_grid(path)
    level = grids.load_level(grid.level)
    cells = {grids.identity(cell): cell for block in grid.block for cell in grids.expand(grid, block)}
    for cell in cells.values():
        level.check(cell)
    results_path = output / f"{path.stem}.jsonl"
    with grids.only_writer(results_path):
        results = grids.read_results(results_path)
        try:
            if not only_report:
                grids.run_missing(grid.level, list(cells.values()), results, workers)
        finally:
            report.write(grid, results, output / path.stem)
    failed = [cells[key] for key in results.failed if key in cells]
    for cell in failed:
        sys.stderr.write(f"failed: {cell}\n{results.failed[grids.identity(cell)]}\n")
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path, help="TOML file, see tools/staleness/grids")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="default: one a core")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "staleness")
    parser.add_argument("--only-report", action="store_true", help="run nothing")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started this with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    try:
        failed = study(args.grid, args.output, workers=args.workers, only_report=args.only_report)
    except ConfigError as err:
        sys.stderr.write(f"{err}\n")
        return 2
    except RunError as err:
        sys.stderr.write(f"{err}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the same command goes on\n")
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
