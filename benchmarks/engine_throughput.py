"""What the fleet costs: one real CPU server through `Fleet.sample`, and under a bare load generator.

    python benchmarks/engine_throughput.py [--rounds 10] [--groups 12] [--concurrency 6] [--group-size 8] [--tokens 48]

The bare generator is the best that the same server can give: a plain aiohttp loop that posts the same requests (log-probs
and experts asked for) at the same concurrency and throws the answers away unread.  The two alternate on one server, in
changing order, so that other work on the machine meets both; a little under 2 minutes with the start of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import numpy as np
import orjson

from megatron_vespo.config import RolloutConfig
from megatron_vespo.data.demo import write_tiny_model
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.model import read_facts
from megatron_vespo.rollout.server import Server
from megatron_vespo.types import Prompt, Sampling

CFG = RolloutConfig(
    device="cpu", dtype="float32", context_length=512, max_running_requests=128, start_timeout_s=300
)
Load = Callable[[int], Awaitable[int]]
"""Samples the responses of the i-th prompt; tokens."""


async def measure(load: Load, groups: int, concurrency: int) -> tuple[int, float]:
    """Tokens and seconds of `groups` requests, `concurrency` of them at a time."""
    places, began = asyncio.Semaphore(concurrency), time.perf_counter()

    async def one(i: int) -> int:
        async with places:
            return await load(i)

    counts = await asyncio.gather(*(one(i) for i in range(groups)))
    return sum(counts), time.perf_counter() - began


def prompts(num: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(uid=f"{i}", token_ids=rng.integers(0, 256, 40).astype(np.int32), text="", answer="")
        for i in range(num)
    ]


def bare(
    session: aiohttp.ClientSession,
    url: str,
    given: list[Prompt],
    args: argparse.Namespace,
    stop: tuple[int, ...],
) -> tuple[Load, list[bytes]]:
    """A load, and the bodies that it got; they are counted when the clock has stopped."""
    bodies: list[bytes] = []

    async def load(i: int) -> int:
        fields = {
            "input_ids": [given[i].token_ids.tolist()] * args.group_size,
            "sampling_params": {
                "temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": args.tokens, "stop_token_ids": stop,
            },
            "return_logprob": True,
            "return_routed_experts": True,
        }  # fmt: skip
        async with session.post(f"{url}/generate", data=orjson.dumps(fields)) as answer:
            bodies.append(await answer.read())
        return 0

    return load, bodies


def num_tokens(bodies: list[bytes]) -> int:
    return sum(len(answer["output_ids"]) for body in bodies for answer in orjson.loads(body))


async def compare(args: argparse.Namespace, model: Path, directory: Path) -> dict[str, list[float]]:
    """Tokens per second of each, by round."""
    server, given = Server(CFG, model, directory / "server.log"), prompts(args.groups)
    speeds: dict[str, list[float]] = {"bare": [], "fleet": []}
    sampling, stop = Sampling(temperature=1.0, max_tokens=args.tokens), read_facts(model).stop_token_ids
    async with (
        Fleet(CFG, model, [server], print) as fleet,
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), headers={"Content-Type": "application/json"}
        ) as session,
    ):
        ((engine),) = await fleet.to_update(0)
        fleet.confirm(engine.name, 0)

        async def through_fleet(i: int) -> int:
            return sum(len(r.token_ids) for r in await fleet.sample(given[i], args.group_size, sampling))

        for number in range(-1, args.rounds):  # round -1 warms both up
            for which in ("bare", "fleet") if number % 2 else ("fleet", "bare"):
                if which == "bare":
                    load, bodies = bare(session, server.url, given, args, stop)
                    _, seconds = await measure(load, args.groups, args.concurrency)
                    tokens = num_tokens(bodies)
                else:
                    tokens, seconds = await measure(through_fleet, args.groups, args.concurrency)
                if number >= 0:
                    speeds[which].append(tokens / seconds)
                    sys.stdout.write(f"round {number}, {which:5}: {tokens / seconds:7.0f} tokens/s\n")
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--concurrency", type=int, default=6)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        write_tiny_model(model, seed=0)
        speeds = asyncio.run(compare(args, model, Path(directory)))
    ratios = np.array(speeds["fleet"]) / np.array(speeds["bare"])
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    sys.stdout.write(
        f"bare {np.mean(speeds['bare']):.0f} tokens/s, fleet {np.mean(speeds['fleet']):.0f} tokens/s; ratio of a round: median "
        f"{middle:.3f}, quartiles {low:.3f} to {high:.3f}\n"
    )


if __name__ == "__main__":
    main()
