"""python -m megatron_vespo.rollout.simulated_engine --port PORT --model DIR [--engines N] [option of Behaviour]..."""

from __future__ import annotations

import argparse
import asyncio
import gc
import resource
from pathlib import Path

from aiohttp import web

from megatron_vespo.rollout.simulated_engine.behaviour import Behaviour
from megatron_vespo.rollout.simulated_engine.content import Content
from megatron_vespo.rollout.simulated_engine.engine import SimulatedEngine


async def serve(model: Path, host: str, port: int, num_engines: int, behaviour: Behaviour) -> None:
    """Serve `num_engines` engines on as many ports from `port` on, for ever."""
    await asyncio.sleep(behaviour.start_delay_s)
    content = Content(model, behaviour)
    for number in range(num_engines):
        engine = SimulatedEngine(model, behaviour, content, alone=num_engines == 1)
        runner = web.ServerRunner(engine.server)
        await runner.setup()
        await web.TCPSite(runner, host, port + number, backlog=4096).start()
    gc.freeze()
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engines", type=int, default=1)
    Behaviour.add_options(parser)
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # one connection for each request in flight
    behaviour = Behaviour.of(options)
    asyncio.run(serve(options.model.resolve(), options.host, options.port, options.engines, behaviour))


if __name__ == "__main__":
    main()
