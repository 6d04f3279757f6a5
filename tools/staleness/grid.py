"""Grids of cells: read from TOML, run by worker processes, remembered in a file that is only appended to."""

from __future__ import annotations

import fcntl
import importlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_vespo.config import ConfigError
from megatron_vespo.types import RunError

Cell = dict[str, Any]
"""The settings of one run, see the package's docstring."""

GOODBYE_S = 60
"""Longest wait for a worker to close its level (a server, perhaps) before it is killed."""


class Level(Protocol):
    """What a level module offers."""

    def check(self, cell: Cell) -> None: ...
    def open_level(self) -> AbstractContextManager[Callable[[Cell], dict[str, Any]]]: ...


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Block(_Section):
    """One product of axes, which becomes one table and its plots."""

    name: str
    """Of the block, in the names of its plots."""
    title: str
    columns: str = "N"
    """The axis whose values are the columns of the table, ascending."""
    methods: list[str] | None = None
    """Labels of `methods` of the grid. Default: all."""
    base: dict[str, Any] = {}
    """Settings of all cells, over those of the grid."""
    axes: dict[str, list[Any]]
    """Settings that are varied, all with all."""
    tuning_seeds: list[int] = []
    """Seeds that run in the first column only and choose the learning rate of every method; no other number is theirs."""
    weights: bool = False
    """Also plot the spread of log W and the living weight over the run."""


class Grid(_Section):
    """A grid file."""

    level: str
    title: str
    base: dict[str, Any] = {}
    methods: dict[str, dict[str, Any]]
    """Label of each method: its section [algorithm]."""
    block: list[Block]


def load_grid(path: Path) -> Grid:
    """Read a grid file.

    Raises:
        ConfigError: unknown, missing or mistyped fields, or a block that contradicts itself.
    """
    try:
        grid = Grid.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(
            f"grid = '{path}': no such file; take one of {Path(__file__).parent}/grids"
        ) from None
    except tomllib.TOMLDecodeError as err:
        raise ConfigError(f"grid = '{path}': expected TOML, but {err}; mend that line") from err
    except ValidationError as err:
        lines = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}; change it" for e in err.errors()]
        raise ConfigError("\n".join([f"{path}: {len(lines)} problem(s)", *lines])) from None
    for block in grid.block:
        _check_block(grid, block)
    return grid


def _check_block(grid: Grid, block: Block) -> None:
    where = f"block '{block.name}'"
    if unknown := set(block.methods or ()) - set(grid.methods):
        raise ConfigError(f"{where}: methods = {sorted(unknown)}: not in [methods]; describe them there")
    if twice := set(block.axes) & set(block.base):
        raise ConfigError(f"{where}: {sorted(twice)}: stand in its base and its axes; take them out of one")
    for axis in (block.columns, "seed"):
        if axis not in block.axes:
            raise ConfigError(f"{where}: axes has no '{axis}'; add it, if with a single value")
    if both := set(block.tuning_seeds) & set(block.axes["seed"]):
        raise ConfigError(f"{where}: seeds {sorted(both)}: are of the table and for tuning; tune on others")


def expand(grid: Grid, block: Block) -> list[Cell]:
    """The cells of a block: its tuning cells first, then methods x axes in the order of the file."""
    axes = block.axes
    tuning = axes | {"seed": block.tuning_seeds, block.columns: [min(axes[block.columns])]}
    return [
        {"level": grid.level, "algorithm": label, "overrides": dotted(grid.methods[label])}
        | grid.base
        | block.base
        | dict(zip(product, values, strict=True))
        for product in (tuning, axes)
        for label in block.methods or grid.methods
        for values in itertools.product(*product.values())
    ]


def dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of tables as one table with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def summary(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a level returns of a run, beside what it cost: `history` with its success at the start, at best and at the end."""
    success = [entry["success"] for entry in history]
    return {"start": success[0], "best": max(success), "final": success[-1], "history": list(history)}


def identity(cell: Cell) -> str:
    """Two cells are the same run exactly if all their settings are equal."""
    return json.dumps(cell, sort_keys=True)


@dataclass
class Results:
    """A results file, one JSON line a finished cell: its settings, and its result or the error that ended it."""

    path: Path
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Result of each cell that has one, by identity."""
    failed: dict[str, str] = field(default_factory=dict)
    """Last error of each cell that has no result."""

    def add(self, cell: Cell, outcome: dict[str, Any]) -> None:
        """Append one line; `outcome` is {"result": ...} or {"error": ...}."""
        with self.path.open("a") as file:
            file.write(json.dumps({"cell": cell} | outcome) + "\n")
        self._remember(cell, outcome)

    def _remember(self, cell: Cell, outcome: dict[str, Any]) -> None:
        key = identity(cell)
        if "error" in outcome:
            self.failed[key] = outcome["error"]
        else:
            self.done[key] = outcome["result"]
            self.failed.pop(key, None)


def read_results(path: Path) -> Results:
    """Results so far; a last line that a crash left incomplete is cut off the file.

    Raises:
        ConfigError: another line is not a result.
    """
    results = Results(path)
    if not path.exists():
        return results
    whole, newline, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        os.truncate(path, len(whole + newline))
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            results._remember(record["cell"], record)
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{path}, line {number}: is not a result of this study; take the line out"
            ) from None
    return results


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold the results file against a second call of the study.

    Raises:
        ConfigError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"results = '{path}': another process runs this grid; wait for it, or end it"
            ) from None
        yield


def load_level(name: str) -> Level:
    """The module of a level.

    Raises:
        ConfigError: there is none of that name.
    """
    known = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem in ("toy", "stack"))
    if name not in known:
        raise ConfigError(f"level = '{name}': expected one of {', '.join(known)}; change it")
    return cast(Level, importlib.import_module(f"{__package__}.{name}"))


def run_missing(level: str, cells: Sequence[Cell], results: Results, num_workers: int) -> None:
    """Run every cell without a result, `num_workers` at a time; what is finished is on disk at once.

    A cell that raises, and one whose worker dies, is recorded as failed; the others go on.
    On Ctrl-C the workers close their level, and only the cells under way are lost.

    Raises:
        RunError: the level cannot be opened.
    """
    waiting = [cell for cell in cells if identity(cell) not in results.done]
    progress = _Progress(total=len(waiting))
    workers: dict[Connection, tuple[BaseProcess, Cell]] = {}
    try:
        while waiting or workers:
            while waiting and len(workers) < num_workers:
                _hand_out(waiting, workers, *_start_worker(level))
            for ready in wait(list(workers)):
                connection = cast(Connection, ready)
                process, cell = workers.pop(connection)
                outcome = _receive(connection, process)
                results.add(cell, outcome)
                progress.show(cell, outcome)
                if process.is_alive():
                    _hand_out(waiting, workers, connection, process)
    finally:
        for connection, (process, _) in workers.items():
            _end(connection, process)


def _hand_out(
    waiting: list[Cell],
    workers: dict[Connection, tuple[BaseProcess, Cell]],
    connection: Connection,
    process: BaseProcess,
) -> None:
    """Give the worker the next cell, or let it go."""
    if not waiting:
        connection.send(None)
        _end(connection, process, ask=False)
        return
    cell = waiting.pop(0)
    connection.send(cell)
    workers[connection] = (process, cell)


def _start_worker(level: str) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(level, theirs))
    process.start()
    theirs.close()  # so that the death of the worker is the end of the pipe
    return ours, process


def _receive(connection: Connection, process: BaseProcess) -> dict[str, Any]:
    try:
        outcome = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join(GOODBYE_S)
        return {"error": f"the worker process died with exit code {process.exitcode}"}
    if "level_error" in outcome:
        _end(connection, process, ask=False)
        raise RunError(f"level = could not be opened, no cell was run: {outcome['level_error']}")
    return outcome


def _end(connection: Connection, process: BaseProcess, ask: bool = True) -> None:
    """Wait until the worker has closed its level; `ask`: interrupt the cell under way."""
    if ask:
        process.terminate()
    process.join(GOODBYE_S)
    if process.is_alive():
        process.kill()
        process.join()
    connection.close()


def _work(level: str, connection: Connection) -> None:
    """A worker process: one level, opened once, for all its cells."""
    # Ctrl-C reaches the whole process group: the parent decides, and asks with SIGTERM.  A handler, unlike SIG_IGN, is
    # not inherited by what a level starts.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with load_level(level).open_level() as run:
            while (cell := _next(connection)) is not None:
                connection.send(_attempt(run, cell))
    except Exception:  # noqa: BLE001  (process boundary)
        connection.send({"level_error": traceback.format_exc()})


def _attempt(run: Callable[[Cell], dict[str, Any]], cell: Cell) -> dict[str, Any]:
    try:
        return {"result": run(cell)}
    except Exception:  # noqa: BLE001  (process boundary)
        return {"error": traceback.format_exc()}


def _next(connection: Connection) -> Cell | None:
    try:
        return connection.recv()
    except EOFError:  # the parent is gone
        return None


@dataclass
class _Progress:
    """One line a cell: how far, which, what came out, how long it took, how much time is left."""

    total: int
    finished: int = 0
    started_s: float = field(default_factory=time.monotonic)

    def show(self, cell: Cell, outcome: dict[str, Any]) -> None:
        self.finished += 1
        left_s = (time.monotonic() - self.started_s) / self.finished * (self.total - self.finished)
        shown = {k: v for k, v in cell.items() if k not in ("level", "algorithm", "overrides")}
        settings = " ".join(f"{key}={value}" for key, value in shown.items())
        if "error" in outcome:
            ending = "FAILED: " + outcome["error"].strip().splitlines()[-1]
        else:
            ending = f"final {outcome['result']['final']:.3f}, {outcome['result']['wall_s']:.1f} s"
        sys.stdout.write(
            f"[{self.finished}/{self.total}, {left_s / 60:.1f} min left] {cell['algorithm']} {settings}: {ending}\n"
        )
        sys.stdout.flush()
