"""Failures on purpose: the real loop, fleet, publisher and weight push on simulated engines, one fault in the middle.

tests/control/test_chaos.py asserts what must hold; benchmarks/chaos.py prints how long recovery takes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from megatron_vespo.config import TrainConfig, parse_config
from megatron_vespo.control.buffer import GroupBuffer
from megatron_vespo.control.observer import Observer
from megatron_vespo.control.simulation import SimulatedTrainer, simulate, simulated_prompts
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.lifecycle import State
from megatron_vespo.rollout.simulated_engine import Behaviour, SimulatedServer
from megatron_vespo.rundir import read_metrics, rollout_files
from megatron_vespo.types import Verifier

NUM_ENGINES = 3
PROMPTS, STALENESS = 4, 1
STRIKE_AT, PATIENCE_S = 3, 60.0

Engines = Sequence[SimulatedServer]


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong after step STRIKE_AT."""

    name: str
    strike: Callable[[Engines], object]
    loses: int = 1
    """Engines that must be lost and come back."""
    tested_elsewhere: bool = False
    """With fakes, in tests/rollout: here it is run by the benchmark alone, to save time."""


@dataclass
class Outcome:
    """What a run with a fault came to."""

    steps: list[int] = field(default_factory=list)
    ordinals: list[int] = field(default_factory=list)
    """Of the groups that were trained on, in order."""
    staleness_max: int = 0
    restarts: int = 0
    recovery_s: float = 0.0
    """From the fault until as many engines serve as before; 0 where none was lost."""
    longest_step_s: float = 0.0
    usual_step_s: float = 0.0
    """Median."""
    told: str = ""


def suffer(kind: str, **parameters: object) -> Callable[[Engines], object]:
    return lambda engines: engines[0].suffer(kind, **parameters)


def send(number: signal.Signals) -> Callable[[Engines], object]:
    def strike(engines: Engines) -> None:
        assert engines[0].pid is not None
        os.killpg(engines[0].pid, number)

    return strike


def kill_all(engines: Engines) -> None:
    for engine in engines:
        assert engine.pid is not None
        os.killpg(engine.pid, signal.SIGKILL)


FAULTS = [
    Fault("killed while it generates", send(signal.SIGKILL)),
    Fault("all killed at once", kill_all, loses=NUM_ENGINES),
    Fault("stopped (SIGSTOP)", send(signal.SIGSTOP)),
    Fault("hangs, HTTP answers", suffer("hang"), tested_elsewhere=True),
    Fault("killed when a bucket is announced", suffer("die", bucket=1)),
    Fault("freezes in a transfer", suffer("freeze", bucket=1)),
    Fault("dies in the pause", suffer("drop", path="/continue_generation"), tested_elsewhere=True),
    Fault("20 times as slow", suffer("slow", factor=20), loses=0, tested_elsewhere=True),
    Fault("truncated answers", suffer("garbage", how="truncated"), tested_elsewhere=True),
    Fault("answers without log-probs", suffer("garbage", how="logprobs"), tested_elsewhere=True),
    Fault("answers of the wrong length", suffer("garbage", how="length")),
    Fault("answers without experts", suffer("garbage", how="experts"), tested_elsewhere=True),
    Fault("wrong version", suffer("wrong_version", label="77")),
    Fault("keeps the old weights", suffer("stale_weights")),
    Fault(
        "every third answer a 500",
        suffer("flaky", probability=0.33, times=30),
        loses=0,
        tested_elsewhere=True,
    ),
    Fault("drops five connections", suffer("drop", times=5), loses=0),
]


def config(directory: Path) -> TrainConfig:
    return parse_config(TrainConfig, {
        "run_dir": str(directory / "run"),
        "model": str(directory / "model"),
        "prompts": {"train": "none.parquet", "max_prompt_tokens": 32},
        "sampling": {"max_response_tokens": 200},
        "trainer": {"device": "cpu", "dtype": "float32", "optimizer": {"learning_rate": 1e-3}},
        "rollout": {
            "device": "cpu", "dtype": "float32", "context_length": 512, "max_running_requests": 64,
            "canary_tolerance": 1e-3, "stall_timeout_s": 3, "sync_timeout_s": 6, "request_timeout_s": 30,
            "start_timeout_s": 60,
        },
        "loop": {
            "num_steps": 10_000, "prompts_per_step": PROMPTS, "group_size": 4, "max_staleness": STALENESS,
            "rescored_sequences": 4, "step_timeout_s": PATIENCE_S,
        },
    })  # fmt: skip


async def suffer_in_the_middle(fault: Fault, directory: Path, verifier: Verifier | None = None) -> Outcome:
    """One run with one fault; `directory` holds the model, and takes everything that is written."""
    cfg, outcome = config(directory), Outcome()
    behaviour = Behaviour(lengths="lognormal:60:0.6:200", speedup=4)
    engines = [
        SimulatedServer(f"engine {i}", cfg.model, directory / f"engine-{i}.log", behaviour)
        for i in range(NUM_ENGINES)
    ]

    async def strike(fleet: Fleet, observer: Observer, buffer: GroupBuffer) -> None:
        await _until(lambda: observer.progress.version >= STRIKE_AT and _all_serve(fleet))
        await asyncio.to_thread(fault.strike, engines)
        began = time.monotonic()
        if fault.loses:
            await _until(lambda: _restarts(fleet) >= fault.loses)
            await _until(lambda: _all_serve(fleet))
            outcome.recovery_s = time.monotonic() - began
        struck = observer.progress.version
        await _until(lambda: observer.progress.version >= struck + 2)
        outcome.restarts = _restarts(fleet)
        buffer.close()

    trainer = SimulatedTrainer(cfg.model, cfg.rollout, lambda sequences: 0.2)
    try:
        outcome.told = await simulate(
            cfg, engines, trainer, simulated_prompts(64), verifier=verifier, meanwhile=strike
        )
    finally:
        await asyncio.to_thread(trainer.close)
    _read(outcome, cfg.run_dir)
    return outcome


def _read(outcome: Outcome, run_dir: Path) -> None:
    """What the run directory says."""
    records = read_metrics(run_dir / "metrics.jsonl")
    for file in rollout_files(run_dir):
        rows = pq.read_table(file, columns=["ordinal", "sample"]).to_pylist()
        outcome.ordinals += [row["ordinal"] for row in rows if row["sample"] == 0]
    times = sorted(record["time/step_s"] for record in records)
    outcome.steps = [record["step"] for record in records]
    outcome.staleness_max = max(record["staleness/max_steps"] for record in records)
    outcome.longest_step_s, outcome.usual_step_s = times[-1], times[len(times) // 2]


async def _until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not happened():
            await asyncio.sleep(0.02)


def _all_serve(fleet: Fleet) -> bool:
    return all(member.state is State.SERVING for member in fleet.members)


def _restarts(fleet: Fleet) -> int:
    return sum(member.life.starts - 1 for member in fleet.members)
