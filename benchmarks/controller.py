"""What the controller can carry: real fleet, sampler, buffer, loop and files, with simulated engines on another core.

    python benchmarks/controller.py [--default-collector]

64 simulated engines share one process on core 1; the controller has core 0 for itself, if nobody else wants it: CPU seconds
are what it costs, and a rate that a busy machine cannot spoil follows from them (1 / CPU seconds per response).  Takes
about 3 minutes.

    in flight   20,000 requests under way that nobody answers: resident memory of each, and what waiting costs
    sampling    `Fleet.sample` alone, groups of 8 from engines that answer at once, as fast as it goes
    loop        whole steps: 1,250 prompts x 8 responses at staleness 1, so that up to 20,000 responses are under way, each
                4 s long, as fast as it goes; the simulated trainer's own computation is taken out
    profile     the same under cProfile, which makes everything slower: shares only
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import pstats
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
from asynchrony import LabellingTrainer

from megatron_vespo.config import TrainConfig, parse_config
from megatron_vespo.control import session
from megatron_vespo.control.buffer import GroupBuffer
from megatron_vespo.control.observer import Observer
from megatron_vespo.control.simulation import simulate, simulated_prompts
from megatron_vespo.data.demo import write_tiny_model
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.simulated_engine import Behaviour, SimulatedServers
from megatron_vespo.types import Sampling, StepOutput, TrainSequence

NUM_ENGINES, GROUP = 64, 8
PROMPTS = 1250
IN_FLIGHT = 20_000
RUNNING = 512
"""Of each engine; the fleet samples in three quarters of them."""
AT_ONCE = Behaviour(
    decode_tokens_s=1e6, max_decode_tokens_s=1e9, prefill_tokens_s=1e9, max_running_requests=RUNNING,
    context_length=4096, text=False, metrics=False,
)  # fmt: skip
ROOMS = {
    "JSON and base64 (orjson, pybase64)": ("orjson", "pybase64"),
    "numpy": ("numpy",),
    "HTTP (aiohttp, yarl, multidict, sockets)": ("aiohttp", "yarl", "multidict", "frozenlist", "socket"),
    "asyncio": ("asyncio", "selectors", "select.epoll", "_asyncio"),
    "rollout/ (fleet, routing, inquiry, answers)": ("megatron_vespo/rollout",),
    "control/, data/, algo/, metrics (loop, buffer, sampler, observer)": ("megatron_vespo/",),
    "rollout files (pyarrow)": ("pyarrow",),
}
"""Who spends the time; the first that fits the file or the name of a function has it."""


def config(directory: Path, num_steps: int) -> TrainConfig:
    return parse_config(TrainConfig, {
        "run_dir": str(directory / f"run-{num_steps}"),
        "model": str(directory / "model"),
        "prompts": {"train": "none.parquet", "max_prompt_tokens": 128},
        "sampling": {"max_response_tokens": 2048},
        "trainer": {"device": "cpu", "dtype": "float32", "optimizer": {"learning_rate": 1e-3}},
        "rollout": {
            "device": "cpu", "dtype": "float32", "context_length": 4096, "max_running_requests": RUNNING,
            "partial_rollouts": "in_place", "record_experts": False, "canary_tolerance": 1e-3,
        },
        "loop": {
            "num_steps": num_steps, "prompts_per_step": PROMPTS, "group_size": GROUP, "max_staleness": 1,
            "rescored_sequences": 1, "step_timeout_s": 300,
        },
    })  # fmt: skip


@asynccontextmanager
async def engines(directory: Path, behaviour: Behaviour) -> AsyncIterator[SimulatedServers]:
    """On core 1, and this process afterwards on core 0."""
    os.sched_setaffinity(0, {1})
    async with SimulatedServers(
        NUM_ENGINES, directory / "model", directory / "engines.log", behaviour
    ) as servers:
        os.sched_setaffinity(0, {0})
        yield servers


@asynccontextmanager
async def fleet_of(directory: Path, behaviour: Behaviour, *, experts: bool = False) -> AsyncIterator[Fleet]:
    """All its engines serve version 0."""
    cfg = config(directory, 1).rollout.model_copy(update={"record_experts": experts})
    async with (
        engines(directory, behaviour) as servers,
        Fleet(cfg, directory / "model", servers.engines, lambda _: None) as fleet,
    ):
        await fleet.all_started()
        for member in await fleet.to_update(0):
            fleet.confirm(member.name, 0)
        yield fleet


async def sampling(directory: Path, num_tokens: int, *, experts: bool, seconds: float = 5.0) -> str:
    behaviour = replace(AT_ONCE, lengths=f"fixed:{num_tokens}")
    prompts, places, num = simulated_prompts(4096, 100), 256, 0
    async with fleet_of(directory, behaviour, experts=experts) as fleet:
        end = time.perf_counter() + seconds

        async def worker(first: int) -> None:
            nonlocal num
            for i in range(first, 10**9, places):
                if time.perf_counter() > end:
                    return
                await fleet.sample(
                    prompts[i % len(prompts)], GROUP, Sampling(temperature=1.0, max_tokens=2048)
                )
                num += GROUP

        began, used = time.perf_counter(), time.process_time()
        await asyncio.gather(*(worker(i) for i in range(places)))
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - used
    what = f"{num_tokens:5d} tokens{' with experts' if experts else ''}"
    return f"sampling   {what:25}{_rate(num, wall_s, cpu_s)}"


async def in_flight(directory: Path) -> str:
    """Engines so slow that none answers: what is under way only waits."""
    slow = replace(AT_ONCE, decode_tokens_s=0.001)
    prompts, process = simulated_prompts(IN_FLIGHT // GROUP, 100), psutil.Process()
    async with fleet_of(directory, slow) as fleet:
        tasks, numbers, sizes = [], [0], [process.memory_info().rss]
        for part in np.array_split(np.arange(len(prompts)), 4):
            tasks += [
                asyncio.create_task(
                    fleet.sample(prompts[i], GROUP, Sampling(temperature=1.0, max_tokens=2048))
                )
                for i in part
            ]
            while fleet.metrics()["fleet/running"] < GROUP * len(tasks):
                await asyncio.sleep(0.05)
            await asyncio.sleep(1.0)
            numbers.append(GROUP * len(tasks))
            sizes.append(process.memory_info().rss)
        used = time.process_time()
        await asyncio.sleep(5.0)
        idle_share = (time.process_time() - used) / 5.0
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    slope, _ = np.polyfit(numbers, sizes, 1)
    return (
        f"in flight  {numbers[-1]:,} requests: {slope / 1024:.1f} KiB of memory each, {sizes[-1] / 2**20:.0f} MiB in all; "
        f"{idle_share:.0%} of the core while they wait"
    )


class TimedTrainer(LabellingTrainer):
    """Trains in no time, and knows what its computation costs, which is not the controller's."""

    cpu_s = 0.0

    async def step(
        self,
        sequences: Sequence[TrainSequence],
        noise_variance: float = 0.0,
        routed: Sequence[int] | None = None,
    ) -> StepOutput:
        used = time.process_time()
        output = await super().step(sequences)
        self.cpu_s += time.process_time() - used
        return output


async def loop(directory: Path, num_steps: int, profile: cProfile.Profile | None = None) -> str:
    """From the end of the first step, which fills the queue, to that of the last one."""
    cfg = config(directory, num_steps)
    behaviour = replace(AT_ONCE, lengths="uniform:150:362", decode_tokens_s=64.0)  # 4 s for each response
    seen = list[tuple[float, float]]()

    async def look(fleet: Fleet, observer: Observer, _: GroupBuffer) -> None:
        for version in (1, num_steps):
            while observer.progress.version < version:
                under_way.append(fleet.metrics()["fleet/running"])
                await asyncio.sleep(0.02)
            seen.append((time.perf_counter(), time.process_time() - trainer.cpu_s))
            if profile:
                (profile.enable if version == 1 else profile.disable)()

    async with engines(directory, behaviour) as servers:
        trainer, under_way = TimedTrainer(cfg.model, cfg.rollout, lambda sequences: 0.0), list[float]()
        prompts = simulated_prompts(PROMPTS * (num_steps + 3), 100)
        await simulate(cfg, servers.engines, trainer, prompts, meanwhile=look)
    (began, used), (ended, used_then) = seen
    num = (num_steps - 1) * PROMPTS * GROUP
    what = f"256 tokens, {np.mean(under_way):,.0f} under way"
    return f"loop       {what:25}{_rate(num, ended - began, used_then - used)}; at most {max(under_way):,.0f} under way"


def _rate(num: int, wall_s: float, cpu_s: float) -> str:
    return (
        f"{num / wall_s:6.0f} responses/s; {1e6 * cpu_s / num:5.0f} us of CPU each, so {num / cpu_s:6.0f} responses/s on a "
        f"core; {cpu_s / wall_s:4.0%} of the core"
    )


def split(profile: cProfile.Profile) -> str:
    """Shares of the time that functions spend themselves."""
    stats, spent = pstats.Stats(profile), Counter[str]()
    for (file, _, name), (_, _, own_s, _, _) in stats.stats.items():  # pyright: ignore[reportAttributeAccessIssue]
        if "select.epoll" in name and "poll" in name:
            continue  # it waits
        where = f"{file} {name}"
        room = next((room for room, marks in ROOMS.items() if any(mark in where for mark in marks)), "other")
        spent[room] += own_s
    total = sum(spent.values())
    return "\n".join(f"profile    {own_s / total:5.0%}  {room}" for room, own_s in spent.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--default-collector", action="store_true", help="leave Python's garbage collector as it is"
    )
    if not parser.parse_args().default_collector:
        session.collect_rarely()  # as every run does
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_tiny_model(directory / "model", seed=0)
        _say(asyncio.run(in_flight(directory)))  # first: memory that was freed would hide what is needed
        for num_tokens, experts in ((16, False), (256, False), (256, True), (2048, False)):
            _say(asyncio.run(sampling(directory, num_tokens, experts=experts)))
        _say(asyncio.run(loop(directory, 5)))
        profile = cProfile.Profile()
        asyncio.run(loop(directory, 3, profile))
        _say(split(profile))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
