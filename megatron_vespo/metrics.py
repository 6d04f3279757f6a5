"""The run log and the live view: what one step's numbers become for a file, a tracker and a person.

One optimizer step is one flat record: `step`, `time` and `room/name_unit` keys.  metrics.jsonl is the truth,
TensorBoard and Weights & Biases are copies.  A list (one number per layer, or per staleness) stays in the JSONL.
"""

from __future__ import annotations

import json
import math
import os
import re
import textwrap
import time
import tomllib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from tensorboard.summary import Writer

from megatron_vespo.config import ConfigError
from megatron_vespo.rundir import RunDirectory, read_metrics
from megatron_vespo.types import RunError

Record = dict[str, Any]
"""One line of metrics.jsonl."""

PHASES = ("wait", "examine", "train", "sync", "score", "measure", "eval", "save")
"""Where a step's time goes, in the order in which it goes there: `time/<phase>_s`."""


class RunLog:
    """Appends one record per step to metrics.jsonl and copies its scalars to TensorBoard and, if asked, W&B and Prometheus."""

    def __init__(
        self, run: RunDirectory, wandb_project: str | None = None, prometheus: str | None = None
    ) -> None:
        """`prometheus`: the host:port on which the newest record is served.  After a resume (and its `rewind`) TensorBoard's files are written anew from metrics.jsonl."""
        for stale in run.events.glob("*tfevents*"):
            stale.unlink()
        self._board = Writer(str(run.events))
        for record in read_metrics(run.metrics) if run.metrics.exists() else []:
            self._copy_to_tensorboard(record)
        self._file = run.metrics.open("ab")
        self._wandb = None if wandb_project is None else _open_wandb(wandb_project, run)
        self._exposition = None if prometheus is None else Exposition(prometheus, run.path.name)

    def log(self, step: int, metrics: Mapping[str, Any]) -> Record:
        """Write one step's metrics, durable on return; the record as written, with `step` and `time` (unix s).

        Raises:
            RunError: a value is no finite number (or list of them); names the metric, and nothing is written.
        """
        values = {key: _plain(key, value, step) for key, value in metrics.items()}
        record = {"step": step, "time": time.time(), **values}
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._copy_to_tensorboard(record)
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in record.items() if not isinstance(value, list)})
        if self._exposition is not None:
            self._exposition.show(record)
        return record

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._exposition is not None:
            self._exposition.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _copy_to_tensorboard(self, record: Record) -> None:
        for key, value in record.items():
            if "/" in key and not isinstance(value, list):
                self._board.add_scalar(key, value, record["step"], wall_time=record["time"])
        self._board.flush()


def _plain(key: str, value: Any, step: int) -> float | int | list[float | int]:
    """`value` as JSON knows it."""
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain_number(f"{key}[{index}]", item, step) for index, item in enumerate(value)]
    return _plain_number(key, value, step)


def _plain_number(key: str, value: Any, step: int) -> float | int:
    number = value.item() if isinstance(value, np.generic) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise RunError(
            f"metric '{key}' = {value!r} at step {step}: expected a finite number; "
            "look at this step's rollouts and at the quantities it is computed from"
        )
    return number


def _open_wandb(project: str, run: RunDirectory) -> Any:
    """A W&B run that is continued when the run directory is."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]  # optional, and slow to import
    except ImportError:
        raise ConfigError(
            f"wandb_project = '{project}': the package wandb is not installed; pip install wandb, or leave it out"
        ) from None
    id_file = run.logs / "wandb_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8])
    tracker = wandb.init(
        project=project,
        name=run.path.name,
        dir=str(run.logs),
        id=id_file.read_text(),
        resume="allow",
        config=tomllib.loads(run.config.read_text()),
    )
    tracker.define_metric("*", step_metric="step")  # W&B's own counter refuses the steps a resume repeats
    return tracker


class Exposition:
    """Serves the scalars of the newest record at http://host:port/metrics, in Prometheus' text format.

    mismatch/k3_nats is the gauge megatron_vespo_mismatch_k3_nats{run="...", metric="mismatch/k3_nats"}.
    """

    def __init__(self, address: str, run: str) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError:
            raise ConfigError(
                f"prometheus = '{address}': the package prometheus-client is not installed; pip install prometheus-client, or "
                "leave it out"
            ) from None
        self._run, self._record = run, Record()
        registry = CollectorRegistry()
        registry.register(self)
        host, _, port = address.rpartition(":")
        try:
            self._server, self._thread = start_http_server(int(port), host, registry)
        except OSError as err:
            raise ConfigError(
                f"prometheus = '{address}': cannot listen there ({err}); choose a free port of this machine"
            ) from err

    def show(self, record: Record) -> None:
        """From now on this is the newest one."""
        self._record = record

    def collect(self) -> Iterator[Any]:
        """One gauge for each scalar; called by the server at every scrape."""
        from prometheus_client.core import GaugeMetricFamily

        gauges: dict[str, Any] = {}
        for key, value in self._record.items():
            if isinstance(value, list):
                continue
            name = "megatron_vespo_" + re.sub(r"\W", "_", key)
            if name not in gauges:  # two names may differ in their signs alone
                gauges[name] = GaugeMetricFamily(name, key, labels=("run", "metric"))
            gauges[name].add_metric((self._run, key), value)
        yield from gauges.values()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


Cells = Sequence[tuple[str, ...]]
"""Rows of (format, metric, ...): one cell of a line each."""

_LINE: Cells = (
    ("reward {:6.3f}", "reward/train_mean"),
    ("held-out {:6.3f}", "reward/heldout_mean"),
    ("stale {:.1f} max {:.0f}", "staleness/mean_steps", "staleness/max_steps"),
    ("log W {:+6.2f} +- {:.2f}", "algo/log_w_mean", "algo/log_w_std"),
    ("phi {:.2f}", "algo/phi_mean"),
    ("k3 {:.1e}", "mismatch/k3_nats"),
    ("max|d| {:.1e}", "mismatch/abs_max_nats"),
    ("experts {:.3f}", "experts/overlap_mean"),
    ("grad {:5.2f}", "optim/grad_norm"),
)
_SFT_LINE: Cells = (
    ("loss {:7.4f}", "optim/loss"),
    ("grad {:5.2f}", "optim/grad_norm"),
    ("lr {:.1e}", "optim/learning_rate"),
)
_WEIGHTS: Cells = (
    ("log W {:+.2f} ± {:.2f}", "algo/log_w_mean", "algo/log_w_std"),
    ("phi {:.2f} A>0", "algo/phi_pos_mean"),
    ("{:.2f} A<0", "algo/phi_neg_mean"),
    ("ESS {:.0%}", "algo/ess_fraction"),
    ("entropy {:.2f} nats", "algo/entropy_nats"),
)
_MISMATCH: Cells = (
    ("k3 {:.1e}", "mismatch/k3_nats"),
    ("|dlogp| {:.1e} mean", "mismatch/abs_mean_nats"),
    ("{:.1e} max nats", "mismatch/abs_max_nats"),
    ("experts agree {:.1%}", "experts/overlap_mean"),
)
_OPTIMIZER: Cells = (
    ("loss {:.4f}", "optim/loss"),
    ("grad {:.2f}", "optim/grad_norm"),
    ("lr {:.1e}", "optim/learning_rate"),
)
_COLORS = {
    "wait": "grey50",
    "examine": "bright_cyan",
    "train": "blue",
    "sync": "yellow",
    "score": "green",
    "measure": "bright_yellow",
    "eval": "magenta",
    "save": "cyan",
}


def step_line(record: Mapping[str, Any]) -> str:
    """One step on one aligned line: the same cells in the same order; a cell without its metric is left out."""
    parts = [f"step {record['step']:4d}", *_filled(_SFT_LINE if _is_sft(record) else _LINE, record)]
    if "reward/train_mean" in record and "reward/heldout_mean" not in record:
        parts.insert(2, "held-out    ...")  # few steps are evaluated; the columns must not jump
    if "time/step_s" in record:
        phases = " + ".join(f"{name} {seconds:.1f}" for name, seconds in phase_times(record).items())
        parts.append(f"{record['time/step_s']:5.1f} s" + (f" = {phases}" if phases else ""))
    if "throughput/tokens_per_s" in record:
        parts.append(f"{si(record['throughput/tokens_per_s'])} tok/s")
    return " | ".join(parts)


def phase_times(record: Mapping[str, Any]) -> dict[str, float]:
    """Seconds per phase that took any, in the order of PHASES."""
    return {name: record[f"time/{name}_s"] for name in PHASES if record.get(f"time/{name}_s", 0) > 0}


def si(value: float) -> str:
    """Three figures with a decimal prefix: 950, 1.42k, 11.4k, 2.08M."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3g}"


def _is_sft(record: Mapping[str, Any]) -> bool:
    return "optim/loss" in record and "reward/train_mean" not in record


def _filled(cells: Cells, record: Mapping[str, Any]) -> list[str]:
    return [
        form.format(*(record[key] for key in keys)) for form, *keys in cells if record.keys() >= set(keys)
    ]


class LiveView:
    """What a person sees of a run: a panel on a terminal, one line per step and event anywhere else."""

    def __init__(
        self, title: str, num_steps: int, *, max_staleness: int = 0, console: Console | None = None
    ) -> None:
        self._title = title
        self._num_steps = num_steps
        self._max_staleness = max_staleness
        self._console = console or Console(highlight=False)
        self._started = time.monotonic()
        self._first: tuple[int, float] | None = None
        """Step and time of the first record: a resumed run does not start at 0."""
        self._records: list[Record] = []
        self._events: list[str] = []
        self._live = Live(console=self._console, get_renderable=self._panel, refresh_per_second=2)

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def event(self, text: str) -> None:
        """Something happened, or is being waited for."""
        line = f"{time.strftime('%H:%M:%S')}  {text}"
        self._events = [*self._events, line][-4:]
        self._print(line)

    def step(self, record: Record) -> None:
        """One record, as `RunLog.log` returned it."""
        self._first = self._first or (record["step"], time.monotonic())
        self._records = [*self._records, record]  # a new list: the refresh thread may be reading the old one
        self._print(step_line(record))

    def _print(self, line: str) -> None:
        if not self._live.is_started:  # on a terminal the panel shows it
            self._console.print(line, markup=False, soft_wrap=True)

    def _panel(self) -> Panel:
        records, events = self._records, self._events
        latest = records[-1] if records else {}
        width = min(self._console.width, 100)
        inner = width - 19  # without frame, padding and labels
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column()
        for label, text in (
            ("reward", _reward_row(records, inner)),
            ("staleness", self._staleness_row(latest)),
            ("weights", _row(_WEIGHTS, latest, inner)),
            ("mismatch", _row(_MISMATCH, latest, inner)),
            ("optimizer", _row(_OPTIMIZER, latest, inner)),
            ("time", _time_row(latest)),
        ):
            if text:
                rows.add_row(label, text)
        history = Text("\n".join(events), style="dim", no_wrap=True, overflow="ellipsis")
        body = [part for part in (rows if latest else None, history if events else None) if part]
        parts = [self._progress_row(latest), *(spaced for part in body for spaced in (Text(), part))]
        return Panel(Group(*parts), title=self._title, title_align="left", width=width, padding=(1, 2))

    def _progress_row(self, latest: Record) -> Table:
        done = latest.get("step", 0)
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(f"step {done}/{self._num_steps}", ProgressBar(self._num_steps, done), self._clock(done))
        return row

    def _clock(self, done: int) -> str:
        now = time.monotonic()
        elapsed = f"{_clock_face(now - self._started)} elapsed"
        if self._first is None or done == self._first[0]:
            return elapsed
        step, since = self._first
        return (
            f"{elapsed}, {_clock_face((now - since) / (done - step) * max(0, self._num_steps - done))} left"
        )

    def _staleness_row(self, latest: Record) -> str:
        if "staleness/mean_steps" not in latest:
            return ""
        most = latest.get("staleness/max_steps", 0)
        return (
            f"{latest['staleness/mean_steps']:.2f} mean   {most:.0f} max, bound {self._max_staleness} steps"
        )


def _row(cells: Cells, record: Record, width: int) -> str:
    """Cells side by side; a narrow terminal breaks the line between two of them, never within one."""
    glued = "   ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in _filled(cells, record))
    return textwrap.fill(glued, width).replace("\N{NO-BREAK SPACE}", " ")


def _reward_row(records: Sequence[Record], width: int) -> Text:
    """The last train and held-out reward, each with its history."""
    num_blocks = 20 if width > 70 else 12
    row = Text()
    for label, key, style in (
        ("train", "reward/train_mean", "blue"),
        ("held-out", "reward/heldout_mean", "green"),
    ):
        history = [(record["step"], record[key]) for record in records if key in record]
        if history:
            step, value = history[-1]
            row.append(f"{label} {value:.3f} ", style="bold")
            row.append(sparkline([v for _, v in history], num_blocks), style=style)
            row.append("    " if label == "train" else f" at {step}")
    return row


def _time_row(record: Record) -> Text:
    """A step's seconds, its share per phase as one bar, and the speed."""
    if "time/step_s" not in record:
        return Text()
    phases = phase_times(record)
    row = Text(f"{record['time/step_s']:.1f} s a step")
    if "throughput/tokens_per_s" in record:
        row.append(f"   {si(record['throughput/tokens_per_s'])} tokens/s")
    if phases:
        row.append("\n")
        for name, seconds in phases.items():
            row.append("█" * round(36 * seconds / sum(phases.values())), style=_COLORS[name])
        row.append("\n")
        for name, seconds in phases.items():
            row.append(f"{name} {seconds:.1f}  ", style=_COLORS[name])
    return row


def sparkline(values: Sequence[float], num_blocks: int) -> str:
    """The whole history in at most `num_blocks` blocks (means), on a scale that holds 0, 1 and every value."""
    means = [float(part.mean()) for part in np.array_split(np.asarray(values), min(num_blocks, len(values)))]
    low, high = min(0.0, *means), max(1.0, *means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / (high - low))] for mean in means)


def _clock_face(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
