"""What asynchrony gains on long-tailed responses: the real loop, buffer and fleet, 64 simulated engines, at staleness 0 to 8.

    python benchmarks/asynchrony.py [--figure docs/asynchrony.png]

Simulated are the models alone (megatron_vespo/rollout/simulated_engine): 64 engines in one process, which sample responses
of log-normal length, median 2,000 tokens, sigma 0.8, cut at 16,384 (0.4 % are), at 100 tokens/s alone and at most 8,000
tokens/s an engine; and a trainer that takes 28,000 tokens/s, so 25 s for a batch of 64 prompts x 4 responses, and gives the
engines a new version by its label alone.  Everything else is what a run on a cluster does.  One token stands for ten, and
time passes 12 to 60 times as fast, so that the controller, whose own time is not sped up, does at most a few hundred
responses a second.  All seconds below are those of the simulated cluster.  Takes about 5 minutes.

    S           loop.max_staleness; window: loop.window, finished groups that may overtake unfinished ones
    step        seconds per step, without the first S + 1, which fill the queue
    ideal       the larger of the trainer's own time and of the engines' time at full load, for the mean step, as a share
                of `step`: 100 % is a trainer that never waits for anything
    wait, sync  share of the step in which the trainer waits for a batch, and for the new version to be confirmed
    stale       mean and largest staleness of the tokens trained on; the largest never exceeds S
    speed-up    over S = 0
    cpu         share of a core that the controller took, the simulated trainer included: near 100 % it is the limit
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np

from megatron_vespo.config import TrainConfig, parse_config
from megatron_vespo.control.simulation import SimulatedTrainer, simulate, simulated_prompts
from megatron_vespo.data.demo import write_tiny_model
from megatron_vespo.rollout.simulated_engine import Behaviour, SimulatedServers
from megatron_vespo.rollout.weight_sync import PushOutcome, Target
from megatron_vespo.rundir import read_metrics
from megatron_vespo.types import TrainSequence

NUM_ENGINES = 64
PROMPTS, GROUP = 64, 4
TOKENS_EACH = 10
"""Tokens that one simulated token stands for."""
CAP = 16384 // TOKENS_EACH
ALONE_TOKENS_S, ENGINE_TOKENS_S, TRAINER_TOKENS_S = 100.0, 8000.0, 28000.0
RUNNING = 64


class Setting(NamedTuple):
    """One run.  The faster its steps, the slower time passes, so that the controller's own time stays a small part."""

    staleness: int
    window: int
    speedup: float
    num_steps: int
    """That are measured, after the S + 1 that fill the queue."""


SETTINGS = (
    Setting(0, 0, 60, 6),
    Setting(1, 0, 40, 8),
    Setting(2, 0, 30, 8),
    Setting(4, 0, 18, 12),
    Setting(8, 0, 12, 18),
    Setting(2, 64, 30, 8),
    Setting(4, 64, 18, 12),
)


@dataclass(frozen=True)
class Result:
    """Means over the measured steps, in seconds of the simulated cluster."""

    setting: Setting
    step_s: float
    ideal_s: float
    wait_share: float
    sync_share: float
    stale_mean: float
    stale_max: int
    cpu_share: float


class LabellingTrainer(SimulatedTrainer):
    """Gives the engines a new version by its label; a simulated engine computes what its label says."""

    async def push(self, targets: Sequence[Target], version: int) -> PushOutcome:
        label = {"new_version": str(version), "abort_all_requests": False}
        async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as tasks:
            for target in targets:
                tasks.create_task(_post(http, f"{target.url}/update_weight_version", label))
        return PushOutcome(
            version=version, num_bytes=0, time_s={}, failures={}, incomplete=frozenset(), digests={}
        )


async def _post(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
    async with http.post(url, json=body) as answer:
        answer.raise_for_status()


def config(directory: Path, setting: Setting) -> TrainConfig:
    staleness, window, _, num_steps = setting
    return parse_config(TrainConfig, {
        "run_dir": str(directory / f"run-{staleness}-{window}"),
        "model": str(directory / "model"),
        "prompts": {"train": "none.parquet", "max_prompt_tokens": 32},
        "sampling": {"max_response_tokens": CAP},
        "trainer": {"device": "cpu", "dtype": "float32", "optimizer": {"learning_rate": 1e-3}},
        "rollout": {
            "device": "cpu", "dtype": "float32", "context_length": 2048, "max_running_requests": RUNNING,
            "partial_rollouts": "in_place", "record_experts": False, "canary_tolerance": 1e-3,
        },
        "loop": {
            "num_steps": staleness + 1 + num_steps, "prompts_per_step": PROMPTS, "group_size": GROUP, "max_staleness": staleness,
            "window": window, "rescored_sequences": 1, "step_timeout_s": 120,
        },
    })  # fmt: skip


async def measure(directory: Path, setting: Setting) -> Result:
    """One run; the steps that fill the queue are not measured."""
    cfg, speedup = config(directory, setting), setting.speedup
    behaviour = Behaviour(
        lengths=f"lognormal:{2000 // TOKENS_EACH}:0.8:{CAP}", max_running_requests=RUNNING, context_length=2048,
        decode_tokens_s=ALONE_TOKENS_S / TOKENS_EACH, max_decode_tokens_s=ENGINE_TOKENS_S / TOKENS_EACH,
        speedup=speedup, text=False, metrics=False,
    )  # fmt: skip
    rate = TRAINER_TOKENS_S / TOKENS_EACH * speedup

    def step_s(sequences: Sequence[TrainSequence]) -> float:
        return sum(s.num_response_tokens for s in sequences) / rate

    async with SimulatedServers(NUM_ENGINES, cfg.model, directory / "engines.log", behaviour) as servers:
        trainer = LabellingTrainer(cfg.model, cfg.rollout, step_s)
        began, used = time.perf_counter(), time.process_time()
        await simulate(cfg, servers.engines, trainer, simulated_prompts(20_000))
        cpu_share = (time.process_time() - used) / (time.perf_counter() - began)
    records = read_metrics(cfg.run_dir / "metrics.jsonl")[setting.staleness + 1 :]

    def mean(key: str) -> float:
        return float(np.mean([record[key] for record in records]))

    tokens = mean("response/length_mean") * PROMPTS * GROUP
    full = NUM_ENGINES * behaviour.throughput(RUNNING)
    step = mean("time/step_s")
    return Result(
        setting=setting,
        step_s=step * speedup,
        ideal_s=max(tokens / full, tokens / rate * speedup),
        wait_share=mean("time/wait_s") / step,
        sync_share=mean("time/sync_s") / step,
        stale_mean=mean("staleness/mean_steps"),
        stale_max=max(record["staleness/max_steps"] for record in records),
        cpu_share=cpu_share,
    )


def table(results: Sequence[Result]) -> str:
    first = results[0].step_s
    lines = ["S  window    step   ideal   speed-up    wait    sync   stale mean  max    cpu"]
    lines += [
        f"{r.setting.staleness}  {r.setting.window or '-':>6}  {r.step_s:4.0f} s  {r.ideal_s / r.step_s:6.0%}  {first / r.step_s:7.2f} x  "
        f"{r.wait_share:6.0%}  {r.sync_share:6.1%}  {r.stale_mean:11.2f}  {r.stale_max:3d}  {r.cpu_share:5.0%}"
        for r in results
    ]
    return "\n".join(lines)


def draw(results: Sequence[Result], path: Path) -> None:
    """Seconds per step by staleness, against the ideal, and the staleness that is really seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ordered = [r for r in results if not r.setting.window]
    figure, (steps, stale) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    bounds = [str(r.setting.staleness) for r in ordered]
    parts = (
        ("training, and the rest of the step", "#4878a8", [1 - r.wait_share - r.sync_share for r in ordered]),
        ("waiting for a batch", "#e0a458", [r.wait_share for r in ordered]),
        ("waiting for the new version", "#b55d60", [r.sync_share for r in ordered]),
    )
    bottom = np.zeros(len(ordered))
    for label, colour, shares in parts:
        seconds = np.array(shares) * [r.step_s for r in ordered]
        steps.bar(bounds, seconds, bottom=bottom, color=colour, label=label)
        bottom += seconds
    windowed = [r for r in results if r.setting.window]
    steps.plot(
        [bounds.index(str(r.setting.staleness)) for r in windowed], [r.step_s for r in windowed], "k_", markersize=28,
        label="the same with a window",
    )  # fmt: skip
    steps.axhline(ordered[-1].ideal_s, color="black", linestyle=":", label="ideal")
    steps.set(xlabel="loop.max_staleness", ylabel="seconds per step")
    steps.legend(frameon=False, fontsize=8)
    stale.plot(bounds, [r.setting.staleness for r in ordered], "k:", label="bound")
    stale.plot(bounds, [r.stale_max for r in ordered], "o", color="#b55d60", label="largest")
    stale.plot(bounds, [r.stale_mean for r in ordered], "s-", color="#4878a8", label="mean")
    stale.set(xlabel="loop.max_staleness", ylabel="staleness of trained tokens, steps")
    stale.legend(frameon=False, fontsize=8)
    for axes in (steps, stale):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as directory:
        write_tiny_model(Path(directory) / "model", seed=0)
        for setting in SETTINGS:
            results.append(asyncio.run(measure(Path(directory), setting)))
            sys.stderr.write(table(results).splitlines()[-1] + "\n")
    sys.stdout.write(table(results) + "\n")
    if options.figure:
        draw(results, options.figure)


if __name__ == "__main__":
    main()
