"""What a run directory remembers, as arrays: the only reader behind report, panels and verdicts.

Shape key:  B sequences of all rollout files read, S their response tokens.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vespo.config import ConfigError
from megatron_vespo.rundir import is_running, read_metrics, rollout_files
from megatron_vespo.types import Doubles, Ints

_READ_BYTES = 2**30
"""Of the compressed rollout files of a long run; beyond it every second, third, ... file is read."""
_SCALARS = ("step", "train_version", "ordinal", "sample", "advantage", "reward", "log_w", "coefficient")
_TOKENS = ("versions", "sampled", "behavior_logp", "policy_logp", "engine_logp")


@dataclass(frozen=True, kw_only=True)
class SequenceTable:
    """One number per sequence, [B]; with algorithm.reference = "behavior" log W = engine_nats + stale_nats wherever the engine
    re-scored it, plus what the updates before its own had moved the policy, where a batch has several."""

    step: Ints
    ordinal: Ints
    """Place of the prompt in the prompt stream."""
    sample: Ints
    """Within its group."""
    advantage: Doubles
    reward: Doubles
    log_w: Doubles
    """nan, like the coefficient, where the update was left out (algorithm.min_living_weight)."""
    coefficient: Doubles
    staleness: Doubles
    """Mean over the tokens that the engine sampled, steps."""
    engine_nats: Doubles
    """sum(policy - engine) under the same weights; nan where not re-scored."""
    stale_nats: Doubles
    """sum(engine now - engine when sampled); nan where not re-scored."""

    @property
    def trained(self) -> SequenceTable:
        """Without the sequences that were left out."""
        kept = np.isfinite(self.log_w)
        return SequenceTable(**{field.name: getattr(self, field.name)[kept] for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class History:
    """A run so far; it may still be running, or have crashed."""

    path: Path
    config: dict[str, Any]
    started: float
    """Unix seconds."""
    versions: dict[str, str]
    """Package versions; empty where environment.json is missing."""
    records: list[dict[str, Any]]
    """One or more, as in metrics.jsonl."""
    rollout_files: list[Path]
    files_read: int
    sequences: SequenceTable | None
    running: bool
    final_written: float
    """Unix seconds of the final model; 0 where there is none."""

    @property
    def is_rl(self) -> bool:
        return "loop" in self.config

    @property
    def num_steps(self) -> int:
        return (self.config["loop"] if self.is_rl else self.config)["num_steps"]

    @property
    def last_step(self) -> int:
        return self.records[-1]["step"]

    @property
    def state(self) -> str:
        """ "running", "complete" or "stopped early"; a run is complete when final/ is newer than its last step."""
        if self.running:
            return "running"
        return "complete" if self.final_written >= self.records[-1]["time"] else "stopped early"

    @property
    def seconds(self) -> float:
        return self.records[-1]["time"] - self.started

    def series(self, key: str) -> tuple[Ints, Doubles]:
        """Steps and values of the records that have the metric."""
        having = [record for record in self.records if key in record]
        steps = np.array([record["step"] for record in having], np.int32)
        return steps, np.array([record[key] for record in having], np.float64)

    def minutes(self, key: str) -> Doubles:
        """Wall-clock minutes since the start, for the records that have the metric."""
        return np.array([(record["time"] - self.started) / 60 for record in self.records if key in record])

    def setting(self, dotted: str, default: Any) -> Any:
        """A value of the configuration that some runs lack, e.g. setting("rollout.dtype", "bfloat16")."""
        value: Any = self.config
        for part in dotted.split("."):
            if part not in value:
                return default
            value = value[part]
        return value


def read_history(path: Path) -> History:
    """Read a run directory.

    Raises:
        ConfigError: it is missing, is no run directory, or no step has been logged in it yet.
    """
    config = path / "config.toml"
    if not config.is_file():
        raise ConfigError(
            f"run_dir = '{path}': no config.toml in it, so it holds no run; give a run's directory"
        )
    metrics = path / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.exists() else []
    if not records:
        raise ConfigError(
            f"run_dir = '{path}': no step has been logged yet; wait for the first, or look at its logs/"
        )
    environments = [json.loads(file.read_text()) for file in path.rglob("environment.json")]
    files, final = rollout_files(path), path / "final"
    stride = max(1, -(-sum(file.stat().st_size for file in files) // _READ_BYTES))
    chosen = files[::-1][::stride][::-1]
    return History(
        path=path,
        config=tomllib.loads(config.read_text()),
        started=min([records[0]["time"], *(e["started"] for e in environments)]),
        versions=environments[0]["versions"] if environments else {},
        records=records,
        rollout_files=files,
        files_read=len(chosen),
        sequences=_read_sequences(chosen) if chosen else None,
        running=is_running(path),
        final_written=final.stat().st_mtime if final.exists() else 0.0,
    )


def _read_sequences(files: list[Path]) -> SequenceTable:
    if missing := {*_SCALARS, *_TOKENS} - set(pq.read_schema(files[0]).names):
        raise ConfigError(
            f"rollouts of '{files[0].parent.parent}': no column {', '.join(sorted(missing))}, written by another version of this "
            "program; report on it with that"
        )
    parts = [
        _summarize(pq.read_table(file, columns=[*_SCALARS, *_TOKENS]).combine_chunks()) for file in files
    ]
    return SequenceTable(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _summarize(table: pa.Table) -> dict[str, Any]:
    columns = {name: table[name].to_numpy() for name in _SCALARS if name != "train_version"}
    num_tokens = _sums(table, None)
    staleness = table["train_version"].to_numpy() - _sums(table, "versions") / num_tokens
    rescored = table["engine_logp"].is_valid()
    some = table.filter(rescored)
    engine_nats, stale_nats = np.full((2, len(table)), np.nan)
    engine_nats[rescored.to_numpy()] = _sums(some, "policy_logp") - _sums(some, "engine_logp")
    stale_nats[rescored.to_numpy()] = _sums(some, "engine_logp") - _sums(some, "behavior_logp")
    return {
        **columns,
        "staleness": staleness,
        "engine_nats": engine_nats,
        "stale_nats": stale_nats,
    }


def _sums(table: pa.Table, column: str | None) -> Doubles:
    """The float64 sum of each row's list over the tokens that the engine sampled; of ones without a column."""
    lengths = table["versions"].combine_chunks().value_lengths().to_numpy()
    ends = np.cumsum(lengths)
    values = np.ones(int(lengths.sum())) if column is None else _flat(table, column).astype(np.float64)
    given = table["sampled"].is_valid().to_numpy()
    if given.any():  # a row without the list has sampled all of its tokens
        sampled = np.ones(len(values), bool)
        sampled[np.repeat(given, lengths)] = _flat(table, "sampled")
        values = np.where(sampled, values, 0.0)
    running = np.concatenate([[0.0], np.cumsum(values)])
    return running[ends] - running[ends - lengths]


def _flat(table: pa.Table, column: str) -> np.ndarray:
    return table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
