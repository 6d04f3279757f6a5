"""Level "stack": one cell is one real `megatron-vespo train` run: Megatron-Core over gloo under Ray, and an SGLang server.

    stack_sft.toml    the warm start, once for every seed      stack.toml    a cell, before its overrides

Every worker keeps one server for all its cells and lends it to them as `rollout.external`; each run pushes its own weights
into it before anything is sampled.  Runs are children of the worker, which has done the imports for them; "command" of a
result repeats a run by hand, with any server of the same model.  The order in which an engine works is not the same twice, so
neither are the numbers.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_vespo.config import ConfigError, RolloutConfig, SftConfig, TrainConfig, load_config
from megatron_vespo.control import finetune
from megatron_vespo.control import run as control
from megatron_vespo.metrics import Record
from megatron_vespo.rollout.server import Server
from megatron_vespo.rundir import read_metrics
from megatron_vespo.types import RunError
from tools.staleness.grid import summary
from tools.staleness.task import write_inputs

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RUNS = ROOT / "runs" / "staleness"
TRAIN, SFT = HERE / "stack.toml", HERE / "stack_sft.toml"
PROMPTS_PER_UPDATE = 4
EVALUATE_EVERY = 64
"""Updates, whatever N is."""
SUCCESS = "eval/prompts/avg"
STATISTICS = {
    "reward": "reward/train_mean",
    "log_w_mean": "algo/log_w_mean",
    "log_w_std": "algo/log_w_std",
    "ess": "algo/ess_fraction",
    "phi_mean": "algo/phi_mean",
    "dead": "algo/dead_fraction",
    "staleness": "staleness/mean_steps",
    "mismatch_abs_max": "mismatch/seq_nats_abs_max",
    "expert_mismatch": "experts/mismatch_fraction",
    "entropy": "algo/entropy_nats",
}
"""Names in a history, and in metrics.jsonl."""
END_WITHIN_S = 40
"""A run that is told to end finishes its step first."""
ANY_SERVER = "http://127.0.0.1:30000"
PHASES = ("wait", "train", "score", "sync", "eval")

Positive = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """A cell."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    level: Literal["stack"]
    algorithm: str
    overrides: dict[str, Any]
    seed: Annotated[int, Field(ge=0)]
    learning_rate: Annotated[float, Field(gt=0)]
    num_updates: Positive
    N: Positive = 1
    """Updates on each batch."""
    staleness: Annotated[int, Field(ge=0)] = 0
    """loop.max_staleness."""
    engine_dtype: Literal["float32", "bfloat16"] = "float32"
    """The trainer's is float32."""
    router_replay: Literal["off", "trainer", "engine"] = "off"

    @model_validator(mode="after")
    def _rounds_are_whole(self) -> Settings:
        if self.num_updates % EVALUATE_EVERY or EVALUATE_EVERY % self.N:
            raise ValueError(
                f"num_updates = {self.num_updates}, N = {self.N}: evaluations come every {EVALUATE_EVERY} updates and at the "
                "end of a batch; N must divide that, and that num_updates"
            )
        return self


def check(cell: dict[str, Any]) -> None:
    """Refuse settings that this level, or `megatron-vespo train`, does not know.

    Raises:
        ConfigError: naming them.
    """
    try:
        settings = Settings.model_validate(cell)
    except ValidationError as err:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in err.errors()]
        raise ConfigError(f"cell = {cell}: {'; '.join(lines)}; mend the grid") from None
    load_config(TrainConfig, TRAIN, overrides(settings, RUNS / "cell", ANY_SERVER))


def overrides(settings: Settings, run_dir: Path, url: str) -> list[str]:
    """What a cell changes of stack.toml, as arguments of `megatron-vespo train`."""
    warm, n = _warm(settings.seed), settings.N
    values = {
        "run_dir": str(run_dir),
        "seed": settings.seed,
        "model": str(warm / "sft" / "final"),
        "prompts.train": str(warm / "inputs" / "prompts.parquet"),
        "evaluation.sets.prompts": str(warm / "inputs" / "prompts.parquet"),
        "evaluation.every": EVALUATE_EVERY // n,
        "loop.num_steps": settings.num_updates // n,
        "loop.prompts_per_step": n * PROMPTS_PER_UPDATE,
        "loop.updates_per_batch": n,
        "loop.max_staleness": settings.staleness,
        "trainer.optimizer.learning_rate": settings.learning_rate,
        "trainer.router_replay": settings.router_replay,
        "rollout.record_experts": settings.router_replay != "off",
        **_engine(settings.engine_dtype),
        "rollout.external": [url],
        **{f"algorithm.{key}": value for key, value in settings.overrides.items()},
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def command(arguments: Sequence[str]) -> str:
    """The line that repeats a cell by hand, in the root of the repository, once a server runs at its `rollout.external`."""
    words = ["megatron-vespo", "train", str(TRAIN), *arguments]
    return shlex.join(word.replace(f"{ROOT}/", "") for word in words)


def outcome(records: Sequence[Record], updates_per_step: int) -> dict[str, Any]:
    """start, best, final and history, with one entry an evaluation, from a finished run's metrics.jsonl."""
    history, steps = [], []
    for record in records:
        steps.append(record)
        if SUCCESS in record:
            history.append({"update": record["step"] * updates_per_step, **_entry(steps)})
            steps = []
    return {
        **summary(history),
        "phases_s": {
            phase: round(sum(record.get(f"time/{phase}_s", 0.0) for record in records), 1) for phase in PHASES
        },
    }


def _entry(steps: Sequence[Record]) -> dict[str, float]:
    """The evaluation after the last of these steps, and the means of what all of them say of their batches."""
    entry = {"success": steps[-1][SUCCESS]}
    for name, key in STATISTICS.items():
        if values := [step[key] for step in steps if key in step]:
            entry[name] = round(statistics.fmean(values), 6)
    return entry


@contextmanager
def open_level() -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """The worker's server, which is started with the first cell."""
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}  # else ranks yield to their own engine
    RUNS.mkdir(parents=True, exist_ok=True)
    servers = _Servers()
    try:
        yield lambda cell: _run(Settings.model_validate(cell), servers)
    finally:
        servers.close()


class _Servers:
    """One server at a time, started again where a cell needs another kind."""

    def __init__(self) -> None:
        self._server: Server | None = None

    def url(self, settings: Settings) -> str:
        """Of a server that serves this cell."""
        server = self._server
        if server and (
            server.cfg.dtype != settings.engine_dtype or asyncio.run(server.death_report()) is not None
        ):
            self.close()
        if self._server is None:
            cfg = load_config(TrainConfig, TRAIN, overrides(settings, RUNS / "cell", ANY_SERVER))
            rollout = RolloutConfig.model_validate(cfg.rollout.model_dump() | {"record_experts": True})
            log = RUNS / f"server-{os.getpid()}.log"
            server = Server(rollout, cfg.model, log, name=f"server of worker {os.getpid()}")
            asyncio.run(server.start())
            self._server = server
        return self._server.url

    def close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            asyncio.run(server.stop())


def _run(settings: Settings, servers: _Servers) -> dict[str, Any]:
    """Train one cell; its directory is kept only if it fails."""
    _make_warm_start(settings.seed)
    url, run_dir = servers.url(settings), RUNS / f"cell-{os.getpid()}"
    shutil.rmtree(run_dir, ignore_errors=True)
    arguments = overrides(settings, run_dir, url)
    cfg = load_config(TrainConfig, TRAIN, arguments)
    began = time.monotonic()
    _in_child(lambda: control.train(cfg, resume=None, report=_no_report), RUNS / f"cell-{os.getpid()}.log")
    result = outcome(read_metrics(run_dir / "metrics.jsonl"), settings.N)
    shutil.rmtree(run_dir)
    return result | {"wall_s": time.monotonic() - began, "command": command(arguments)}


def _warm(seed: int) -> Path:
    return RUNS / f"seed-{seed}"


def _make_warm_start(seed: int) -> None:
    """Inputs and fine-tuned model of a seed, made by whichever worker needs them first."""
    warm = _warm(seed)
    warm.mkdir(parents=True, exist_ok=True)
    with (warm / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (warm / "sft" / "final").exists():
            return
        shutil.rmtree(warm / "sft", ignore_errors=True)
        values = {
            "run_dir": str(warm / "sft"),
            "seed": seed,
            "model": str(warm / "inputs" / "model"),
            "data.train": str(warm / "inputs" / "demonstrations.parquet"),
        }
        cfg = load_config(SftConfig, SFT, [f"{key}={json.dumps(value)}" for key, value in values.items()])

        def make() -> None:
            write_inputs(warm / "inputs", seed)
            finetune.finetune(cfg, resume=None, report=_no_report)

        _in_child(make, warm / "sft.log")


def _no_report(run_dir: Path) -> Path:
    return run_dir / "metrics.jsonl"  # which is all that the study reads


def _in_child(work: Callable[[], None], log: Path) -> None:
    """Do it in a fork of this process, whose output goes to `log`.

    Raises:
        RunError: it failed; with the end of its output.
    """
    child = multiprocessing.get_context("fork").Process(target=_child, args=(work, log))
    child.start()
    try:
        child.join()
    finally:
        if child.is_alive():  # we are told to end
            child.terminate()
            child.join(END_WITHIN_S)
            child.kill()
    if child.exitcode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RunError(f"run = ended with status {child.exitcode}: expected 0; the end of {log}:\n{tail}")


def _child(work: Callable[[], None], log: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    work()


def _engine(dtype: str) -> dict[str, Any]:
    """A bfloat16 engine differs from the trainer by about so much on the canary."""
    return {"rollout.dtype": dtype, "rollout.canary_tolerance": 0.01 if dtype == "float32" else 0.5}
