"""The run directory: one per run, held by one process, never overwritten; plots and trackers read from it.

    config.toml        the resolved configuration          rollouts/step_000012.parquet   one file per step
    environment.json   start, versions, host, command      checkpoints/  logs/  final/    state, logs, HF model
    metrics.jsonl      one line per step                   evidence/step_000020.parquet   of some steps (evidence.py)
    alerts.jsonl       one line per alert                  events/                        TensorBoard, derived
    superseded/001/    what a resume replaced              report.html                    derived

Shape key:  T response tokens of one sequence.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vespo.config import ConfigError
from megatron_vespo.types import Group, RunError, Scored, StepOutput

_PACKAGES = (
    "megatron-vespo",
    "torch",
    "megatron-core",
    "sglang",
    "ray",
    "transformers",
    "transformer-engine",
)
_TRACES = ("metrics.jsonl", "rollouts", "checkpoints", "final")
"""A directory in which one of these is not empty holds a run; one that only failed to start does not."""
_LOCK_PATIENCE_S = 1.0
"""Longer than `is_running` holds the lock, far shorter than a run does."""


class RunDirectory:
    """A run directory that this process holds until `close` (or its end, however sudden)."""

    def __init__(self, path: Path, config_toml: str, *, resume: bool = False) -> None:
        """Create the directory, or take up the run it holds.

        With `resume` the run that is there is continued (see `rewind`); where there is none, one is started, so
        that a job that a scheduler requeues can always be submitted with the same command.

        Raises:
            ConfigError: the directory already holds a run and `resume` is false.
            RunError: another process runs in it.
        """
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(path)
        found = [name for name in _TRACES if _holds_something(path / name)]
        if found and not resume:
            os.close(self._lock)
            raise ConfigError(
                f"run_dir = '{path}': already holds a run ({', '.join(found)}), which is never overwritten; "
                "resume it, or choose another directory"
            )
        self.resumed = bool(found)
        self._superseded = _next_superseded(path)
        for folder in (self.events, self.rollouts, self.evidence, self.checkpoints, self.logs):
            folder.mkdir(exist_ok=True)
        for file in (self.config, self.environment):
            if file.exists():
                self._supersede(file)
        write_atomically(self.config, config_toml.encode())
        write_atomically(self.environment, json.dumps(_environment(), indent=1).encode())

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def alerts(self) -> Path:
        return self.path / "alerts.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def evidence(self) -> Path:
        return self.path / "evidence"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def rewind(self, version: int) -> None:
        """Forget the steps after `version`, the checkpoint a run resumes from; -1 forgets all of them.

        Their lines of metrics and alerts (and a line that a crash tore), rollout and evidence files and the final model move
        to superseded/: nothing is lost.
        """
        for log in (self.metrics, self.alerts):
            lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
            kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= version]
            if len(kept) < len(lines):
                self._supersede(log)
                write_atomically(log, b"".join(kept))
        for folder in (self.rollouts, self.evidence):
            for file in folder.glob("step_*.parquet"):
                if step_of(file) > version:
                    self._supersede(file)
        if self.final.exists():
            self._supersede(self.final)

    def close(self) -> None:
        """Let another process run here."""
        os.close(self._lock)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _supersede(self, file: Path) -> None:
        target = self._superseded / file.relative_to(self.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)


def is_running(path: Path) -> bool:
    """Whether a process holds the run directory `path`."""
    try:
        descriptor = os.open(path / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, oldest first; a last line that a crash tore is left out."""
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as err:
            raise RunError(
                f"{path}:{number}: expected one JSON object, but {err}; mend or delete that line"
            ) from err
    return records


ROLLOUT_SCHEMA = pa.schema([
    ("step", pa.int32()),  # the weights version after the update
    ("train_version", pa.int32()),  # the weights version that the update started from: step - 1
    ("uid", pa.string()),
    ("ordinal", pa.int64()),  # place in the prompt stream, counted over epochs: no two groups of a run share one
    ("sample", pa.int32()),  # 0, 1, ... in its group
    ("prompt_text", pa.string()),
    ("response_text", pa.string()),
    ("answer", pa.string()),
    ("reward", pa.float64()),
    ("advantage", pa.float64()),
    ("finish_reason", pa.string()),
    ("prompt_ids", pa.list_(pa.int32())),
    ("response_ids", pa.list_(pa.int32())),
    ("versions", pa.list_(pa.int32())),  # the weights version that sampled each token
    ("sampled", pa.list_(pa.bool_())),  # false where an environment wrote the token; null: all were sampled
    ("engine", pa.string()),  # that sampled the end
    ("num_turns", pa.int32()),
    ("num_resumed", pa.int32()),  # interruptions by weight pushes or lost engines
    ("behavior_logp", pa.list_(pa.float32())),  # engine, when sampled
    ("policy_logp", pa.list_(pa.float32())),  # trainer, under train_version
    ("engine_logp", pa.list_(pa.float32())),  # engine, under train_version; null where not re-scored
    ("log_w", pa.float64()),  # as its own update found the policy, which is train_version's for the first update
    ("coefficient", pa.float64()),  # mean over its tokens; both null where the update was left out
])  # fmt: skip
"""Columns of a rollout file; log-probs are [T] nats at the sampling temperature."""


def rollout_rows(
    groups: Sequence[Group], output: StepOutput, engine: Sequence[Scored | None], *, step: int
) -> list[dict[str, Any]]:
    """One row per rollout of the step that made weights version `step`, in the order of `output`."""
    placed = [(group.ordinal, *pair) for group in groups for pair in enumerate(group.rollouts)]
    rows = []
    for index, (ordinal, sample, rollout) in enumerate(placed):
        prompt, response = rollout.prompt, rollout.response
        rows.append({
            "step": step,
            "train_version": step - 1,
            "uid": prompt.uid,
            "ordinal": ordinal,
            "sample": sample,
            "prompt_text": prompt.text,
            "response_text": response.text,
            "answer": prompt.answer,
            "reward": rollout.reward,
            "advantage": rollout.advantage,
            "finish_reason": response.finish_reason,
            "prompt_ids": prompt.token_ids,
            "response_ids": response.token_ids,
            "versions": response.versions,
            "sampled": response.sampled,
            "engine": response.engine,
            "num_turns": response.num_turns,
            "num_resumed": response.num_resumed,
            "behavior_logp": response.behavior_logp,
            "policy_logp": output.scored[index].logp,
            "engine_logp": scored.logp if (scored := engine[index]) else None,
            "log_w": float(output.log_w[index]) if index < len(output.log_w) else None,
            "coefficient": float(output.coefficient[index]) if index < len(output.log_w) else None,
        })  # fmt: skip
    return rows


def write_rollouts(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write the rows of one step to `path`/step_<step>.parquet; a reader sees the whole file or none."""
    file = step_file(path, rows[0]["step"])
    columns = [pa.array([row[field.name] for row in rows], type=field.type) for field in ROLLOUT_SCHEMA]
    partial = file.with_suffix(".partial")
    pq.write_table(pa.Table.from_arrays(columns, schema=ROLLOUT_SCHEMA), partial, compression="zstd")
    partial.replace(file)
    return file


def rollout_files(path: Path) -> list[Path]:
    """The rollout files below the run directory `path`, by ascending step."""
    return sorted((path / "rollouts").glob("step_*.parquet"), key=step_of)


def step_file(path: Path, step: int) -> Path:
    """`path`/step_000012.parquet for 12."""
    return path / f"step_{step:06d}.parquet"


def step_of(file: Path) -> int:
    """12 for step_000012.parquet."""
    return int(file.stem.removeprefix("step_"))


def write_atomically(file: Path, content: bytes) -> None:
    """Replace `file` so that a crash leaves either the old or the new content."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)


def _lock(path: Path) -> int:
    """A descriptor that holds path/lock; the kernel lets go of it when the process ends, however it ends."""
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    for _ in _until(_LOCK_PATIENCE_S):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return descriptor
    owner = os.pread(descriptor, 200, 0).decode() or "another process"
    os.close(descriptor)
    raise RunError(
        f"run_dir = '{path}': {owner} is running in it; wait for it or end it, or choose another directory"
    )


def _until(patience_s: float) -> Iterator[None]:
    deadline = time.monotonic() + patience_s
    yield
    while time.monotonic() < deadline:
        time.sleep(0.02)
        yield


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size > 0


def _next_superseded(path: Path) -> Path:
    taken = [int(folder.name) for folder in (path / "superseded").glob("[0-9]*")]
    return path / "superseded" / f"{max(taken, default=0) + 1:03d}"


def _environment() -> dict[str, Any]:
    """What the configuration does not say about this process."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "started": time.time(),
        "host": socket.gethostname(),
        "processors": os.cpu_count(),
        "command": sys.argv,
        "versions": versions,
    }
